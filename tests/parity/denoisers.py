"""Runs reference cases of denoising networks through our networks and name tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from diffusion_jax.core.condition import Condition
from diffusion_jax.io.mapping import convert, prefixed
from diffusion_jax.io.tables.unet import (
    CLASS_EMBEDDING_ROWS,
    UNet2D,
    UnsupportedOption,
    has_old_attention_names,
    unet2d_config,
    unet2d_rows,
)
from diffusion_jax.models import LevelConfig, Sinusoidal, UNetConfig

UNET2D_WEIGHTS = "diffusion_pytorch_model.safetensors"


def run(case: Mapping[str, Any], folder: Path) -> dict[str, np.ndarray] | None:
    """Our outputs for a case, by name and in NCHW; None if the case's form is not implemented."""
    if case["class"] == "diffusers.UNet2DModel" and case["checkpoint_format"] == "diffusers":
        return _unet2d(case, folder)
    return None


def unet_config(fields: Mapping[str, Any]) -> UNetConfig:
    """The plain fields of a translated configuration as the dataclasses that they stand for."""
    return UNetConfig(
        **{
            **fields,
            "levels": tuple(LevelConfig(**level) for level in fields["levels"]),
            "time_features": Sinusoidal(**fields["time_features"]),
        }
    )


def expected_params(form: UNet2D, config: UNetConfig) -> dict[str, Any]:
    """Shapes of {"network": …, "label": …} for a translated configuration."""
    size = 2 ** (len(config.levels) - 1)
    x = jax.ShapeDtypeStruct((1, size, size, form.in_channels), jnp.float32)
    vector = jax.ShapeDtypeStruct((1, config.embed_dim), jnp.float32)
    time = jax.ShapeDtypeStruct((1,), jnp.float32)
    expected = {
        "network": jax.eval_shape(
            config.build().init, jax.random.key(0), x, time, Condition(vector=vector)
        )["params"]
    }
    if form.num_classes is not None:
        shape = (form.num_classes, config.embed_dim)
        expected["label"] = {"embedding": jax.ShapeDtypeStruct(shape, jnp.float32)}
    return expected


def unet2d_table(names: Any) -> tuple:
    """The rows for a file with these tensor names, below "network/" and "label/"."""
    rows = unet2d_rows(old_attention_names=has_old_attention_names(names))
    return prefixed(rows, target="network/") + prefixed(CLASS_EMBEDDING_ROWS, target="label/")


def _unet2d(case: Mapping[str, Any], folder: Path) -> dict[str, np.ndarray] | None:
    try:
        form = unet2d_config(case["config"])
    except UnsupportedOption:
        return None
    weights = folder / case["checkpoint"] / UNET2D_WEIGHTS
    config = unet_config(form.unet)
    tensors = load_file(weights)
    params = convert(tensors, unet2d_table(tensors), expected_params(form, config))
    apply = jax.jit(config.build().apply)
    outputs = {}
    for name, arguments in calls(case, folder).items():
        sample = np.asarray(arguments.pop("sample"), np.float32).transpose(0, 2, 3, 1)
        time = np.broadcast_to(np.float32(arguments.pop("timestep")), sample.shape[:1])
        cond = Condition()
        if "class_labels" in arguments:
            labels = np.asarray(arguments.pop("class_labels"))
            cond = Condition(vector=params["label"]["embedding"][labels])
        if arguments:
            return None
        out = apply({"params": params["network"]}, sample, time, cond)
        outputs[name] = np.asarray(out).transpose(0, 3, 1, 2)
    return outputs


def calls(case: Mapping[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Arguments of every call of a case; without `calls`, one call with all inputs by name."""
    with np.load(folder / case["inputs_file"]) as file:
        inputs = dict(file)
    if "calls" not in case:
        return {name: dict(inputs) for name in case["outputs"]}
    return {
        output: {
            name: inputs[value["input"]] if "input" in value else value["value"]
            for name, value in arguments.items()
        }
        for output, arguments in case["calls"].items()
    }
