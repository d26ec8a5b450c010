"""KDPM2: the midpoint method in log-SNR, DPM-Solver-2 in the words of k-diffusion."""

import jax
import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.types import Array, Key, NoiseLevel
from diffusion_jax.samplers.base import Denoise, SamplerState, StepInfo, need_middle, noise_from_x0


def midpoint_step(
    x: Array,
    denoise: Denoise,
    level: NoiseLevel,
    middle: NoiseLevel,
    next_level: NoiseLevel,
    down: Array,
) -> Array:
    """x_s without new noise: Euler's step to `middle`, and from x on with the slope there.

    x_s = (α_s/α_t) x_t + (down - σ_t α_s/α_t) ε̂_m. Euler's step α_s x̂0 + down ε̂ where a log-SNR
    is infinite.

    Args:
      x: [B, ...] at `level`.
      down: [] the noise rate to arrive at, at most that of the next level.

    Source: Karras et al. 2022 (arXiv:2206.00364), appendix D.2.
    """
    x0 = denoise(x, level).x0
    eps = noise_from_x0(x, x0, level)

    def midpoint(_):
        inside = middle.alpha * x0 + middle.sigma * eps
        slope = noise_from_x0(inside, denoise(inside, middle).x0, middle)
        ratio = next_level.alpha / jnp.where(level.alpha > 0, level.alpha, 1.0)
        return ratio * x + (down - level.sigma * ratio) * slope

    euler = next_level.alpha * x0 + down * eps
    has_middle = (level.alpha > 0) & (next_level.sigma > 0)
    return jax.lax.cond(has_middle, midpoint, lambda x: x, euler)


@struct.dataclass
class KDPM2:
    """Second-order method that takes the slope halfway through the step, DPM-Solver-2 at r1 = 1/2.

    With ε̂ of x_t, x_m = α_m x̂0 + σ_m ε̂ at the level m whose σ/α is the geometric mean of both
    ends', and ε̂_m of x_m: x_s = (α_s/α_t) x_t + (σ_s - σ_t α_s/α_t) ε̂_m.
    Two calls a step, 2N - 1 in all: a step that ends at sigma = 0 is Euler's, and so is one that
    starts at alpha = 0. On grids of `fit_grid`.

    Source: Karras et al. 2022 (arXiv:2206.00364), appendix D.2; Lu et al. 2022
    (arXiv:2206.00927), algorithm 1 with r1 = 1/2.
    """

    middle = "log_snr"

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
        del keys
        middle = need_middle(self, info)
        x = midpoint_step(state.x, denoise, level, middle, next_level, next_level.sigma)
        return SamplerState(x)
