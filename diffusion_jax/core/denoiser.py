"""make_denoiser: turns any network into the one function that samplers know."""

from collections.abc import Callable

import jax.numpy as jnp

from diffusion_jax.core.condition import Condition
from diffusion_jax.core.forward import log_snr
from diffusion_jax.core.parameterization import Parameterization
from diffusion_jax.core.types import Array, DenoiseFn, Network, NoiseLevel, Params, Prediction


def network_time(level: NoiseLevel) -> Array:
    """The schedule's own t, the time input of DDPM, ADM and Stable Diffusion.

    Source: Ho et al. 2020 (arXiv:2006.11239), section 4.
    """
    return level.t


def scaled_time(level: NoiseLevel) -> Array:
    """1000 · t: a continuous t in [0, 1] for embeddings made for 1000 steps.

    Source: Saharia et al. 2022 (arXiv:2205.11487), released descendants.
    """
    return 1000.0 * level.t


def edm_time(level: NoiseLevel) -> Array:
    """c_noise = log(σ / α) / 4.

    Source: Karras et al. 2022 (arXiv:2206.00364), table 1.
    """
    return -log_snr(level) / 8.0


TIME_INPUTS = {"t": network_time, "scaled_t": scaled_time, "edm": edm_time}


def apply_network(
    network: Network,
    parameterization: Parameterization,
    time_input: Callable[[NoiseLevel], Array],
) -> Callable[..., Array]:
    """The network with its input scaled and its time made from the level, output in float32.

    Returns:
      (params, x [B, ...], level, cond, keys=None) -> [B, ...], in float32 (float64 where x is).

    Source: none; a convention of this library.
    """

    def apply(params, x, level, cond, keys=None):
        t = jnp.broadcast_to(time_input(level), x.shape[:1])
        output = network(params, parameterization.scale_input(x, level), t, cond, keys=keys)
        return output.astype(jnp.promote_types(jnp.float32, x.dtype))

    return apply


def make_denoiser(
    network: Network,
    parameterization: Parameterization,
    *,
    time_input: Callable[[NoiseLevel], Array] = network_time,
    learned_variance: bool = False,
) -> Callable[[Params], DenoiseFn]:
    """Makes denoise(x_t, level, cond) -> x0 of a network and its parameterization.

    Args:
      network: (params, x, t, cond) -> output with x's channels, or twice as many.
      parameterization: what the output means.
      time_input: what the network is told about the level.
      learned_variance: the second half of the output's channels is o in [-1, 1], and
        var_frac = (o + 1) / 2.

    Returns:
      params -> denoiser. Call it inside of the compiled function, so that params stay an
      argument.

    Raises:
      ValueError: if the output's channels do not fit x (twice x's with learned variance).

    Source: k-diffusion's convention D(x, σ) -> x0; learned variance: Nichol & Dhariwal 2021
    (arXiv:2102.09672), eq. 15.
    """
    apply = apply_network(network, parameterization, time_input)

    def with_params(params: Params) -> DenoiseFn:
        def denoise(x: Array, level: NoiseLevel, cond: Condition = Condition()) -> Prediction:
            output = apply(params, x, level, cond)
            expected = x.shape[:-1] + (x.shape[-1] * (2 if learned_variance else 1),)
            if output.shape != expected:
                raise ValueError(
                    f"the network returned {output.shape} for x of {x.shape}, expected {expected}; "
                    f"learned_variance is {learned_variance}"
                )
            var_frac = None
            if learned_variance:
                output, raw = jnp.split(output, 2, axis=-1)
                var_frac = (raw + 1.0) / 2.0
            return Prediction(parameterization.to_x0(output, x, level), var_frac)

        return denoise

    return with_params
