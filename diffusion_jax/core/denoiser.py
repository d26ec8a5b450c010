"""make_denoiser: turns any network into the one function that samplers know."""

from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class RescaledTime:
    """t · 1000 / T: times of a discrete schedule in the range of 1000 steps, whatever T is.

    Attributes:
      num_timesteps: T.

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672), released code (rescale_timesteps).
    """

    num_timesteps: int

    def __call__(self, level: NoiseLevel) -> Array:
        return level.t * (1000.0 / self.num_timesteps)


LEARNED_VARIANCES = ("range", "log", "variance")
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


def check_learned_variance(learned_variance: str | None) -> None:
    """Raises ValueError unless it is None or a meaning in LEARNED_VARIANCES.

    Source: none; a convention of this library.
    """
    if learned_variance is not None and learned_variance not in LEARNED_VARIANCES:
        raise ValueError(
            f"learned_variance must be None or one of {LEARNED_VARIANCES}, got {learned_variance!r}"
        )


def split_output(
    output: Array, x: Array, learned_variance: str | None
) -> tuple[Array, Array | None]:
    """The two halves of a network's channels: what predicts x0, and what the variance.

    Args:
      output: [B, ..., C], or [B, ..., 2C] with learned variance.
      x: [B, ..., C] what the network was shown.
      learned_variance: see `make_denoiser`.

    Returns:
      [B, ..., C], and [B, ..., C] or None.

    Raises:
      ValueError: if the output's shape does not fit x.

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672), section 3.1.
    """
    expected = x.shape[:-1] + (x.shape[-1] * (1 if learned_variance is None else 2),)
    if output.shape != expected:
        raise ValueError(
            f"the network returned {output.shape} for x of {x.shape}, expected {expected}; "
            f"learned_variance is {learned_variance!r}"
        )
    if learned_variance is None:
        return output, None
    first, second = jnp.split(output, 2, axis=-1)
    return first, second


def variance_fields(raw: Array | None, learned_variance: str | None) -> dict[str, Array]:
    """The field of a Prediction that the second half of the channels [B, ..., C] stands for.

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 15.
    """
    if learned_variance is None:
        return {}
    if learned_variance == "range":
        return {"var_frac": (raw + 1.0) / 2.0}
    return {"log_var": raw if learned_variance == "log" else jnp.log(raw)}


def make_denoiser(
    network: Network,
    parameterization: Parameterization,
    *,
    time_input: Callable[[NoiseLevel], Array] = network_time,
    learned_variance: str | None = None,
) -> Callable[[Params], DenoiseFn]:
    """Makes denoise(x_t, level, cond) -> x0 of a network and its parameterization.

    Args:
      network: (params, x, t, cond) -> output with x's channels, or twice as many.
      parameterization: what the (first half of the) output means.
      time_input: what the network is told about the level.
      learned_variance: what the second half of the output's channels o means. None: there is
        none. "range": var_frac = (o + 1) / 2, where o may leave [-1, 1]. "log": log_var = o.
        "variance": log_var = log o.

    Returns:
      params -> denoiser. Call it inside of the compiled function, so that params stay an
      argument.

    Raises:
      ValueError: if learned_variance is unknown, or the output's channels do not fit x (twice
        x's with learned variance).

    Source: k-diffusion's convention D(x, σ) -> x0; learned variance: Nichol & Dhariwal 2021
    (arXiv:2102.09672), eq. 15 ("range") and released code ("log"); "variance": diffusers' DDPM
    scheduler, variance_type "learned".
    """
    check_learned_variance(learned_variance)
    apply = apply_network(network, parameterization, time_input)

    def with_params(params: Params) -> DenoiseFn:
        def denoise(x: Array, level: NoiseLevel, cond: Condition = Condition()) -> Prediction:
            output = apply(params, x, level, cond)
            output, raw = split_output(output, x, learned_variance)
            x0 = parameterization.to_x0(output, x, level)
            return Prediction(x0, **variance_fields(raw, learned_variance))

        return denoise

    return with_params
