"""DPM-Solver++: exponential integrators in the half log-SNR."""

import jax.numpy as jnp
from flax import struct

from diffusion_jax.core.types import Array, Key, NoiseLevel
from diffusion_jax.samplers.base import Denoise, StepInfo


@struct.dataclass
class MultistepState:
    """The sample and the previous prediction.

    Attributes:
      x: [B, ...] the sample.
      x0: [B, ...] the previous x̂0; zero before the first step.
      half_log_snr: [] λ where it was made; -inf before the first step.

    Source: none; a convention of this library.
    """

    x: Array
    x0: Array
    half_log_snr: Array


@struct.dataclass
class DPMSolverMultistep:
    """DPM-Solver++ of order 1 or 2 in multistep form ("2M"), one call per step.

    With λ = log(α/σ), h = λ_s - λ_t, and h' the previous step:
    D = x̂0 + h / (2h') (x̂0 - x̂0') and x_s = (σ_s/σ_t) x_t + (α_s - α_t σ_s/σ_t) D.
    Where a step is infinitely long (no history yet, sigma = 0 at the end, alpha = 0 at the
    start) D = x̂0, the first-order step, which is DDIM's.

    Attributes:
      order: 1 or 2.

    Raises:
      ValueError: if the order is another.

    Source: Lu et al. 2022 (arXiv:2211.01095), algorithm 2.
    """

    order: int = struct.field(pytree_node=False, default=2)

    def __post_init__(self):
        if self.order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {self.order}")

    def init(self, x_T: Array) -> MultistepState:
        missing = jnp.asarray(-jnp.inf, x_T.dtype)
        return MultistepState(x_T, jnp.zeros_like(x_T), missing)

    def step(
        self,
        keys: Key,
        denoise: Denoise,
        state: MultistepState,
        level: NoiseLevel,
        next_level: NoiseLevel,
        info: StepInfo,
    ) -> MultistepState:
        del keys, info
        x0 = denoise(state.x, level).x0
        here = jnp.log(level.alpha) - jnp.log(level.sigma)
        d = x0
        if self.order == 2:
            step = jnp.log(next_level.alpha) - jnp.log(next_level.sigma) - here
            previous = here - state.half_log_snr
            both_finite = jnp.isfinite(step) & jnp.isfinite(previous)
            weight = jnp.where(both_finite, step, 0.0) / jnp.where(both_finite, 2 * previous, 1.0)
            d = x0 + weight * (x0 - state.x0)
        ratio = next_level.sigma / level.sigma
        x = ratio * state.x + (next_level.alpha - level.alpha * ratio) * d
        return MultistepState(x, x0, here.astype(state.half_log_snr.dtype))
