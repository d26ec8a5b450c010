"""diffusers' autoencoders, read and written as ours."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.core.types import Params
from diffusion_jax.io.tables.autoencoder import (
    autoencoder_kl_config,
    autoencoder_kl_json,
    autoencoder_rows,
    autoencoder_tiny_config,
    autoencoder_tiny_json,
    autoencoder_tiny_rows,
    vq_model_config,
    vq_model_json,
)
from diffusion_jax.models.autoencoder import AutoencoderKLConfig, AutoencoderLevel
from diffusion_jax.models.tiny_autoencoder import AutoencoderTinyConfig
from diffusion_jax.models.vq import VQModelConfig
from diffusion_jax.pretrained.components.base import Component

AnyAutoencoderConfig = AutoencoderKLConfig | VQModelConfig | AutoencoderTinyConfig


def with_levels(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The plain fields of a translated configuration with the records that they stand for."""
    levels, up_levels = fields["levels"], fields["up_levels"]
    return {
        **fields,
        "levels": tuple(AutoencoderLevel(**level) for level in levels),
        "up_levels": up_levels and tuple(AutoencoderLevel(**level) for level in up_levels),
    }


def autoencoder_shapes(config: AnyAutoencoderConfig) -> Params:
    """Shapes of the parameters, of float32 `jax.ShapeDtypeStruct`s."""
    shape = (1, config.factor, config.factor, config.in_channels)
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(config.build().init, jax.random.key(0), image)["params"]


AUTOENCODER_KL = Component(
    read=lambda config: AutoencoderKLConfig(**with_levels(autoencoder_kl_config(config))),
    write=lambda config: autoencoder_kl_json(dataclasses.asdict(config)),
    shapes=autoencoder_shapes,
    rows=lambda config, names: autoencoder_rows(names),
)
VQ_MODEL = Component(
    read=lambda config: VQModelConfig(**with_levels(vq_model_config(config))),
    write=lambda config: vq_model_json(dataclasses.asdict(config)),
    shapes=autoencoder_shapes,
    rows=lambda config, names: autoencoder_rows(names),
)
AUTOENCODER_TINY = Component(
    read=lambda config: AutoencoderTinyConfig(**autoencoder_tiny_config(config)),
    write=lambda config: autoencoder_tiny_json(dataclasses.asdict(config)),
    shapes=autoencoder_shapes,
    rows=lambda config, names: autoencoder_tiny_rows(config.encoder_blocks, config.decoder_blocks),
)
