"""Grids for exact variances: Karras levels that end before sigma = 0, fit to a sampler."""

from typing import Any

import jax.numpy as jnp

from diffusion_jax.core.grid import Grid
from diffusion_jax.core.schedules import EDM
from diffusion_jax.core.timesteps import karras
from diffusion_jax.core.types import NoiseLevel
from diffusion_jax.samplers.base import fit_grid

SCHEDULE = EDM(sigma_min=0.02, sigma_max=20.0)


def grid_for(sampler: Any, num_steps: int, *, vp: bool = True, max_steps: int = 513) -> Grid:
    """From σ/α = 20 to 0.02, on the variance-preserving path or at alpha = 1.

    The step to sigma = 0 has an error of its own, which hides the order of a method.
    """
    grid = karras(SCHEDULE, num_steps + 1, max_steps=max_steps)
    grid = fit_grid(sampler, grid._replace(stop=jnp.asarray(num_steps, jnp.int32)), SCHEDULE)
    if not vp:
        return grid

    def scaled(level):
        norm = jnp.sqrt(level.alpha**2 + level.sigma**2)
        return NoiseLevel(level.t, level.alpha / norm, level.sigma / norm)

    middle = None if grid.middle is None else scaled(grid.middle)
    return grid._replace(levels=scaled(grid.levels), middle=middle)
