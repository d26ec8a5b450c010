"""Runs reference cases of GLIGEN's original modules through ours and their name tables."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from diffusion_jax.core.condition import Condition, Grounding
from diffusion_jax.io.mapping import convert
from diffusion_jax.io.tables.gligen import (
    DOWNSAMPLER_ROWS,
    FUSER_CLASSES,
    FUSER_TYPES,
    POSITION_NET_ROWS,
    Module,
    downsampler_config,
    position_net_config,
)
from diffusion_jax.io.tables.options import UnsupportedOption
from diffusion_jax.io.tables.transformer import FUSER_ROWS, spatial_transformer_rows
from diffusion_jax.models.gated_attention import FUSERS
from diffusion_jax.models.transformer import SpatialTransformer, SpatialTransformerBlock
from diffusion_jax.pretrained import from_original
from diffusion_jax.pretrained.components.gligen import (
    GLIGEN_CLASS,
    grounding_config,
    grounding_shapes,
)

PEER = "GLIGEN "


def run(case: Mapping[str, Any], folder: Path) -> dict[str, np.ndarray] | None:
    """Our outputs for a case, by name and in NCHW; None if the case's form is not implemented."""
    name = case.get("class", "")
    if not name.startswith(PEER):
        return None
    with np.load(folder / case["inputs_file"]) as file:
        inputs = dict(file)
    try:
        if name.endswith(".UNetModel"):
            weights = folder / case["checkpoint"] / "model.safetensors"
            return _unet(case["config"], weights, inputs)
        tensors = {}
        if "checkpoint" in case:
            tensors = load_file(folder / case["checkpoint"] / "model.safetensors")
        return _run(name.removeprefix(PEER), case, tensors, inputs)
    except UnsupportedOption:
        return None


def _run(name: str, case: Mapping[str, Any], tensors, inputs):
    module = name.split(".")[-1].split()[-1]
    if module in FUSER_CLASSES:
        return _fuser(FUSER_CLASSES[module], case, tensors, inputs)
    config = case.get("config") or {}
    if module == "SpatialTransformer":
        return _spatial_transformer(case["config"], tensors, inputs)
    if module == "PositionNet":
        form = position_net_config(name, config)
        names = {**form.arguments, "cond": "map"}
        objects = _module(form, tensors, {names[key]: value for key, value in inputs.items()})
        return {"objs": objects}
    if module == "GroundingDownsampler":
        # "hed GroundingDownsampler" has no module of its own to be named after.
        target = name if "." in name else f"{name.split()[0]}_grounding_downsampler"
        form = downsampler_config(target, config)
        return {"out": _nchw(_module(form, tensors, {"map": inputs["cond"]}))}
    return None


def _fuser(kind: str, case: Mapping[str, Any], tensors, inputs):
    module = FUSERS[kind](case["config"]["n_heads"], case["config"]["d_head"])
    x, objects = inputs["x"], inputs["objs"]
    gates = {
        name: float(name.removeprefix("out_scale") or 1)
        for name in case["outputs"]
        if name != "out"
    }
    gates["out"] = 1.0
    ones = jnp.ones(len(x))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, objects, ones)["params"]
    params = convert(tensors, FUSER_ROWS, shapes)
    apply = jax.jit(module.apply)
    return {
        name: apply({"params": params}, x, objects, gate * ones) for name, gate in gates.items()
    }


def _spatial_transformer(config: Mapping[str, Any], tensors, inputs):
    spec = SpatialTransformer(head_dim=config["d_head"], fuser=FUSER_TYPES[config["fuser_type"]])
    module = SpatialTransformerBlock(spec, config["n_heads"], config.get("depth", 1), 32)
    x, tokens, objects = np.moveaxis(inputs["x"], 1, -1), inputs["context"], inputs["objs"]
    arguments = x, tokens, None, Grounding(objects, jnp.ones(len(x)))
    shapes = jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"]
    params = convert(tensors, spatial_transformer_rows(), shapes)
    return {"out": _nchw(jax.jit(module.apply)({"params": params}, *arguments))}


def _unet(options: Mapping[str, Any], weights: Path, inputs):
    options = _with_widths(options)
    _, config, network, params = from_original(weights, GLIGEN_CLASS, options)
    names = position_net_config(**options["grounding_tokenizer"]).arguments
    parts = params["conditioner"]
    arguments = {
        names[name.removeprefix("grounding_input.")]: _nhwc(value)
        for name, value in inputs.items()
        if name.startswith("grounding_input.")
    }
    objects = jax.jit(config.grounding.build().apply)({"params": parts["grounding"]}, **arguments)
    images = []
    if config.downsampler is not None:
        image = _nhwc(inputs["grounding_extra_input"])
        downsampler = config.downsampler.build()
        images.append(downsampler.apply({"params": parts.get("channels", {})}, image))
    if config.inpaint:
        images.append(_nhwc(inputs["inpainting_extra_input"]))
    cond = Condition(
        tokens=inputs["context"],
        image=jnp.concatenate(images, axis=-1) if images else None,
        grounding=Grounding(objects, jnp.ones(len(objects))),
    )
    x, times = _nhwc(inputs["x"]), inputs["timesteps"].astype(np.float32)
    out = jax.jit(network.apply)({"params": params["network"]}, x, times, cond)
    return {"out": _nchw(out), "objs": objects}


def _with_widths(options: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments; widths of a reduced position network lie beside them."""
    options = dict(options)
    widths = {
        "hidden": options.pop("grounding_tokenizer_hidden", None),
        **{name: options.pop(name, None) for name in list(options) if name.startswith("convnext")},
    }
    tokenizer = options["grounding_tokenizer"]
    known = {name: value for name, value in widths.items() if value is not None}
    # Reduced modules are named after their widths: "text_grounding_net_small_48_None".
    target = re.sub(r"_small_\w+", "", tokenizer["target"])
    params = {**tokenizer["params"], **known}
    return {**options, "grounding_tokenizer": {"target": target, "params": params}}


def _module(form: Module, tensors, arguments: Mapping[str, np.ndarray]):
    """A position network or a downsampler; maps are given as NCHW."""
    config = grounding_config(form)
    rows = DOWNSAMPLER_ROWS if form.kind == "downsampler" else POSITION_NET_ROWS[form.kind]
    params = convert(tensors, rows, grounding_shapes(config))
    arguments = {name: _nhwc(value) for name, value in arguments.items()}
    return jax.jit(config.build().apply)({"params": params}, **arguments)


def _nhwc(images: np.ndarray) -> np.ndarray:
    return np.moveaxis(images, 1, -1) if images.ndim == 4 else images


def _nchw(images) -> np.ndarray:
    return np.moveaxis(np.asarray(images), -1, 1)
