"""EDM's samplers, Euler and Heun in the coordinates x/α and σ/α, without and with churn."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.arrays import per_image_normal
from diffusion_jax.core.forward import transition
from diffusion_jax.core.grid import Grid
from diffusion_jax.core.parameterization import Parameterization, V
from diffusion_jax.core.ratios import level_of_ratio
from diffusion_jax.core.schedules import NoiseSchedule
from diffusion_jax.core.types import Array, Key, NoiseLevel
from diffusion_jax.samplers.base import Denoise, SamplerState, StepInfo, need_middle, noise_from_x0


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


@struct.dataclass
class Churn:
    """What EDM's stochastic samplers share: before each step noise is added again.

    With r = σ/α of the level, N steps and γ = min(s_churn / N, √2 - 1) where s_tmin ≤ r ≤ s_tmax,
    else 0, x is brought to the noisier level r̂ = (1 + γ) r by
    x̂/α̂ = x/α + s_noise √(r̂² - r²) z. The step then starts from there, and the network is told
    the time of that level: r̂ on an EDM path, otherwise the schedule's `inverse`. Where alpha = 0
    nothing is added. The levels r̂ are in the grid: for other values of these knobs fit the grid as
    it was made, since a fitted one keeps its levels.

    Attributes:
      s_churn: noise added over all steps, in units of log σ; at least 0, and 0 adds none. More
        than (√2 - 1) N is cut to that.
      s_tmin, s_tmax: range of σ/α in which noise is added.
      s_noise: factor of the noise. It is 1 for the true process: a larger one, meant to make up
        for networks that remove too much, leaves the variance too large for any number of steps.

    Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 2.
    """

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def validate(self) -> None:
        """Raises ValueError unless all are at least 0 and s_tmin <= s_tmax; not for tracers."""
        for name in ("s_churn", "s_tmin", "s_noise"):
            value = float(getattr(self, name))
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")
        if not float(self.s_tmin) <= float(self.s_tmax):
            raise ValueError(f"expected s_tmin <= s_tmax, got {self.s_tmin} and {self.s_tmax}")

    def init(self, x_T: Array) -> SamplerState:
        return SamplerState(x_T)

    def middle(self, grid: Grid, schedule: NoiseSchedule) -> NoiseLevel:
        """The level to which each step of the grid adds noise, every field [MAX]."""
        here = NoiseLevel(*(jnp.asarray(field)[:-1] for field in grid.levels))
        finite = (here.alpha > 0) & (here.sigma > 0)
        ratio = jnp.where(finite, here.sigma, 1.0) / jnp.where(finite, here.alpha, 1.0)
        gamma = jnp.minimum(self.s_churn / jnp.asarray(grid.stop), math.sqrt(2.0) - 1.0)
        churned = finite & (gamma > 0) & (ratio >= self.s_tmin) & (ratio <= self.s_tmax)
        level = level_of_ratio(schedule, ratio * (1.0 + gamma))
        fields = zip(level, here, strict=True)
        return NoiseLevel(*(jnp.where(churned, there, field) for there, field in fields))

    def churned(
        self, keys: Key, x: Array, level: NoiseLevel, info: StepInfo
    ) -> tuple[Array, NoiseLevel]:
        """x [B, ...] with noise added, and the level that it is then at."""
        noisier = need_middle(self, info)
        # q(x_t | x_s) from the level s up to the noisier one t; rounding must not make it move.
        scale, std = transition(noisier, level)
        same = (noisier.alpha == level.alpha) & (noisier.sigma == level.sigma)
        scale, std = jnp.where(same, 1.0, scale), jnp.where(same, 0.0, std)
        return scale * x + self.s_noise * std * per_image_normal(keys, x), noisier


@struct.dataclass
class EulerChurn(Churn):
    """Euler's method with EDM's churn: noise is added, then one Euler step, one call per step.

    At s_churn = 0 it is `Euler`. On grids of `fit_grid`.

    Attributes:
      s_churn, s_tmin, s_tmax, s_noise: see `Churn`.

    Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 2 without its correction.
    """

    def step(
        self,
        keys: Key,
        denoise: Denoise,
        state: SamplerState,
        level: NoiseLevel,
        next_level: NoiseLevel,
        info: StepInfo,
    ) -> SamplerState:
        x, noisier = self.churned(keys, state.x, level, info)
        return Euler().step(keys, denoise, SamplerState(x), noisier, next_level, info)


@struct.dataclass
class HeunChurn(Churn):
    """EDM's stochastic sampler: noise is added, then one step of Heun's method.

    At s_churn = 0 it is `Heun`. On grids of `fit_grid`.

    Attributes:
      s_churn, s_tmin, s_tmax, s_noise: see `Churn`.

    Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 2; for ImageNet at 64x64 its table 5
    has s_churn = 40, s_tmin = 0.05, s_tmax = 50 and s_noise = 1.003 with 256 steps.
    """

    def step(
        self,
        keys: Key,
        denoise: Denoise,
        state: SamplerState,
        level: NoiseLevel,
        next_level: NoiseLevel,
        info: StepInfo,
    ) -> SamplerState:
        x, noisier = self.churned(keys, state.x, level, info)
        return Heun().step(keys, denoise, SamplerState(x), noisier, next_level, info)


@struct.dataclass
class ReferenceEulerChurn(Churn):
    """EulerChurn as diffusers runs it, which calls the network before it adds the noise.

    The network sees x at the old level and is told the old time; what it said is then read as if
    it had been said about x̂ at the noisier level (with v, by the coefficients of the old level).
    This is not algorithm 2, and adds an error of first order to that of Euler's method: it is here
    to reproduce numbers.

    Attributes:
      s_churn, s_tmin, s_tmax, s_noise: see `Churn`.
      parameterization: of the network, a value of a class in PARAMETERIZATIONS.

    Source: none; a mistake in use (EulerDiscreteScheduler and EDMEulerScheduler of diffusers).
    """

    parameterization: Any = struct.field(pytree_node=False, kw_only=True)

    def step(
        self,
        keys: Key,
        denoise: Denoise,
        state: SamplerState,
        level: NoiseLevel,
        next_level: NoiseLevel,
        info: StepInfo,
    ) -> SamplerState:
        said_as: Parameterization = self.parameterization
        x0 = denoise(state.x, level).x0
        output = said_as.target(x0, noise_from_x0(state.x, x0, level), level)
        x, noisier = self.churned(keys, state.x, level, info)
        if isinstance(said_as, V):
            x0 = said_as.to_x0(output, level.alpha / noisier.alpha * x, level)
        else:
            x0 = said_as.to_x0(output, x, noisier)
        eps = noise_from_x0(x, x0, noisier)
        return SamplerState(next_level.alpha * x0 + next_level.sigma * eps)
