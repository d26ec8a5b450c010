"""Samplers of networks that jump to the end of the flow: consistency models, LCM and TCD."""

import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.arrays import per_image_normal
from diffusion_jax.core.forward import root
from diffusion_jax.core.grid import Grid, schedule_time
from diffusion_jax.core.schedules import NoiseSchedule
from diffusion_jax.core.types import Array, Key, NoiseLevel
from diffusion_jax.samplers.base import (
    Denoise,
    SamplerState,
    StepInfo,
    need_middle,
    noise_from_x0,
)


def _need_nonnegative(**values: Array | float) -> None:
    for name, value in values.items():
        if not float(value) >= 0.0:
            raise ValueError(f"{name} must be at least 0, got {value}")


@struct.dataclass
class ConsistencyMultistep:
    """Multistep sampling of a consistency model: jump to the end, add noise, jump again.

    x_s = α_s (f + s_noise √(r_s² - sigma_min²) z) with r = σ/α and f = x̂0 of the denoiser, which
    must be a consistency function: where the flow from x_t/α_t arrives at σ/α = sigma_min (see
    `ConsistencyPreconditioning`). Steps to r_s <= sigma_min return α_s f.

    Attributes:
      sigma_min: the σ/α that the flow ends at, ε in the paper; 0 for networks that predict clean
        data.
      s_noise: scale of the noise, 1 in the paper.

    Source: Song et al. 2023 (arXiv:2303.01469), algorithm 1.
    """

    sigma_min: float = 0.002
    s_noise: float = 1.0

    def validate(self) -> None:
        """Raises ValueError unless both are at least 0; for values, not tracers."""
        _need_nonnegative(sigma_min=self.sigma_min, s_noise=self.s_noise)

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
        end = next_level.alpha * denoise(state.x, level).x0
        variance = next_level.sigma**2 - (next_level.alpha * self.sigma_min) ** 2
        std = self.s_noise * root(variance)
        return SamplerState(end + std * per_image_normal(keys, state.x))


@struct.dataclass
class LCM:
    """Latent consistency model: x_s = α_s f + σ_s z, f = c_skip x_t + c_out x̂0.

    With τ = timestep_scaling · t, t the time that the network is told, f is x_t at t = 0:
    c_skip = σ_d² / (τ² + σ_d²), c_out = τ / √(τ² + σ_d²).
    The default scaling is for discrete times 0 … 999, where f is x̂0 from t = 1 on but for a part
    in a thousand; for times in [0, 1] it would be 10^4.

    Attributes:
      timestep_scaling: s > 0.
      sigma_data: σ_d; 0 leaves x̂0 as it is.

    Source: Luo et al. 2023 (arXiv:2310.04378), eq. 9 and algorithm 3; the coefficients: its
    released code.
    """

    timestep_scaling: float = 10.0
    sigma_data: float = 0.5

    def validate(self) -> None:
        """Raises ValueError unless scaling > 0 and sigma_data >= 0; for values, not tracers."""
        _need_nonnegative(sigma_data=self.sigma_data)
        if not float(self.timestep_scaling) > 0.0:
            raise ValueError(f"timestep_scaling must be positive, got {self.timestep_scaling}")

    def init(self, x_T: Array) -> SamplerState:
        return SamplerState(x_T)

    def consistency(self, x: Array, x0: Array, level: NoiseLevel) -> Array:
        """f(x_t, t), [B, ...], of x_t and x̂0 there."""
        tau = self.timestep_scaling * level.t
        total = tau**2 + self.sigma_data**2
        at_zero = total == 0.0
        total = jnp.where(at_zero, 1.0, total)
        c_skip = jnp.where(at_zero, 1.0, self.sigma_data**2 / total)
        return c_skip * x + tau / jnp.sqrt(total) * x0

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
        end = self.consistency(state.x, denoise(state.x, level).x0, level)
        noise = per_image_normal(keys, state.x)
        return SamplerState(next_level.alpha * end + next_level.sigma * noise)


@struct.dataclass
class TCD:
    """Trajectory consistency: jump beyond the next level, and return to it with noise.

    x_m = α_m x̂0 + σ_m ε̂ at the time m = (1 - eta) s, then x_s = (α_s/α_m) x_m + √(σ_s² -
    (α_s σ_m/α_m)²) z. Times count from the schedule's least noisy one; where s is clean, so is m.
    At eta = 0 it is DDIM, at eta = 1 LCM without its boundary but with the least noise in x̂0.

    Attributes:
      eta: γ in the paper, in [0, 1]. `fit_grid` puts the levels m into the grid: after
        changing eta fit the grid as it was made, a fitted one keeps its levels.

    Source: Zheng et al. 2024 (arXiv:2402.19159), algorithm 4 ("strategic stochastic sampling").
    """

    eta: float = 0.3

    def validate(self) -> None:
        """Raises ValueError unless eta lies in [0, 1]; for values, not tracers."""
        if not 0.0 <= float(self.eta) <= 1.0:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")

    def middle(self, grid: Grid, schedule: NoiseSchedule) -> NoiseLevel:
        """The levels m of a grid, every field [MAX]."""
        there = grid.ends
        if there is None:
            there = NoiseLevel(*(jnp.asarray(field)[1:] for field in grid.levels))
        end = schedule_time(schedule, there)
        t = schedule.t_min + (1.0 - self.eta) * (end - schedule.t_min)
        fields = zip(schedule(t), there, strict=True)
        # The clean level is beyond the schedule; its t is that of the least noisy level.
        return NoiseLevel(*(jnp.where(there.sigma > 0, m, end) for m, end in fields))

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
        x0 = denoise(state.x, level).x0
        eps = noise_from_x0(state.x, x0, level)
        x = middle.alpha * x0 + middle.sigma * eps
        ratio = next_level.alpha / middle.alpha
        std = root(next_level.sigma**2 - (ratio * middle.sigma) ** 2)
        return SamplerState(ratio * x + std * per_image_normal(keys, state.x))
