"""Nearest-neighbour metrics: precision and recall, density and coverage, memorising."""

from typing import NamedTuple

import numpy as np

_ROWS = 1024
# From here on distances come from a matrix product, which is tens of times faster.
_PRODUCT_DIMS = 256


class PrecisionRecall(NamedTuple):
    """How much of one set lies on the manifold of the other.

    Attributes:
      precision: share of samples on the manifold of the real data, in [0, 1].
      recall: share of real data on the manifold of the samples, in [0, 1].
    """

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Precision and recall that outliers of the real data do not inflate.

    Attributes:
      density: how many real neighbourhoods a sample lies in, over k; 1 on average for equal
        distributions, not bounded by 1.
      coverage: share of real data with a sample in their neighbourhood, in [0, 1].
    """

    density: float
    coverage: float


def _features(features: np.ndarray, name: str) -> np.ndarray:
    features = np.asarray(features, np.float64)
    if features.ndim < 2 or not features.size or not np.isfinite(features).all():
        raise ValueError(f"{name} must be a non-empty, finite [N, ...], got {features.shape}")
    return features.reshape(len(features), -1)


def _check_dims(**features: np.ndarray) -> None:
    dims = {name: value.shape[1] for name, value in features.items()}
    if len(set(dims.values())) != 1:
        raise ValueError(f"features must have the same number of dimensions, got {dims}")


def _distance_rows(a: np.ndarray, b: np.ndarray):
    """Distances of a few rows of `a` at a time to all of `b`, to bound the memory."""
    from scipy.spatial.distance import cdist

    if a.shape[1] < _PRODUCT_DIMS:
        for start in range(0, len(a), _ROWS):
            yield slice(start, start + _ROWS), cdist(a[start : start + _ROWS], b)
        return
    # ‖a‖² + ‖b‖² - 2 aᵀb cancels less between vectors that lie around zero.
    centre = b.mean(axis=0)
    a, b = a - centre, b - centre
    norms_a, norms_b = (a * a).sum(axis=1), (b * b).sum(axis=1)
    for start in range(0, len(a), _ROWS):
        rows = slice(start, start + _ROWS)
        squares = norms_a[rows, None] + norms_b[None] - 2.0 * (a[rows] @ b.T)
        yield rows, np.sqrt(np.maximum(squares, 0.0))


def _radii(features: np.ndarray, k: int) -> np.ndarray:
    """Distance of each vector to its k-th nearest neighbour, itself not counted."""
    radii = np.empty(len(features))
    for rows, distances in _distance_rows(features, features):
        # Position 0 of the sorted row is the vector itself, at distance zero.
        radii[rows] = np.partition(distances, k, axis=1)[:, k]
    return radii


def _covered(queries: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> float:
    inside = np.empty(len(queries), bool)
    for rows, distances in _distance_rows(queries, centres):
        inside[rows] = (distances <= radii).any(axis=1)
    return float(inside.mean())


def precision_recall(real: np.ndarray, fake: np.ndarray, *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall.

    A set's manifold is the union of balls around its vectors, each reaching to the k-th
    nearest neighbour in the set. Precision is the share of `fake` on the manifold of `real`,
    recall the share of `real` on that of `fake`. Both depend on the numbers of vectors, so
    compare runs of equal numbers only.

    Args:
      real: [N, ...] features of real data, flattened.
      fake: [M, ...] features of samples.
      k: neighbours, at least 1 and below N and M.

    Raises:
      ValueError: if the dimensions differ, a value is not finite, or k is out of range.

    Source: Kynkäänniemi et al. 2019 (arXiv:1904.06991), eq. 1-3.
    """
    real, fake = _features(real, "real"), _features(fake, "fake")
    _check_dims(real=real, fake=fake)
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"k must be in 1 … {min(len(real), len(fake)) - 1}, got {k}")
    return PrecisionRecall(
        precision=_covered(fake, real, _radii(real, k)),
        recall=_covered(real, fake, _radii(fake, k)),
    )


def density_coverage(real: np.ndarray, fake: np.ndarray, *, k: int = 5) -> DensityCoverage:
    """Density and coverage of samples.

    With B_i the ball around real vector i that reaches to its k-th nearest real neighbour:
    density = 1 / (k M) Σ_j Σ_i 1[y_j ∈ B_i], coverage = 1 / N Σ_i 1[∃ j: y_j ∈ B_i].

    Args:
      real: [N, ...] features of real data, flattened.
      fake: [M, ...] features of samples.
      k: neighbours, at least 1 and below N.

    Raises:
      ValueError: if the dimensions differ, a value is not finite, or k is out of range.

    Source: Naeem et al. 2020 (arXiv:2002.09797), section 3.
    """
    real, fake = _features(real, "real"), _features(fake, "fake")
    _check_dims(real=real, fake=fake)
    if not 1 <= k < len(real):
        raise ValueError(f"k must be in 1 … {len(real) - 1}, got {k}")
    radii, hits = _radii(real, k), 0
    covered = np.zeros(len(real), bool)
    for _, distances in _distance_rows(fake, real):
        inside = distances <= radii
        hits += int(inside.sum())
        covered |= inside.any(axis=0)
    return DensityCoverage(hits / (k * len(fake)), float(covered.mean()))


def nearest_distances(queries: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Euclidean distance of each query [N, ...] to the nearest reference [M, ...], [N]."""
    queries, references = _features(queries, "queries"), _features(references, "references")
    _check_dims(queries=queries, references=references)
    nearest = np.empty(len(queries), int)
    for rows, distances in _distance_rows(queries, references):
        nearest[rows] = distances.argmin(axis=1)
    # By subtraction, so that a copy is at distance zero exactly.
    return np.linalg.norm(queries - references[nearest], axis=1)


def nearest_ratio(samples: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> float:
    """How close samples are to training data, in units of how close new real data are.

    median nearest-train distance of samples / median nearest-train distance of held-out data.
    About 1 for samples as new as real data, 0 for copies of the training data.

    Args:
      samples, train, held_out: [N, ...] each with its own N, flattened.

    Raises:
      ValueError: if more than half of the held-out data are in the training data.
    """
    unit = float(np.median(nearest_distances(held_out, train)))
    if unit == 0.0:
        raise ValueError("at least half of the held-out data are in the training data")
    return float(np.median(nearest_distances(samples, train))) / unit
