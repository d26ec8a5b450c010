"""The simple denoising loss: weighted mean squared error of the network's own target."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.core.arrays import per_image_normal
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.denoiser import apply_network, network_time
from diffusion_jax.core.forward import add_noise
from diffusion_jax.core.parameterization import Parameterization
from diffusion_jax.core.schedules import NoiseSchedule
from diffusion_jax.core.types import Array, Key, Metrics, Network, NoiseLevel, Params

DiffusionLoss = Callable[[Params, Array, Condition, Key], tuple[Array, Metrics]]


def uniform(level: NoiseLevel) -> Array:
    """Weight 1 at every level: with eps-prediction DDPM's L_simple.

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 14.
    """
    return jnp.ones_like(level.alpha)


def simple(
    network: Network,
    schedule: NoiseSchedule,
    parameterization: Parameterization,
    *,
    weight: Callable[[NoiseLevel], Array] = uniform,
    time_input: Callable[[NoiseLevel], Array] = network_time,
) -> DiffusionLoss:
    """Makes the loss  E_{t, eps} [ weight(t) · mean_pixels (network - target)² ].

    The mean is over pixels and channels, as in the released code; the paper writes a sum.

    Args:
      network: (params, x, t, cond, keys) -> output of x's shape.
      schedule: draws t and gives the level.
      parameterization: gives the target.
      weight: level [B] -> [B].
      time_input: what the network is told about the level.

    Returns:
      (params, x0 [B, ...], cond, keys [B]) -> (loss [], {}); example i depends on keys[i]
      alone. There are no metrics beside the loss.

    Raises:
      ValueError: if the network's output has not x0's shape.

    Source: Ho et al. 2020 (arXiv:2006.11239), algorithm 1 and eq. 14.
    """
    apply = apply_network(network, parameterization, time_input)

    def loss(params: Params, x0: Array, cond: Condition, keys: Key) -> tuple[Array, Metrics]:
        keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
        key_t, key_eps, key_dropout = keys[:, 0], keys[:, 1], keys[:, 2]
        level = schedule(schedule.sample_t(key_t))
        eps = per_image_normal(key_eps, x0)
        output = apply(params, add_noise(x0, eps, level), level, cond, key_dropout)
        if output.shape != x0.shape:
            raise ValueError(f"the network returned {output.shape} for x0 of {x0.shape}")
        error = output - parameterization.target(x0, eps, level)
        per_image = jnp.mean(error**2, axis=tuple(range(1, x0.ndim)))
        value = jnp.mean(weight(level) * per_image)
        return value, {}

    return loss
