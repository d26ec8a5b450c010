"""System: the stages of a model by name, and how they sample together."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from diffusion_jax.core.types import Array, Batch, Key, Params
from diffusion_jax.systems.stage import Stage


class System(NamedTuple):
    """A model of one or more stages.

    Attributes:
      stages: each trained by itself.
      sample: (params by stage, batch, keys [B]) -> images.
    """

    stages: Mapping[str, Stage]
    sample: Callable[[Params, Batch, Key], Array]


def single(stage: Stage) -> System:
    """A system of one stage, called "base"."""
    return System(
        {"base": stage}, lambda params, batch, keys: stage.sample(params["base"], batch, keys)
    )
