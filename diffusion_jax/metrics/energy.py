"""Energy distance of two sets of points: zero for one distribution, without any parameter."""

import numpy as np

# Distances that are held at once, few enough for a core's cache.
_BLOCK = 2**17


def _distance_sum(a: np.ndarray, b: np.ndarray) -> float:
    """Σ |x - y| over all pairs."""
    square_b, total, rows = (b * b).sum(1), 0.0, max(_BLOCK // len(b), 1)
    for start in range(0, len(a), rows):
        block = a[start : start + rows]
        square = (-2.0 * block) @ b.T
        square += (block * block).sum(1)[:, None]
        square += square_b
        # Rounding makes the square of a distance of 0 negative.
        np.maximum(square, 0.0, out=square)
        total += float(np.sqrt(square, out=square).sum())
    return total


def _within(a: np.ndarray) -> float:
    """Mean distance of two different points."""
    return _distance_sum(a, a) / (len(a) * (len(a) - 1))


class EnergyDistance:
    """Unbiased estimates of the energy distance to one set of true points.

    2 E|X - Y| - E|X - X'| - E|Y - Y'|, the last two over different points. It is zero in
    expectation for equal distributions and there only, hence by chance negative.

    Args:
      true: [M, ...] points, flattened to [M, D], M at least 2.

    Raises:
      ValueError: if there are fewer than two points, or one is not finite.

    Source: Székely & Rizzo 2013 (J. Stat. Plan. Inference 143), eq. 5, as U-statistics.
    """

    def __init__(self, true: np.ndarray):
        true = np.asarray(true, np.float64)
        if true.ndim < 2 or len(true) < 2 or not np.isfinite(true).all():
            raise ValueError(f"expected finite points [M, ...] with M >= 2, got {true.shape}")
        self._shape = true.shape[1:]
        # Distances do not change, and squares of large coordinates would cost digits.
        self._centre = true.reshape(len(true), -1).mean(0)
        self._true = true.reshape(len(true), -1) - self._centre
        self._within = _within(self._true)

    def __call__(self, points: np.ndarray) -> float:
        """Distance of points [N, ...] in their unit; inf if a point is not finite.

        Raises:
          ValueError: if the points have another shape than the true ones, or are fewer than two.
        """
        points = np.asarray(points, np.float64)
        if points.shape[1:] != self._shape or len(points) < 2:
            raise ValueError(
                f"expected at least two points of shape {self._shape}, got {points.shape}"
            )
        if not np.isfinite(points).all():
            return float("inf")
        points = points.reshape(len(points), -1) - self._centre
        across = _distance_sum(points, self._true) / (len(points) * len(self._true))
        return 2.0 * across - _within(points) - self._within


def energy_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased estimate of the energy distance of two sets of points, see `EnergyDistance`.

    Args:
      a: [N, ...] points, N at least 2.
      b: [M, ...] points, the true ones.

    Raises:
      ValueError: if the shapes differ, a set has fewer than two points, or b is not finite.

    Source: Székely & Rizzo 2013 (J. Stat. Plan. Inference 143), eq. 5.
    """
    return EnergyDistance(b)(a)
