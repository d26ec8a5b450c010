"""UniPC: a multistep predictor, corrected by the prediction at its end without another call."""

import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.types import Array, Key, NoiseLevel
from diffusion_jax.samplers import exponential
from diffusion_jax.samplers.base import Denoise, StepInfo
from diffusion_jax.samplers.options import check_choice

# What is integrated, in the words of DPM-Solver.
_ALGORITHMS = {"x0": "dpmsolver++", "eps": "dpmsolver"}


@struct.dataclass
class UniPCState:
    """The predicted sample, and what its correction needs.

    Attributes:
      x: [B, ...] the sample, not yet corrected.
      added: [B, ...] what the predictor added to the first-order step to make x.
      order: [] int32 order of the predictor that made x; 0 where there was none or it cannot be
        corrected.
      outputs: `order` times [B, ...] x̂0 or ε̂, the latest first; zero before they are made.
      half_log_snrs: `order` times [] λ where they were made; -inf before.

    Source: none; a convention of this library.
    """

    x: Array
    added: Array
    order: Array
    outputs: tuple[Array, ...]
    half_log_snrs: tuple[Array, ...]


@struct.dataclass
class UniPC:
    """UniPC-p: UniP-p predicts, and the next call at its end corrects it by UniC-p.

    With m the prediction, λ = log(α/σ) and r_j the places of earlier predictions in units of the
    step h, UniP-p adds Σ c_j (m_j - m) to the first-order step, where the weights integrate the
    polynomial through m and p - 1 earlier predictions exactly. UniC-p repeats the step with the
    prediction at its end (r = 1) as one more point. One call a step; the last step is not
    corrected. The order of accuracy is p + 1, limited to 3 by the first step and, with
    lower_order_final, by the last ones.

    B(h) has an effect in the two degenerate cases alone, UniP-2 and UniC-1, whose one weight is
    B(h)/2 for r = 1: with z = -h ("x0") or h ("eps"), B is z for "bh1" and e^z - 1 for "bh2".
    UniP-2 with "bh2" is DPM-Solver++ 2M. A step that is infinitely long (sigma = 0 at the end,
    alpha = 0 at the start) is of order 1 and not corrected, with either B(h).

    Attributes:
      order: p, 1, 2 or 3.
      solver_type: "bh1" or "bh2"; without effect at order 1 without the corrector.
      predict: "x0" or "eps", what is integrated.
      corrector: False for UniP alone.
      disable_corrector: indices of steps whose result is not corrected.
      lower_order_final: the last step is of order 1, the one before of order 2 at most; without
        effect at order 1.

    Raises:
      ValueError: if an option is none of these.

    Source: Zhao et al. 2023 (arXiv:2302.04867), algorithms 1 and 2, appendix F for the
    degenerate cases; lower orders at the end: released code.
    """

    order: int = struct.field(pytree_node=False, default=2)
    solver_type: str = struct.field(pytree_node=False, default="bh2")
    predict: str = struct.field(pytree_node=False, default="x0")
    corrector: bool = struct.field(pytree_node=False, default=True)
    disable_corrector: tuple[int, ...] = struct.field(pytree_node=False, default=())
    lower_order_final: bool = struct.field(pytree_node=False, default=True)

    def __post_init__(self):
        check_choice("order", self.order, (1, 2, 3))
        check_choice("solver_type", self.solver_type, ("bh1", "bh2"))
        check_choice("predict", self.predict, tuple(_ALGORITHMS))
        if not isinstance(self.disable_corrector, tuple) or any(
            isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in self.disable_corrector
        ):
            raise ValueError(
                "disable_corrector must be a tuple of step indices of at least 0, got "
                f"{self.disable_corrector!r}"
            )
        if self.disable_corrector and not self.corrector:
            raise ValueError(
                f"disable_corrector = {self.disable_corrector} names single steps, and corrector = "
                "False leaves none; give one of them"
            )

    @property
    def _algorithm(self) -> str:
        return _ALGORITHMS[self.predict]

    def init(self, x_T: Array) -> UniPCState:
        zero, missing = jnp.zeros_like(x_T), jnp.asarray(-jnp.inf, x_T.dtype)
        past = self.order if self.corrector else self.order - 1
        none = jnp.zeros((), jnp.int32)
        return UniPCState(x_T, zero, none, (zero,) * past, (missing,) * past)

    def step(
        self,
        keys: Key,
        denoise: Denoise,
        state: UniPCState,
        level: NoiseLevel,
        next_level: NoiseLevel,
        info: StepInfo,
    ) -> UniPCState:
        del keys
        x0 = denoise(state.x, level).x0
        output = exponential.integrand(self._algorithm, state.x, x0, level)
        here = exponential.half_log_snr(level).astype(state.x.dtype)
        x, correction = state.x, 0.0
        if self.corrector:
            correction = self._correction(state, output, here, level, info)

        first = exponential.first_step(self._algorithm, level, next_level)
        # x̂0 was predicted at the uncorrected sample, so the correction moves with x alone.
        x = first.of_x * x + first.of_x0 * x0 + first.linear * correction
        order = self._order_at(state, here, next_level, info)
        step = exponential.half_log_snr(next_level) - here
        weights = self._predictor(state.half_log_snrs, here, step, next_level, order)
        added = jnp.zeros_like(x)
        for weight, earlier in zip(weights, state.outputs, strict=False):
            added = added + weight * (earlier - output)
        past = len(state.outputs)
        return UniPCState(
            x + added,
            added,
            jnp.where(exponential.is_finite_step(here, here + step), order, 0),
            (output, *state.outputs)[:past],
            (here, *state.half_log_snrs)[:past],
        )

    def _order_at(self, state, here, next_level, info: StepInfo) -> Array:
        """The order of the predictor, by the place in the grid and by the history, [] int32."""
        order = jnp.asarray(self.order, jnp.int32)
        if self.lower_order_final:
            order = jnp.minimum(order, jnp.asarray(info.stop - info.index, jnp.int32))
        end = exponential.half_log_snr(next_level)
        usable = exponential.known(state.half_log_snrs, here, end)
        known = 1 + sum(ok.astype(jnp.int32) for ok in usable)
        return jnp.where(exponential.is_finite_step(here, end), jnp.minimum(order, known), 1)

    def _half_of_b(self, constant, h, next_level) -> Array:
        """B(h)/2 with the gain of the integral, the weight of the two degenerate cases."""
        if self.solver_type == "bh2":
            return constant / 2
        gain = next_level.alpha if self.predict == "x0" else -next_level.sigma
        return gain * h / 2

    def _predictor(self, lambdas, here, step, next_level, order) -> tuple[Array, ...]:
        """Weights of the differences to earlier predictions, zero beyond the order."""
        if self.order == 1:
            return ()
        used = [order >= 2 + j for j in range(self.order - 1)]
        h = jnp.where(used[0], step, 1.0)
        nodes = exponential.past_nodes(lambdas[: self.order - 1], here, h, used)
        constant, *moments = exponential.moments(self._algorithm, h, next_level, 2)
        second = jnp.where(used[0], self._half_of_b(constant, h, next_level) / nodes[0], 0.0)
        if self.order == 2:
            return (second,)
        third = exponential.difference_weights(nodes, moments)
        return tuple(jnp.where(used[1], t, s) for t, s in zip(third, (second, 0.0), strict=True))

    def _correction(self, state, output, here, level, info: StepInfo) -> Array:
        """UniC less UniP: what the prediction at the end of the step before adds to it."""
        previous = state.half_log_snrs[0]
        use = state.order >= 1
        for index in self.disable_corrector:
            use = use & (info.index - 1 != index)
        used = [use & (state.order >= 2 + j) for j in range(self.order - 1)]
        start = jnp.where(use, previous, 0.0)
        h = jnp.where(use, here, 1.0) - start
        nodes = exponential.past_nodes(state.half_log_snrs[1:], start, h, used)
        constant, *moments = exponential.moments(self._algorithm, h, level, self.order)
        weights = self._of_order(1, (self._half_of_b(constant, h, level),))
        for order in range(2, self.order + 1):
            solved = exponential.difference_weights((1.0, *nodes[: order - 1]), moments[:order])
            chosen = self._of_order(order, solved)
            weights = [
                jnp.where(state.order == order, c, w) for c, w in zip(chosen, weights, strict=True)
            ]
        correction = -state.added
        for weight, m in zip(weights, (output, *state.outputs[1:]), strict=True):
            correction = correction + weight * (m - state.outputs[0])
        return jnp.where(use, correction, 0.0)

    def _of_order(self, order: int, weights) -> list:
        return [*weights] + [0.0] * (self.order - order)
