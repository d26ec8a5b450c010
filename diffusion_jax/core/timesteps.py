"""Sampling spacings: which times of a schedule a sampler visits."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from diffusion_jax.core.grid import FINALS, Grid, check_num_steps, from_times, jumps
from diffusion_jax.core.schedules import NoiseSchedule
from diffusion_jax.core.spacings import (
    beta,
    exponential,
    from_sigmas,
    karras,
    log_linear,
    rounded_times,
)

# GLIDE's 27 steps: these sections, with the last time moved down by 2.
_FAST27 = (10, 10, 3, 2, 2)


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
    times = rounded_times(schedule, times) if round_t else times
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
    times = rounded_times(schedule, times) if round_t else times
    return from_times(schedule, times, final=final, max_steps=max_steps)


def _integer_stride(num_timesteps: int, count: int) -> tuple[int, ...]:
    for stride in range(1, num_timesteps):
        if -(-num_timesteps // stride) == count:
            return tuple(range(0, num_timesteps, stride))
    raise ValueError(
        f"'ddim{count}': no integer stride through {num_timesteps} timesteps visits {count} of "
        f"them; give a divisor of {num_timesteps}, or {str(count)!r} for strides that are rounded"
    )


def latent_diffusion_times(
    num_timesteps: int, num_steps: int, spacing: str = "uniform"
) -> tuple[int, ...]:
    """The timesteps, ascending, that latent diffusion's samplers visit.

    "uniform" is 1, 1 + s, 1 + 2s, … up to at most T with s = ⌊T / N⌋: more than N where N does not
    divide T, and for some N (3 of 1000) with the time T, which no schedule of T has. "quad" is
    1 + ⌊u²⌋ with N values of u from 0 to √(0.8 T), evenly spaced; the least noisy times repeat
    where N is large.

    Args:
      num_timesteps: T of the schedule.
      num_steps: N.
      spacing: "uniform" or "quad".

    Raises:
      ValueError: if the spacing is unknown, or N is not in [1, T].

    Source: Rombach et al. 2022 (arXiv:2112.10752), released code; Song et al. 2021
    (arXiv:2010.02502), appendix D.2.
    """
    check_num_steps(num_steps, num_timesteps)
    if spacing == "uniform":
        return tuple(range(1, num_timesteps + 1, num_timesteps // num_steps))
    if spacing == "quad":
        roots = np.linspace(0.0, np.sqrt(0.8 * num_timesteps), num_steps)
        return tuple(1 + int(time) for time in roots**2)
    raise ValueError(f"spacing must be 'uniform' or 'quad', got {spacing!r}")


# Strings of one number with a rule of their own.
_RULES = ("ddim", "uniform", "quad")


def _rule(spec: str) -> str:
    return next((rule for rule in _RULES if spec.startswith(rule)), "")


def _section_counts(spec: str) -> tuple[int, ...]:
    if spec == "fast27":
        return _FAST27
    rule = _rule(spec)
    parts = spec.removeprefix(rule).split(",")
    counts = [int(part) for part in parts if part.strip().isdecimal()]
    if len(counts) != len(parts) or (rule and len(parts) > 1) or not sum(counts):
        raise ValueError(
            "sections must be numbers of steps such as '250' or '10,10,3,2,2', 'ddim50', "
            f"'uniform50', 'quad50' or 'fast27', got {spec!r}"
        )
    return tuple(counts)


def space_timesteps(num_timesteps: int, spec: str) -> tuple[int, ...]:
    """The timesteps, ascending, that a respacing string picks out of 0 … num_timesteps - 1.

    "10,10,3" cuts the times into as many sections of equal length (the first ones are longer by
    one where that does not divide) and takes so many out of each: evenly from the section's first
    to its last time, rounded half to even; a single one is the first. "ddim50" takes 0, s, 2s, …
    with the smallest integer stride s that gives 50, and so leaves the last time out. "fast27" is
    "10,10,3,2,2" with the last time T - 1 moved to T - 3. "uniform50" and "quad50" are those of
    `latent_diffusion_times`, each once: not exactly 50 where 50 does not divide T or where times
    repeat.

    Args:
      num_timesteps: T of the schedule.
      spec: the respacing string.

    Raises:
      ValueError: if the string has another form, a section has fewer times than are asked of
        it, or no integer stride gives the number after "ddim".

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672), section 4; "fast27": Nichol et al. 2021
    (arXiv:2112.10741), released code; "uniform" and "quad": see `latent_diffusion_times`.
    """
    counts, rule = _section_counts(spec), _rule(spec)
    if rule == "ddim":
        return _integer_stride(num_timesteps, counts[0])
    if rule:
        return tuple(sorted(set(latent_diffusion_times(num_timesteps, counts[0], rule))))
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
    """The timesteps that a respacing string picks, see `space_timesteps`.

    The rates and the network's times are the schedule's own at these times.

    Args:
      schedule: a discrete one.
      spec: such as "250", "10,10,3,2,2", "ddim50", "uniform50" or "fast27".
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
    "exponential": exponential,
    "beta": beta,
}
_CAN_ROUND = ("trailing", "linspace", "karras", "exponential", "beta")
_HAVE_ENDS = ("karras", "exponential")
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
      round_t: tell the network integer times, on discrete schedules. The times of "leading" and
        of "sections" are integers anyway.
      final: where the last step ends, "clean" or "t_min", see `from_times`.
      sigma_min, sigma_max: least and largest noise-to-signal ratio, for karras and exponential;
        the schedule's own where None. One without signal at its end needs sigma_max.

    Raises:
      ValueError: if the spacing or the final level is unknown, num_steps is not in [1, max_steps]
        or not what the sections make, or an option is given that the spacing does not have.

    Source: none; a convention of this library.
    """

    spacing: str = "trailing"
    num_steps: int | None = None
    max_steps: int = 1000
    sections: str | None = None
    round_t: bool = False
    final: str = "clean"
    sigma_min: float | None = None
    sigma_max: float | None = None

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
        if self.final not in FINALS:
            raise ValueError(f"final must be one of {FINALS}, got {self.final!r}")
        if (self.sigma_min, self.sigma_max) != (None, None) and self.spacing not in _HAVE_ENDS:
            raise ValueError(
                f"sigma_min and sigma_max are for the spacings {_HAVE_ENDS}, got {self.sigma_min} "
                f"and {self.sigma_max} with {self.spacing!r}"
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
        common = {"max_steps": self.max_steps, "final": self.final}
        if self.sections is not None:
            return sections(schedule, self.sections, **common)
        options = {"round_t": True} if self.round_t else {}
        if self.spacing in _HAVE_ENDS:
            options |= {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}
        return TIMESTEPS[self.spacing](schedule, self.num_steps, **common, **options)


__all__ = [
    "TIMESTEPS",
    "Grid",
    "Steps",
    "beta",
    "check_num_steps",
    "exponential",
    "from_sigmas",
    "from_times",
    "jumps",
    "karras",
    "latent_diffusion_times",
    "leading",
    "linspace",
    "log_linear",
    "sections",
    "space_timesteps",
    "trailing",
]
