"""LMS: Adams-Bashforth in σ/α with steps of any length."""

import jax
import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.types import Array, Key, NoiseLevel
from diffusion_jax.samplers.base import Denoise, StepInfo, need_middle, noise_from_x0
from diffusion_jax.samplers.linear_multistep import (
    UNIFORM_MOMENTS,
    NoiseHistory,
    check_start,
    integral_beyond_euler,
    no_history,
    noise_to_signal,
    remember,
    runge_kutta_step,
    usable_nodes,
)
from diffusion_jax.samplers.options import check_choice


@struct.dataclass
class LMS:
    """Linear multistep method of order 1 to 4, one call per step.

    With u = x/α and r = σ/α the ODE is du/dr = ε̂. The polynomial in r through the last `order`
    predictions, integrated exactly: x_s = (α_s/α_t) x_t + α_s ∫_{r_t}^{r_s} P(r) dr.
    The same as ρAB-DEIS of q = order - 1. A step that starts at alpha = 0 is Euler's and leaves no
    history.

    Attributes:
      order: 1 to 4.
      start: what the first order - 1 steps are. "euler": methods of order 1, 2, … on the history
        that there is, as k-diffusion and diffusers do. The error of Euler's one step limits the
        order to 2, which shows only with hundreds of steps. "runge_kutta": the classical method
        in log-SNR, three more calls in each of these steps, on grids of `fit_grid`; needed for
        order 3 and 4.

    Raises:
      ValueError: if the order or the start is another.

    Source: Zhang & Chen 2022 (arXiv:2204.13902), eq. 14 in ρ = σ/α ("ρAB"); as a sampler of its
    own: k-diffusion's `sample_lms`.
    """

    order: int = struct.field(pytree_node=False, default=4)
    start: str = struct.field(pytree_node=False, default="euler")

    def __post_init__(self):
        check_choice("order", self.order, (1, 2, 3, 4))
        check_start(self.start)

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
        has_signal = jnp.isfinite(ratio)
        h = end - jnp.where(has_signal, ratio, end)
        unit = jnp.where(h == 0, 1.0, h)
        here = jnp.where(has_signal, ratio, 0.0)
        nodes = [jnp.where(has_signal, r - here, jnp.inf) / unit for r in state.ratio]
        usable = usable_nodes(nodes)

        def multistep(euler):
            more = integral_beyond_euler(eps, state.eps, nodes, usable, UNIFORM_MOMENTS)
            return euler + next_level.alpha * h * more

        x = next_level.alpha * x0 + next_level.sigma * eps
        if self.middle is None:
            x = multistep(x)
        else:
            middle = need_middle(self, info)
            starting = has_signal & (end > 0) & ~usable[-1]
            x = jax.lax.cond(
                starting,
                lambda _: runge_kutta_step(state.x, eps, denoise, level, middle, next_level),
                multistep,
                x,
            )
        return remember(state, x, eps, ratio)
