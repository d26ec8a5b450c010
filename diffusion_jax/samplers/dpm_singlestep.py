"""DPM-Solver in singlestep form: blocks of one to three grid steps, one call a step."""

import jax
import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.arrays import per_image_normal
from diffusion_jax.core.types import Array, Key, NoiseLevel
from diffusion_jax.samplers import exponential
from diffusion_jax.samplers.base import Denoise, StepInfo
from diffusion_jax.samplers.exponential import SOLVER_TYPES, VARIANTS
from diffusion_jax.samplers.options import check_choice

ALGORITHMS = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++")


@struct.dataclass
class Evaluation:
    """What is known of one level of a block.

    Attributes:
      x, x0: [B, ...] the sample there and the prediction.
      level: where it is.
      half_log_snr: [] λ there; -inf where the block has no such level yet.

    Source: none; a convention of this library.
    """

    x: Array
    x0: Array
    level: NoiseLevel
    half_log_snr: Array


@struct.dataclass
class SinglestepState:
    """The sample and the block that it is in.

    Attributes:
      x: [B, ...] the sample.
      start: where the block starts.
      inner: [B, ...] x̂0 or ε̂ at the second level of the block.
      inner_half_log_snr: [] λ there; -inf where the block has not reached it.
      noise: [B, ...] the noise of an SDE since the start of the block, None of an ODE.

    Source: none; a convention of this library.
    """

    x: Array
    start: Evaluation
    inner: Array
    inner_half_log_snr: Array
    noise: Array | None


