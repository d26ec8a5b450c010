"""Runs reference cases of glide-text2im through our networks and name tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax.core.condition import Condition
from diffusion_jax.pretrained import from_original
from diffusion_jax.pretrained.components.glide import GLIDE

# The original's arguments as entries of our batch.
BATCH = {
    "tokens": "tokens",
    "mask": "token_mask",
    "low_res": "low_res",
    "inpaint_image": "known_image",
    "inpaint_mask": "known_mask",
}


def run(case: Mapping[str, Any], folder: Path) -> dict[str, np.ndarray] | None:
    """Our outputs for a case, by name and in NCHW; None if it is not of glide-text2im."""
    if case.get("class") not in GLIDE:
        return None
    weights = folder / case["checkpoint"] / "model.safetensors"
    loaded = from_original(weights, case["class"], case["config"])
    config, params = loaded.config, loaded.params
    with np.load(folder / case["inputs_file"]) as file:
        inputs = {
            name: np.moveaxis(value, 1, -1) if value.ndim == 4 else value
            for name, value in file.items()
        }
    x, t = inputs.pop("x"), inputs.pop("timesteps").astype(np.float32)
    batch = {BATCH[name]: value for name, value in inputs.items()}
    if config.inpaint:
        # Nothing is known where the original is given no image.
        batch = {"known_image": np.zeros_like(x), "known_mask": np.zeros_like(x[..., :1])} | batch
    dtype = "float16" if case["config"].get("use_fp16") else "float32"
    network, conditioner = config.build(dtype=dtype), config.conditioner(x.shape[1:3], dtype=dtype)

    def apply(params, x, t, batch):
        cond = conditioner.apply(params.get("conditioner", {}), batch, None)
        return network.apply({"params": params["network"]}, x, t, cond), cond

    out, cond = jax.jit(apply)(params, x, t, batch)
    outputs = {"out": np.moveaxis(np.asarray(out), -1, 1)}
    return outputs | _text(cond)


def _text(cond: Condition) -> dict[str, np.ndarray]:
    if cond.tokens is None:
        return {}
    return {"xf_proj": cond.vector, "xf_out": np.swapaxes(np.asarray(cond.tokens), 1, 2)}
