"""Sliced Wasserstein distance of two sets of points: optimal transport along many lines."""

import numpy as np


def directions(count: int, dim: int, seed: int | np.random.Generator = 0) -> np.ndarray:
    """Unit vectors [count, dim] float64, uniform on the sphere.

    Raises:
      ValueError: if count or dim is below 1.
    """
    if count < 1 or dim < 1:
        raise ValueError(f"count and dim must be at least 1, got {count} and {dim}")
    vectors = np.random.default_rng(seed).standard_normal((count, dim))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class SlicedWasserstein:
    """Sliced Wasserstein-2 distances to one set of true points, which is sorted once.

    SW2² = mean over directions θ of W2²(θᵀa, θᵀb), and in one dimension W2² is the mean square
    difference of the sorted values. Two sets of one distribution are not 0 apart but about as far
    as chance takes them: compare with the distance of two independent true sets.

    Args:
      true: [N, ...] points, flattened to [N, D].
      num_directions: lines that the points are projected on.
      seed: of the directions, or a generator.

    Raises:
      ValueError: if there are no points, or one is not finite.

    Source: Rabin et al. 2011 (SSVM), definition 2; Bonneel et al. 2015 (JMIV 51), section 3.
    """

    def __init__(
        self, true: np.ndarray, *, num_directions: int = 64, seed: int | np.random.Generator = 0
    ):
        true = np.asarray(true, np.float64)
        if true.ndim < 2 or not true.size or not np.isfinite(true).all():
            raise ValueError(f"expected finite points [N, ...] with N >= 1, got {true.shape}")
        self._shape = true.shape
        self._directions = directions(num_directions, true[0].size, seed)
        self._sorted = self._project(true)

    def _project(self, points: np.ndarray) -> np.ndarray:
        lines = self._directions @ points.reshape(len(points), -1).T
        lines.sort(axis=1)
        return lines

    def __call__(self, points: np.ndarray) -> float:
        """SW2 of points [N, ...] in their unit, not squared; inf if a point is not finite.

        Raises:
          ValueError: unless there are as many points as true ones, of the same shape.
        """
        points = np.asarray(points, np.float64)
        if points.shape != self._shape:
            raise ValueError(
                f"expected as many points as there are true ones, {self._shape}, got {points.shape}"
            )
        if not np.isfinite(points).all():
            return float("inf")
        return float(np.sqrt(np.mean((self._project(points) - self._sorted) ** 2)))


def sliced_wasserstein(
    a: np.ndarray, b: np.ndarray, *, num_directions: int = 64, seed: int | np.random.Generator = 0
) -> float:
    """Sliced Wasserstein-2 distance of two sets of equally many points, see `SlicedWasserstein`.

    Args:
      a: [N, ...] points.
      b: [N, ...] points, the true ones.

    Raises:
      ValueError: if the sets differ in shape or are empty, or a point of b is not finite.

    Source: Rabin et al. 2011 (SSVM), definition 2.
    """
    return SlicedWasserstein(b, num_directions=num_directions, seed=seed)(a)
