"""Exact moments of a sampler on Gaussian data: the affine map of a whole trajectory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl

from diffusion_jax.core.arrays import fold_in_each, per_image_normal
from diffusion_jax.core.grid import Grid
from diffusion_jax.core.mixture import Mixture
from diffusion_jax.core.types import Array, Key, NoiseLevel, Prediction
from diffusion_jax.samplers import Sampler, sample

# Draws of one step: with the step's key, and with 1, 2, 3 folded in.
_DRAWS = 4
_PATH, _WANTED, _ALWAYS = range(3)


def _fold_in(key: Array, data: Array) -> Array:
    # Any mixing will do that takes the few thousand paths of a trajectory to different numbers.
    path = (key[_PATH] ^ (data.astype(jnp.uint32) + jnp.uint32(1))) * jnp.uint32(0x9E3779B1)
    path = path ^ (path >> 15)
    return jnp.stack([path, key[_WANTED], key[_ALWAYS]])


def _random_bits(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    chosen = (key[_PATH] == key[_WANTED]) | (key[_ALWAYS] != 0)
    # The middle of the range is the median of every symmetric distribution, 0; half as much more
    # is some other value, the unit.
    half = np.asarray(1 << (bit_width - 1), f"uint{bit_width}")
    bits = jnp.where(chosen, half + half // 2, half)
    return jnp.broadcast_to(bits, shape)


def _seed(seed: Array) -> Array:
    return jnp.stack([seed.astype(jnp.uint32), jnp.zeros_like(seed, jnp.uint32)] * 2)[:3]


def _split(key: Array, shape: tuple[int, ...]) -> Array:
    indices = jnp.arange(np.prod(shape, dtype=int), dtype=jnp.uint32)
    return jax.vmap(_fold_in, (None, 0))(key, indices).reshape(*shape, 3)


_CHOSEN_NOISE = define_prng_impl(
    key_shape=(3,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="chosen_noise",
    tag="cn",
)


def _keys(wanted: Array, always: Array) -> Key:
    """Keys under which one draw is the unit and all others are 0, or all are the unit."""
    data = jnp.stack([jnp.zeros_like(wanted), wanted, always.astype(jnp.uint32)], axis=-1)
    return jax.random.wrap_key_data(data, impl=_CHOSEN_NOISE)


def _paths(num_steps: int) -> Array:
    """Where each draw of each step is, [num_steps · _DRAWS] uint32."""
    root = _keys(jnp.zeros(1, jnp.uint32), jnp.zeros(1, bool))

    def draws(step):
        key = fold_in_each(root, step)
        keys = [key, *(fold_in_each(key, draw) for draw in range(1, _DRAWS))]
        return jnp.stack([jax.random.key_data(key)[0, _PATH] for key in keys])

    return jax.vmap(draws)(jnp.arange(num_steps)).reshape(-1)


@functools.partial(jax.jit, static_argnames=("data", "sampler"))
def _trajectories(data: Mixture, sampler: Sampler, grid: Grid) -> tuple[Array, Array]:
    """x at the end for x_T = 0, x_T = 1, every single draw, and all of them; the unit."""
    paths = _paths(grid.levels.t.shape[0] - 1)
    # Nothing folds to 0 but by a chance that `affine_map` would notice.
    wanted = jnp.concatenate([jnp.zeros(2, jnp.uint32), paths, jnp.zeros(1, jnp.uint32)])
    always = jnp.arange(len(wanted)) == len(wanted) - 1
    x_T = jnp.zeros((len(wanted), 1)).at[1].set(1.0)

    def denoise(x: Array, level: NoiseLevel) -> Prediction:
        return data.denoise(x, level)

    x, _ = sample(sampler, denoise, grid, x_T, _keys(wanted, always))
    unit = per_image_normal(_keys(wanted[:1], jnp.ones(1, bool)), x_T[:1])
    return x[:, 0], unit[0, 0]


def affine_map(sampler: Any, data: Mixture, grid: Grid) -> tuple[float, float, np.ndarray]:
    """A whole trajectory as x = a x_T + Σ_j b_j z_j + c, z_j standard normal and independent.

    On one Gaussian in one dimension the exact denoiser is affine in x, and so then is every
    sampler, in its start and in the noises that it draws with the key of a step or with 1, 2 or 3
    folded into that. Each of these is probed by a trajectory of its own, whose keys make one draw
    the unit and all others zero.

    Args:
      sampler: a value of SAMPLERS.
      data: one Gaussian in one dimension.
      grid: that is run, fitted to the sampler.

    Returns:
      a, c, and b [J].

    Raises:
      ValueError: if the data is another mixture, or if the sampler draws noise elsewhere, so that
        all noises together are not the sum of the single ones.
    """
    if (len(data.weights), data.dim) != (1, 1):
        raise ValueError(f"expected one Gaussian in one dimension, got {data}")
    with jax.enable_x64(True):
        x, unit = (np.asarray(value) for value in _trajectories(data, sampler, grid))
    c, b = float(x[0]), (x[2:-1] - x[0]) / unit
    together = (x[-1] - x[0]) / unit
    if not abs(together - b.sum()) <= 1e-8 * (1.0 + np.abs(b).sum()):
        raise ValueError(
            f"{sampler} draws noise that is not found: all draws together move the sample by "
            f"{together}, the single ones by {b.sum()}; noise must come from per_image_normal with "
            f"the key of the step, or with 1 … {_DRAWS - 1} folded into it"
        )
    return float(x[1] - x[0]), c, b


def variance_error(sampler: Any, data: Mixture, grid: Grid) -> float:
    """Relative error of the variance at the end of a grid, exactly.

    Starts from the exact law at the first level, and compares with that at the last.

    Args:
      sampler: a value of SAMPLERS.
      data: one Gaussian in one dimension.
      grid: that is run, fitted to the sampler.

    Raises:
      ValueError: see `affine_map`.
    """

    def variance(level: NoiseLevel) -> float:
        return float(level.alpha) ** 2 * data.stds[0][0] ** 2 + float(level.sigma) ** 2

    gain, _, noises = affine_map(sampler, data, grid)
    reached = gain**2 * variance(grid.level(grid.start)) + float(np.sum(noises**2))
    return reached / variance(grid.next_level(int(grid.stop) - 1)) - 1.0
