"""Ancestral sampling: draw from the posterior q(x_s | x_t, x̂0) with a chosen variance."""

import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.arrays import per_example, per_image_normal
from diffusion_jax.core.forward import posterior_mean, posterior_std, transition
from diffusion_jax.core.types import Array, Key, NoiseLevel, Prediction
from diffusion_jax.core.variance import check_variance, reverse_log_variance
from diffusion_jax.samplers.base import Denoise, SamplerState, StepInfo

# What the published code that `noise_at_end` reproduces clips β̃ at.
_LEAST_VARIANCE = 1e-20
_VARIANTS = ("exact", "unclip")


def _rounded(rate: Array) -> Array:
    """The square of a rate at float32's resolution near 1, multiples of 2^-24."""
    return jnp.round(rate**2 * 2.0**24) / 2.0**24


def _rounded_posterior_mean(
    x: Array, x0: Array, level: NoiseLevel, next_level: NoiseLevel
) -> Array:
    """Mean of q(x_s | x_t, x0) with σ² and α²_{t|s} rounded, but β = σ²_{t|s} precise."""
    alpha, std = transition(level, next_level)
    variance, next_variance = _rounded(level.sigma), _rounded(next_level.sigma)
    towards_x = per_example(jnp.sqrt(_rounded(alpha)) * next_variance / variance, x)
    return towards_x * x + per_example(next_level.alpha * std**2 / variance, x) * x0


def _rounding(level: NoiseLevel, next_level: NoiseLevel) -> Array:
    """What becomes of σ_s / σ_t when the squares are rounded, as a factor; 1 where σ_s = 0."""
    ratio = jnp.sqrt(_rounded(next_level.sigma) / _rounded(level.sigma))
    is_clean = next_level.sigma == 0
    return jnp.where(
        is_clean, 1.0, ratio * level.sigma / jnp.where(is_clean, 1.0, next_level.sigma)
    )


@struct.dataclass
class DDPM:
    """Ancestral sampling of the reverse chain.

    x_s = mean of q(x_s | x_t, x̂0) + std z. With σ²_{t|s} the forward variance (β on the
    training chain) and β̃ the posterior variance, std² is β̃ ("small"), σ²_{t|s} ("large",
    the paper's best FID at T steps), or exp(v log σ²_{t|s} + (1 - v) log β̃) with v given
    ("interpolated") or said by the network ("learned_range"), or the network's own ("learned",
    for the steps of training only). No noise is added in a step that ends at sigma = 0.

    Attributes:
      variance: "small", "large", "interpolated", "learned_range" or "learned".
      fraction: v in [0, 1], with "interpolated" only.
      noise_at_end: add noise in the step to sigma = 0 too, with β̃ = 1e-20 there, unless it starts
        at t = 0. It spoils the picture; diffusers does so.
      variant: "exact", or "unclip" for the mean and β̃ of diffusers' UnCLIPScheduler, which
        divides a precise β by a σ² = 1 - ᾱ that float32 has rounded to multiples of 2^-24, as it
        has α²_{t|s}. Its last step returns x̂0 times a number that is off by up to a thousandth.

    Raises:
      ValueError: if the variance or the variant is unknown, if `fraction` is missing or given in
        vain, or if a learned variance meets a denoiser that predicts none.

    Source: Ho et al. 2020 (arXiv:2006.11239), algorithm 2 and section 3.2; learned range:
    Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 15; interpolated: Ho & Salimans 2022
    (arXiv:2207.12598), section 2; noise_at_end: none, a mistake in use.
    """

    variance: str = struct.field(pytree_node=False, default="large")
    fraction: float | None = None
    noise_at_end: bool = struct.field(pytree_node=False, default=False)
    variant: str = struct.field(pytree_node=False, default="exact")

    def __post_init__(self):
        check_variance(self.variance)
        if self.variant not in _VARIANTS:
            raise ValueError(f"variant must be one of {_VARIANTS}, got {self.variant!r}")
        if (self.fraction is not None) != (self.variance == "interpolated"):
            raise ValueError(
                "fraction belongs to the variance 'interpolated' and must be given there, got "
                f"{self.fraction} with {self.variance!r}"
            )

    def validate(self) -> None:
        """Raises ValueError unless fraction lies in [0, 1]; for values, not tracers."""
        if self.fraction is not None and not 0.0 <= float(self.fraction) <= 1.0:
            raise ValueError(f"fraction must lie in [0, 1], got {self.fraction}")

    def init(self, x_T: Array) -> SamplerState:
        return SamplerState(x_T)

    def moments(
        self, prediction: Prediction, x: Array, level: NoiseLevel, next_level: NoiseLevel
    ) -> tuple[Array, Array]:
        """Mean and standard deviation of p(x_s | x_t), for x [B, ...].

        Returns:
          The mean [B, ...] and the std, which broadcasts to it. In the step that ends at
          sigma = 0 the std is 0 with "small", what the network says with "learned" and else
          σ_{t|s}, although `step` adds no noise there.
        """
        mean = posterior_mean if self.variant == "exact" else _rounded_posterior_mean
        mean = mean(x, prediction.x0, level, next_level)
        rounding = 1.0 if self.variant == "exact" else _rounding(level, next_level)
        if self.variance == "small":
            return mean, per_example(posterior_std(level, next_level) * rounding, x)
        log_variance = reverse_log_variance(
            prediction,
            level,
            next_level,
            variance=self.variance,
            fraction=self.fraction,
            least=_LEAST_VARIANCE if self.noise_at_end and self.variance != "large" else None,
        )
        if self.variant == "unclip" and self.variance == "learned_range":
            small = per_example(2.0 * jnp.log(rounding), x)
            log_variance = log_variance + (1.0 - prediction.var_frac) * small
        return mean, jnp.exp(0.5 * log_variance)

    def adds_noise(self, level: NoiseLevel, next_level: NoiseLevel) -> Array:
        """Whether the step draws noise, [] bool."""
        at_end = next_level.sigma == 0
        return ~(at_end & (level.t == 0) if self.noise_at_end else at_end)

    def step(
        self,
        keys: Key,
        denoise: Denoise,
        state: SamplerState,
        level: NoiseLevel,
        next_level: NoiseLevel,
        info: StepInfo,
    ) -> SamplerState:
        del info
        mean, std = self.moments(denoise(state.x, level), state.x, level, next_level)
        std = jnp.where(self.adds_noise(level, next_level), std, 0.0)
        return SamplerState(mean + std * per_image_normal(keys, state.x))
