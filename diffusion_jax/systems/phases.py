"""Phases: what a pipeline computes, one pure function after another over arrays by name.

A pipeline from a prompt to an image is a tuple of phases. Each reads arrays of the batch and adds
others: `Compute` in one go, `Draw` by sampling. A phase names the components whose parameters it
reads, so that they can be brought to a device one after the other; `draw_all` is all of them as one
pure function.

Phases are frozen dataclasses of what is compiled, modules and shapes. Two that are equal share
their compiled programs, whoever made them; everything that varies from call to call is an argument.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.arrays import fold_in_each, per_image_normal
from diffusion_jax.core.grid import Grid
from diffusion_jax.core.types import Array, Batch, Key, Params
from diffusion_jax.guidance import Chain, GroundedUntil, Guide, Unguided
from diffusion_jax.samplers import Sampler, advance, initial_noise
from diffusion_jax.samplers.base import Denoise

# What a phase draws besides steps and initial noise, each from keys of its own: numbers that no
# step can have, see `initial_noise`.
PURPOSES = {
    "posterior": 0xFFFFFFFE,
    "known_posterior": 0xFFFFFFFD,
    "low_res": 0xFFFFFFFC,
}


def noise_for(purpose: str, keys: Key, like: Array) -> Array:
    """Standard normal noise like [B, ...] for one of PURPOSES, image i drawn from keys[i] alone.

    Source: none; a convention of this library.
    """
    return per_image_normal(fold_in_each(keys, PURPOSES[purpose]), like)


@struct.dataclass
class Control:
    """What a call chooses of how a phase draws; all of it is data.

    Attributes:
      sampler: a value of SAMPLERS.
      grid: levels, and which steps are run.
      start_std: [] std of x at the grid's first level, where sampling starts from pure noise.
      guide: towards the condition.
      threshold: of x̂0, after guidance.
      stop: the step before which to stop, where another network takes the rest; None for the
        grid's last.
      end_scale: [] factor of the last x, for classes that keep x / α and stop before the end.
    """

    sampler: Sampler
    grid: Grid
    start_std: Array | float = 1.0
    guide: Guide = Unguided()
    threshold: Guide = Unguided()
    stop: Array | int | None = None
    end_scale: Array | float = 1.0

    @property
    def last(self) -> Array | int:
        """The step before which to stop."""
        return self.grid.stop if self.stop is None else self.stop

    @property
    def guided(self) -> bool:
        """Whether the unconditional branch is needed."""
        return _needs_null(self.guide)


def _needs_null(guide: Guide) -> bool:
    if isinstance(guide, Chain):
        return any(_needs_null(each) for each in guide.guides)
    return not isinstance(guide, Unguided | GroundedUntil)


@dataclass(frozen=True)
class Compute:
    """A phase that computes arrays of others: texts to tokens, latents to images.

    Subclasses add fields for what is compiled, and define `__call__`.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components whose parameters are read."""
        raise NotImplementedError

    def __call__(self, params: Mapping[str, Params], batch: Batch, keys: Key) -> dict[str, Array]:
        """New arrays by name.

        Args:
          params: of the components by name.
          batch: arrays by name, [B, ...] each.
          keys: [B] one key per image.
        """
        raise NotImplementedError

    def needed(self, batch: Batch) -> bool:
        """Whether there is something to compute: a caller may have brought the results along."""
        return any(name in batch for name in self.reads)


@dataclass(frozen=True)
class Draw:
    """A phase that samples.

    Attributes:
      name: of the phase, by which a call controls it.
      gives: name of what is drawn.
      shape: of one sample.
      index: place among the phases that draw; each draws from keys of its own.
    """

    name: str
    gives: str
    shape: tuple[int, ...]
    index: int = 0

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components whose parameters are read."""
        raise NotImplementedError

    def own_keys(self, keys: Key) -> Key:
        """The keys [B] of this phase; those of the first one are the images' own."""
        return fold_in_each(keys, 0xFFFFFF00 + self.index) if self.index else keys

    def unit_noise(self, batch: Batch, keys: Key) -> Array:
        """Standard normal noise [B, *shape]: batch["noise_" + gives], or drawn."""
        given = batch.get(f"noise_{self.gives}")
        return initial_noise(keys, self.shape) if given is None else given

    def begin(self, params: Mapping[str, Params], batch: Batch, keys: Key, control: Control) -> Any:
        """x [B, *shape] at the grid's first level that is run: pure noise, unless overridden."""
        del params
        return control.start_std * self.unit_noise(batch, keys)

    def sampler(self, batch: Batch, keys: Key, control: Control) -> Sampler:
        """The call's sampler; phases that keep known pixels put theirs around it."""
        del batch, keys
        return control.sampler

    def denoiser(self, params: Mapping[str, Params], batch: Batch, control: Control) -> Denoise:
        """(x, level) -> Prediction with guidance, threshold and conditions bound."""
        raise NotImplementedError

    def finish(self, batch: Batch, x: Array) -> Array:
        """What is given of the last x."""
        del batch
        return x


