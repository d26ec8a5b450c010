"""Closed forms that samplers, guidance and losses are held against: Gaussian data, exactly."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.discrete import numpy_like
from diffusion_jax.core.mixture import MIXTURE, Mixture, gaussian
from diffusion_jax.core.types import NoiseLevel
from diffusion_jax.samplers.base import StepInfo

__all__ = [
    "MIXTURE",
    "Mixture",
    "NoiseLevel",
    "affine_steps",
    "gaussian",
    "gaussian_flow",
    "in_vp",
    "ode_solution",
    "optimal_var_frac",
    "propagate_variance",
]


def gaussian_flow(x, level: NoiseLevel, next_level: NoiseLevel, *, mean: float, std: float):
    """The exact probability-flow map of Gaussian data from one level to another.

    x_s = α_s m + √((α_s² Λ + σ_s²) / (α_t² Λ + σ_t²)) (x_t - α_t m).
    """
    before = level.alpha**2 * std**2 + level.sigma**2
    after = next_level.alpha**2 * std**2 + next_level.sigma**2
    return next_level.alpha * mean + (after / before) ** 0.5 * (x - level.alpha * mean)


def ode_solution(mixture: Mixture, x, sigma_max: float, sigma_min: float, steps: int = 512):
    """The probability flow from sigma_max to sigma_min at alpha = 1, by RK4 in log sigma."""

    def slope(x, log_sigma):
        level = NoiseLevel(np.asarray(0.0), np.asarray(1.0), np.exp(log_sigma))
        return x - mixture.x0(x, level)

    grid = np.linspace(np.log(sigma_max), np.log(sigma_min), steps + 1)
    for here, there in zip(grid[:-1], grid[1:], strict=True):
        h, middle = there - here, (here + there) / 2
        k1 = slope(x, here)
        k2 = slope(x + h / 2 * k1, middle)
        k3 = slope(x + h / 2 * k2, middle)
        k4 = slope(x + h * k3, there)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def optimal_var_frac(level: NoiseLevel, next_level: NoiseLevel, data_variance: float):
    """Where the exact reverse variance of Gaussian data lies between log β̃ (0) and log β (1).

    With numpy levels in float64, with jax levels inside of a traced step.

    Var(x_s | x_t) = β̃ + (α_s σ²_{t|s} / σ_t²)² Λ σ_t² / (α_t² Λ + σ_t²).
    """
    forward = level.sigma**2 - (level.alpha / next_level.alpha * next_level.sigma) ** 2
    small = forward * next_level.sigma**2 / level.sigma**2
    towards_x0 = next_level.alpha * forward / level.sigma**2
    of_x0 = data_variance * level.sigma**2 / (level.alpha**2 * data_variance + level.sigma**2)
    best = small + towards_x0**2 * of_x0
    xp = numpy_like(best)
    return xp.log(best / small) / xp.log(forward / small)


def in_vp(grid: Any) -> Any:
    """The same noise-to-signal ratios on a variance-preserving path."""
    t, alpha, sigma = grid.levels
    norm = jnp.sqrt(alpha**2 + sigma**2)
    return grid._replace(levels=NoiseLevel(t, alpha / norm, sigma / norm))


@functools.partial(jax.jit, static_argnames=("sampler", "denoise"))
def _probe(sampler, denoise, here, there):
    probes = jnp.asarray([[0.0], [1.0], [0.0]])
    keys = jax.random.split(jax.random.key(0), 3)

    def one(level, next_level):
        state = sampler.step(
            keys,
            lambda x, here: denoise(x, here, level, next_level),
            sampler.init(probes),
            level,
            next_level,
            StepInfo(0, 0, 1),
        )
        return state.x[:, 0]

    return jax.vmap(one)(here, there)


def affine_steps(sampler: Any, denoise: Callable, grid: Any) -> tuple[np.ndarray, ...]:
    """Every step of a sampler without memory as x_s = a x_t + b z + c, for affine denoisers.

    The caller must have replaced the sampler's noise by [0, 0, 1] for the three probes.

    Args:
      denoise: (x [3, 1], level, start and end of the step) -> Prediction.

    Returns:
      a, b, c, each [N].
    """
    here = NoiseLevel(*(field[:-1] for field in grid.levels))
    there = NoiseLevel(*(field[1:] for field in grid.levels))
    out = np.asarray(_probe(sampler, denoise, here, there))[: int(grid.stop)]
    return out[:, 1] - out[:, 0], out[:, 2] - out[:, 0], out[:, 0]


def propagate_variance(a: np.ndarray, b: np.ndarray, variance: float) -> float:
    """Variance after the affine steps x <- a x + b z + c."""
    for gain, noise in zip(a, b, strict=True):
        variance = gain**2 * variance + noise**2
    return variance
