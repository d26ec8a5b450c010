"""Ancestral samplers of k-diffusion: an ODE step past the next level, then noise back up to it."""

import math
from collections.abc import Callable

import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.arrays import per_image_normal
from diffusion_jax.core.forward import root
from diffusion_jax.core.grid import Grid, schedule_time
from diffusion_jax.core.schedules import NoiseSchedule
from diffusion_jax.core.types import Array, Key, NoiseLevel
from diffusion_jax.samplers.base import Denoise, SamplerState, StepInfo, need_middle, noise_from_x0
from diffusion_jax.samplers.kdpm2 import midpoint_step
from diffusion_jax.samplers.options import check_choice


def ancestral_rates(
    level: NoiseLevel, next_level: NoiseLevel, eta: Array | float = 1.0
) -> tuple[Array, Array]:
    """How far down a step goes beyond the next level s, and the noise that brings it up again.

    up = σ_s min(1, η √(1 - q²)) and down = √(σ_s² - up²) with q = (σ_s/α_s) / (σ_t/α_t), so that
    α_s x0 + down ε + up z has the noise rate σ_s of its level. At η = 1 up is the std of
    q(x_s | x_t, x0), and down = q σ_s.

    Args:
      eta: η, at least 0. From where the min takes over, all noise of x_s is new.

    Returns:
      (down, up), [] each.

    Source: Song et al. 2021 (arXiv:2010.02502), eq. 16; in σ/α it is get_ancestral_step of
    k-diffusion.
    """
    # As σ_s² - up² a small q would be lost to rounding.
    q = jnp.minimum(level.alpha * next_level.sigma / (next_level.alpha * level.sigma), 1.0)
    kept = jnp.minimum(1.0 - eta**2 + (eta * q) ** 2, 1.0)
    new = jnp.minimum(eta * root((1.0 - q) * (1.0 + q)), 1.0)
    return next_level.sigma * root(kept), next_level.sigma * new


@struct.dataclass
class EulerAncestral:
    """Euler's method down to a level below the next one, and noise to get up to that.

    x_s = α_s x̂0 + down ε̂ + s_noise · up z, see `ancestral_rates`. At eta = 1 this is ancestral
    sampling with the small variance, and at eta = 0 Euler's method; DDIM is the same for eta in
    [0, 1].

    Attributes:
      eta: scale of the noise relative to the posterior, at least 0. Beyond 1 more noise is
        replaced than the true reverse process does, up to all of it.
      s_noise: factor of the noise; 1 for the true process.

    Source: Song et al. 2021 (arXiv:2010.02502), eq. 12; k-diffusion, sample_euler_ancestral.
    """

    eta: float = 1.0
    s_noise: float = 1.0

    def validate(self) -> None:
        """Raises ValueError unless both are at least 0 and finite; for values, not tracers."""
        for name in ("eta", "s_noise"):
            if not 0.0 <= float(getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")

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
        eps = noise_from_x0(state.x, x0, level)
        down, up = ancestral_rates(level, next_level, self.eta)
        noise = self.s_noise * per_image_normal(keys, state.x)
        return SamplerState(next_level.alpha * x0 + down * eps + up * noise)


KDPM2_ANCESTRAL_VARIANTS = ("next_level", "reference")


def _next_levels_at_exact_times(grid: Grid, schedule: NoiseSchedule) -> NoiseLevel:
    there = grid.ends
    if there is None:
        there = NoiseLevel(*(jnp.asarray(field)[1:] for field in grid.levels))
    return there._replace(t=schedule_time(schedule, there))


@struct.dataclass
class KDPM2Ancestral:
    """KDPM2 down to a level below the next one, and noise to get up to that.

    The step goes down to σ/α = r_s² / r_t, and the geometric mean of r_t and that is r_s: the
    second call of the network is at the next level itself. With ε̂' of α_s x̂0 + σ_s ε̂ there,
    x_s = (α_s/α_t) x_t + (down - σ_t α_s/α_t) ε̂' + s_noise · up z, see `ancestral_rates`.
    Two calls a step, 2N - 1 in all: a step that ends at sigma = 0 is Euler's, and one that starts
    at alpha = 0 is EulerAncestral's.

    Attributes:
      s_noise: factor of the noise, at least 0; 1 for the true process.
      variant: "next_level", or "reference" for a second call that is told the exact time of the
        next level's σ/α, also where the next step will be told a rounded one: diffusers on Karras
        spacing. On grids of `fit_grid` then.

    Raises:
      ValueError: if the variant is unknown.

    Source: k-diffusion, sample_dpm_2_ancestral, after Karras et al. 2022 (arXiv:2206.00364),
    appendix D.2.
    """

    s_noise: float = 1.0
    variant: str = struct.field(pytree_node=False, default="next_level")

    def __post_init__(self):
        check_choice("variant", self.variant, KDPM2_ANCESTRAL_VARIANTS)

    @property
    def middle(self) -> Callable[[Grid, NoiseSchedule], NoiseLevel] | None:
        """With "reference" what `fit_grid` makes the level of the second call of."""
        return _next_levels_at_exact_times if self.variant == "reference" else None

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
        middle = need_middle(self, info) if self.variant == "reference" else next_level
        down, up = ancestral_rates(level, next_level)
        x = midpoint_step(state.x, denoise, level, middle, next_level, down)
        return SamplerState(x + self.s_noise * up * per_image_normal(keys, state.x))
