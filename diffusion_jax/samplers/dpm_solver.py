"""DPM-Solver in multistep form: its ++ and SDE variants, orders 1 to 3, one call a step."""

import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.arrays import per_image_normal
from diffusion_jax.core.types import Array, Key, NoiseLevel
from diffusion_jax.samplers import exponential
from diffusion_jax.samplers.base import Denoise, StepInfo
from diffusion_jax.samplers.exponential import SOLVER_TYPES, VARIANTS
from diffusion_jax.samplers.options import check_choice, check_count


@struct.dataclass
class MultistepState:
    """The sample and what earlier steps predicted, the latest first.

    Attributes:
      x: [B, ...] the sample.
      outputs: order - 1 times [B, ...] x̂0 or ε̂; zero before they are made.
      half_log_snrs: order - 1 times [] λ where they were made; -inf before.

    Source: none; a convention of this library.
    """

    x: Array
    outputs: tuple[Array, ...]
    half_log_snrs: tuple[Array, ...]


@struct.dataclass
class DPMSolverMultistep:
    """DPM-Solver, DPM-Solver++ ("2M", "3M") and their SDE forms in multistep form.

    With λ = log(α/σ), h = λ_s - λ_t the step, h' and h'' the two before, and m the prediction:
    order 2 adds to the first-order step the integral of D1 τ/h with D1 = (h/h') (m - m'), order 3
    that of the parabola through m, m' and m''. See samplers/exponential.py for the integrals.
    "midpoint" takes half the integral of the constant D1 instead, which order 3 does in its
    steps of order 2 alone. A step that is infinitely long (sigma = 0 at the end, alpha = 0 at
    the start) is of order 1, as is the first one.

    The published third order takes half of the second derivative and so is of order 2, and
    diffusers' SDE form has a sign error besides that makes its weak order 1. By default the
    parabola is integrated exactly, and the first step, whose error alone would limit the
    order to 2, is corrected after the fact by the prediction at its end: third order, without
    another call. The SDE forms are of weak order 2 and need no such start.

    Attributes:
      order: 1, 2 or 3.
      algorithm: "dpmsolver++" (integrates x̂0), "dpmsolver" (ε̂), "sde-dpmsolver++" or
        "sde-dpmsolver".
      solver_type: "midpoint" or "heun", of steps of order 2; without effect at order 1.
      lower_order_below: on grids with fewer steps the last but one is of order 2 at most and the
        last of order 1; 0 for never. Without effect at order 1.
      euler_at_final: the last step is of order 1 on every grid.
      variant: "default", or "reference" for the third order of diffusers 0.42.1; the same at
        orders 1 and 2.

    Raises:
      ValueError: if an option is none of these, or if "reference" is asked for "sde-dpmsolver" of
        order 3, which diffusers does not have.

    Source: Lu et al. 2022 (arXiv:2211.01095), algorithm 2 and appendix B; order 3: released code
    of the authors, corrected; lower orders at the end: section 5 there, released code.
    """

    order: int = struct.field(pytree_node=False, default=2)
    algorithm: str = struct.field(pytree_node=False, default="dpmsolver++")
    solver_type: str = struct.field(pytree_node=False, default="midpoint")
    lower_order_below: int = struct.field(pytree_node=False, default=15)
    euler_at_final: bool = struct.field(pytree_node=False, default=False)
    variant: str = struct.field(pytree_node=False, default="default")

    def __post_init__(self):
        check_choice("order", self.order, (1, 2, 3))
        check_choice("algorithm", self.algorithm, exponential.ALGORITHMS)
        check_choice("solver_type", self.solver_type, SOLVER_TYPES)
        check_choice("variant", self.variant, VARIANTS)
        check_count("lower_order_below", self.lower_order_below)
        if (self.order, self.algorithm, self.variant) == (3, "sde-dpmsolver", "reference"):
            raise ValueError(
                "diffusers has no 'sde-dpmsolver' of order 3 to refer to; use variant='default'"
            )

    def init(self, x_T: Array) -> MultistepState:
        missing = jnp.asarray(-jnp.inf, x_T.dtype)
        past = self.order - 1
        return MultistepState(x_T, (jnp.zeros_like(x_T),) * past, (missing,) * past)

    def step(
        self,
        keys: Key,
        denoise: Denoise,
        state: MultistepState,
        level: NoiseLevel,
        next_level: NoiseLevel,
        info: StepInfo,
    ) -> MultistepState:
        x0 = denoise(state.x, level).x0
        output = exponential.integrand(self.algorithm, state.x, x0, level)
        here = exponential.half_log_snr(level)
        first = exponential.first_step(self.algorithm, level, next_level)
        x = first.of_x * state.x + first.of_x0 * x0
        if self._corrects_its_start():
            x = x + first.linear * self._start_error(state, output, level, next_level)
        weights = self._weights(state.half_log_snrs, here, next_level, info)
        for weight, earlier in zip(weights, state.outputs, strict=True):
            x = x + weight * (earlier - output)
        if exponential.is_sde(self.algorithm):
            x = x + first.std * per_image_normal(keys, x)
        here = here.astype(x.dtype)
        outputs, lambdas = (output, *state.outputs), (here, *state.half_log_snrs)
        return MultistepState(x, outputs[: self.order - 1], lambdas[: self.order - 1])

    def _corrects_its_start(self) -> bool:
        is_sde = exponential.is_sde(self.algorithm)
        return self.order == 3 and self.variant == "default" and not is_sde

    def _start_error(self, state, output, level, next_level) -> Array:
        """What the trapezoidal rule adds to the step before, if that had no history."""
        here, end = exponential.half_log_snr(level), exponential.half_log_snr(next_level)
        latest, before = exponential.known(state.half_log_snrs, here, end)
        was_first = latest & ~before
        h = jnp.where(was_first, here - jnp.where(was_first, state.half_log_snrs[0], 0.0), 1.0)
        _, moment = exponential.moments(self.algorithm, h, level, 1)
        return jnp.where(was_first, moment, 0.0) * (output - state.outputs[0])

    def _order_at(self, info: StepInfo) -> Array:
        """The order that the place in the grid allows, []."""
        left = info.stop - info.index
        order = jnp.where(info.stop < self.lower_order_below, jnp.minimum(left, 3), 3)
        return jnp.where(self.euler_at_final & (left == 1), 1, order)

    def _weights(self, lambdas, here, next_level, info: StepInfo) -> tuple[Array, ...]:
        """Factors of m' - m and m'' - m; zeros where history is missing or the order is lower."""
        if self.order == 1:
            return ()
        end = exponential.half_log_snr(next_level)
        finite = exponential.is_finite_step(here, end)
        h = jnp.where(finite, end - here, 1.0)
        known = [ok & finite for ok in exponential.known(lambdas, here, end)]
        nodes = exponential.past_nodes(lambdas, here, h, known)
        constant, *moments = exponential.moments(self.algorithm, h, next_level, 2)
        allowed = self._order_at(info)
        slope = constant / 2 if self.solver_type == "midpoint" else moments[0]
        second = jnp.where(known[0] & (allowed >= 2), slope / nodes[0], 0.0)
        if self.order == 2:
            return (second,)
        if self.variant == "reference":
            moments[1] = self._published_second_moment(moments[1], next_level)
        third = exponential.difference_weights(nodes, moments)
        use_third = known[1] & (allowed >= 3)
        return tuple(jnp.where(use_third, w, s) for w, s in zip(third, (second, 0.0), strict=True))

    def _published_second_moment(self, moment, next_level) -> Array:
        """That of half the second derivative; the SDE's has -1/2 where it should be +1/2."""
        if exponential.is_sde(self.algorithm):
            moment = moment - 2.0 * next_level.alpha
        return moment / 2
