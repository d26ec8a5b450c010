"""GLIGEN's position networks and downsamplers as our configurations, shapes and conditioners."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.conditioners.base import Conditioner
from diffusion_jax.conditioners.grounding import (
    keypoints,
    map_channels,
    map_tokens,
    text_boxes,
    text_image_boxes,
)
from diffusion_jax.core.types import Params
from diffusion_jax.io.tables.gligen import Module
from diffusion_jax.models.convnext import ConvNeXtConfig
from diffusion_jax.models.grounding import (
    GROUNDINGS,
    KeypointGroundingConfig,
    MapDownsamplerConfig,
    MapGroundingConfig,
    TextGroundingConfig,
    TextImageGroundingConfig,
)
from diffusion_jax.models.inputs import DType

GroundingConfig = (
    TextGroundingConfig
    | TextImageGroundingConfig
    | KeypointGroundingConfig
    | MapGroundingConfig
    | MapDownsamplerConfig
)

_CONDITIONERS: Mapping[type, Any] = {
    TextGroundingConfig: text_boxes,
    TextImageGroundingConfig: text_image_boxes,
    KeypointGroundingConfig: keypoints,
    MapGroundingConfig: map_tokens,
    MapDownsamplerConfig: map_channels,
}


def grounding_config(module: Module) -> GroundingConfig:
    """The plain fields of a translated configuration as the dataclass that they stand for."""
    fields = dict(module.fields)
    if module.kind == "downsampler":
        return MapDownsamplerConfig(**fields)
    if "encoder" in fields:
        fields["encoder"] = ConvNeXtConfig(**fields["encoder"])
    return GROUNDINGS[module.kind](**fields)


def grounding_conditioner(config: GroundingConfig, *, dtype: DType = jnp.float32) -> Conditioner:
    """The conditioner that runs a position network or a downsampler.

    Args:
      config: of the network.
      dtype: of what it makes.
    """
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return _CONDITIONERS[type(config)](**options, dtype=dtype)


def grounding_shapes(config: GroundingConfig) -> Params:
    """The parameter tree of a position network or downsampler, of `jax.ShapeDtypeStruct`s."""
    return jax.eval_shape(grounding_conditioner(config).init, jax.random.key(0))
