"""GLIGEN's UNet, position networks and downsamplers, read and written as ours."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from diffusion_jax.conditioners.base import Conditioner, combine
from diffusion_jax.conditioners.grounding import (
    keypoints,
    map_channels,
    map_tokens,
    text_boxes,
    text_image_boxes,
)
from diffusion_jax.conditioners.image import known_pixels
from diffusion_jax.core.condition import Condition, Grounding
from diffusion_jax.core.types import Params
from diffusion_jax.io.mapping import Row
from diffusion_jax.io.tables.gligen import (
    GLIGEN,
    Module,
    gligen_unet_config,
    gligen_unet_options,
    gligen_unet_rows,
)
from diffusion_jax.io.tables.options import UnsupportedOption
from diffusion_jax.models.convnext import ConvNeXtConfig
from diffusion_jax.models.embeddings import Sinusoidal
from diffusion_jax.models.grounding import (
    GROUNDINGS,
    KeypointGroundingConfig,
    MapDownsamplerConfig,
    MapGroundingConfig,
    TextGroundingConfig,
    TextImageGroundingConfig,
)
from diffusion_jax.models.inputs import DType
from diffusion_jax.models.levels import LevelConfig
from diffusion_jax.models.transformer import SpatialTransformer
from diffusion_jax.models.unet import UNet, UNetConfig
from diffusion_jax.pretrained.components.base import Component

# The original class has the name of latent diffusion's, so the repository's comes before it.
GLIGEN_CLASS = "gligen.ldm.modules.diffusionmodules.openaimodel.UNetModel"

GroundingConfig = (
    TextGroundingConfig
    | TextImageGroundingConfig
    | KeypointGroundingConfig
    | MapGroundingConfig
    | MapDownsamplerConfig
)

_KINDS = {config: kind for kind, config in GROUNDINGS.items()}
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


@dataclasses.dataclass(frozen=True)
class GLIGENConfig:
    """GLIGEN's UNet with what it is told.

    Attributes:
      network: the UNet, with transformers that have adapters.
      grounding_name: the original kind of grounding: "text", "text_image", "keypoint", "canny",
        "depth", "hed", "normal" or "sem".
      grounding: the position network.
      downsampler: what a map becomes in the network's input; None without.
      token_dim: width of the text's tokens.
      in_channels: channels of x.
      inpaint: it is shown the pixels that are known.
    """

    network: UNetConfig
    grounding_name: str
    grounding: GroundingConfig
    downsampler: MapDownsamplerConfig | None
    token_dim: int
    in_channels: int = 4
    inpaint: bool = False

    def build(self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32) -> UNet:
        """The network, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return self.network.build(dtype=dtype, param_dtype=param_dtype)

    def conditioner(self, *, dtype: DType = jnp.float32) -> Conditioner:
        """Grounding tokens, and of a map and of known pixels the channels beside x.

        Its parameters are {"grounding": …, "channels": …, "known": {}}, as far as there are such
        parts.

        Args:
          dtype: of what it makes, a dtype or its name.
        """
        parts = {"grounding": grounding_conditioner(self.grounding, dtype=dtype)}
        if self.downsampler is not None:
            parts["channels"] = grounding_conditioner(self.downsampler, dtype=dtype)
        if self.inpaint:
            parts["known"] = known_pixels()
        return combine(**parts)


def _unet_config(form: GLIGEN) -> UNetConfig:
    """The plain fields of a translated configuration as the dataclasses that they stand for."""
    attention = SpatialTransformer(**form.transformer)
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


def gligen_config(config: Mapping[str, Any]) -> GLIGENConfig:
    """The arguments of GLIGEN's UNetModel as our configuration.

    Raises:
      UnsupportedOption: naming what is unknown, missing or not for images.
    """
    form = gligen_unet_config(config)
    downsampler = None if form.downsampler is None else grounding_config(form.downsampler)
    return GLIGENConfig(
        _unet_config(form),
        form.grounding.name,
        grounding_config(form.grounding),
        cast("MapDownsamplerConfig | None", downsampler),
        form.token_dim,
        form.in_channels,
        form.inpaint,
    )


def _form(config: GLIGENConfig) -> GLIGEN:
    """Our configuration in plain values: `_unet_config` backwards."""
    unet = dataclasses.asdict(config.network)
    unet["levels"] = tuple(
        {**each, "attention": bool(level.attention)}
        for each, level in zip(unet["levels"], config.network.levels, strict=True)
    )
    name, down = config.grounding_name, config.downsampler
    return GLIGEN(
        unet,
        dataclasses.asdict(config.network)["middle_attention"],
        config.token_dim,
        config.in_channels,
        Module(name, _KINDS[type(config.grounding)], dataclasses.asdict(config.grounding), {}),
        None if down is None else Module(name, "downsampler", dataclasses.asdict(down), {}),
        config.inpaint,
    )


def gligen_options(config: GLIGENConfig) -> dict[str, Any]:
    """The arguments of GLIGEN's UNetModel: `gligen_config` backwards.

    Raises:
      UnsupportedOption: if it has no options for this network.
    """
    options = {"_class_name": GLIGEN_CLASS, **gligen_unet_options(_form(config))}
    if gligen_config(options) != config:
        raise UnsupportedOption(f"GLIGEN's UNetModel has no options for this network: {config}")
    return options


def gligen_shapes(config: GLIGENConfig) -> Params:
    """Shapes of {"network": …, "conditioner": {"grounding": …, "channels": …}}."""

    def struct(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    size = 2 ** (len(config.network.levels) - 1)
    down = 0 if config.downsampler is None else config.downsampler.out_channels
    channels = down + (config.in_channels + 1) * config.inpaint
    cond = Condition(
        tokens=struct(1, 1, config.token_dim),
        image=struct(1, size, size, channels) if channels else None,
        # A square number of objects, since some adapters take them for a map.
        grounding=Grounding(struct(1, 1, config.grounding.out_dim), struct(1)),
    )
    arguments = struct(1, size, size, config.in_channels), struct(1), cond
    network = jax.eval_shape(config.build().init, jax.random.key(0), *arguments)["params"]
    conditioner = jax.eval_shape(config.conditioner().init, jax.random.key(0))
    # Parts without parameters have no tensors in the file.
    return {"network": network, "conditioner": {k: v for k, v in conditioner.items() if v}}


def _rows(config: GLIGENConfig, names: Collection[str]) -> Sequence[Row]:
    del names
    return gligen_unet_rows(_form(config))


GLIGEN_UNET = Component(gligen_config, gligen_options, gligen_shapes, _rows)
