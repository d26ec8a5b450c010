"""RePaint's path the way diffusers walks it: up in single steps, with too much noise."""

import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.grid import Grid, check_num_steps
from diffusion_jax.core.schedules import NoiseSchedule
from diffusion_jax.core.timesteps import jumps, leading
from diffusion_jax.core.types import NoiseLevel


def single_step_jumps(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    jump_length: int,
    num_resamples: int,
    max_steps: int | None = None,
) -> Grid:
    """`jumps` of a "leading" grid as diffusers' RePaintScheduler takes them.

    It calls the network at the times t_1, t_2, … of `jumps`, each step from t_i to t_i - n with
    n = T // N. Where t_i is larger than the one before, it noises x by β of the n training steps to
    t_{i-1} … t_{i-1} + n - 1, one by one. But x stands at t_{i-1} - n, and those to
    t_{i-1} - n + 1 … t_{i-1} would be right: x has more noise then than the network is told. Use
    `jumps`, unless these numbers are to be reproduced.

    Args:
      schedule: a discrete one.
      num_steps: N.
      jump_length, num_resamples: see `jumps`.
      max_steps: length that the result is padded to; as many as it has where None.

    Raises:
      ValueError: if the schedule is continuous, or an option is out of range.

    Source: Lugmayr et al. 2022 (arXiv:2201.09865), algorithm 1; the single steps: von Platen et
    al., diffusers 0.42.1.
    """
    if schedule.num_timesteps is None:
        raise ValueError(
            f"single training steps belong to discrete schedules, {type(schedule).__name__} is "
            "continuous; use jumps"
        )
    grid = leading(schedule, num_steps, max_steps=num_steps)
    path = jumps(grid, jump_length=jump_length, num_resamples=num_resamples)
    times = np.round(np.asarray(path.levels.t[: int(path.stop)], np.float64))
    stride = schedule.num_timesteps // num_steps
    starts, ends = [], []
    for before, t in zip(np.append(np.inf, times[:-1]), times, strict=True):
        singles = before + np.arange(0 if t < before else stride)
        starts += [t] if t < before else list(singles - 1)
        ends += [t - stride] if t < before else list(singles)
    max_steps = len(starts) if max_steps is None else max_steps
    check_num_steps(len(starts), max_steps)
    padding = max_steps - len(starts)
    starts = np.asarray([*starts, *[-1.0] * (padding + 1)])
    ends = np.asarray([*ends, *[-1.0] * padding])
    return Grid(
        _levels(schedule, starts),
        jnp.asarray(0, jnp.int32),
        jnp.asarray(len(starts) - padding - 1, jnp.int32),
        ends=_levels(schedule, ends),
    )


def _levels(schedule: NoiseSchedule, times: np.ndarray) -> NoiseLevel:
    t, alpha, sigma = schedule(np.maximum(times, 0.0))
    clean = times < 0
    # Times below 0 are clean data.
    fields = t, np.where(clean, 1.0, alpha), np.where(clean, 0.0, sigma)
    return NoiseLevel(*(jnp.asarray(field) for field in fields))
