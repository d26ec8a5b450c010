"""Samplers for flow matching: Heun along the straight path, and prediction with fresh noise.

Euler along the straight path is `Euler`: x + (σ_s - σ_t) u with the velocity u = ε̂ - x̂0 is
α_s x̂0 + σ_s ε̂ where alpha = 1 - sigma.
"""

import jax

from diffusion_jax.core import struct
from diffusion_jax.core.arrays import per_image_normal
from diffusion_jax.core.types import Array, Key, NoiseLevel
from diffusion_jax.samplers.base import Denoise, SamplerState, StepInfo, noise_from_x0


@struct.dataclass
class FlowHeun:
    """Heun's method in the coordinates of the straight path, y = x/(α + σ) and τ = σ/(α + σ).

    There dy/dτ is the velocity u = ε̂ - x̂0, and y_s = y_t + (τ_s - τ_t) (u + u') / 2 with u' from
    the end of the Euler step. On a flow-matching path y = x and τ = σ. `Heun` solves the same ODE
    in x/α and σ/α, which gives other numbers at the same order; here a start at alpha = 0 is no
    special case. Two calls a step, 2N - 1 in all: a step that ends at sigma = 0 is Euler's.

    Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 1, on the ODE of Liu et al. 2022
    (arXiv:2209.03003), eq. 1.
    """

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
        del keys, info
        x0 = denoise(state.x, level).x0
        eps = noise_from_x0(state.x, x0, level)
        euler = next_level.alpha * x0 + next_level.sigma * eps

        def corrected(x):
            next_x0 = denoise(x, next_level).x0
            next_eps = noise_from_x0(x, next_x0, next_level)
            ratio = (next_level.alpha + next_level.sigma) / (level.alpha + level.sigma)
            turn = (next_eps - next_x0) - (eps - x0)
            return x + (next_level.sigma - level.sigma * ratio) * turn / 2

        return SamplerState(jax.lax.cond(next_level.sigma > 0, corrected, lambda x: x, euler))


@struct.dataclass
class Renoise:
    """Predicts the clean data and adds fresh noise up to the next level.

    x_s = α_s x̂0 + σ_s z. No noise of x_t is kept, more than the reverse process replaces: right
    for models that map noise to data in few steps, while for others the errors of x̂0 are drawn
    anew in each step and do not vanish with many. The same as ConsistencyMultistep(0.0, 1.0), and
    as LCM(sigma_data=0.0), under the name that flow models know it by.

    Source: Song et al. 2023 (arXiv:2303.01469), algorithm 1; "stochastic_sampling" of
    diffusers' flow-matching Euler scheduler.
    """

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
        x0 = denoise(state.x, level).x0
        noise = per_image_normal(keys, state.x)
        return SamplerState(next_level.alpha * x0 + next_level.sigma * noise)
