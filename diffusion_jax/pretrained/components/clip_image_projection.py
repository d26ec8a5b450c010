"""CLIPImageProjection of diffusers' GLIGEN: CLIP's projection of images, backwards."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.core.types import Params
from diffusion_jax.io.mapping import Row
from diffusion_jax.io.tables.options import complete, require_integers
from diffusion_jax.models.inputs import DType
from diffusion_jax.models.layers import Dense
from diffusion_jax.pretrained.components.base import Component

CLASS = "CLIPImageProjection"
_DEFAULTS: Mapping[str, Any] = {"hidden_size": 768}


@dataclasses.dataclass(frozen=True)
class CLIPImageProjectionConfig:
    """A square matrix that brings embeddings of images to where those of texts are.

    Attributes:
      hidden_size: width of the embeddings.
    """

    hidden_size: int = 768

    def build(self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32) -> Dense:
        """The module, from [B, hidden_size] to the same, without a bias.

        Args:
          dtype: of the embeddings, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        types = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(param_dtype)}
        return Dense(self.hidden_size, use_bias=False, **types)


def _read(config: Mapping[str, Any]) -> CLIPImageProjectionConfig:
    full = complete(config, _DEFAULTS, CLASS)
    require_integers(full, ("hidden_size",), CLASS)
    return CLIPImageProjectionConfig(**full)


def _write(config: CLIPImageProjectionConfig) -> dict[str, Any]:
    return {"_class_name": CLASS, **dataclasses.asdict(config)}


def _shapes(config: CLIPImageProjectionConfig) -> Params:
    x = jax.ShapeDtypeStruct((1, config.hidden_size), jnp.float32)
    return jax.eval_shape(config.build().init, jax.random.key(0), x)["params"]


def _rows(config: CLIPImageProjectionConfig, names: Collection[str]) -> tuple[Row, ...]:
    return (Row("project.weight", "kernel", "transposed"),)


CLIP_IMAGE_PROJECTION = Component(_read, _write, _shapes, _rows)
