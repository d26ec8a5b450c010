"""The order table: how fast the error of every sampler must fall with the number of steps."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.discrete import numpy_like
from diffusion_jax.core.grid import Grid, from_times
from diffusion_jax.core.schedules import EDM
from diffusion_jax.core.timesteps import karras
from diffusion_jax.core.types import Array, NoiseLevel
from diffusion_jax.samplers import (
    DDIM,
    DDPM,
    DEIS,
    IPNDM,
    KDPM2,
    LMS,
    PNDM,
    DPMSolverMultistep,
    DPMSolverSDE,
    DPMSolverSinglestep,
    Euler,
    EulerAncestral,
    EulerChurn,
    FlowHeun,
    Heun,
    HeunChurn,
    KDPM2Ancestral,
    UniPC,
    fit_grid,
)


@dataclass(frozen=True)
class LinearVP:
    """The continuous limit of DDPM's linear schedule: log α² = -β0 t - (β1 - β0) t² / 2.

    A grid that is uniform in t is smooth here; on the discrete schedule it is not, whose
    log-SNR has a kink at every timestep.
    """

    beta_start: float = 0.1
    beta_end: float = 20.0
    t_min: float = 0.05
    t_max: float = 1.0

    num_timesteps = None

    def __call__(self, t: Array) -> NoiseLevel:
        """The level at t, [] or [B]."""
        xp = numpy_like(t)
        t = xp.asarray(t)
        log_signal = -self.beta_start * t - 0.5 * (self.beta_end - self.beta_start) * t**2
        return NoiseLevel(t, xp.exp(0.5 * log_signal), xp.sqrt(-xp.expm1(log_signal)))

    def inverse(self, log_snr: Array) -> Array:
        """The time of a log-SNR, the positive root of a quadratic."""
        xp = numpy_like(log_snr)
        loss = xp.logaddexp(xp.zeros_like(log_snr), -xp.asarray(log_snr))
        slope = self.beta_end - self.beta_start
        root = xp.sqrt(self.beta_start**2 + 2.0 * slope * loss)
        return 2.0 * loss / (self.beta_start + root)

    def prior_std(self, level: NoiseLevel) -> float:
        """1, as for every schedule that preserves variance."""
        del level
        return 1.0


def _without_last_step(grid: Grid, num_steps: int) -> Grid:
    # The step to sigma = 0 has an error of its own, which no number of steps makes smaller.
    return grid._replace(stop=jnp.asarray(num_steps, jnp.int32))


def exploding(sampler: Any, num_steps: int, *, sigma_min: float, sigma_max: float) -> Grid:
    """N steps from sigma_max to sigma_min at alpha = 1, Karras et al.'s levels with ρ = 7."""
    schedule = EDM(sigma_min, sigma_max)
    grid = karras(schedule, num_steps + 1, max_steps=MAX_STEPS + 1)
    return fit_grid(sampler, _without_last_step(grid, num_steps), schedule)


def preserving(sampler: Any, num_steps: int, *, sigma_min: float, sigma_max: float) -> Grid:
    """The same noise-to-signal ratios on a variance-preserving path."""

    def normed(level: NoiseLevel | None) -> NoiseLevel | None:
        if level is None:
            return None
        norm = jnp.sqrt(level.alpha**2 + level.sigma**2)
        return NoiseLevel(level.t, level.alpha / norm, level.sigma / norm)

    grid = exploding(sampler, num_steps, sigma_min=sigma_min, sigma_max=sigma_max)
    levels, middle, ends = (normed(part) for part in (grid.levels, grid.middle, grid.ends))
    assert levels is not None
    return grid._replace(levels=levels, middle=middle, ends=ends)


def uniform_in_time(sampler: Any, num_steps: int) -> Grid:
    """N equal steps in t from 1 to 0.05 on `LinearVP`."""
    schedule = LinearVP()
    times = np.linspace(schedule.t_max, schedule.t_min, num_steps + 1)
    grid = _without_last_step(from_times(schedule, times, max_steps=MAX_STEPS + 1), num_steps)
    if getattr(sampler, "middle", None) == "time":
        here, there = grid.levels.t[:-1], grid.levels.t[1:]
        return grid._replace(middle=schedule(0.5 * (here + there)))
    return fit_grid(sampler, grid, schedule)


