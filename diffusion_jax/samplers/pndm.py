"""PNDM and its relatives: Adams-Bashforth weights of equal steps, and the transfer of DDIM."""

import jax
import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.types import Array, Key, NoiseLevel
from diffusion_jax.samplers.base import Denoise, StepInfo, need_middle, noise_from_x0
from diffusion_jax.samplers.linear_multistep import (
    UNIFORM_MOMENTS,
    integral_beyond_euler,
    usable_nodes,
)
from diffusion_jax.samplers.options import check_choice

QUANTITIES = ("eps", "v")
VARIANTS = ("default", "reference")


@struct.dataclass
class CountedHistory:
    """The sample, what was predicted before, newest first, and how often that was.

    Attributes:
      x: [B, ...] the sample.
      slopes: past ε̂ (or v̂), [B, ...] each; zero where there is none yet.
      count: [] int32, predictions so far.

    Source: none; a convention of this library.
    """

    x: Array
    slopes: tuple[Array, ...]
    count: Array

    def extended(self, x: Array, slope: Array) -> "CountedHistory":
        slopes = (slope, *self.slopes)[: len(self.slopes)]
        return CountedHistory(x, slopes, self.count + 1)


def _begin(x_T: Array, length: int) -> CountedHistory:
    return CountedHistory(x_T, (jnp.zeros_like(x_T),) * length, jnp.asarray(0, jnp.int32))


def _beyond_first_order(state: CountedHistory, slope: Array) -> Array:
    """What Adams-Bashforth for equal steps adds to the slope, on the history that there is."""
    nodes = [
        jnp.where(k < state.count, -1.0 - k, jnp.inf).astype(slope.dtype)
        for k in range(len(state.slopes))
    ]
    return integral_beyond_euler(slope, state.slopes, nodes, usable_nodes(nodes), UNIFORM_MOMENTS)


def transfer(x: Array, eps: Array, level: NoiseLevel, next_level: NoiseLevel) -> Array:
    """φ: moves x from one level to another as if ε̂ were right, x_s = α_s (x - σ_t ε̂)/α_t + σ_s ε̂.

    Args:
      x, eps: [B, ...].
      level, next_level: scalars; level.alpha > 0.

    Source: Liu et al. 2022 (arXiv:2202.09778), eq. 11; DDIM's step.
    """
    ratio = next_level.alpha / level.alpha
    return ratio * x + (next_level.sigma - ratio * level.sigma) * eps


def _two_levels(middle: NoiseLevel) -> tuple[NoiseLevel, NoiseLevel]:
    if jnp.ndim(middle.t) == 0:
        return middle, middle
    first, second = (NoiseLevel(*(jnp.asarray(f)[i] for f in middle)) for i in (0, 1))
    return first, second


