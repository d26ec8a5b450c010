"""Fréchet distance between Gaussians fitted to features, gathered batch by batch."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np


class Gaussian(Protocol):
    """Anything with a mean [D] and a covariance [D, D], both float64."""

    @property
    def mean(self) -> np.ndarray: ...

    @property
    def covariance(self) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class GaussianStats:
    """Mean and covariance of a stream of feature vectors.

    Attributes:
      count: number of vectors seen.
      mean: [D] float64.
      scatter: [D, D] float64, Σ (x - mean)(x - mean)ᵀ.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def empty(cls, dim: int) -> "GaussianStats":
        """Statistics of nothing, to be updated; D = dim, at least 1."""
        if dim < 1:
            raise ValueError(f"features need at least one dimension, got {dim}")
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    @classmethod
    def of(cls, features: np.ndarray) -> "GaussianStats":
        """Statistics of features [N, ...], flattened to [N, D].

        Raises:
          ValueError: if there is no vector, or a value is NaN or infinite.
        """
        features = np.asarray(features, np.float64)
        if features.ndim < 2 or not features.size:
            raise ValueError(f"features must be a non-empty [N, ...], got {features.shape}")
        if not np.isfinite(features).all():
            raise ValueError(f"{(~np.isfinite(features)).sum()} feature values are NaN or infinite")
        features = features.reshape(len(features), -1)
        mean = features.mean(axis=0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def update(self, features: np.ndarray) -> "GaussianStats":
        """These statistics with the features [N, ...] of one more batch."""
        return self.merge(GaussianStats.of(features))

    def merge(self, other: "GaussianStats") -> "GaussianStats":
        """The statistics of both streams together; exact but for rounding.

        scatter = S_a + S_b + n_a n_b / (n_a + n_b) · d dᵀ,  d = mean_b - mean_a.

        Raises:
          ValueError: if the dimensions differ.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"cannot merge statistics of {len(self.mean)} and {len(other.mean)} dimensions"
            )
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        between = np.outer(delta, delta) * (self.count * other.count / count)
        return GaussianStats(count, mean, self.scatter + other.scatter + between)

    def to_dict(self) -> dict[str, np.ndarray]:
        """The statistics as arrays: count [] int64, mean [D], scatter [D, D]."""
        return {"count": np.asarray(self.count), "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_dict(cls, arrays: Mapping[str, np.ndarray]) -> "GaussianStats":
        """The statistics of `to_dict`, bit by bit.

        Raises:
          ValueError: if an array is missing, or they do not fit each other.
        """
        missing = sorted({"count", "mean", "scatter"} - set(arrays))
        if missing:
            raise ValueError(f"statistics need count, mean and scatter; {missing} are missing")
        mean, scatter = (np.asarray(arrays[key], np.float64) for key in ("mean", "scatter"))
        count = int(arrays["count"])
        if mean.ndim != 1 or scatter.shape != (len(mean), len(mean)) or count < 0:
            raise ValueError(
                f"statistics must have count >= 0, mean [D] and scatter [D, D], got {count}, "
                f"{mean.shape} and {scatter.shape}"
            )
        return cls(count, mean, scatter)

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance [D, D].

        Raises:
          ValueError: if fewer than two vectors were seen.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, got {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians.

    ‖μ_a - μ_b‖² + Tr(Σ_a + Σ_b) - 2 Tr((Σ_a^½ Σ_b Σ_a^½)^½).

    With Σ_a = R Rᵀ the last trace is that of (Rᵀ Σ_b R)^½, a symmetric matrix: its eigenvalues
    are real, no root of an unsymmetric matrix is taken, and singular covariances are fine.
    Depends on the features and is biased upwards by about 1/N: compare only values of the same
    features and the same N.

    Raises:
      ValueError: if the dimensions differ or either saw fewer than two vectors.

    Source: Dowson & Landau 1982, eq. 4; as a score of samples, Heusel et al. 2017
      (arXiv:1706.08500), eq. 6.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and {len(b.mean)} dimensions do not compare")
    cov_a, cov_b = a.covariance, b.covariance
    values, vectors = np.linalg.eigh(cov_a)
    # Fewer vectors than dimensions leave eigenvalues that are zero but for rounding; a thousand
    # of their roots would add up.
    real = values > values[-1] * len(values) * np.finfo(np.float64).eps
    root_a = vectors[:, real] * np.sqrt(values[real])
    product = root_a.T @ cov_b @ root_a
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2.0)
    overlap = np.sqrt(np.maximum(eigenvalues, 0.0)).sum()
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2.0 * overlap
    return float(max(distance, 0.0))
