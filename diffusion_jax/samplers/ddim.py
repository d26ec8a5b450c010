"""DDIM: a first-order step between any two levels, with as much noise as wanted."""

from diffusion_jax.core import struct
from diffusion_jax.core.arrays import per_image_normal
from diffusion_jax.core.types import Array, Key, NoiseLevel
from diffusion_jax.samplers.ancestral import ancestral_rates
from diffusion_jax.samplers.base import (
    Denoise,
    SamplerState,
    StepInfo,
    check_noise_from,
    predicted_noise,
)


@struct.dataclass
class DDIM:
    """DDIM: one network call per step, deterministic at eta = 0, DDPM at eta = 1.

    x_s = α_s x̂0 + √(σ_s² - std²) ε̂ + std z,  std = eta · posterior std of q(x_s | x_t, x0).

    Attributes:
      eta: scale of the injected noise relative to the DDPM posterior, in [0, 1].
      noise_from: the x̂0 that ε̂ is derived from, which matters where x̂0 is thresholded. "x0": the
        thresholded one, so that α_t x̂0 + σ_t ε̂ is still x_t, as ADM does. "raw_x0": the one from
        before, which leaves ε̂ as the network said it and moves x off its path; diffusers' default
        (use_clipped_model_output=False).

    Raises:
      ValueError: if noise_from is unknown.

    Source: Song et al. 2021 (arXiv:2010.02502), eq. 12 with the std of eq. 16; ε̂ from the
    thresholded x̂0: Dhariwal & Nichol 2021 (arXiv:2105.05233), released code.
    """

    eta: float = 0.0
    noise_from: str = struct.field(pytree_node=False, default="x0")

    def __post_init__(self):
        check_noise_from(self.noise_from)

    def validate(self) -> None:
        """Raises ValueError unless eta lies in [0, 1]; for values, not tracers."""
        if not 0.0 <= float(self.eta) <= 1.0:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")

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
        prediction = denoise(state.x, level)
        x0, eps = prediction.x0, predicted_noise(prediction, state.x, level, self.noise_from)
        towards_x_t, std = ancestral_rates(level, next_level, self.eta)
        noise = per_image_normal(keys, state.x)
        return SamplerState(next_level.alpha * x0 + towards_x_t * eps + std * noise)