@struct.dataclass
class PNDM:
    """Pseudo numerical method of order 4 in time, one call per step after its start.

    ε' = (55 ε̂_t - 59 ε̂_{t+δ} + 37 ε̂_{t+2δ} - 9 ε̂_{t+3δ}) / 24, and x_s = φ(x_t, ε', t, s) with
    `transfer` φ. The weights are those of equal steps in time, whatever the steps are.
    Of order 2 in the limit of many steps; with few the higher terms pay.

    Start with Runge-Kutta ("F-PNDM"): the first three steps call the network four times, at t, at
    the middle in time, there again, and at the end. Without ("PLMS", as Stable Diffusion): the
    first step is pseudo improved Euler of two calls, then orders 2 and 3, N + 1 calls in all.
    Steps from alpha = 0 or to sigma = 0 that belong to the start are DDIM's.

    Attributes:
      runge_kutta_start: the start of the paper, on grids of `fit_grid`.
      extrapolates: what the polynomial is drawn through. "eps", as in the paper. "v": v̂ = α ε̂ - σ
        x̂0 of each call, turned into ε' at x_t: what diffusers does with networks that predict v.

    Diffusers rounds: its stages land at other levels than those that the network is called at. Such
    grids have two levels inside of a step, `grid.middle` with fields [MAX, 2]: with Runge-Kutta
    the first is where the first stage lands, the second has the time of both calls and is where
    the second stage lands; without, the first is where the Euler step lands, with the time of the
    second call, and the second is where the improved step starts from.

    Raises:
      ValueError: if `extrapolates` is unknown.

    Source: Liu et al. 2022 (arXiv:2202.09778), algorithm 2 with eq. 11 to 13; without
    Runge-Kutta: Rombach et al. 2022 (arXiv:2112.10752), released code.
    """

    runge_kutta_start: bool = struct.field(pytree_node=False, default=True)
    extrapolates: str = struct.field(pytree_node=False, default="eps")

    def __post_init__(self):
        check_choice("extrapolates", self.extrapolates, QUANTITIES)

    @property
    def middle(self) -> str | None:
        return "time" if self.runge_kutta_start else None

    def init(self, x_T: Array) -> CountedHistory:
        return _begin(x_T, 3)

    def _slope(self, x: Array, x0: Array, level: NoiseLevel) -> Array:
        eps = noise_from_x0(x, x0, level)
        return eps if self.extrapolates == "eps" else level.alpha * eps - level.sigma * x0

    def _transfer(self, x, slope, level, next_level):
        if self.extrapolates == "v":
            slope = (level.sigma * x + level.alpha * slope) / (level.alpha**2 + level.sigma**2)
        return transfer(x, slope, level, next_level)

    def starting_stages(
        self,
        denoise: Denoise,
        x: Array,
        slope: Array,
        level: NoiseLevel,
        next_level: NoiseLevel,
        info: StepInfo,
    ) -> tuple[Array, ...]:
        """Where a step of the start arrives after each of its calls, [B, ...]; the last is x_s."""

        def call(x, level):
            return self._slope(x, denoise(x, level).x0, level)

        def move(slope, next_level, level=level):
            return self._transfer(x, slope, level, next_level)

        if self.runge_kutta_start:
            landing, middle = _two_levels(need_middle(self, info))
            first = move(slope, landing)
            slope_2 = call(first, middle)
            second = move(slope_2, middle)
            slope_3 = call(second, middle)
            third = move(slope_3, next_level)
            mean = (slope + 2.0 * slope_2 + 2.0 * slope_3 + call(third, next_level)) / 6.0
            return first, second, third, move(mean, next_level)
        landing, origin = next_level, level
        if info.middle is not None and jnp.ndim(info.middle.t) > 0:
            landing, origin = _two_levels(info.middle)
        euler = move(slope, landing)
        return euler, move((slope + call(euler, landing)) / 2.0, next_level, origin)

    def step(
        self,
        keys: Key,
        denoise: Denoise,
        state: CountedHistory,
        level: NoiseLevel,
        next_level: NoiseLevel,
        info: StepInfo,
    ) -> CountedHistory:
        del keys
        x0 = denoise(state.x, level).x0
        eps, slope = noise_from_x0(state.x, x0, level), self._slope(state.x, x0, level)

        def begin(_):
            return self.starting_stages(denoise, state.x, slope, level, next_level, info)[-1]

        def multistep(ddim):
            more = _beyond_first_order(state, slope)
            # ε' - ε̂ of v' - v̂ at the same x_t.
            if self.extrapolates == "v":
                more = level.alpha / (level.alpha**2 + level.sigma**2) * more
            ratio = next_level.alpha / jnp.where(level.alpha > 0, level.alpha, 1.0)
            gain = jnp.where(level.alpha > 0, next_level.sigma - ratio * level.sigma, 0.0)
            return ddim + gain * more

        to_begin = state.count < (3 if self.runge_kutta_start else 1)
        x = jax.lax.cond(
            to_begin & (level.alpha > 0) & (next_level.sigma > 0),
            begin,
            multistep,
            next_level.alpha * x0 + next_level.sigma * eps,
        )
        return state.extended(x, slope)


@struct.dataclass
class IPNDM:
    """Improved PNDM: no start of its own, order 1, 2, 3 and then 4, one call in every step.

    The weights of Adams-Bashforth for equal steps in time, x_s = φ(x_t, ε', t, s):
    order 2 (3, -1)/2, order 3 (23, -16, 5)/12, order 4 (55, -59, 37, -9)/24.

    Attributes:
      order: 1 to 4, the highest that is used.
      variant: "default", or "reference": diffusers divides by max(α_t, 1e-8), so that a first step
        from alpha = 0 loses x̂0: x_s = σ_s ε̂ there.

    Raises:
      ValueError: if the order or the variant is unknown.

    Source: Zhang & Chen 2022 (arXiv:2204.13902), appendix ("iPNDM"); the weights: Liu et al. 2022
    (arXiv:2202.09778), eq. 12.
    """

    order: int = struct.field(pytree_node=False, default=4)
    variant: str = struct.field(pytree_node=False, default="default")

    def __post_init__(self):
        check_choice("order", self.order, (1, 2, 3, 4))
        check_choice("variant", self.variant, VARIANTS)

    def init(self, x_T: Array) -> CountedHistory:
        return _begin(x_T, self.order - 1)

    def step(
        self,
        keys: Key,
        denoise: Denoise,
        state: CountedHistory,
        level: NoiseLevel,
        next_level: NoiseLevel,
        info: StepInfo,
    ) -> CountedHistory:
        del keys, info
        x0 = denoise(state.x, level).x0
        eps, has_signal = noise_from_x0(state.x, x0, level), level.alpha > 0
        ratio = next_level.alpha / jnp.where(has_signal, level.alpha, 1.0)
        gain = jnp.where(has_signal, next_level.sigma - ratio * level.sigma, 0.0)
        if self.variant == "reference":
            x0 = jnp.where(has_signal, x0, 0.0)
        x = next_level.alpha * x0 + next_level.sigma * eps
        return state.extended(x + gain * _beyond_first_order(state, eps), eps)
