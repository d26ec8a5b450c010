"""Kernel distance of two sets of features: unbiased, so fit for few samples (KID)."""

from typing import NamedTuple

import numpy as np

_ROWS = 2048


class KernelDistance(NamedTuple):
    """Kernel distance over random subsets.

    Attributes:
      mean: estimate of the squared MMD; unbiased, so negative by chance where it is near 0.
      std: standard deviation over the subsets, which says how far one subset lies off; the
        subsets overlap, so it is no standard error of the mean.
    """

    mean: float
    std: float


def _checked(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = (np.asarray(features, np.float64) for features in (a, b))
    for name, features in (("first", a), ("second", b)):
        if features.ndim < 2 or len(features) < 2 or not np.isfinite(features).all():
            raise ValueError(
                f"the {name} features must be a finite [N, ...] with N >= 2, got {features.shape}"
            )
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features of {a.shape[1]} and {b.shape[1]} dimensions do not compare")
    return a, b


def _kernel_sum(a: np.ndarray, b: np.ndarray) -> float:
    """Σ k(x, y) over all pairs, a few rows at a time to bound the memory."""
    blocks = (a[start : start + _ROWS] @ b.T for start in range(0, len(a), _ROWS))
    return float(sum(((block / a.shape[1] + 1.0) ** 3).sum() for block in blocks))


def _off_diagonal_mean(a: np.ndarray) -> float:
    diagonal = (((a * a).sum(axis=1) / a.shape[1] + 1.0) ** 3).sum()
    return (_kernel_sum(a, a) - diagonal) / (len(a) * (len(a) - 1))


def squared_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy, from all pairs.

    mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j),
    k(x, y) = (xᵀy / D + 1)³. Zero in expectation for equal distributions, hence possibly
    negative.

    Args:
      a: [N, ...] features, flattened, N at least 2.
      b: [M, ...] features.

    Raises:
      ValueError: if the dimensions differ, a set is too small or a value is not finite.

    Source: Gretton et al. 2012 (JMLR 13), eq. 3; kernel of Bińkowski et al. 2018
      (arXiv:1801.01401), section 4.
    """
    a, b = _checked(a, b)
    cross = _kernel_sum(a, b) / (len(a) * len(b))
    return _off_diagonal_mean(a) + _off_diagonal_mean(b) - 2.0 * cross


def kernel_distance(
    a: np.ndarray,
    b: np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int | np.random.Generator = 0,
) -> KernelDistance:
    """Mean and standard deviation of `squared_mmd` over random subsets.

    Over Inception's pool3 this is the kernel Inception distance (KID). A value depends on
    `subset_size` in its spread only, not in its expectation.

    Args:
      a: [N, ...] features.
      b: [M, ...] features.
      subsets: number of pairs of subsets, at least 1.
      subset_size: vectors of each subset, drawn without replacement; at least 2 and at most
        N and M.
      seed: of the draws, or a generator.

    Raises:
      ValueError: if the dimensions differ, a value is not finite, or there are too few vectors.

    Source: Bińkowski et al. 2018 (arXiv:1801.01401), section 4.
    """
    a, b = _checked(a, b)
    if subsets < 1:
        raise ValueError(f"subsets must be at least 1, got {subsets}")
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise ValueError(
            f"subset_size must be in 2 … {min(len(a), len(b))} for {len(a)} and {len(b)} vectors, "
            f"got {subset_size}"
        )
    rng = np.random.default_rng(seed)

    def draw(features):
        return features[rng.choice(len(features), subset_size, replace=False)]

    values = [squared_mmd(draw(a), draw(b)) for _ in range(subsets)]
    return KernelDistance(float(np.mean(values)), float(np.std(values)))
