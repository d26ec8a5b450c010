"""glide-text2im's networks, read and written as our UNet, its text encoder and conditioners."""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.conditioners.base import UNCONDITIONAL, Conditioner, combine
from diffusion_jax.conditioners.glide_text import glide_text
from diffusion_jax.conditioners.image import known_pixels, low_res
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import Params
from diffusion_jax.io.mapping import Row, prefixed
from diffusion_jax.io.tables.glide import (
    CLASSES,
    Glide,
    glide_config,
    glide_options,
    glide_text_rows,
    glide_unet_rows,
)
from diffusion_jax.io.tables.options import UnsupportedOption
from diffusion_jax.models.embeddings import Sinusoidal
from diffusion_jax.models.encoder import LevelConfig
from diffusion_jax.models.inputs import DType
from diffusion_jax.models.text_attention import TextAttention
from diffusion_jax.models.text_transformer import TextTransformerConfig
from diffusion_jax.models.unet import UNet, UNetConfig
from diffusion_jax.pretrained.components.base import Component

MODULE = "glide_text2im.text2im_model."


@dataclasses.dataclass(frozen=True)
class GlideConfig:
    """A network of GLIDE with what it is told.

    Attributes:
      network: the UNet.
      text: its text encoder, None where it reads no text.
      in_channels: channels of x.
      inpaint: it is shown the pixels that are known.
      low_res: it is shown an image of low resolution.
    """

    network: UNetConfig
    text: TextTransformerConfig | None
    in_channels: int = 3
    inpaint: bool = False
    low_res: bool = False

    def build(self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32) -> UNet:
        """The network, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return self.network.build(dtype=dtype, param_dtype=param_dtype)

    def conditioner(self, size: tuple[int, int], *, dtype: DType = jnp.float32) -> Conditioner:
        """From batch["tokens"] and ["token_mask"], ["known_image"] and ["known_mask"], ["low_res"].

        Args:
          size: height and width of x, in pixels.
          dtype: of the text encoder's activations, a dtype or its name.
        """
        parts: dict[str, Conditioner] = {}
        if self.text is not None:
            parts["text"] = glide_text(self.text, dtype=dtype)
        if self.inpaint:
            parts["known"] = known_pixels()
        if self.low_res:
            parts["low_res"] = low_res(size)
        return combine(**parts) if parts else UNCONDITIONAL


def _unet_config(form: Glide) -> UNetConfig:
    """The plain fields of a translated configuration as the dataclasses that they stand for."""
    attention = True if form.text is None else TextAttention()
    levels = (
        LevelConfig(**{**level, "attention": level["attention"] and attention})
        for level in form.unet["levels"]
    )
    return UNetConfig(
        **{
            **form.unet,
            "levels": tuple(levels),
            "middle_attention": attention,
            "time_features": Sinusoidal(**form.unet["time_features"]),
        }
    )


def _read(config: Mapping[str, Any], *, class_name: str) -> GlideConfig:
    form = glide_config(config, class_name)
    text = None if form.text is None else TextTransformerConfig(**form.text)
    return GlideConfig(_unet_config(form), text, form.in_channels, form.inpaint, form.low_res)


def _options(config: GlideConfig) -> dict[str, Any]:
    unet = dataclasses.asdict(config.network)
    unet["levels"] = tuple(
        {**each, "attention": bool(level.attention)}
        for each, level in zip(unet["levels"], config.network.levels, strict=True)
    )
    text = None if config.text is None else dataclasses.asdict(config.text)
    return glide_options(unet, text, config.in_channels)


def glide_shapes(config: GlideConfig) -> Params:
    """Shapes of {"network": …, "conditioner": {"text": …}}."""

    def struct(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    size = 2 ** (len(config.network.levels) - 1)
    key, channels = jax.random.key(0), config.in_channels
    image_channels = (channels + 1) * config.inpaint + channels * config.low_res
    cond = Condition(image=struct(1, size, size, image_channels) if image_channels else None)
    if config.text is not None:
        tokens = struct(1, config.text.length, config.text.width)
        cond = cond.replace(tokens=tokens, vector=struct(1, config.network.embed_dim))
    x, time = struct(1, size, size, channels), struct(1)
    shapes = {"network": jax.eval_shape(config.build().init, key, x, time, cond)["params"]}
    if config.text is not None:
        told = jax.eval_shape(config.conditioner((size, size)).init, key)
        # Images have no parameters, and files none for them.
        shapes["conditioner"] = {"text": told["text"]}
    return shapes


def _rows(config: GlideConfig, names: Collection[str]) -> Sequence[Row]:
    del names
    options = _options(config)
    return prefixed(glide_unet_rows(options), target="network/") + prefixed(
        glide_text_rows(options), target="conditioner/text/"
    )


def _write(config: GlideConfig, *, class_name: str) -> dict[str, Any]:
    options = {"_class_name": MODULE + class_name, **_options(config)}
    if _read(options, class_name=class_name) != config:
        raise UnsupportedOption(f"a {class_name} has no options for this network: {config}")
    return options


# By the names of the original classes.
GLIDE: Mapping[str, Component] = {
    MODULE + name: Component(
        read=functools.partial(_read, class_name=name),
        write=functools.partial(_write, class_name=name),
        shapes=glide_shapes,
        rows=_rows,
    )
    for name in CLASSES
}
