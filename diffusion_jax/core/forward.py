"""The forward process: add noise, move between two levels, and the posterior in between."""

import jax.numpy as jnp

from diffusion_jax.core.arrays import per_example
from diffusion_jax.core.types import Array, NoiseLevel


def add_noise(x0: Array, eps: Array, level: NoiseLevel) -> Array:
    """x_t = alpha · x0 + sigma · eps.

    Args:
      x0, eps: [B, ...].
      level: scalars or [B].

    Raises:
      ValueError: if x0 and eps differ in shape.

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 4.
    """
    if x0.shape != eps.shape:
        raise ValueError(f"x0 and eps must have one shape, got {x0.shape} and {eps.shape}")
    return per_example(level.alpha, x0) * x0 + per_example(level.sigma, x0) * eps


def log_snr(level: NoiseLevel) -> Array:
    """log(alpha² / sigma²); +inf for clean data, -inf for pure noise.

    Source: Kingma et al. 2021 (arXiv:2107.00630), eq. 3.
    """
    return 2.0 * (jnp.log(level.alpha) - jnp.log(level.sigma))


def root(x: Array) -> Array:
    """√max(x, 0), with a gradient of 0 where that is 0 instead of an infinite one.

    Source: none; a convention of this library.
    """
    positive = x > 0.0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def transition(level: NoiseLevel, next_level: NoiseLevel) -> tuple[Array, Array]:
    """Signal rate and std of q(x_t | x_s), from the cleaner s = next_level to t = level.

    α_{t|s} = α_t / α_s,  σ²_{t|s} = σ_t² - α²_{t|s} σ_s². With s and t neighbours of the
    training chain σ²_{t|s} is β_t.

    Source: Kingma et al. 2021 (arXiv:2107.00630), appendix A.1.
    """
    alpha = level.alpha / next_level.alpha
    return alpha, root(level.sigma**2 - (alpha * next_level.sigma) ** 2)


def posterior_std(level: NoiseLevel, next_level: NoiseLevel) -> Array:
    """Standard deviation of q(x_s | x_t, x0), s = next_level.

    std = σ_{t|s} σ_s / σ_t; its square is β̃_t on the training chain.

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 7.
    """
    _, std = transition(level, next_level)
    return std * next_level.sigma / level.sigma


def posterior_mean(x: Array, x0: Array, level: NoiseLevel, next_level: NoiseLevel) -> Array:
    """Mean of q(x_s | x_t, x0), s = next_level.

    mean = (α_{t|s} σ_s² / σ_t²) x_t + (α_s σ²_{t|s} / σ_t²) x0.

    Args:
      x, x0: [B, ...].

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 7.
    """
    alpha, std = transition(level, next_level)
    towards_x = alpha * (next_level.sigma / level.sigma) ** 2
    towards_x0 = next_level.alpha * (std / level.sigma) ** 2
    return per_example(towards_x, x) * x + per_example(towards_x0, x) * x0
