"""bench order: the measured order of every sampler beside the window that it must lie in."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from diffusion_jax.commands.moments import variance_error
from diffusion_jax.commands.order_table import ORDERS, Order
from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.grid import Grid
from diffusion_jax.core.mixture import MIXTURE, exact_flow, gaussian
from diffusion_jax.core.types import Array, NoiseLevel
from diffusion_jax.samplers import Sampler, sample

NUM_POINTS = 256
# Data of the weak orders: narrow, so that the variance is far from that of the noise.
GAUSSIAN = gaussian(0.0, 0.25)


@dataclass(frozen=True)
class Measured:
    """A row of the order table, measured.

    Attributes:
      errors: by number of steps.
      slopes: between neighbours in the row's num_steps.
      inside: whether every slope lies in the window, and the error below its bound.
    """

    errors: Mapping[int, float]
    slopes: tuple[float, ...]
    inside: bool


@functools.partial(jax.jit, static_argnames="sampler")
def solve(sampler: Sampler, grid: Grid, x_T: Array) -> Array:
    """The sample of the mixture's exact denoiser, x_T [B, 2] -> [B, 2]."""
    keys = image_keys(0, jnp.arange(x_T.shape[0]))
    return sample(sampler, MIXTURE.denoise, grid, x_T, keys)[0]


@functools.cache
def _draws() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return MIXTURE.draw(rng, NUM_POINTS), rng.standard_normal((NUM_POINTS, MIXTURE.dim))


@functools.cache
def _flow(alpha: float, sigma: float, next_alpha: float, next_sigma: float):
    """256 points of the mixture at a level, and where the exact flow takes them."""
    start, end = (NoiseLevel(*(np.asarray(v) for v in level)) for level in (
        (0.0, alpha, sigma), (0.0, next_alpha, next_sigma)
    ))  # fmt: skip
    x0, noise = _draws()
    x = alpha * x0 + sigma * noise
    return x, exact_flow(MIXTURE, x, start, end)


def strong_error(sampler: Sampler, grid: Grid) -> float:
    """RMS distance of 256 samples to the exact solution of the probability-flow ODE, float64."""
    with jax.enable_x64(True):
        start, end = grid.level(grid.start), grid.next_level(int(grid.stop) - 1)
        x, exact = _flow(*(float(v) for v in (start.alpha, start.sigma, end.alpha, end.sigma)))
        solved = np.asarray(solve(sampler, grid, jnp.asarray(x)))
    return float(np.sqrt(np.mean(np.sum((solved - exact) ** 2, axis=-1))))


def measure(order: Order) -> Measured:
    """The errors and slopes of one row, in float64."""
    bounded = () if order.error is None else (order.error[0],)
    errors = {}
    for num_steps in sorted({*order.num_steps, *bounded}):
        with jax.enable_x64(True):
            grid = order.grid(order.sampler, num_steps)
        errors[num_steps] = (
            variance_error(order.sampler, GAUSSIAN, grid)
            if order.weak
            else strong_error(order.sampler, grid)
        )
    pairs = zip(order.num_steps[:-1], order.num_steps[1:], strict=True)
    slopes = tuple(
        float(np.log(abs(errors[few] / errors[many])) / np.log(many / few)) for few, many in pairs
    )
    inside = all(order.low <= slope <= order.high for slope in slopes)
    if order.error is not None:
        inside = inside and errors[order.error[0]] < order.error[1]
    return Measured(errors, slopes, inside)


def line(name: str, order: Order, measured: Measured) -> str:
    """One row of the printed table."""
    window = f"{order.low:g} to {order.high:g}"
    slopes = " ".join(f"{slope:5.2f}" for slope in measured.slopes)
    steps = " ".join(str(n) for n in order.num_steps)
    last = measured.errors[order.num_steps[-1]]
    bound = ""
    if order.error is not None:
        num_steps, limit = order.error
        bound = f"{measured.errors[num_steps]:.1e} < {limit:.1e} (N = {num_steps})"
    kind = "variance" if order.weak else "samples"
    verdict = "ok" if measured.inside else "OUTSIDE"
    return (
        f"{name:31} {kind:8}  {steps:11}  {slopes:11}  {window:12}  {last:9.1e}  "
        f"{bound:30}  {verdict}"
    )


def show(names: Iterable[str] = ()) -> bool:
    """Measures and prints the order table, or some rows of it; whether all lie in their windows.

    Raises:
      ValueError: if a row is unknown.
    """
    names = tuple(names) or tuple(ORDERS)
    unknown = sorted(set(names) - set(ORDERS))
    if unknown:
        raise ValueError(f"no rows {unknown} in the order table; there are {sorted(ORDERS)}")
    print(
        "Order of convergence, float64. samples: RMS error against the exact probability flow of\n"
        "a mixture; variance: relative error of the samples' variance on a Gaussian, exact."
    )
    head = f"{'sampler':31} {'error of':8}  {'N':11}  {'slope':11}  {'window':12}  "
    print(f"{head}{'last error':9}  {'error where it is bounded':29}")
    inside = True
    for name in (progress := tqdm(names, "orders", leave=False)):
        measured = measure(ORDERS[name])
        inside = inside and measured.inside
        progress.write(line(name, ORDERS[name], measured))
    return inside