Phase = Compute | Draw


def start(
    phase: Draw, params: Mapping[str, Params], batch: Batch, keys: Key, control: Control
) -> Any:
    """The sampler's state before the first step.

    Source: none; a convention of this library.
    """
    own = phase.own_keys(keys)
    x = phase.begin(params, batch, own, control)
    return phase.sampler(batch, own, control).init(x)


def steps(
    phase: Draw,
    params: Mapping[str, Params],
    batch: Batch,
    keys: Key,
    control: Control,
    state: Any,
    first: Array | int,
    stop: Array | int,
) -> Any:
    """The sampler's state after the steps first … stop - 1.

    Source: none; a convention of this library.
    """
    own = phase.own_keys(keys)
    sampler = phase.sampler(batch, own, control)
    denoise = phase.denoiser(params, batch, control)
    return advance(sampler, denoise, control.grid, state, own, first, stop)


def draw_all(
    phases: Sequence[Phase],
    params: Mapping[str, Params],
    batch: Batch,
    keys: Key,
    controls: Mapping[str, Control],
) -> Batch:
    """All phases in a row: the batch with everything that they give.

    Pure and to be jitted as a whole; a phase that has nothing to compute is left out.

    Args:
      phases: static.
      params: of every component by name.
      batch: what the first phases read, arrays [B, ...].
      keys: [B] one key per image, see `image_keys`.
      controls: of every phase that draws, by its name.

    Source: none; a convention of this library.
    """
    batch = dict(batch)
    for phase in phases:
        own = {name: params[name] for name in phase.components}
        if isinstance(phase, Compute):
            if phase.needed(batch):
                batch |= phase(own, batch, keys)
            continue
        control = controls[phase.name]
        state = start(phase, own, batch, keys, control)
        bounds = control.grid.start, control.last
        state = steps(phase, own, batch, keys, control, state, *bounds)
        batch[phase.gives] = phase.finish(batch, control.end_scale * state.x)
    return batch


@functools.partial(jax.jit, static_argnums=0)
def run_compute(phase: Compute, params: Any, batch: Batch, keys: Key) -> dict[str, Array]:
    """A phase that computes, compiled.

    Source: none; a convention of this library.
    """
    return phase(params, batch, keys)


@functools.partial(jax.jit, static_argnums=0)
def run_start(phase: Draw, params: Any, batch: Batch, keys: Key, control: Control) -> Any:
    """`start`, compiled.

    Source: none; a convention of this library.
    """
    return start(phase, params, batch, keys, control)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def run_steps(
    phase: Draw,
    params: Any,
    batch: Batch,
    keys: Key,
    control: Control,
    state: Any,
    first: Array,
    stop: Array,
) -> Any:
    """`steps`, compiled once for any number of them; the state is donated.

    Source: none; a convention of this library.
    """
    return steps(phase, params, batch, keys, control, state, first, stop)


@functools.partial(jax.jit, static_argnums=0)
def run_finish(phase: Draw, batch: Batch, x: Array, control: Control) -> Array:
    """`Draw.finish` of x in the units that a call gives it in, compiled.

    Source: none; a convention of this library.
    """
    return phase.finish(batch, control.end_scale * jnp.asarray(x))
