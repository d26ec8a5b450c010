"""Grid: the noise levels that a sampler visits, as padded arrays, from times or from jumps."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.schedules import NoiseSchedule
from diffusion_jax.core.types import Array, NoiseLevel


def _at(levels: NoiseLevel, index: Array | int) -> NoiseLevel:
    return NoiseLevel(*(jnp.asarray(field)[index] for field in levels))


class Grid(NamedTuple):
    """Noise levels from noisy to clean, padded with the last one to a fixed length.

    Step i goes from levels[i] to levels[i + 1]; steps start … stop - 1 are run. All leaves
    are arrays of a shape that does not depend on the number of steps, so that grids of
    different length share one compilation.

    Attributes:
      levels: every field [MAX + 1].
      start: [] int32, the first step; larger than 0 for image-to-image.
      stop: [] int32, the number of steps.
      middle: a level inside of each step, every field [MAX], for samplers that evaluate the
        network there (see `with_middle`); None where there are none.
      ends: where each step ends, every field [MAX], for published samplers whose steps do not
        end where the next one starts; None where they do.

    Source: none; a convention of this library.
    """

    levels: NoiseLevel
    start: Array | int
    stop: Array | int
    middle: NoiseLevel | None = None
    ends: NoiseLevel | None = None

    def level(self, index: Array | int) -> NoiseLevel:
        """The level before step `index`, every field []."""
        return _at(self.levels, index)

    def next_level(self, index: Array | int) -> NoiseLevel:
        """The level that step `index` ends at, every field []."""
        return _at(self.levels, index + 1) if self.ends is None else _at(self.ends, index)

    def middle_level(self, index: Array | int) -> NoiseLevel | None:
        """The level inside of step `index`, every field []; None where the grid has none."""
        return None if self.middle is None else _at(self.middle, index)

    def astype(self, dtype: Any) -> "Grid":
        """The same grid with all of its levels in another type of float."""

        def cast(level):
            if level is None:
                return None
            return NoiseLevel(*(jnp.asarray(field, dtype) for field in level))

        return self._replace(
            levels=cast(self.levels), middle=cast(self.middle), ends=cast(self.ends)
        )

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


MIDDLES = ("log_snr", "time")
FINALS = ("clean", "t_min")


def schedule_time(schedule: NoiseSchedule, level: NoiseLevel) -> Array:
    """The t of a level that schedule(t) takes; level.t is what the network is told there.

    They differ where the network is told another number than t, and on grids of rounded times.
    Found by the rates; sigma = 0 counts as t_min and alpha = 0 as t_max.

    Args:
      level: of the schedule, fields of any shape.

    Source: none; a convention of this library.
    """
    told, alpha, sigma = (jnp.asarray(field) for field in level)
    finite = (alpha > 0) & (sigma > 0)
    ratio = jnp.where(finite, alpha, 1.0), jnp.where(finite, sigma, 1.0)
    t = schedule.inverse(2.0 * (jnp.log(ratio[0]) - jnp.log(ratio[1])))
    # Whole numbers stay whole: the inverse is off by rounding.
    rounding = 16.0 * jnp.finfo(alpha.dtype).eps * (schedule.t_max - schedule.t_min)
    t = jnp.where(jnp.abs(t - told) <= rounding, told, t)
    return jnp.where(sigma == 0, schedule.t_min, jnp.where(alpha == 0, schedule.t_max, t))


def with_middle(grid: Grid, schedule: NoiseSchedule, rule: str) -> Grid:
    """The grid with a level inside of each step, where some samplers evaluate the network.

    The rule says what lies halfway between start and end: "log_snr", so that the noise-to-signal
    ratio σ/α is the geometric mean of both, or "time", the schedule's. All fields of the level
    are the schedule's own. Where log-SNR is infinite at either end, the middle is the
    end, and samplers take a step without it.

    Args:
      grid: without jumps upwards.
      schedule: that the grid was made of.
      rule: one of MIDDLES.

    Raises:
      ValueError: if the rule is unknown.

    Source: "log_snr": Karras et al. 2022 (arXiv:2206.00364), appendix D.2 with DPM-Solver-2 of Lu
    et al. 2022 (arXiv:2206.00927), algorithm 1, r1 = 1/2; "time": Liu et al. 2022
    (arXiv:2202.09778), eq. 13.
    """
    if rule not in MIDDLES:
        raise ValueError(f"rule must be one of {MIDDLES}, got {rule!r}")
    here = NoiseLevel(*(jnp.asarray(field)[:-1] for field in grid.levels))
    there = NoiseLevel(*(jnp.asarray(f)[1:] for f in grid.levels))
    there = there if grid.ends is None else grid.ends
    if rule == "time":
        start, end = schedule_time(schedule, here), schedule_time(schedule, there)
        return grid._replace(middle=schedule(0.5 * (start + end)))
    finite = (here.alpha > 0) & (here.sigma > 0) & (there.alpha > 0) & (there.sigma > 0)

    def log_snr(level):
        alpha, sigma = (jnp.where(finite, rate, 1.0) for rate in (level.alpha, level.sigma))
        return 2.0 * (jnp.log(alpha) - jnp.log(sigma))

    level = schedule(schedule.inverse(0.5 * (log_snr(here) + log_snr(there))))
    fields = zip(level, there, strict=True)
    return grid._replace(middle=NoiseLevel(*(jnp.where(finite, m, end) for m, end in fields)))


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
    if times.ndim != 1 or not np.all(np.isfinite(times)) or np.any(np.diff(times) >= 0.0):
        raise ValueError(f"times must be a strictly decreasing finite sequence, got {times}")
    check_num_steps(len(times), max_steps)
    slack = 1e-9 * max(1.0, abs(schedule.t_max))
    if times[0] > schedule.t_max + slack or times[-1] < schedule.t_min - slack:
        raise ValueError(
            f"times must lie in [{schedule.t_min}, {schedule.t_max}], got {times[0]} to {times[-1]}"
        )
    return from_levels(schedule, schedule(times), final=final, max_steps=max_steps)


def from_levels(
    schedule: NoiseSchedule, levels: NoiseLevel, *, final: str | NoiseLevel, max_steps: int
) -> Grid:
    """The grid that evaluates the network at the given levels of a schedule.

    Args:
      levels: every field [N], from noisy to clean.
      final: where the last step ends: see `from_times`, or a level of its own.
      max_steps: length that the grid is padded to.

    Raises:
      ValueError: if `final` is unknown.

    Source: none; a convention of this library.
    """
    end = _final_level(schedule, final) if isinstance(final, str) else final
    return _from_levels(levels, end, max_steps)


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
      ValueError: if j or n is below 1, if the grid does not start at 0 or has more than its
        levels, or if the result is longer than max_steps.

    Source: Lugmayr et al. 2022 (arXiv:2201.09865), section 4.2 and appendix.
    """
    if jump_length < 1 or num_resamples < 1:
        raise ValueError(
            f"jump_length and num_resamples must be at least 1, got {jump_length}, {num_resamples}"
        )
    if int(grid.start) != 0:
        raise ValueError(f"jumps needs a grid that starts at step 0, got {int(grid.start)}")
    if grid.middle is not None or grid.ends is not None:
        raise ValueError(
            "jumps repeats levels, and this grid has "
            f"{'ends of its own' if grid.ends is not None else 'levels inside of its steps'}: "
            "take the jumps first and then fit_grid"
        )
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
