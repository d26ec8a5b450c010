"""The likelihood of data under a diffusion model, by the probability flow and its divergence."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.core.arrays import fold_in_each, per_example, per_image_normal
from diffusion_jax.core.grid import Grid
from diffusion_jax.core.types import Array, Key, NoiseLevel
from diffusion_jax.samplers.base import Denoise
from diffusion_jax.samplers.inversion import reverse

DIVERGENCES = ("exact", "rademacher", "gaussian")
ORDERS = (1, 2)


class Likelihood(NamedTuple):
    """Of every example.

    Attributes:
      log_prob: [B] log p(x), in nats.
      noise: [B, ...] where the flow takes x, at the grid's first level.

    Source: none; a convention of this library.
    """

    log_prob: Array
    noise: Array


def _probe(divergence: str, keys: Key, x: Array) -> Array:
    if divergence == "gaussian":
        return per_image_normal(keys, x)
    return jax.vmap(lambda key: jax.random.rademacher(key, x.shape[1:], x.dtype))(keys)


def _sum(x: Array) -> Array:
    return jnp.sum(x.reshape(x.shape[0], -1), axis=1)


def _trace_exactly(function: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    """function(x) and the trace of its Jacobian for each example, by D directions."""
    value, push = jax.linearize(function, x)
    size = math.prod(x.shape[1:])

    def diagonal(i):
        direction = jax.nn.one_hot(i, size, dtype=x.dtype).reshape(x.shape[1:])
        return _sum(push(jnp.broadcast_to(direction, x.shape)) * direction[None])

    return value, jnp.sum(jax.lax.map(diagonal, jnp.arange(size)), axis=0)


def log_likelihood(
    denoise: Denoise,
    grid: Grid,
    x: Array,
    *,
    divergence: str = "exact",
    keys: Key | None = None,
    order: int = 2,
    prior_std: Array | float | None = None,
    log_prior: Callable[[Array, NoiseLevel], Array] | None = None,
) -> Likelihood:
    """log p(x) of the data that the probability flow makes of noise.

    With u = x/α and r = σ/α the flow is du/dr = ε̂, and along it d log p(u)/dr = -div ε̂, where
    div ε̂ = (D - tr ∂x̂0/∂u) / r. Both are solved from the data to the grid's first level, where p is
    the prior. So any path and any denoiser will do, but thresholds have a wrong divergence, and a
    guided denoiser's flow is no model's. The grid must start at alpha > 0, where r is finite:
    otherwise leave its first step out (`starting_at(1)`). A grid that ends with clean data is
    entered at its last noisy level r with u = x: the density is that of data with noise of r added.

    Args:
      denoise: (x, level) -> Prediction, conditions bound.
      grid: levels from noisy to clean, without jumps.
      x: [B, ...] float32 data at the grid's last level.
      divergence: "exact", by D evaluations of the derivative for D dimensions; or an unbiased
        estimate by one of them, along a probe ("rademacher": ±1, of the smaller variance, or
        "gaussian") that is drawn for every step anew.
      keys: [B] one key per image, for probes only.
      order: 2 for Heun's method, 1 for Euler's.
      prior_std: the schedule's `prior_std` at the grid's first level; 1 where None.
      log_prior: (x_T [B, ...], level) -> [B] log density at the first level, in the place of
        N(0, prior_std²).

    Reverse-mode gradients pass on grids with Python bounds (`grid.fixed()`), as in `sample`.

    Raises:
      ValueError: if an option is unknown, keys or prior_std are missing or given in vain, the grid
        has ends of its own, or it starts at alpha = 0 (inside of jit the result is NaN or infinite
        then).

    Source: Song et al. 2021 (arXiv:2011.13456), section 4.3 and appendix D.2, eq. 39; in σ/α:
    Karras et al. 2022 (arXiv:2206.00364), eq. 4.
    """
    if prior_std is not None and log_prior is not None:
        raise ValueError("prior_std is that of a normal prior, which log_prior replaces; give one")
    _check(grid, divergence, keys, order)
    # Under jax_enable_x64 grids are in float64, and would make the state of the loop so too.
    grid = grid.astype(x.dtype)
    back, size = reverse(grid), math.prod(x.shape[1:])

    def slope(u, level, probe):
        r = level.sigma / level.alpha

        def x0_of(u):
            return denoise(level.alpha * u, level).x0

        if divergence == "exact":
            x0, trace = _trace_exactly(x0_of, u)
        else:
            x0, along = jax.jvp(x0_of, (u,), (probe,))
            # E v'v = D is known, so of the probe only the Jacobian's part is estimated.
            trace = _sum(along * probe)
        return (u - x0) / r, (size - trace) / r

    def step(index, carry):
        u, total = carry
        level, noisier = back.level(index), back.level(index + 1)
        h = noisier.sigma / noisier.alpha - level.sigma / level.alpha
        probe = None if keys is None else _probe(divergence, fold_in_each(keys, index), x)
        eps, div = slope(u, level, probe)
        if order == 2:
            next_eps, next_div = slope(u + h * eps, noisier, probe)
            eps, div = (eps + next_eps) / 2, (div + next_div) / 2
        return u + h * eps, total + h * div

    data_alpha = jnp.asarray(grid.level(grid.stop).alpha, x.dtype)
    carry = (x / data_alpha, jnp.zeros(x.shape[0], x.dtype))
    if isinstance(back.stop, int):
        step = jax.checkpoint(step)
    u, total = jax.lax.fori_loop(0, back.stop, step, carry)
    start = grid.level(grid.start)
    noise = start.alpha * u
    std = 1.0 if prior_std is None else prior_std
    prior = _log_normal(noise, std) if log_prior is None else log_prior(noise, start)
    # Densities of x and u = x / α differ by the volume, at both ends.
    volume = size * (jnp.log(start.alpha) - jnp.log(data_alpha))
    return Likelihood(prior + total + volume, noise)


def _log_normal(x: Array, std: Array | float) -> Array:
    std = per_example(jnp.asarray(std, x.dtype), x)
    return _sum(-0.5 * (x / std) ** 2 - jnp.log(std) - 0.5 * math.log(2.0 * math.pi))


def _check(grid: Grid, divergence: str, keys: Key | None, order: int) -> None:
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {DIVERGENCES}, got {divergence!r}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
    if (keys is None) != (divergence == "exact"):
        raise ValueError(
            "keys are for the probes of 'rademacher' and 'gaussian', and needed there, got "
            f"{'none' if keys is None else 'keys'} with {divergence!r}"
        )
    if grid.ends is not None:
        raise ValueError("the flow runs through levels in a row; this grid has ends of its own")
    alpha = grid.level(grid.start).alpha
    if not isinstance(alpha, jax.core.Tracer) and float(alpha) == 0.0:
        raise ValueError(
            "the grid starts at alpha = 0, where the flow has no finite coordinates; leave that "
            "step out with grid.starting_at(1)"
        )


def bits_per_dimension(log_prob: Array, dimensions: int, *, half_bin: float = 1.0 / 255.0) -> Array:
    """-log2 of the probability of data on grey levels, per dimension: density times the bins' size.

    (-log p(x) / D - log(2 half_bin)) / ln 2, which `losses.bits_per_dim` bounds. For data on grey
    levels add noise uniform in ± half_bin to x first: the mean of this is then an upper bound.

    Args:
      log_prob: [B] nats, of data in [-1, 1].
      dimensions: D, numbers in one example.
      half_bin: half the distance of two grey levels, 1/255 for 256 of them.

    Returns:
      [B] bits.

    Raises:
      ValueError: unless half_bin lies in (0, 1] and dimensions is at least 1.

    Source: Theis et al. 2016 (arXiv:1511.01844), section 3.1.
    """
    if not 0.0 < half_bin <= 1.0 or dimensions < 1:
        raise ValueError(
            f"half_bin must lie in (0, 1] and dimensions be at least 1, got {half_bin} and "
            f"{dimensions}"
        )
    return (-log_prob / dimensions - math.log(2.0 * half_bin)) / math.log(2.0)
