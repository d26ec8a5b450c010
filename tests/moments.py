"""Exact variances of samplers with memory: every noise is a probe image of its own."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.arrays import image_keys
from diffusion_jax.samplers.base import StepInfo
from tests.analytic import Mixture
from tests.noise import drawn_by


@functools.partial(jax.jit, static_argnames=("sampler", "data", "draws"))
def _probe(sampler, data, grid, draws):
    """Where x_T = 0, x_T = 1 and a unit noise in every draw of every step lead, [2 + MAX·draws]."""
    count = 2 + draws * (grid.levels.t.shape[0] - 1)
    keys = image_keys(0, jnp.arange(count))

    def step(index, state):
        draw = itertools.count()

        def unit(keys, x):
            place = next(draw)
            assert place < draws, f"{type(sampler).__name__} draws more than {draws} times a step"
            hit = jnp.arange(count) == 2 + draws * index + place
            return jnp.broadcast_to(hit[:, None], x.shape).astype(x.dtype)

        with drawn_by(unit):
            return sampler.step(
                keys,
                data.denoise,
                state,
                grid.level(index),
                grid.next_level(index),
                StepInfo(index, grid.start, grid.stop, grid.middle_level(index)),
            )

    x_T = (jnp.arange(count) == 1).astype(grid.levels.sigma.dtype)[:, None]
    return jax.lax.fori_loop(grid.start, grid.stop, step, sampler.init(x_T)).x[:, 0]


def variance_error(sampler: Any, data: Mixture, grid: Any, *, draws: int = 1) -> float:
    """Relative error of the variance at the end of a grid, for data of one Gaussian in 1-D.

    For such data every sampler is affine in x_T and in all its noises, whatever it remembers, so
    the variance is the sum of the squares of what each of them contributes.

    Args:
      data: `analytic.gaussian(mean, std)`.
      grid: starts at the exact marginal; fitted to the sampler.
      draws: noises a step, at most.
    """
    zero, one, *noises = np.asarray(_probe(sampler, data, grid, draws))
    (std,) = data.stds[0]

    def exact(index):
        level = grid.level(index)
        return float(level.alpha) ** 2 * std**2 + float(level.sigma) ** 2

    variance = (one - zero) ** 2 * exact(int(grid.start)) + np.sum((np.asarray(noises) - zero) ** 2)
    return float(variance / exact(int(grid.stop)) - 1.0)
