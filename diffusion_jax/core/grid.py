"""Grid: the noise levels that a sampler visits, as padded arrays, from times or from jumps."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.schedules import NoiseSchedule
from diffusion_jax.core.types import Array, NoiseLevel


class Grid(NamedTuple):
    """Noise levels from noisy to clean, padded with the last one to a fixed length.

    Step i goes from levels[i] to levels[i + 1]; steps start … stop - 1 are run. All leaves
    are arrays of a shape that does not depend on the number of steps, so that grids of
    different length share one compilation.

    Attributes:
      levels: every field [MAX + 1].
      start: [] int32, the first step; larger than 0 for image-to-image.
      stop: [] int32, the number of steps.

    Source: none; a convention of this library.
    """

    levels: NoiseLevel
    start: Array | int
    stop: Array | int

    def level(self, index: Array | int) -> NoiseLevel:
        """The level before step `index`, every field []."""
        return NoiseLevel(*(jnp.asarray(field)[index] for field in self.levels))

    def starting_at(self, step: int) -> "Grid":
        """The same grid without its first `step` steps (image-to-image).

        Raises:
          ValueError: if no step is left.
        """
        if not 0 <= step < int(self.stop):
            raise ValueError(f"step must lie in [0, {int(self.stop)}), got {step}")
        return self._replace(start=jnp.asarray(step, jnp.int32))

    def fixed(self) -> "Grid":
        """The grid with Python bounds: reverse-mode gradients pass, and each length compiles."""
        return self._replace(start=int(self.start), stop=int(self.stop))


def check_num_steps(num_steps: int, max_steps: int) -> None:
    """Raises ValueError unless num_steps is an integer in [1, max_steps].

    Source: none; a convention of this library.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer):
        raise ValueError(f"num_steps must be an integer, got {num_steps!r}")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if num_steps > max_steps:
        raise ValueError(
            f"num_steps = {num_steps} exceeds max_steps = {max_steps}, the length that grids are "
            "padded to; pass a larger max_steps (a sampler compiles once per max_steps)"
        )


def from_times(
    schedule: NoiseSchedule, times: Array, *, final: str = "clean", max_steps: int = 1000
) -> Grid:
    """The grid that evaluates the network at the given times, from noisy to clean.

    Args:
      times: [N] strictly decreasing, in [schedule.t_min, schedule.t_max].
      final: where the last step ends: "clean" (alpha 1, sigma 0) or "t_min" (the schedule's
        least noisy level, as Stable Diffusion's DDIM does).
      max_steps: length that the grid is padded to.

    Raises:
      ValueError: if the times are not a decreasing sequence inside the range, if there are
        more than `max_steps`, or if `final` is unknown.

    Source: none; a convention of this library.
    """
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or np.any(np.diff(times) >= 0.0):
        raise ValueError(f"times must be a strictly decreasing sequence, got {times}")
    check_num_steps(len(times), max_steps)
    slack = 1e-9 * max(1.0, abs(schedule.t_max))
    if times[0] > schedule.t_max + slack or times[-1] < schedule.t_min - slack:
        raise ValueError(
            f"times must lie in [{schedule.t_min}, {schedule.t_max}], got {times[0]} to {times[-1]}"
        )
    return _from_levels(schedule(times), _final_level(schedule, final), max_steps)


def _final_level(schedule: NoiseSchedule, final: str) -> NoiseLevel:
    least = schedule(np.asarray(schedule.t_min))
    if final == "clean":
        return least._replace(alpha=np.asarray(1.0), sigma=np.asarray(0.0))
    if final == "t_min":
        return least
    raise ValueError(f"final must be 'clean' or 't_min', got {final!r}")


def _from_levels(levels: NoiseLevel, final: NoiseLevel, max_steps: int) -> Grid:
    num_steps = len(levels.t)

    def pad(values, last):
        return jnp.asarray(
            np.concatenate([values, np.full(max_steps + 1 - num_steps, last, np.float64)])
        )

    return Grid(
        NoiseLevel(*(pad(values, last) for values, last in zip(levels, final, strict=True))),
        jnp.asarray(0, jnp.int32),
        jnp.asarray(num_steps, jnp.int32),
    )


def jumps(
    grid: Grid, *, jump_length: int, num_resamples: int, max_steps: int | None = None
) -> Grid:
    """Lets a grid go back up and down again, RePaint's resampling, as data.

    After every `jump_length` steps the path returns `jump_length` levels upwards, until each
    stretch was descended `num_resamples` times. Upward steps go to a noisier level.

    Args:
      grid: N steps.
      jump_length: j, in levels.
      num_resamples: n; 1 gives the grid back.
      max_steps: length that the result is padded to; as many as it has where None.

    Raises:
      ValueError: if j or n is below 1, if the grid does not start at 0, or if the result is
        longer than max_steps.

    Source: Lugmayr et al. 2022 (arXiv:2201.09865), section 4.2 and appendix.
    """
    if jump_length < 1 or num_resamples < 1:
        raise ValueError(
            f"jump_length and num_resamples must be at least 1, got {jump_length}, {num_resamples}"
        )
    if int(grid.start) != 0:
        raise ValueError(f"jumps needs a grid that starts at step 0, got {int(grid.start)}")
    num_steps = int(grid.stop)
    left = dict.fromkeys(range(0, num_steps - jump_length, jump_length), num_resamples - 1)
    t, path = num_steps, []
    while t >= 1:
        t -= 1
        path.append(t)
        if left.get(t, 0) > 0:
            left[t] -= 1
            path.extend(range(t + 1, t + jump_length + 1))
            t += jump_length
    index = num_steps - 1 - np.asarray(path)
    levels = NoiseLevel(*(np.asarray(field, np.float64)[index] for field in grid.levels))
    final = NoiseLevel(*(np.asarray(field, np.float64)[num_steps] for field in grid.levels))
    max_steps = len(path) if max_steps is None else max_steps
    check_num_steps(len(path), max_steps)
    return _from_levels(levels, final, max_steps)