def ode_grid(sampler: Any, num_steps: int) -> Grid:
    """σ/α from 10 to 0.1 at alpha = 1."""
    return exploding(sampler, num_steps, sigma_min=0.1, sigma_max=10.0)


def sde_grid(sampler: Any, num_steps: int) -> Grid:
    """σ/α from 20 to 0.02, variance-preserving: there "small" and "large" are what DDPM means."""
    return preserving(sampler, num_steps, sigma_min=0.02, sigma_max=20.0)


# Grids are padded to this, so that a sampler compiles once for all numbers of steps.
MAX_STEPS = 512


@dataclass(frozen=True)
class Order:
    """What the error of a sampler must do.

    Attributes:
      sampler: with its options.
      low, high: bounds of the slope log(error(N) / error(N')) / log(N' / N) between each two
        neighbours in `num_steps`.
      num_steps: N of each measurement; multiples of the block in singlestep methods.
      grid: (sampler, N) -> the grid.
      weak: whether the error is that of the variance of the samples on Gaussian data, and not
        that of every single sample against the exact flow.
      error: (N, bound on the RMS error with so many steps), or None.
    """

    sampler: Any
    low: float
    high: float = math.inf
    num_steps: tuple[int, ...] = (64, 128, 256)
    grid: Callable[[Any, int], Grid] = ode_grid
    weak: bool = False
    error: tuple[int, float] | None = None


LATE = (128, 256, 512)


def _first(sampler: Any) -> Order:
    return Order(sampler, 0.95, 1.05, error=(32, 4.5e-2))


def _second(sampler: Any, bound: float | None = 3e-3) -> Order:
    return Order(sampler, 1.9, 2.1, error=None if bound is None else (32, bound))


def _singlestep(low: float, high: float, bound: float | None, **options: Any) -> Order:
    """Blocks of two or three steps, as many as other rows have steps."""
    sampler = DPMSolverSinglestep(**options)
    num_steps = tuple(sampler.order * blocks for blocks in (64, 128))
    error = None if bound is None else (32 * sampler.order, bound)
    return Order(sampler, low, high, num_steps, error=error)


def _deis(order: int, low: float, high: float, bound: float | None) -> Order:
    sampler = DEIS(order=order, start="runge_kutta")
    error = None if bound is None else (32, bound)
    return Order(sampler, low, high, LATE, uniform_in_time, error=error)


def _in_time(sampler: Any) -> Order:
    """Weights of equal steps and the transfer of DDIM: order 2, after a transient of more."""
    return Order(sampler, 1.9, 2.3, (256, 512), uniform_in_time, error=(32, 7e-3))


def _weak(sampler: Any, order: int) -> Order:
    width = {1: 0.1, 2: 0.15}[order]
    return Order(sampler, order - width, order + width, (128, 512), sde_grid, weak=True)


def _sde(order: int, **options: Any) -> DPMSolverMultistep:
    return DPMSolverMultistep(order, algorithm="sde-dpmsolver++", **options)


