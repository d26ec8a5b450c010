"""Solvers of the probability-flow ODE in the coordinates x/α and σ/α: Euler and Heun."""

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_jax.core.types import Array, Key, NoiseLevel
from diffusion_jax.samplers.base import Denoise, SamplerState, StepInfo, noise_from_x0


@struct.dataclass
class Euler:
    """Euler's method: with u = x/α and r = σ/α the ODE is du/dr = ε̂, one call per step.

    u_s = u_t + (r_s - r_t) ε̂, that is x_s = α_s x̂0 + σ_s ε̂, the DDIM step at eta = 0. Written
    this way α_t = 0 is no special case.

    Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 1 without its correction.
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
        return SamplerState(next_level.alpha * x0 + next_level.sigma * eps)


@struct.dataclass
class Heun:
    """Heun's second-order method: an Euler step, corrected by the slope at its end.

    x_s = α_s x̂0 + σ_s ε̂ + (σ_s - σ_t α_s / α_t) (ε̂' - ε̂) / 2, ε̂' from the Euler step's end.
    Two calls a step, 2N - 1 in all: a step that ends at sigma = 0 is Euler's, and so is one
    that starts at alpha = 0, where r = σ/α is infinite.

    Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 1.
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
            next_eps = noise_from_x0(x, denoise(x, next_level).x0, next_level)
            ratio = next_level.alpha / jnp.where(level.alpha > 0, level.alpha, 1.0)
            return x + (next_level.sigma - level.sigma * ratio) * (next_eps - eps) / 2

        can_correct = (level.alpha > 0) & (next_level.sigma > 0)
        return SamplerState(jax.lax.cond(can_correct, corrected, lambda x: x, euler))
