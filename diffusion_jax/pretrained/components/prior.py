"""diffusers' PriorTransformer and UnCLIPTextProjModel, read and written as ours."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.conditioners.clip_projection import CLIPProjectionConfig, clip_projection
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import Params
from diffusion_jax.io.tables.prior import (
    PRIOR_ROWS,
    TEXT_PROJECTION_ROWS,
    prior_config,
    prior_options,
    text_projection_config,
    text_projection_options,
)
from diffusion_jax.models.prior import PriorConfig
from diffusion_jax.pretrained.components.base import Component


def _read_prior(config: Mapping[str, Any]) -> PriorConfig:
    return PriorConfig(**prior_config(config))


def _write_prior(config: PriorConfig) -> dict[str, Any]:
    return prior_options(dataclasses.asdict(config))


def prior_shapes(config: PriorConfig) -> Params:
    """Shapes of {"network": …, "codec": {"mean", "std"}}; see `restore_embedding`."""

    def struct(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    # Learned positions may be those of x alone, so that this sequence fits any configuration.
    x = struct(1, config.num_positions, config.data_dim)
    tokens = struct(1, 1, config.data_dim) if config.token_projection else None
    cond = Condition(vector=struct(1, config.embed_dim), tokens=tokens)
    network = jax.eval_shape(config.build().init, jax.random.key(0), x, struct(1), cond)["params"]
    statistic = struct(1, config.out_dim or config.data_dim)
    return {"network": network, "codec": {"mean": statistic, "std": statistic}}


def _read_projection(config: Mapping[str, Any]) -> CLIPProjectionConfig:
    return CLIPProjectionConfig(**text_projection_config(config))


def _projection_shapes(config: CLIPProjectionConfig) -> Params:
    return jax.eval_shape(clip_projection(config).init, jax.random.key(0))


PRIOR = Component(
    read=_read_prior,
    write=_write_prior,
    shapes=prior_shapes,
    rows=lambda config, names: PRIOR_ROWS,
)
CLIP_PROJECTION = Component(
    read=_read_projection,
    write=lambda config: text_projection_options(dataclasses.asdict(config)),
    shapes=_projection_shapes,
    rows=lambda config, names: TEXT_PROJECTION_ROWS,
)
