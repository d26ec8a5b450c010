"""Runs reference cases of OpenAI's original networks through our networks and name tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from diffusion_jax.core.condition import Condition
from diffusion_jax.io.mapping import Row, convert, prefixed
from diffusion_jax.io.tables.openai import (
    LABEL_ROWS,
    ADMClassifier,
    ADMUNet,
    adm_classifier_config,
    adm_classifier_rows,
    adm_unet_config,
    adm_unet_rows,
)
from diffusion_jax.io.tables.unet import UnsupportedOption
from diffusion_jax.losses.classifier import log_prob
from diffusion_jax.models import ClassifierConfig, LevelConfig, Sinusoidal, UNetConfig

MODULE = "guided_diffusion.unet."


def unet_config(fields: Mapping[str, Any]) -> UNetConfig:
    """The plain fields of a translated configuration as the dataclasses that they stand for."""
    return UNetConfig(
        **{
            **fields,
            "levels": tuple(LevelConfig(**level) for level in fields["levels"]),
            "time_features": Sinusoidal(**fields["time_features"]),
        }
    )


def expected_params(form: ADMUNet, config: UNetConfig) -> dict[str, Any]:
    """Shapes of {"network": …, "label": …} for a translated configuration."""
    size = 2 ** (len(config.levels) - 1)
    x = jax.ShapeDtypeStruct((1, size, size, form.in_channels), jnp.float32)
    vector = jax.ShapeDtypeStruct((1, config.embed_dim), jnp.float32)
    time = jax.ShapeDtypeStruct((1,), jnp.float32)
    cond = Condition(vector=vector)
    network = jax.eval_shape(config.build().init, jax.random.key(0), x, time, cond)["params"]
    expected = {"network": network}
    if form.num_classes is not None:
        shape = (form.num_classes, config.embed_dim)
        expected["label"] = {"embedding": jax.ShapeDtypeStruct(shape, jnp.float32)}
    return expected


def run(case: Mapping[str, Any], folder: Path) -> dict[str, np.ndarray] | None:
    """Our outputs for a case, by name and in NCHW; None if the case's form is not implemented."""
    network = case.get("class", "").removeprefix(MODULE)
    if case.get("checkpoint_format") != "original-state-dict" or network not in RUNS:
        return None
    with np.load(folder / case["inputs_file"]) as file:
        inputs = dict(file)
    tensors = load_file(folder / case["checkpoint"] / "model.safetensors")
    try:
        return RUNS[network](case["config"], tensors, inputs)
    except UnsupportedOption:
        return None


def classifier_config(fields: Mapping[str, Any]) -> ClassifierConfig:
    """The plain fields of a translated configuration as the dataclasses that they stand for."""
    return ClassifierConfig(
        **{
            **fields,
            "levels": tuple(LevelConfig(**level) for level in fields["levels"]),
            "time_features": Sinusoidal(**fields["time_features"]),
        }
    )


def unet_table(config: Mapping[str, Any]) -> tuple[Row, ...]:
    """The rows of a UNet, below "network/" and "label/"."""
    return prefixed(adm_unet_rows(config), target="network/") + prefixed(
        LABEL_ROWS, target="label/"
    )


def expected_classifier_params(form: ADMClassifier, config: ClassifierConfig) -> dict[str, Any]:
    """Shapes of a classifier's parameters for a translated configuration."""
    shape = (1, form.image_size, form.image_size, form.in_channels)
    x, t = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    return jax.eval_shape(config.build().init, jax.random.key(0), x, t, Condition())["params"]


def _take(inputs: dict[str, np.ndarray], *names: str) -> list[np.ndarray]:
    """These inputs, images in NHWC.

    Raises:
      UnsupportedOption: if there are others.
    """
    if set(inputs) != set(names):
        raise UnsupportedOption(f"inputs {sorted(inputs)}, expected {sorted(names)}")
    values = (np.asarray(inputs[name]) for name in names)
    return [np.moveaxis(value, 1, -1) if value.ndim == 4 else value for value in values]


def _unet(config: Mapping[str, Any], tensors, inputs, *, super_resolution: bool = False):
    form = adm_unet_config(config, super_resolution=super_resolution)
    ours = unet_config(form.unet)
    params = convert(tensors, unet_table(config), expected_params(form, ours))
    extra = ("low_res",) * super_resolution + ("y",) * (form.num_classes is not None)
    x, t, *rest = _take(inputs, "x", "timesteps", *extra)
    image = vector = None
    if super_resolution:
        size = (*x.shape[:3], form.image_channels)
        image = jax.image.resize(rest.pop(0), size, "linear", antialias=False)
    if form.num_classes is not None:
        vector = params["label"]["embedding"][rest.pop(0)]
    cond = Condition(vector=vector, image=image)
    apply = jax.jit(ours.build(dtype=form.dtype).apply)
    out = apply({"params": params["network"]}, x, t.astype(np.float32), cond)
    return {"out": np.moveaxis(np.asarray(out), -1, 1)}


def _super_resolution(config: Mapping[str, Any], tensors, inputs):
    return _unet(config, tensors, inputs, super_resolution=True)


def _classifier(config: Mapping[str, Any], tensors, inputs):
    form = adm_classifier_config(config)
    ours = classifier_config(form.classifier)
    rows = adm_classifier_rows(config)
    params = convert(tensors, rows, expected_classifier_params(form, ours))
    x, t, labels = _take(inputs, "x", "timesteps", "y")
    network = ours.build(dtype=form.dtype)

    def total(x, params, t, labels):
        logits = network.apply({"params": params}, x, t)
        log_probs = log_prob(logits, labels)
        return log_probs.sum(), (logits, log_probs)

    evaluate = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, (logits, log_probs)), grad = evaluate(
        x, params, t.astype(np.float32), labels.astype(np.int32)
    )
    grad = np.moveaxis(np.asarray(grad), -1, 1)
    return {"logits": logits, "log_prob_y": log_probs, "grad": grad}


RUNS = {
    "UNetModel": _unet,
    "SuperResModel": _super_resolution,
    "EncoderUNetModel": _classifier,
}
