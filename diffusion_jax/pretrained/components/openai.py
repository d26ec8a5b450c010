"""guided-diffusion's networks, read and written as our UNet, classifier and conditioners."""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.configuration import from_dict, to_dict
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import Params
from diffusion_jax.io.mapping import Row, prefixed
from diffusion_jax.io.tables.openai import (
    LABEL_ROWS,
    adm_classifier_config,
    adm_classifier_options,
    adm_classifier_rows,
    adm_unet_config,
    adm_unet_options,
    adm_unet_rows,
)
from diffusion_jax.io.tables.unet_blocks import UNetForm
from diffusion_jax.models.classifier import ClassifierConfig, NoisyClassifier
from diffusion_jax.models.inputs import DType
from diffusion_jax.pretrained.components.base import Component
from diffusion_jax.pretrained.components.unet import (
    ReleasedUNetConfig,
    checked,
    told_rows,
    unet_config,
    unet_form,
    unet_shapes,
)

MODULE = "guided_diffusion.unet."


def _read_unet(config: Mapping[str, Any], *, super_resolution: bool) -> ReleasedUNetConfig:
    form = adm_unet_config(config, super_resolution=super_resolution)
    told: dict[str, tuple[str, dict[str, Any]]] = {}
    if form.num_classes is not None:
        fields = {"num_classes": form.num_classes, "dim": form.unet["time_embed_dim"]}
        told["label"] = ("label", {**fields, "null": False})
    if super_resolution:
        told["low_res"] = ("low_res", {"size": [config["image_size"]] * 2})
    unet = {**form.unet, "levels": list(form.unet["levels"])}
    kept = {
        "image_size": config["image_size"],
        "use_new_attention_order": config.get("use_new_attention_order", False),
    }
    return unet_config(UNetForm(unet, form.in_channels, told, kept))


def _unet_options(config: ReleasedUNetConfig) -> dict[str, Any]:
    form = unet_form(config)
    label = form.conditioners.get("label")
    # With an image of low resolution the first convolution reads twice the channels.
    in_channels = form.in_channels // (2 if "low_res" in form.conditioners else 1)
    return {
        **form.kept,
        **adm_unet_options(form.unet, in_channels, label and label[1]["num_classes"]),
    }


def _unet_rows(config: ReleasedUNetConfig, names: Collection[str]) -> tuple[Row, ...]:
    del names
    network = adm_unet_rows(_unet_options(config))
    return prefixed(network, target="network/") + told_rows(config, {"label": LABEL_ROWS})


def _unet(name: str, *, super_resolution: bool) -> Component:
    read = functools.partial(_read_unet, super_resolution=super_resolution)

    def write(config: ReleasedUNetConfig) -> dict[str, Any]:
        return checked({"_class_name": MODULE + name, **_unet_options(config)}, config, read)

    return Component(read=read, write=write, shapes=unet_shapes, rows=_unet_rows)


@dataclasses.dataclass(frozen=True)
class ReleasedClassifierConfig:
    """A classifier of noisy images, with what its weights say about those.

    Attributes:
      classifier: the network.
      in_channels: channels of x.
      image_size: height and width of x; the attention pool takes no other.
      kept: options of the file that only say how it is laid out.
    """

    classifier: ClassifierConfig
    in_channels: int
    image_size: int
    kept: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def build(
        self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32
    ) -> NoisyClassifier:
        """The classifier, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return self.classifier.build(dtype=dtype, param_dtype=param_dtype)


def _read_classifier(config: Mapping[str, Any]) -> ReleasedClassifierConfig:
    form = adm_classifier_config(config)
    fields = {**form.classifier, "levels": list(form.classifier["levels"])}
    kept = {"use_new_attention_order": config.get("use_new_attention_order", False)}
    classifier = from_dict(ClassifierConfig, fields, "classifier")
    return ReleasedClassifierConfig(classifier, form.in_channels, form.image_size, kept)


def _classifier_options(config: ReleasedClassifierConfig) -> dict[str, Any]:
    options = adm_classifier_options(to_dict(config.classifier), config.in_channels)
    return {**config.kept, **options, "image_size": config.image_size}


def _write_classifier(config: ReleasedClassifierConfig) -> dict[str, Any]:
    options = {"_class_name": MODULE + "EncoderUNetModel", **_classifier_options(config)}
    return checked(options, config, _read_classifier)


def _classifier_shapes(config: ReleasedClassifierConfig) -> Params:
    shape = (1, config.image_size, config.image_size, config.in_channels)
    x, t = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    return jax.eval_shape(config.build().init, jax.random.key(0), x, t, Condition())["params"]


# By the names of the original classes.
GUIDED_DIFFUSION: Mapping[str, Component] = {
    MODULE + "UNetModel": _unet("UNetModel", super_resolution=False),
    MODULE + "SuperResModel": _unet("SuperResModel", super_resolution=True),
    MODULE + "EncoderUNetModel": Component(
        read=_read_classifier,
        write=_write_classifier,
        shapes=_classifier_shapes,
        rows=lambda config, names: adm_classifier_rows(_classifier_options(config)),
    ),
}
