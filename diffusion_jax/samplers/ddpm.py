"""Ancestral sampling: draw from the posterior q(x_s | x_t, x̂0) with a chosen variance."""

import jax.numpy as jnp
from flax import struct

from diffusion_jax.core.arrays import per_image_normal
from diffusion_jax.core.forward import posterior_mean, posterior_std, transition
from diffusion_jax.core.types import Array, Key, NoiseLevel
from diffusion_jax.samplers.base import Denoise, SamplerState, StepInfo

VARIANCES = ("small", "large", "interpolated", "learned_range")


@struct.dataclass
class DDPM:
    """Ancestral sampling of the reverse chain.

    x_s = mean of q(x_s | x_t, x̂0) + std z. With σ²_{t|s} the forward variance (β on the
    training chain) and β̃ the posterior variance, std² is β̃ ("small"), σ²_{t|s} ("large",
    the paper's best FID at T steps), or exp(v log σ²_{t|s} + (1 - v) log β̃) with v given
    ("interpolated") or said by the network ("learned_range"). No noise is added in a step that
    ends at sigma = 0.

    Attributes:
      variance: "small", "large", "interpolated" or "learned_range".
      fraction: v in [0, 1], with "interpolated" only.

    Raises:
      ValueError: if the variance is unknown, if `fraction` is missing or given in vain, or if
        "learned_range" meets a denoiser that predicts no variance.

    Source: Ho et al. 2020 (arXiv:2006.11239), algorithm 2 and section 3.2; learned range:
    Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 15; interpolated: Ho & Salimans 2022
    (arXiv:2207.12598), section 2.
    """

    variance: str = struct.field(pytree_node=False, default="large")
    fraction: float | None = None

    def __post_init__(self):
        if self.variance not in VARIANCES:
            raise ValueError(f"variance must be one of {VARIANCES}, got {self.variance!r}")
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
        x0, var_frac = denoise(state.x, level)
        mean = posterior_mean(state.x, x0, level, next_level)
        std = self._std(var_frac, level, next_level)
        return SamplerState(mean + std * per_image_normal(keys, state.x))

    def _std(self, var_frac: Array | None, level: NoiseLevel, next_level: NoiseLevel) -> Array:
        _, large = transition(level, next_level)
        small = posterior_std(level, next_level)
        ends_clean = next_level.sigma == 0
        if self.variance == "small":
            return small
        if self.variance == "large":
            return jnp.where(ends_clean, 0.0, large)
        if self.variance == "interpolated":
            var_frac = self.fraction
        if var_frac is None:
            raise ValueError(
                "variance 'learned_range' needs a denoiser that predicts var_frac; build it with "
                "learned_variance=True or choose 'small' or 'large'"
            )
        # log 0 at the clean end would make NaN of 0 · inf; the step is noiseless there anyway.
        log_small = jnp.log(jnp.where(ends_clean, large, small))
        log_std = var_frac * jnp.log(large) + (1.0 - var_frac) * log_small
        return jnp.where(ends_clean, 0.0, jnp.exp(log_std))
