"""The original latent diffusion: its UNet, and a whole file of it, read and written as ours."""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.configuration import to_dict
from diffusion_jax.core.schedules import DiscreteSchedule
from diffusion_jax.core.types import Params
from diffusion_jax.io.mapping import Row, prefixed
from diffusion_jax.io.tables.autoencoder import COMPVIS_IGNORE, compvis_autoencoder_rows
from diffusion_jax.io.tables.clip import OPEN_CLIP_TEXT_ROWS, clip_text_rows
from diffusion_jax.io.tables.compvis import (
    LABEL_ROWS,
    UNET,
    compvis_unet_config,
    compvis_unet_options,
    compvis_unet_rows,
    with_averages,
)
from diffusion_jax.io.tables.latent_diffusion import (
    FIRST_STAGE_PREFIX,
    IGNORED,
    TEXT_PREFIX,
    UNET_PREFIX,
    Part,
    first_stage_config,
    latent_diffusion_config,
)
from diffusion_jax.io.tables.ldm_bert import bert_embedder_rows
from diffusion_jax.models.autoencoder import AutoencoderKL, AutoencoderKLConfig
from diffusion_jax.models.clip import CLIPTextConfig
from diffusion_jax.models.inputs import DType
from diffusion_jax.models.ldm_bert import LDMBertConfig
from diffusion_jax.models.pre_norm import TokenEmbed
from diffusion_jax.models.vq import VQModel, VQModelConfig
from diffusion_jax.pretrained.components.autoencoder import autoencoder_shapes, with_levels
from diffusion_jax.pretrained.components.base import Component
from diffusion_jax.pretrained.components.encoders import text_shapes
from diffusion_jax.pretrained.components.unet import (
    ReleasedUNetConfig,
    checked,
    told_rows,
    unet_config,
    unet_form,
    unet_shapes,
)
from diffusion_jax.pretrained.latent_diffusion import noise_schedule

UNET_CLASS = f"ldm.modules.diffusionmodules.{UNET}"
LATENT_DIFFUSION_CLASS = "ldm.models.diffusion.ddpm.LatentDiffusion"


def _read_unet(config: Mapping[str, Any]) -> ReleasedUNetConfig:
    return unet_config(compvis_unet_config(config))


def _write_unet(config: ReleasedUNetConfig) -> dict[str, Any]:
    options = {"_class_name": UNET_CLASS, **compvis_unet_options(unet_form(config))}
    return checked(options, config, _read_unet)


def _unet_rows(config: ReleasedUNetConfig) -> tuple[Row, ...]:
    network = compvis_unet_rows(compvis_unet_options(unet_form(config)))
    return prefixed(network, target="network/") + told_rows(config, LABEL_ROWS)


def _rows(config: ReleasedUNetConfig, names: Collection[str]) -> tuple[Row, ...]:
    whole = any(name.startswith(UNET_PREFIX) for name in names)
    return prefixed(_unet_rows(config), source=UNET_PREFIX if whole else "")


COMPVIS_UNET = Component(
    read=_read_unet,
    write=_write_unet,
    shapes=unet_shapes,
    rows=_rows,
    # Of a file that holds all of a latent diffusion.
    ignore=(*IGNORED, f"{FIRST_STAGE_PREFIX}*", f"{TEXT_PREFIX}*"),
    averages=with_averages,
)


@dataclasses.dataclass(frozen=True)
class ClassTokensConfig:
    """One token for each class, instead of a text.

    Attributes:
      num_classes: labels are 0 … num_classes - 1; ImageNet's network was released with a last
        one that stands for none.
      dim: width of the token.
    """

    num_classes: int
    dim: int

    def build(self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32) -> TokenEmbed:
        """The module, from labels [B, 1] to tokens [B, 1, dim].

        Args:
          dtype: of the tokens, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        types = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(param_dtype)}
        return TokenEmbed(self.num_classes, self.dim, **types)


@dataclasses.dataclass(frozen=True)
class LatentDiffusionConfig:
    """A latent diffusion, which one file holds all of.

    Attributes:
      unet: the denoising network.
      first_stage: the autoencoder; None where images themselves are diffused.
      text: what makes the network's tokens; None without.
      schedule: of the noise.
      prediction: what the network says: "eps", "x0" or "v".
      text_skip: blocks of the text encoder that the tokens leave out, an argument of CLIP's tower.
      text_names: layout of the text encoder's names: "clip", "open_clip", "bert" or "class".
      settings: as they were read, and are written.
    """

    unet: ReleasedUNetConfig
    first_stage: AutoencoderKLConfig | VQModelConfig | None
    text: CLIPTextConfig | LDMBertConfig | ClassTokensConfig | None
    schedule: DiscreteSchedule
    prediction: str
    text_skip: int
    text_names: str | None
    settings: Mapping[str, Any]

    def parts(self) -> dict[str, Any]:
        """Configurations of the parts that there are: "unet", "first_stage", "text"."""
        parts = {"unet": self.unet, "first_stage": self.first_stage, "text": self.text}
        return {name: config for name, config in parts.items() if config is not None}

    def build(
        self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32
    ) -> dict[str, nn.Module]:
        """The modules of `parts`, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        types = {"dtype": dtype, "param_dtype": param_dtype}
        return {name: config.build(**types) for name, config in self.parts().items()}


