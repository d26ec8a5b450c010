"""System: the stages of a model by name, and how they sample together."""

from collections.abc import Mapping
from typing import NamedTuple

from diffusion_jax.core.timesteps import Grid
from diffusion_jax.guidance import Guide
from diffusion_jax.samplers import Sampler
from diffusion_jax.systems.stage import SampleFn, Stage


class System(NamedTuple):
    """A model of one or more stages.

    Attributes:
      stages: each trained by itself, in the order in which they are trained.
      sample: draws one image per key; its params are those of every stage, by name.
      guide, sampler, grid: what `sample` uses where nothing is given.
    """

    stages: Mapping[str, Stage]
    sample: SampleFn
    guide: Guide
    sampler: Sampler
    grid: Grid


def single(stage: Stage) -> System:
    """A system of one stage, called "base"."""

    def sample(params, batch, keys, *, guide=None, sampler=None, grid=None):
        return stage.sample(params["base"], batch, keys, guide=guide, sampler=sampler, grid=grid)

    return System({"base": stage}, sample, stage.guide, stage.sampler, stage.grid)