# Windows and bounds follow from the theory of each method and from prototypes of them in float64,
# not from this code. Rules for the last steps are off, as they are for grids that end at sigma = 0.
ORDERS: dict[str, Order] = {
    "euler": _first(Euler()),
    "ddim": _first(DDIM()),
    "dpm_solver_pp_1": _first(DPMSolverMultistep(order=1)),
    "heun": _second(Heun()),
    "flow_heun": _second(FlowHeun(), None),
    "kdpm2": _second(KDPM2()),
    "dpm_solver_pp_2s": _singlestep(1.9, 2.1, 3e-3, order=2),
    "dpm_solver_pp_3s": _singlestep(2.85, 3.1, None, order=3),
    "dpm_solver_2s": _singlestep(1.9, 2.1, 3e-3, order=2, algorithm="dpmsolver"),
    "dpm_solver_3s": _singlestep(2.85, 3.1, 5e-5, order=3, algorithm="dpmsolver"),
    "dpm_solver_pp_2m": _second(DPMSolverMultistep()),
    "dpm_solver_2m": _second(DPMSolverMultistep(algorithm="dpmsolver"), None),
    "dpm_solver_pp_3m": Order(DPMSolverMultistep(3), 2.9, 3.3, error=(32, 1e-3)),
    "dpm_solver_3m": Order(
        DPMSolverMultistep(3, algorithm="dpmsolver"), 2.9, 3.3, error=(32, 1e-3)
    ),
    # The published coefficients, half of one term short of the third order.
    "dpm_solver_pp_3m reference": Order(
        DPMSolverMultistep(3, variant="reference"), 1.9, 2.1, LATE, error=(32, 1e-3)
    ),
    "unipc_1": _second(UniPC(1, lower_order_final=False), None),
    "unipc_2": Order(UniPC(2, lower_order_final=False), 2.8, 3.1, error=(32, 8e-4)),
    "unipc_2 bh1": Order(UniPC(2, "bh1", lower_order_final=False), 2.8, 3.1),
    "unipc_3": Order(UniPC(3, lower_order_final=False), 3.2, 4.2, error=(32, 2e-4)),
    "unip_2": _second(UniPC(2, corrector=False, lower_order_final=False)),
    "lms_2": _second(LMS(order=2), None),
    "lms_3": Order(LMS(order=3, start="runge_kutta"), 2.8, 3.1),
    "lms_4": Order(LMS(start="runge_kutta"), 3.6, 4.2, error=(32, 1.5e-3)),
    # What one Euler step at the start leaves of it, in the end.
    "lms_4 euler start": Order(LMS(), 1.9, 2.6, (256, 512)),
    "pndm": _in_time(PNDM()),
    "plms": _in_time(PNDM(runge_kutta_start=False)),
    "ipndm": _in_time(IPNDM()),
    "deis_1": Order(DEIS(order=1), 0.95, 1.05, error=(32, 4.5e-2)),
    "deis_2": _deis(2, 1.8, 2.1, 1.2e-2),
    "deis_3": _deis(3, 2.9, 3.4, 8e-3),
    "deis_4": _deis(4, 3.4, 4.4, None),
    "ddpm small": _weak(DDPM("small"), 1),
    "ddpm large": _weak(DDPM("large"), 1),
    "ddim eta 1": _weak(DDIM(eta=1.0), 1),
    "ddim eta 0.5": _weak(DDIM(eta=0.5), 1),
    "euler_ancestral": _weak(EulerAncestral(), 1),
    "euler_churn": _weak(EulerChurn(s_churn=20.0), 1),
    "heun_churn": _weak(HeunChurn(s_churn=20.0), 2),
    # More noise than the process has: the variance stays too large for any number of steps.
    "heun_churn s_noise 1.007": Order(
        HeunChurn(s_churn=20.0, s_noise=1.007), -0.5, 0.5, (128, 512), sde_grid, weak=True
    ),
    "kdpm2_ancestral": _weak(KDPM2Ancestral(), 2),
    "dpm_solver_pp_sde": _weak(DPMSolverSDE(), 2),
    # Two unit normals in place of one path.
    "dpm_solver_pp_sde independent": _weak(DPMSolverSDE(noise="independent"), 1),
    "dpm_solver_pp_1 sde": _weak(_sde(1), 1),
    "dpm_solver_pp_2m sde": _weak(_sde(2), 2),
    "dpm_solver_pp_2m sde heun": _weak(_sde(2, solver_type="heun"), 2),
    "dpm_solver_pp_3m sde": _weak(_sde(3), 2),
    # A wrong sign in the published code.
    "dpm_solver_pp_3m sde reference": _weak(_sde(3, variant="reference"), 1),
    "dpm_solver_pp_2s sde": _weak(DPMSolverSinglestep(2, "sde-dpmsolver++"), 2),
    "dpm_solver_pp_2s sde reference": _weak(
        DPMSolverSinglestep(2, "sde-dpmsolver++", variant="reference"), 1
    ),
}

# Rows of SAMPLERS that have no order with a denoiser, and why.
WITHOUT_ORDER = {
    "renoise": "draws the errors of x0 anew in each step: it does not converge",
    "lcm": "samples consistency functions, not denoisers",
    "tcd": "samples consistency functions, not denoisers",
    "consistency_multistep": "samples consistency functions, not denoisers",
}
