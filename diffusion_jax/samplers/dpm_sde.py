"""DPM-Solver++ SDE: a two-stage solver of the reverse SDE whose stages share one Brownian path."""

import math

import jax
import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.arrays import fold_in_each, per_image_normal
from diffusion_jax.core.types import Array, Key, NoiseLevel
from diffusion_jax.samplers.ancestral import ancestral_rates
from diffusion_jax.samplers.base import Denoise, SamplerState, StepInfo, need_middle, noise_from_x0

NOISES = ("path", "independent")


@struct.dataclass
class DPMSolverSDE:
    """DPM-Solver++ SDE of two stages: half a step, and a whole one with x̂0 from the middle.

    With h = log(α_s/σ_s) - log(α_t/σ_t), and m halfway in log-SNR:
    x_m = (σ_m/σ_t) e^{-h/2} x_t + α_m (1 - e^{-h}) x̂0(x_t) + σ_m √(1 - e^{-h}) z_m,
    x_s = (σ_s/σ_t) e^{-h} x_t + α_s (1 - e^{-2h}) x̂0(x_m) + σ_s √(1 - e^{-2h}) z_s.
    Both noises are increments of one Brownian path, whose clock is the SNR. The first half of the
    path gives z_m, and z_s = √ρ z_m + √(1 - ρ) z with ρ = 1 / (1 + e^h). Drawn independently they
    would miss how x̂0(x_m) moves with the noise of the step, and the method would be of weak order
    1 instead of 2.
    Two calls a step, 2N - 1 in all: a step that ends at sigma = 0 or starts at alpha = 0 is that
    of EulerAncestral. On grids of `fit_grid`.

    Attributes:
      s_noise: factor of the noise, at least 0; 1 for the true process.
      noise: "path", or "independent" for z_s = z: what the published code computes when its
        Brownian path is replaced by one unit normal a stage.

    Raises:
      ValueError: if the noise is unknown.

    Source: Lu et al. 2022 (arXiv:2211.01095), section 5 (SDE-DPM-Solver++, its first-order step in
    both stages); k-diffusion, sample_dpmpp_sde with r = 1/2, whose path has the clock σ/α.
    """

    s_noise: float = 1.0
    noise: str = struct.field(pytree_node=False, default="path")

    middle = "log_snr"

    def __post_init__(self):
        if self.noise not in NOISES:
            raise ValueError(f"noise must be one of {NOISES}, got {self.noise!r}")

    def validate(self) -> None:
        """Raises ValueError unless s_noise is at least 0 and finite; for values, not tracers."""
        if not 0.0 <= float(self.s_noise) < math.inf:
            raise ValueError(f"s_noise must be at least 0 and finite, got {self.s_noise}")

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
        middle = need_middle(self, info)
        first = self.s_noise * per_image_normal(keys, state.x)
        second = self.s_noise * per_image_normal(fold_in_each(keys, 1), state.x)
        x0 = denoise(state.x, level).x0

        def towards(end, x0, noise):
            down, up = ancestral_rates(level, end)
            eps = noise_from_x0(state.x, x0, level)
            return end.alpha * x0 + down * eps + up * noise

        def two_stages(_):
            whole = second
            if self.noise == "path":
                share = _share_of_first_half(level, next_level)
                whole = jnp.sqrt(share) * first + jnp.sqrt(1.0 - share) * second
            from_middle = denoise(towards(middle, x0, first), middle).x0
            return towards(next_level, from_middle, whole)

        has_middle = (level.alpha > 0) & (next_level.sigma > 0)
        one_stage = towards(next_level, x0, first)
        return SamplerState(jax.lax.cond(has_middle, two_stages, lambda x: x, one_stage))


def _share_of_first_half(level: NoiseLevel, next_level: NoiseLevel) -> Array:
    """ρ = (SNR_m - SNR_t) / (SNR_s - SNR_t) = r_s / (r_s + r_t), r = σ/α and r_m² = r_s r_t."""
    here, there = level.sigma * next_level.alpha, next_level.sigma * level.alpha
    return there / (there + here)
