"""The sampler protocol and the one sampling loop."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.arrays import fold_in_each, per_image_normal
from diffusion_jax.core.grid import Grid, with_middle
from diffusion_jax.core.schedules import NoiseSchedule
from diffusion_jax.core.types import Array, Key, NoiseLevel, Prediction

Denoise = Callable[[Array, NoiseLevel], Prediction]

# Steps fold in their index; the initial noise folds in a number that no step can have.
_INITIAL_NOISE = 0xFFFFFFFF


@struct.dataclass
class SamplerState:
    """State of a sampler without memory.

    Attributes:
      x: [B, ...] the sample at the current level.

    Source: none; a convention of this library.
    """

    x: Array


class StepInfo(NamedTuple):
    """Where in the grid a step is, for rules such as a lower order at the end.

    Attributes:
      index: [] this step.
      start: [] the first step that is run.
      stop: [] one past the last step.
      middle: the level inside of this step, or None where the grid has none.

    Source: none; a convention of this library.
    """

    index: Array | int
    start: Array | int
    stop: Array | int
    middle: NoiseLevel | None = None


class Sampler(Protocol):
    """What turns a denoiser into samples: a pure step from one level to the next.

    Implementations are dataclasses of `core.struct` whose continuous knobs are leaves.

    Source: none; a convention of this library.
    """

    def init(self, x_T: Array) -> Any:
        """The state before the first step; its field x is the sample."""
        ...

    def step(
        self,
        keys: Key,
        denoise: Denoise,
        state: Any,
        level: NoiseLevel,
        next_level: NoiseLevel,
        info: StepInfo,
    ) -> Any:
        """One step from `level` to the cleaner `next_level`, with one key per image."""
        ...


def initial_noise(keys: Key, shape: tuple[int, ...], std: Array | float = 1.0) -> Array:
    """x_T ~ N(0, std²), [B, *shape] float32, image i drawn from keys[i] alone.

    Args:
      keys: [B] one key per image, see `image_keys`.
      shape: of one image.
      std: the schedule's `prior_std` at the level where sampling starts.

    Source: Ho et al. 2020 (arXiv:2006.11239), algorithm 2, line 1.
    """
    like = jnp.zeros(keys.shape + tuple(shape), jnp.float32)
    return jnp.asarray(std, like.dtype) * per_image_normal(fold_in_each(keys, _INITIAL_NOISE), like)


def _check(x_T: Array, keys: Key) -> None:
    if x_T.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"samplers keep their state in float32: x_T has dtype {x_T.dtype}; convert it with "
            "astype(float32), the network may still compute in bfloat16"
        )
    if keys.shape != x_T.shape[:1] or not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"expected one key per image, shape {x_T.shape[:1]}, got {keys.dtype} of shape "
            f"{keys.shape}; make them with image_keys(seed, range(batch_size))"
        )


def sample(
    sampler: Sampler,
    denoise: Denoise,
    grid: Grid,
    x_T: Array,
    keys: Key,
    *,
    trace: Callable[[Any], Any] | None = None,
) -> tuple[Array, Any]:
    """Runs a sampler over a grid.

    One `fori_loop` over a padded grid: the number of steps, the start, the seed and the
    sampler's knobs are data, and changing them does not recompile. With a grid of Python
    bounds (`grid.fixed()`) reverse-mode gradients pass through, each step rematerialised.

    Args:
      sampler: a value of SAMPLERS.
      denoise: (x, level) -> Prediction, conditions bound.
      grid: levels from noisy to clean; they are taken in x_T's type.
      x_T: [B, ...] float32 (or float64) noise at grid.levels[grid.start].
      keys: [B] one key per image.
      trace: state -> pytree to be recorded after every step.

    Returns:
      The sample [B, ...] and the trace: leaves [max_steps, ...], zero in rows that were not
      run; None without `trace`.

    Raises:
      ValueError: if x_T is not float32, or keys are not one per image.

    Source: none; a convention of this library.
    """
    _check(x_T, keys)
    # Under jax_enable_x64 grids are in float64, and would make the state of the loop so too.
    grid = grid.astype(x_T.dtype)
    state = sampler.init(x_T)
    step = _step_of(sampler, denoise, grid, keys)
    if trace is None:
        return _loop(grid.start, grid.stop, step, state).x, None
    shapes = jax.eval_shape(trace, state)
    max_steps = grid.levels.t.shape[0] - 1
    record = jax.tree.map(lambda s: jnp.zeros((max_steps, *s.shape), s.dtype), shapes)

    def traced_step(index, carry):
        state, record = carry
        state = step(index, state)
        return state, jax.tree.map(lambda r, v: r.at[index].set(v), record, trace(state))

    state, record = _loop(grid.start, grid.stop, traced_step, (state, record))
    return state.x, record


def advance(
    sampler: Sampler,
    denoise: Denoise,
    grid: Grid,
    state: Any,
    keys: Key,
    first: Array | int,
    stop: Array | int,
) -> Any:
    """The state of a sampler after steps first … stop - 1 of a grid; `sample` in pieces.

    Where the pieces lie end to end they make the steps that `sample` makes, so that a caller may
    look at the sample, or change it, between them.

    Args:
      sampler, denoise, keys: as of `sample`.
      grid: the whole one; its start and stop are those of the whole run.
      state: before the step `first`; sampler.init(x_T) before the first of all.
      first, stop: indices of steps, within start … stop of the grid.

    Raises:
      ValueError: if the state's x is not float32, or keys are not one per image.

    Source: none; a convention of this library.
    """
    _check(state.x, keys)
    step = _step_of(sampler, denoise, grid.astype(state.x.dtype), keys)
    return _loop(first, stop, step, state)


def _step_of(
    sampler: Sampler, denoise: Denoise, grid: Grid, keys: Key
) -> Callable[[Array | int, Any], Any]:
    def step(index, state):
        return sampler.step(
            fold_in_each(keys, index),
            denoise,
            state,
            grid.level(index),
            grid.next_level(index),
            StepInfo(index, grid.start, grid.stop, grid.middle_level(index)),
        )

    return step


def _loop(first: Array | int, stop: Array | int, step: Callable, carry: Any) -> Any:
    if isinstance(first, int) and isinstance(stop, int):
        step = jax.checkpoint(step)
    return jax.lax.fori_loop(first, stop, step, carry)


def fit_grid(sampler: Sampler, grid: Grid, schedule: NoiseSchedule) -> Grid:
    """The grid with what the sampler needs beyond the levels themselves.

    A sampler with an attribute `middle` evaluates the network at a level of its own in each
    step. `middle` is either the name of a rule of `core.grid.with_middle`, or a method
    (grid, schedule) -> NoiseLevel with every field [MAX], which may read the sampler's knobs.
    Grids of other samplers are returned as they are, and so are grids that have middle levels,
    which published ones bring along. So for other knobs, or another sampler, fit the grid as it was
    made: a fitted one would keep the levels of before.

    Args:
      sampler: a value of SAMPLERS.
      grid: as it was made of the schedule.

    Source: none; a convention of this library.
    """
    middle = getattr(sampler, "middle", None)
    if middle is None or grid.middle is not None:
        return grid
    if callable(middle):
        return grid._replace(middle=middle(grid, schedule))
    return with_middle(grid, schedule, middle)


def need_middle(sampler: Sampler, info: StepInfo) -> NoiseLevel:
    """The level inside of a step that the sampler asked for by its attribute `middle`.

    Raises:
      ValueError: if the grid has none.

    Source: none; a convention of this library.
    """
    if info.middle is None:
        raise ValueError(
            f"{type(sampler).__name__} evaluates the network at levels of its own inside of each "
            "step, and this grid has none: sample on fit_grid(sampler, grid, schedule)"
        )
    return info.middle


def noise_from_x0(x: Array, x0: Array, level: NoiseLevel) -> Array:
    """ε̂ = (x_t - α x̂0) / σ: the noise always follows from x̂0, so thresholding stays consistent.

    Args:
      x, x0: [B, ...].
      level: scalars, sigma > 0.

    Source: Song et al. 2021 (arXiv:2010.02502), eq. 9.
    """
    return (x - level.alpha * x0) / level.sigma


NOISES_FROM = ("x0", "raw_x0")


def check_noise_from(noise_from: str) -> None:
    """Raises ValueError unless it names an x̂0 of a Prediction.

    Source: none; a convention of this library.
    """
    if noise_from not in NOISES_FROM:
        raise ValueError(f"noise_from must be one of {NOISES_FROM}, got {noise_from!r}")


def predicted_noise(prediction: Prediction, x: Array, level: NoiseLevel, noise_from: str) -> Array:
    """ε̂ of x̂0 as it is ("x0"), or as it was before it was thresholded ("raw_x0").

    Args:
      prediction: of the denoiser at x; its raw_x0 is None where nothing was thresholded.
      x: [B, ...].
      level: scalars, sigma > 0.
      noise_from: one of NOISES_FROM.

    Source: none; a convention of this library.
    """
    raw = noise_from == "raw_x0" and prediction.raw_x0 is not None
    return noise_from_x0(x, prediction.raw_x0 if raw else prediction.x0, level)
