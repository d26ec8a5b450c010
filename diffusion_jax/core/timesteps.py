"""Sampling grids: which noise levels a sampler visits, as padded arrays."""

from collections.abc import Callable
from dataclasses import dataclass
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
    if final == "clean":
        return NoiseLevel(np.asarray(schedule.t_min), np.asarray(1.0), np.asarray(0.0))
    if final == "t_min":
        return schedule(np.asarray(schedule.t_min))
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


def _check_discrete(schedule: NoiseSchedule, num_steps: int, max_steps: int) -> None:
    check_num_steps(num_steps, max_steps)
    if schedule.num_timesteps is not None and num_steps > schedule.num_timesteps:
        raise ValueError(
            f"num_steps = {num_steps} exceeds the schedule's {schedule.num_timesteps} timesteps"
        )


def trailing(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    max_steps: int = 1000,
    round_t: bool = False,
    final: str = "clean",
) -> Grid:
    """Uniform times counted down from the noisiest: T, T - T/N, … (each minus 1 if discrete).

    Args:
      num_steps: N.
      max_steps: length that the grid is padded to.
      round_t: round times to the integers that the network was trained with.
      final: see `from_times`.

    Raises:
      ValueError: if num_steps is below 1 or above max_steps or the schedule's T.

    Source: Lin et al. 2023 (arXiv:2305.08891), table 2.
    """
    _check_discrete(schedule, num_steps, max_steps)
    if schedule.num_timesteps is None:
        times = np.linspace(schedule.t_max, schedule.t_min, num_steps + 1)[:-1]
    else:
        total = schedule.num_timesteps
        times = total - np.arange(num_steps) * (total / num_steps) - 1.0
    times = np.round(times) if round_t else times
    return from_times(schedule, times, final=final, max_steps=max_steps)


def leading(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    max_steps: int = 1000,
    offset: int = 0,
    final: str = "clean",
) -> Grid:
    """Uniform times counted up from the least noisy: offset + 0, s, 2s, … with s = ⌊T/N⌋.

    The noisiest time is not visited, unlike in `trailing`.

    Args:
      num_steps: N.
      max_steps: length that the grid is padded to.
      offset: added to every time (1 in Stable Diffusion).
      final: see `from_times`.

    Raises:
      ValueError: if num_steps is out of range, or if the offset moves a time out of range.

    Source: Song et al. 2021 (arXiv:2010.02502), appendix D.2 ("linear"); Lin et al. 2023
    (arXiv:2305.08891), table 2.
    """
    _check_discrete(schedule, num_steps, max_steps)
    if schedule.num_timesteps is None:
        if offset:
            raise ValueError("offset counts discrete timesteps; this schedule is continuous")
        times = np.linspace(schedule.t_max, schedule.t_min, num_steps + 1)[1:]
    else:
        stride = schedule.num_timesteps // num_steps
        times = (np.arange(num_steps) * stride + offset)[::-1].astype(np.float64)
    return from_times(schedule, times, final=final, max_steps=max_steps)


def linspace(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    max_steps: int = 1000,
    round_t: bool = False,
    final: str = "clean",
) -> Grid:
    """N uniform times that include both the noisiest and the least noisy one.

    Args:
      num_steps: N; a single step starts at the noisiest time.
      max_steps: length that the grid is padded to.
      round_t: round times to the integers that the network was trained with.
      final: see `from_times`.

    Raises:
      ValueError: if num_steps is out of range.

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672), section 4; Lin et al. 2023
    (arXiv:2305.08891), table 2.
    """
    _check_discrete(schedule, num_steps, max_steps)
    times = np.linspace(schedule.t_max, schedule.t_min, num_steps)
    times = np.round(times) if round_t else times
    return from_times(schedule, times, final=final, max_steps=max_steps)


def karras(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    max_steps: int = 1000,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    round_t: bool = False,
    final: str = "clean",
) -> Grid:
    """Noise-to-signal ratios that are uniform after taking the rho-th root.

    (σ/α)_i = (σ_max^{1/ρ} + i/(N-1) · (σ_min^{1/ρ} - σ_max^{1/ρ}))^ρ, i = 0 … N-1.

    Args:
      num_steps: N.
      max_steps: length that the grid is padded to.
      rho: ρ; larger puts more steps at low noise.
      sigma_min, sigma_max: ends of the grid; the schedule's own where None.
      round_t: tell the network rounded times; the rates stay exact.
      final: see `from_times`.

    Raises:
      ValueError: if num_steps is out of range, if the ends are not ordered or lie outside
        of the schedule, or if rho is not positive.

    Source: Karras et al. 2022 (arXiv:2206.00364), eq. 5.
    """
    check_num_steps(num_steps, max_steps)
    if rho <= 0.0:
        raise ValueError(f"rho must be positive, got {rho}")
    ratios, ends = [], []
    for t, given in ((schedule.t_min, sigma_min), (schedule.t_max, sigma_max)):
        level = schedule(np.asarray(t))
        with np.errstate(divide="ignore"):
            ends.append(float(level.sigma / level.alpha))
        ratios.append(ends[-1] if given is None else given)
    low, high = ratios
    if not 0.0 < low < high < np.inf:
        raise ValueError(
            f"expected 0 < sigma_min < sigma_max < inf, got {low} and {high}; a schedule with "
            "zero terminal SNR needs sigma_max"
        )
    if low < ends[0] * (1 - 1e-6) or high > ends[1] * (1 + 1e-6):
        raise ValueError(
            f"the schedule has noise-to-signal ratios from {ends[0]} to {ends[1]}, got sigma_min = "
            f"{low} and sigma_max = {high}"
        )
    ramp = np.linspace(0.0, 1.0, num_steps)
    sigmas = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    times = schedule.inverse(-2.0 * np.log(sigmas))
    grid = from_times(schedule, times, final=final, max_steps=max_steps)
    if round_t:
        grid = grid._replace(levels=grid.levels._replace(t=jnp.round(grid.levels.t)))
    return grid


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


TIMESTEPS: dict[str, Callable[..., Grid]] = {
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "karras": karras,
}


@dataclass(frozen=True)
class Steps:
    """Which grid a system samples on.

    Attributes:
      spacing: a name in TIMESTEPS.
      num_steps: number of steps.
      max_steps: length that grids are padded to; one compilation serves them all.

    Raises:
      ValueError: if the spacing is unknown or num_steps is not in [1, max_steps].

    Source: none; a convention of this library.
    """

    spacing: str = "trailing"
    num_steps: int = 50
    max_steps: int = 1000

    def __post_init__(self):
        if self.spacing not in TIMESTEPS:
            raise ValueError(f"spacing must be one of {sorted(TIMESTEPS)}, got {self.spacing!r}")
        check_num_steps(self.num_steps, self.max_steps)

    def grid(self, schedule: NoiseSchedule) -> Grid:
        """The grid on a schedule."""
        return TIMESTEPS[self.spacing](schedule, self.num_steps, max_steps=self.max_steps)