@struct.dataclass
class DPMSolverSinglestep:
    """DPM-Solver and DPM-Solver++ ("2S", "3S") in singlestep form, on the levels of the grid.

    The grid is cut into blocks of `order` steps. The first step of a block is of order 1, the
    second starts again at the block's first level and is of order 2, the third of order 3:
    only the last level of a block has the full order, the others are where the network is
    evaluated, so N steps are N calls. The paper's r1 and r2 are those of the grid: on one that
    is uniform in λ they are 1/2, or 1/3 and 2/3, as published. Order 3
    needs r2 = 2/3, which every smooth grid approaches fast enough as N grows; where r2 stays
    elsewhere, both forms are of order 2. There "midpoint" integrates the line through the first
    and the third level of a block, "heun" the parabola through all three.

    A step to sigma = 0 is of order 1, and so is one from alpha = 0, after which a block starts.
    If N is not divisible by the order, the last block is shorter.

    The SDE form draws the noise within a block from one path, so that its weak order is 2.
    diffusers draws it afresh for each level of the block, which makes it 1, and has a wrong sign
    in "heun" of order 3.

    Attributes:
      order: 1, 2 or 3.
      algorithm: "dpmsolver++" (integrates x̂0), "dpmsolver" (ε̂) or "sde-dpmsolver++".
      solver_type: "midpoint" or "heun"; without effect at order 1.
      lower_order_final: the last step is of order 1 also where N is divisible by the order. With
        order 3 that is the paper's "DPM-Solver-fast". Without effect at order 1.
      variant: "default", or "reference" for diffusers 0.42.1: blocks are counted from step 0 of
        the grid, not from the step that sampling starts at, and the SDE is as said above.

    Raises:
      ValueError: if an option is none of these.

    Source: Lu et al. 2022 (arXiv:2206.00927), algorithms 1 and 2 and appendix D.2; ++:
    (arXiv:2211.01095), algorithm 1.
    """

    order: int = struct.field(pytree_node=False, default=2)
    algorithm: str = struct.field(pytree_node=False, default="dpmsolver++")
    solver_type: str = struct.field(pytree_node=False, default="midpoint")
    lower_order_final: bool = struct.field(pytree_node=False, default=False)
    variant: str = struct.field(pytree_node=False, default="default")

    def __post_init__(self):
        check_choice("order", self.order, (1, 2, 3))
        check_choice("algorithm", self.algorithm, ALGORITHMS)
        check_choice("solver_type", self.solver_type, SOLVER_TYPES)
        check_choice("variant", self.variant, VARIANTS)

    def init(self, x_T: Array) -> SinglestepState:
        zero, missing = jnp.zeros_like(x_T), jnp.asarray(-jnp.inf, x_T.dtype)
        nowhere = NoiseLevel(*(jnp.ones((), x_T.dtype),) * 3)
        noise = zero if exponential.is_sde(self.algorithm) else None
        return SinglestepState(x_T, Evaluation(zero, zero, nowhere, missing), zero, missing, noise)

    def step(
        self,
        keys: Key,
        denoise: Denoise,
        state: SinglestepState,
        level: NoiseLevel,
        next_level: NoiseLevel,
        info: StepInfo,
    ) -> SinglestepState:
        x, dtype = state.x, state.x.dtype
        x0 = denoise(x, level).x0
        at = NoiseLevel(*(jnp.asarray(field, dtype) for field in level))
        here = Evaluation(x, x0, at, exponential.half_log_snr(level).astype(dtype))
        output = exponential.integrand(self.algorithm, x, x0, level)
        order = self._order_at(state, here.half_log_snr, next_level, info)
        start = jax.tree.map(lambda a, b: jnp.where(order == 1, a, b), here, state.start)

        step = exponential.first_step(self.algorithm, start.level, next_level)
        x = step.of_x * start.x + step.of_x0 * start.x0
        at_start = exponential.integrand(self.algorithm, start.x, start.x0, start.level)
        to_inner, to_here = self._weights(state, here, start, next_level, order)
        x = x + to_inner * (state.inner - at_start) + to_here * (output - at_start)
        noise = state.noise
        if noise is not None:
            noise = self._noise(keys, state, level, next_level, step, order)
            x = x + noise
        second, first = order == 2, order == 1
        missing = jnp.full_like(state.inner_half_log_snr, -jnp.inf)
        kept = jnp.where(first, missing, state.inner_half_log_snr)
        return SinglestepState(
            x,
            start,
            jnp.where(second, output, state.inner),
            jnp.where(second, here.half_log_snr, kept),
            noise,
        )

    def _order_at(self, state, here, next_level, info: StepInfo) -> Array:
        """The order that the place in the block and what is known of the block allow, []."""
        begin = 0 if self.variant == "reference" else info.start
        index, count = info.index - begin, info.stop - begin
        order = index % self.order + 1
        last = (count % self.order == 0) & (index == count - 1) & self.lower_order_final
        end = exponential.half_log_snr(next_level)
        order = jnp.where(last | ~jnp.isfinite(end), 1, order)
        block = (state.inner_half_log_snr, state.start.half_log_snr)
        (started,) = exponential.known(block[1:], here, end)
        _, inner = exponential.known(block, here, end)
        return jnp.minimum(order, 1 + started + inner)

    def _weights(
        self, state, here, start, next_level, order
    ) -> tuple[Array | float, Array | float]:
        """Factors of the differences to the start, of the second level and of this one."""
        if self.order == 1:
            return 0.0, 0.0
        second, third = order == 2, order == 3
        safe = order > 1
        beginning = jnp.where(safe, start.half_log_snr, 0.0)
        end = jnp.where(safe, exponential.half_log_snr(next_level), 1.0)
        h = end - beginning
        to_here = jnp.where(safe, (jnp.where(safe, here.half_log_snr, 0.5) - beginning) / h, 0.5)
        constant, *moments = exponential.moments(self.algorithm, h, next_level, 2)
        slope = constant / 2 if self.solver_type == "midpoint" else moments[0]
        of_second = jnp.where(second, slope / to_here, 0.0)
        if self.order == 2:
            return 0.0, of_second
        if self.solver_type == "midpoint":
            return 0.0, jnp.where(third, moments[0] / to_here, of_second)
        if self.variant == "reference" and exponential.is_sde(self.algorithm):
            # The sign error: 1/2 is subtracted where it should be added.
            moments[1] = moments[1] - 2.0 * next_level.alpha
        inner = jnp.where(third, state.inner_half_log_snr - beginning, h * to_here / 2) / h
        of_inner, of_here = exponential.difference_weights((inner, to_here), moments)
        return jnp.where(third, of_inner, 0.0), jnp.where(third, of_here, of_second)

    def _noise(self, keys, state, level, next_level, step, order) -> Array:
        """The noise of an SDE between the start of the block and the end of this step."""
        fresh = per_image_normal(keys, state.x)
        if self.variant == "reference":
            return step.std * fresh
        here = exponential.first_step(self.algorithm, level, next_level)
        return here.linear * jnp.where(order == 1, 0.0, state.noise) + here.std * fresh
