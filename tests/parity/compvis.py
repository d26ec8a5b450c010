"""Runs reference cases of the original latent diffusion through our networks and name tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax.core.types import Params
from diffusion_jax.pretrained import Loaded, from_original
from diffusion_jax.pretrained.components.compvis import LATENT_DIFFUSION_CLASS, UNET_CLASS
from diffusion_jax.pretrained.components.unet import ReleasedUNetConfig


def run(case: Mapping[str, Any], folder: Path) -> dict[str, np.ndarray] | None:
    """Our outputs for a case, by name and in NCHW; None if it is not of latent diffusion."""
    if case.get("checkpoint_format", "").partition(" ")[0] != "original-ldm":
        return None
    if case["class"] not in (UNET_CLASS, LATENT_DIFFUSION_CLASS):
        return None
    (weights,) = (folder / case["checkpoint"]).glob("*.safetensors")
    loaded = from_original(weights, case["class"], case["config"])
    with np.load(folder / case["inputs_file"]) as file:
        inputs = {
            name: np.moveaxis(value, 1, -1) if value.ndim == 4 else value
            for name, value in file.items()
        }
    if case["class"] == UNET_CLASS:
        return {"out": _unet(loaded.config, loaded.params, inputs)}
    return _latent_diffusion(loaded, inputs)


def _nchw(out: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(out), -1, 1)


def _unet(config: ReleasedUNetConfig, params: Params, inputs: dict[str, np.ndarray]):
    network, conditioner = config.build(), config.conditioner()

    @jax.jit
    def apply(params, x, t, batch):
        cond = conditioner.apply(params.get("conditioner", {}), batch, None)
        return network.apply({"params": params["network"]}, x, t, cond)

    batch = {ours: inputs[name] for name, ours in (("context", "tokens"), ("y", "label"))
             if name in inputs}  # fmt: skip
    return _nchw(apply(params, inputs["x"], inputs["timesteps"].astype(np.float32), batch))


def _latent_diffusion(loaded: Loaded, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    config, params, modules = loaded.config, loaded.params, loaded.module
    outputs = {"unet_out": _unet(config.unet, params["unet"], inputs)}
    if config.first_stage is not None:
        apply = jax.jit(modules["first_stage"].apply, static_argnames="method")
        variables = {"params": params["first_stage"]}
        moments = _nchw(apply(variables, inputs["image"], method="moments"))
        gaussian = apply(variables, inputs["image"], method="encode")
        outputs |= {"moments": moments, "mean": _nchw(gaussian.mean)}
        outputs["logvar"] = _nchw(gaussian.logvar)
        outputs["decoded"] = _nchw(apply(variables, inputs["z"], method="decode"))
    if config.text is not None:
        text = jax.jit(modules["text"].apply)({"params": params["text"]}, inputs["input_ids"])
        outputs["text_hidden"] = np.asarray(text.last)
    return outputs
