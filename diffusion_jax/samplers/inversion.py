"""From data to the noise that a deterministic sampler makes it of, and paths between noises."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core import struct
from diffusion_jax.core.arrays import image_keys, per_example
from diffusion_jax.core.grid import Grid
from diffusion_jax.core.types import Array, Key, NoiseLevel, Prediction
from diffusion_jax.samplers.base import (
    Denoise,
    Sampler,
    SamplerState,
    StepInfo,
    noise_from_x0,
    predicted_noise,
    sample,
)

VARIANTS = ("default", "reference")

# At sigma = 0, x̂0 = x says nothing about ε̂. But of a network that is told one time and read with
# the rates (σ, α) of another, ε̂ is affine in these: constant where it predicts ε, and σ x + α v
# where it predicts v. So three readings elsewhere on the circle, weighted, give that at (0, 1).
_RATES = ((0.28, 0.96), (0.6, 0.8), (0.8, 0.6))
_WEIGHTS = np.linalg.solve(np.vstack([np.transpose(_RATES), np.ones(3)]), (0.0, 1.0, 1.0)).tolist()


@struct.dataclass
class DDIMInversion:
    """DDIM backwards: the x_s, noisier than x_t, from which DDIM at eta = 0 steps to x_t.

    x_s = α_s / α_t (x_t - σ_t ε̂) + σ_s ε̂ with ε̂ of the network at x_s and s, which is the
    unknown. One iteration takes x_t for it, as DDIM inversion is commonly done: an error of first
    order. Each further iteration puts the last x_s in, and where that converges, the inverse is
    exact: sampling gives the data back. It starts from clean data too.

    Attributes:
      iterations: at least 1, calls of the network a step.
      variant: "default", or "reference" for diffusers' DDIMInverseScheduler: the network at x_t is
        told the time s but read with the rates of t, which is the same if it predicts ε. From
        sigma = 0 on it must predict ε or v. Where x̂0 is thresholded, ε̂ stays what the network
        said. One iteration.

    Raises:
      ValueError: if iterations is below 1, or the variant is unknown or cannot iterate.

    Source: Song et al. 2021 (arXiv:2010.02502), section 5.4; Dhariwal & Nichol 2021
    (arXiv:2105.05233), appendix F; iterations: Pan et al. 2023 (arXiv:2309.04907), section 3.
    """

    iterations: int = struct.field(pytree_node=False, default=1)
    variant: str = struct.field(pytree_node=False, default="default")

    # Its first step may start at sigma = 0, where no other sampler knows ε̂.
    starts_clean = True

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {VARIANTS}, got {self.variant!r}")
        if self.iterations < 1 or (self.variant == "reference" and self.iterations != 1):
            raise ValueError(
                "iterations must be at least 1, and 1 with the variant 'reference', got "
                f"{self.iterations} with {self.variant!r}"
            )

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
        if self.variant == "reference":
            x0, eps = _read_with_the_rates_of(level, next_level.t, denoise, state.x)
            return SamplerState(next_level.alpha * x0 + next_level.sigma * eps)

        def iterate(_, x):
            eps = noise_from_x0(x, denoise(x, next_level).x0, next_level)
            x0 = (state.x - level.sigma * eps) / level.alpha
            return next_level.alpha * x0 + next_level.sigma * eps

        return SamplerState(jax.lax.fori_loop(0, self.iterations, iterate, state.x))


def _read_with_the_rates_of(
    level: NoiseLevel, t: Array, denoise: Denoise, x: Array
) -> tuple[Array, Array]:
    """x̂0 and ε̂ of a network that is told another time than that of the level."""

    def noisy(x):
        told = level._replace(t=t)
        prediction = denoise(x, told)
        return prediction.x0, predicted_noise(prediction, x, told, "raw_x0")

    def clean(x):
        eps = jnp.zeros_like(x)
        for weight, (sigma, alpha) in zip(_WEIGHTS, _RATES, strict=True):
            told = NoiseLevel(t, *(jnp.full_like(level.alpha, rate) for rate in (alpha, sigma)))
            eps = eps + weight * predicted_noise(denoise(x, told), x, told, "raw_x0")
        return denoise(x, level._replace(t=t)).x0, eps

    return jax.lax.cond(level.sigma == 0, clean, noisy, x)


def reverse(grid: Grid, *, from_clean: bool = False) -> Grid:
    """The grid from its last level back to its first one, padded to the same length.

    Levels inside of its steps stay there. Bounds that are Python numbers stay such, unless the
    levels are traced.

    Args:
      grid: without jumps upwards; steps before its start stay out.
      from_clean: include the step out of sigma = 0, for samplers that can take it. Otherwise a
        grid that ends there is reversed from the level before.

    Raises:
      ValueError: if the grid has ends of its own.

    Source: none; a convention of this library.
    """
    if grid.ends is not None:
        raise ValueError(
            "only grids of levels in a row can be reversed; this one has ends of its own"
        )
    bounds = (grid.start, grid.stop, *jax.tree.leaves(grid.levels))
    # Inside of jit jnp would trace what is known.
    xp = jnp if any(isinstance(value, jax.core.Tracer) for value in bounds) else np
    first, last = grid.start, grid.stop
    if not from_clean:
        last = last - (xp.asarray(grid.levels.sigma)[last] == 0)
    if xp is np and isinstance(first, int) and isinstance(grid.stop, int):
        start, first, stop = 0, int(first), int(last) - int(first)
    else:
        first, last = (jnp.asarray(bound, jnp.int32) for bound in (first, last))
        start, stop = jnp.asarray(0, jnp.int32), last - first
    index = jnp.arange(grid.levels.t.shape[0], dtype=jnp.int32)

    def back(level, last):
        return NoiseLevel(
            *(jnp.asarray(f)[jnp.maximum(last - index[: len(f)], first)] for f in level)
        )

    # Step i goes from level last - i to the one before, so through the middle of that one's step.
    middle = None if grid.middle is None else back(grid.middle, last - 1)
    return Grid(back(grid.levels, last), start, stop, middle)


@jax.jit
def _without_network(sampler: Sampler, grid: Grid, x: Array, keys: Key) -> Array:
    def denoise(x, level):
        return Prediction(0.5 * x, 0.5 * jnp.ones_like(x), jnp.zeros_like(x))

    return sample(sampler, denoise, grid, x, keys)[0]


def _check_invertible(sampler: Sampler, grid: Grid, x: Array) -> None:
    """Raises ValueError unless x_T alone determines the sample; tracers may draw noise unseen."""
    if callable(getattr(sampler, "middle", None)):
        raise ValueError(
            f"{type(sampler).__name__} has levels inside of its steps that lead down only, and "
            "cannot be run backwards; take a deterministic sampler, such as DDIM at eta = 0 or Heun"
        )
    if grid.middle is not None and jnp.ndim(grid.middle.t) != 1:
        raise ValueError(
            "this grid has two levels inside of each step, the way a published scheduler rounds, "
            "which lead down only; take the grid as it was made"
        )
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((sampler, grid))):
        return
    with jax.ensure_compile_time_eval():
        images, start = jnp.arange(x.shape[0]), jnp.ones(x.shape, x.dtype)
        one, other = (
            _without_network(sampler, grid, start, image_keys(seed, images)) for seed in (0, 1)
        )
        same = bool(jnp.array_equal(one, other, equal_nan=True))
    if not same:
        raise ValueError(
            f"{sampler} draws noise in its steps, so no noise at the first level is the one that x "
            "was made of; take a deterministic sampler, such as DDIM at eta = 0 or Heun"
        )


def encode(sampler: Sampler, denoise: Denoise, grid: Grid, x: Array) -> Array:
    """The noise at the grid's first level that the probability flow turns into x.

    The sampler solves the flow backwards, so the error against the exact flow falls with its
    order, and so does that of `decode` after `encode`. A grid that ends with clean data is entered
    at its last noisy level with α x, which the exact flow reaches up to O(σ²).

    Args:
      sampler: a deterministic one, such as DDIM at eta = 0, Heun or DDIMInversion. Whether it draws
        noise is found out by running it without a network, for values, not tracers: inside of jit
        a sampler or a grid that are arguments are not asked.
      denoise: (x, level) -> Prediction, conditions bound; guidance makes the flow harder to
        invert.
      grid: the one to sample on afterwards, fitted to the sampler, without jumps and with all
        steps in a row.
      x: [B, ...] float32 data, at the grid's last level.

    Raises:
      ValueError: if the sampler draws noise or cannot run backwards, if the grid has ends of its
        own, or x is not float32.

    Source: Song et al. 2021 (arXiv:2010.02502), section 5.4.
    """
    back = reverse(grid, from_clean=getattr(sampler, "starts_clean", False))
    _check_invertible(sampler, grid, x)
    x = x * (back.level(0).alpha / grid.level(grid.stop).alpha).astype(x.dtype)
    return sample(sampler, denoise, back, x, image_keys(0, jnp.arange(x.shape[0])))[0]


def decode(sampler: Sampler, denoise: Denoise, grid: Grid, noise: Array) -> Array:
    """The data that a deterministic sampler makes of noise: `sample` without keys.

    Args:
      sampler, denoise, grid: as in `encode`, although another sampler may decode.
      noise: [B, ...] float32, at the grid's first level.

    Source: Song et al. 2021 (arXiv:2010.02502), section 5.4.
    """
    return sample(sampler, denoise, grid, noise, image_keys(0, jnp.arange(noise.shape[0])))[0]


def _norm(x: Array) -> Array:
    square = jnp.sum(x**2, axis=-1, keepdims=True)
    # The root has no slope at 0: there the norm is taken for a constant.
    some = square > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, square, 1.0)), 0.0)


def _unit(x: Array) -> Array:
    norm = _norm(x)
    return x / jnp.where(norm > 0, norm, 1.0)


def _perpendicular(unit: Array) -> Array:
    """A unit vector at right angles: the axis that is least like `unit`, made orthogonal."""
    axis = jax.nn.one_hot(jnp.argmin(jnp.abs(unit), axis=-1), unit.shape[-1], dtype=unit.dtype)
    return _unit(axis - jnp.sum(axis * unit, axis=-1, keepdims=True) * unit)


def slerp(start: Array, end: Array, fraction: Array | float) -> Array:
    """Spherical interpolation of noise, image by image: the way along the great circle.

    sin((1 - w) θ) / sin θ · start + sin(w θ) / sin θ · end, θ the angle of the two. Unlike a
    straight line it stays where noise is typical. Parallel images, and those of which one is 0, are
    interpolated linearly, which is the limit. Opposite ones have no great circle of their own:
    they go by the axis that is least like them, with a length that changes linearly.

    Args:
      start, end: [B, ...] of one shape.
      fraction: w, [] or [B], in [0, 1]; 0 is start and 1 end.

    Raises:
      ValueError: if the shapes differ.

    Source: Shoemake 1985 (SIGGRAPH 19(3)), section 3.3; Song et al. 2021 (arXiv:2010.02502),
    eq. 67.
    """
    if start.shape != end.shape:
        raise ValueError(f"start and end must have one shape, got {start.shape} and {end.shape}")
    a, b = (jnp.asarray(x).reshape(x.shape[0], -1) for x in (start, end))
    w = per_example(jnp.asarray(fraction, a.dtype), a)
    u, v = _unit(a), _unit(b)
    apart, together = _norm(u - v), _norm(u + v)
    tiny = jnp.finfo(a.dtype).eps ** 0.5
    some = (_norm(a) > 0) & (_norm(b) > 0)
    opposite = some & (together < tiny)
    general = some & (apart > tiny) & ~opposite
    # Not arccos, which has lost half of its digits at small angles.
    angle = 2.0 * jnp.arctan2(*(jnp.where(general, side, 1.0) for side in (apart, together)))
    along = (jnp.sin((1 - w) * angle) * a + jnp.sin(w * angle) * b) / jnp.sin(angle)
    length = (1 - w) * _norm(a) + w * _norm(b)
    around = length * (jnp.cos(jnp.pi * w) * u + jnp.sin(jnp.pi * w) * _perpendicular(u))
    straight = (1 - w) * a + w * b
    out = jnp.where(opposite, around, jnp.where(general, along, straight))
    return out.reshape(start.shape)
