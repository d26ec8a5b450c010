"""The float32 tables of ᾱ that released samplers read, to their last bits.

Near clean data 1 - ᾱ is a few units of float32's last place, so that these tables make other
pictures than precise ones: 1 - ᾱ_0 of the cosine schedule is off by a thousandth.
"""

import numpy as np

from diffusion_jax.core.schedules import DiscreteSchedule, Linear, ScaledLinear, ZeroTerminalSNR


def _linspace(start: float, end: float, count: int) -> np.ndarray:
    start, end = np.float32(start), np.float32(end)
    step = np.float64(np.float32((end - start) / np.float32(count - 1)))
    index = np.arange(count)
    up, down = np.float64(start) + step * index, np.float64(end) - step * (count - 1 - index)
    return np.where(index < count // 2, up, down).astype(np.float32)


def _cumprod(betas: np.ndarray) -> np.ndarray:
    return np.cumprod((np.float32(1.0) - betas).astype(np.float64)).astype(np.float32)


def _betas(schedule: DiscreteSchedule) -> np.ndarray:
    total = schedule.num_timesteps
    if isinstance(schedule, Linear):
        return _linspace(schedule.beta_start, schedule.beta_end, total)
    if isinstance(schedule, ScaledLinear):
        return _linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, total) ** 2
    if isinstance(schedule, ZeroTerminalSNR):
        root = np.sqrt(_cumprod(_betas(schedule.base)))
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        squared = root**2
        return 1 - np.concatenate([squared[:1], squared[1:] / squared[:-1]])
    return schedule.betas().astype(np.float32)


def alphas_cumprod32(schedule: DiscreteSchedule) -> np.ndarray:
    """ᾱ of every time [T] in float32, made in the order of operations that diffusers uses."""
    return _cumprod(_betas(schedule))
