"""Sampling spacings: which times of a schedule a sampler visits."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.grid import Grid, check_num_steps, from_times, jumps
from diffusion_jax.core.schedules import NoiseSchedule
from diffusion_jax.core.types import Array

# GLIDE's 27 steps: these sections, with the last time moved down by 2.
_FAST27 = (10, 10, 3, 2, 2)


def _check_discrete(schedule: NoiseSchedule, num_steps: int, max_steps: int) -> None:
    check_num_steps(num_steps, max_steps)
    if schedule.num_timesteps is not None and num_steps > schedule.num_timesteps:
        raise ValueError(
            f"num_steps = {num_steps} exceeds the schedule's {schedule.num_timesteps} timesteps"
        )


def _rounded(schedule: NoiseSchedule, times: Array) -> Array:
    if schedule.num_timesteps is None:
        raise ValueError(
            f"round_t rounds to discrete timesteps; {type(schedule).__name__} is continuous with "
            f"times from {schedule.t_min} to {schedule.t_max}, so leave round_t off"
        )
    return np.round(times)


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
      ValueError: if num_steps is below 1 or above max_steps or the schedule's T, or if times
        of a continuous schedule are to be rounded.

    Source: Lin et al. 2023 (arXiv:2305.08891), table 2.
    """
    _check_discrete(schedule, num_steps, max_steps)
    if schedule.num_timesteps is None:
        times = np.linspace(schedule.t_max, schedule.t_min, num_steps + 1)[:-1]
    else:
        total = schedule.num_timesteps
        times = total - np.arange(num_steps) * (total / num_steps) - 1.0
    times = _rounded(schedule, times) if round_t else times
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
      ValueError: if num_steps is out of range, or if times of a continuous schedule are to be
        rounded.

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672), section 4; Lin et al. 2023
    (arXiv:2305.08891), table 2.
    """
    _check_discrete(schedule, num_steps, max_steps)
    times = np.linspace(schedule.t_max, schedule.t_min, num_steps)
    times = _rounded(schedule, times) if round_t else times
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
        of the schedule, if rho is not positive, or if times of a continuous schedule are to be
        rounded.

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
            f"expected 0 < sigma_min < sigma_max < inf, got {low} and {high}; a schedule without "
            "signal at its end (zero terminal SNR, flow matching) needs sigma_max or another "
            "spacing"
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
        told = _rounded(schedule, np.asarray(grid.levels.t))
        grid = grid._replace(levels=grid.levels._replace(t=jnp.asarray(told)))
    return grid


def _integer_stride(num_timesteps: int, count: int) -> tuple[int, ...]:
    for stride in range(1, num_timesteps):
        if -(-num_timesteps // stride) == count:
            return tuple(range(0, num_timesteps, stride))
    raise ValueError(
        f"'ddim{count}': no integer stride through {num_timesteps} timesteps visits {count} of "
        f"them; give a divisor of {num_timesteps}, or {str(count)!r} for strides that are rounded"
    )


def _section_counts(spec: str) -> tuple[int, ...]:
    if spec == "fast27":
        return _FAST27
    parts = spec.removeprefix("ddim").split(",")
    counts = [int(part) for part in parts if part.strip().isdecimal()]
    if len(counts) != len(parts) or (spec.startswith("ddim") and len(parts) > 1) or not sum(counts):
        raise ValueError(
            "sections must be numbers of steps such as '250' or '10,10,3,2,2', 'ddim50' or "
            f"'fast27', got {spec!r}"
        )
    return tuple(counts)


def space_timesteps(num_timesteps: int, spec: str) -> tuple[int, ...]:
    """The timesteps, ascending, that a respacing string picks out of 0 … num_timesteps - 1.

    "10,10,3" cuts the times into as many sections of equal length (the first ones are longer by
    one where that does not divide) and takes so many out of each: evenly from the section's first
    to its last time, rounded half to even; a single one is the first. "ddim50" takes 0, s, 2s, …
    with the smallest integer stride s that gives 50, and so leaves the last time out. "fast27" is
    "10,10,3,2,2" with the last time T - 1 moved to T - 3.

    Args:
      num_timesteps: T of the schedule.
      spec: the respacing string.

    Raises:
      ValueError: if the string has another form, a section has fewer times than are asked of
        it, or no integer stride gives the number after "ddim".

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672), section 4; "fast27": Nichol et al. 2021
    (arXiv:2112.10741), released code.
    """
    counts = _section_counts(spec)
    if spec.startswith("ddim"):
        return _integer_stride(num_timesteps, counts[0])
    times, start = [], 0
    for index, count in enumerate(counts):
        size = num_timesteps // len(counts) + (index < num_timesteps % len(counts))
        if count > size:
            raise ValueError(
                f"section {index} of sections {spec!r} has {size} of the {num_timesteps} "
                f"timesteps, cannot take {count} out of it"
            )
        # Summed up rather than multiplied: the last bit decides how a half is rounded.
        offsets = np.cumsum([0.0] + [(size - 1) / max(count - 1, 1)] * (count - 1))[:count]
        times += [start + int(offset) for offset in np.round(offsets)]
        start += size
    if spec == "fast27":
        times[-1] -= 2
    return tuple(times)


def sections(
    schedule: NoiseSchedule, spec: str, *, max_steps: int = 1000, final: str = "clean"
) -> Grid:
    """The timesteps that a respacing string of ADM or GLIDE picks, see `space_timesteps`.

    The rates and the network's times are the schedule's own at these times.

    Args:
      schedule: a discrete one.
      spec: such as "250", "10,10,3,2,2", "ddim50" or "fast27".
      max_steps: length that the grid is padded to.
      final: see `from_times`.

    Raises:
      ValueError: if the schedule is continuous, or the string picks no times of it.

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672), section 4.
    """
    if schedule.num_timesteps is None:
        raise ValueError(
            f"sections pick discrete timesteps; {type(schedule).__name__} is continuous, use "
            f"another spacing: {sorted(TIMESTEPS)}"
        )
    times = space_timesteps(schedule.num_timesteps, spec)
    return from_times(schedule, times[::-1], final=final, max_steps=max_steps)


# Spacings that are a function of the number of steps; `sections` has a string instead.
TIMESTEPS: dict[str, Callable[..., Grid]] = {
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "karras": karras,
}
_CAN_ROUND = ("trailing", "linspace", "karras")
_DEFAULT_NUM_STEPS = 50


@dataclass(frozen=True)
class Steps:
    """Which grid a system samples on.

    Attributes:
      spacing: a name in TIMESTEPS, or "sections".
      num_steps: number of steps. None stands for 50, or with "sections" for as many as these
        make, which is then the only number that is accepted.
      max_steps: length that grids are padded to; one compilation serves them all.
      sections: respacing string such as "250" or "ddim50" where the spacing is "sections", else
        None; see `space_timesteps`.
      round_t: tell the network integer times; for trailing, linspace and karras on discrete
        schedules. The times of the other spacings are integers anyway.

    Raises:
      ValueError: if the spacing is unknown, num_steps is not in [1, max_steps] or not what
        the sections make, or an option is given that the spacing does not have.

    Source: none; a convention of this library.
    """

    spacing: str = "trailing"
    num_steps: int | None = None
    max_steps: int = 1000
    sections: str | None = None
    round_t: bool = False

    def __post_init__(self):
        known = (*sorted(TIMESTEPS), "sections")
        if self.spacing not in known:
            raise ValueError(f"spacing must be one of {known}, got {self.spacing!r}")
        if (self.spacing == "sections") != (self.sections is not None):
            raise ValueError(
                "the spacing 'sections' and a value of sections such as '250' go together, got "
                f"spacing = {self.spacing!r} and sections = {self.sections!r}"
            )
        if self.round_t and self.spacing not in _CAN_ROUND:
            raise ValueError(
                f"round_t is for the spacings {_CAN_ROUND}; {self.spacing!r} makes integers anyway"
            )
        made = _DEFAULT_NUM_STEPS if self.sections is None else sum(_section_counts(self.sections))
        if self.num_steps is None:
            object.__setattr__(self, "num_steps", made)
        elif self.sections is not None and self.num_steps != made:
            raise ValueError(
                f"sections {self.sections!r} make {made} steps, got num_steps = {self.num_steps}; "
                f"leave num_steps out (None) or change sections; for {self.num_steps} steps of "
                "another spacing choose that spacing and sections = None"
            )
        check_num_steps(self.num_steps, self.max_steps)

    def grid(self, schedule: NoiseSchedule) -> Grid:
        """The grid on a schedule.

        Raises:
          ValueError: if the spacing does not fit the schedule.
        """
        if self.sections is not None:
            return sections(schedule, self.sections, max_steps=self.max_steps)
        options = {"round_t": True} if self.round_t else {}
        make = TIMESTEPS[self.spacing]
        return make(schedule, self.num_steps, max_steps=self.max_steps, **options)


__all__ = [
    "TIMESTEPS",
    "Grid",
    "Steps",
    "check_num_steps",
    "from_times",
    "jumps",
    "karras",
    "leading",
    "linspace",
    "sections",
    "space_timesteps",
    "trailing",
]