@dataclasses.dataclass(frozen=True)
class FirstStageConfig:
    """An autoencoder that was released alone.

    Attributes:
      network: the autoencoder.
      settings: as they were read, and are written.
    """

    network: AutoencoderKLConfig | VQModelConfig
    settings: Mapping[str, Any]

    def build(
        self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32
    ) -> AutoencoderKL | VQModel:
        """The autoencoder, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return self.network.build(dtype=dtype, param_dtype=param_dtype)


def _first_stage(part: Part) -> AutoencoderKLConfig | VQModelConfig:
    made = {"kl": AutoencoderKLConfig, "vq": VQModelConfig}[part.kind]
    return made(**with_levels(part.fields))


def _text(part: Part | None) -> CLIPTextConfig | LDMBertConfig | ClassTokensConfig | None:
    if part is None:
        return None
    kinds = {
        "clip": CLIPTextConfig,
        "open_clip": CLIPTextConfig,
        "bert": LDMBertConfig,
        "class": ClassTokensConfig,
    }
    return kinds[part.kind](**part.fields)


def _without_metadata(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if not key.startswith("_")}


def _read_first_stage(settings: Mapping[str, Any]) -> FirstStageConfig:
    network = _first_stage(first_stage_config(settings))
    return FirstStageConfig(network, _without_metadata(settings))


def latent_diffusion(settings: Mapping[str, Any]) -> LatentDiffusionConfig:
    """A latent diffusion by the settings that it was trained with.

    Args:
      settings: the parsed YAML or JSON, {"model": {"target": …, "params": …}} or its "model".

    Raises:
      UnsupportedOption: naming the part, the option and the value that is not computed here.
    """
    form = latent_diffusion_config(settings)
    return LatentDiffusionConfig(
        unet_config(form.unet),
        None if form.first_stage is None else _first_stage(form.first_stage),
        _text(form.text),
        noise_schedule(**form.schedule),
        form.prediction,
        0 if form.text is None else form.text.skip,
        None if form.text is None else form.text.kind,
        _without_metadata(settings),
    )


def _shapes(config: LatentDiffusionConfig) -> Params:
    shapes = {"unet": unet_shapes, "first_stage": autoencoder_shapes, "text": text_shapes}
    return {name: shapes[name](part) for name, part in config.parts().items()}


def _text_rows(config: LatentDiffusionConfig, names: Collection[str]) -> Sequence[Row]:
    if isinstance(config.text, LDMBertConfig):
        return bert_embedder_rows(config.text.num_layers)
    if isinstance(config.text, ClassTokensConfig):
        return (Row("embedding.weight", "embedding", "param"),)
    if config.text_names == "open_clip":
        return prefixed(OPEN_CLIP_TEXT_ROWS, source="model.")
    prefix = TEXT_PREFIX + "transformer."
    below = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return prefixed(clip_text_rows(below), source="transformer.")


def _all_rows(config: LatentDiffusionConfig, names: Collection[str]) -> tuple[Row, ...]:
    rows = prefixed(_unet_rows(config.unet), source=UNET_PREFIX, target="unet/")
    if config.first_stage is not None:
        first_stage = compvis_autoencoder_rows(len(config.first_stage.levels))
        rows += prefixed(first_stage, source=FIRST_STAGE_PREFIX, target="first_stage/")
    if config.text is not None:
        rows += prefixed(_text_rows(config, names), source=TEXT_PREFIX, target="text/")
    return rows


def _write_settings(
    config: LatentDiffusionConfig | FirstStageConfig, *, class_name: str
) -> dict[str, Any]:
    return {"_class_name": class_name, **to_dict(config.settings)}


LATENT_DIFFUSION = Component(
    read=latent_diffusion,
    write=functools.partial(_write_settings, class_name=LATENT_DIFFUSION_CLASS),
    shapes=_shapes,
    rows=_all_rows,
    ignore=IGNORED,
    averages=with_averages,
)

# By the names of the original classes.
FIRST_STAGES: Mapping[str, Component] = {
    f"ldm.models.autoencoder.{name}": Component(
        read=_read_first_stage,
        write=functools.partial(_write_settings, class_name=f"ldm.models.autoencoder.{name}"),
        shapes=lambda config: autoencoder_shapes(config.network),
        rows=lambda config, names: compvis_autoencoder_rows(len(config.network.levels)),
        ignore=COMPVIS_IGNORE,
    )
    for name in ("AutoencoderKL", "VQModel", "VQModelInterface")
}
