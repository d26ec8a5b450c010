"""DEIS: past noise predictions interpolated in log(σ/α), integrated in σ/α."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.types import Array, Key, NoiseLevel
from diffusion_jax.samplers import exponential
from diffusion_jax.samplers.base import Denoise, StepInfo, need_middle, noise_from_x0
from diffusion_jax.samplers.linear_multistep import (
    NoiseHistory,
    check_start,
    integral_beyond_euler,
    no_history,
    noise_to_signal,
    remember,
    runge_kutta_step,
    usable_nodes,
)
from diffusion_jax.samplers.options import check_choice, check_count


def _up_to_order(usable: Sequence[Array], limit: Array) -> list[Array]:
    return [use & (k < limit) for k, use in enumerate(usable, start=1)]


@struct.dataclass
class DEIS:
    """Exponential integrator with a polynomial in log(σ/α), of order 1 to 4, one call per step.

    With u = x/α, r = σ/α and P the polynomial in log r through the last `order` predictions:
    x_s = (α_s/α_t) x_t + α_s ∫_{r_t}^{r_s} P(log r) dr, in closed form. A step that starts at
    alpha = 0 or ends at sigma = 0, where log r is infinite, is of first order.
    The paper counts q = order - 1 and prefers polynomials in t (tAB-DEIS), whose integrals need
    the schedule between the levels; this is the variant in log r of released code. `LMS` is the
    paper's ρAB-DEIS.

    Attributes:
      order: 1 to 4, how many predictions are used.
      start: what the first order - 1 steps are: "euler" or "runge_kutta", see `LMS`.
      lower_order_below: on grids with fewer steps the last one is of order 1, the one before of
        order 2 at most, and so on; 0 for never. Without effect at order 1.

    Raises:
      ValueError: if the order or the start is another, or lower_order_below is negative.

    Source: Zhang & Chen 2022 (arXiv:2204.13902), eq. 14 and 15; log r and the last steps:
    diffusers' DEISMultistepScheduler.
    """

    order: int = struct.field(pytree_node=False, default=3)
    start: str = struct.field(pytree_node=False, default="euler")
    lower_order_below: int = struct.field(pytree_node=False, default=15)

    def __post_init__(self):
        check_choice("order", self.order, (1, 2, 3, 4))
        check_start(self.start)
        check_count("lower_order_below", self.lower_order_below)

    @property
    def middle(self) -> str | None:
        return "log_snr" if self.start == "runge_kutta" and self.order > 1 else None

    def init(self, x_T: Array) -> NoiseHistory:
        return no_history(x_T, self.order - 1)

    def step(
        self,
        keys: Key,
        denoise: Denoise,
        state: NoiseHistory,
        level: NoiseLevel,
        next_level: NoiseLevel,
        info: StepInfo,
    ) -> NoiseHistory:
        del keys
        x0 = denoise(state.x, level).x0
        eps = noise_from_x0(state.x, x0, level)
        ratio, end = noise_to_signal(level), noise_to_signal(next_level)
        finite = jnp.isfinite(ratio) & (end > 0)
        here = jnp.where(finite, ratio, 1.0)
        h = jnp.log(here) - jnp.log(jnp.where(finite, end, 1.0))
        unit = jnp.where(h == 0, 1.0, h)
        nodes = [jnp.where(finite, jnp.log(here / r), -jnp.inf) / unit for r in state.ratio]
        usable = usable_nodes(nodes)

        def multistep(euler):
            few = info.stop < self.lower_order_below
            limit = jnp.where(few, info.stop - info.index, self.order)
            _, *moments = exponential.moments("dpmsolver", h, next_level, self.order - 1)
            allowed = _up_to_order(usable, limit)
            return euler + integral_beyond_euler(eps, state.eps, nodes, allowed, moments)

        x = next_level.alpha * x0 + next_level.sigma * eps
        if self.middle is None:
            x = multistep(x)
        else:
            middle = need_middle(self, info)
            x = jax.lax.cond(
                finite & ~usable[-1],
                lambda _: runge_kutta_step(state.x, eps, denoise, level, middle, next_level),
                multistep,
                x,
            )
        return remember(state, x, eps, ratio)
