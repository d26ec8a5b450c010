"""Fréchet distance between Gaussians fitted to features, gathered batch by batch."""

import dataclasses

import numpy as np


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

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance [D, D].

        Raises:
          ValueError: if fewer than two vectors were seen.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, got {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(a: GaussianStats, b: GaussianStats) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians.

    ‖μ_a - μ_b‖² + Tr(Σ_a + Σ_b) - 2 Tr((Σ_a^½ Σ_b Σ_a^½)^½).

    The product under the root is symmetric, so its eigenvalues are real and no root of an
    unsymmetric matrix is taken. Depends on the features and is biased upwards by about 1/N:
    compare only values of the same features and the same N.

    Raises:
      ValueError: if the dimensions differ or either saw fewer than two vectors.

    Source: Dowson & Landau 1982, eq. 4; as a score of samples, Heusel et al. 2017
      (arXiv:1706.08500), eq. 6.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and {len(b.mean)} dimensions do not compare")
    cov_a, cov_b = a.covariance, b.covariance
    values, vectors = np.linalg.eigh(cov_a)
    # Covariances have no negative eigenvalues; what is below zero is rounding.
    root_a = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    product = root_a @ cov_b @ root_a
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2.0)
    overlap = np.sqrt(np.maximum(eigenvalues, 0.0)).sum()
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2.0 * overlap
    return float(max(distance, 0.0))
