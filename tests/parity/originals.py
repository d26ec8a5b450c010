"""Runs reference cases of guided-diffusion through our networks, loaded as users load them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax.io.tables.unet import UnsupportedOption
from diffusion_jax.losses.classifier import log_prob
from diffusion_jax.pretrained import Loaded, from_original
from diffusion_jax.pretrained.components.openai import GUIDED_DIFFUSION, MODULE

# The original's arguments as entries of our batch.
BATCH = {"y": "label", "low_res": "low_res"}


def run(case: Mapping[str, Any], folder: Path) -> dict[str, np.ndarray] | None:
    """Our outputs for a case, by name and in NCHW; None if the case's form is not implemented."""
    class_name, config = case.get("class"), case.get("config")
    if class_name not in GUIDED_DIFFUSION:
        return None
    try:
        loaded = from_original(
            folder / case["checkpoint"] / "model.safetensors", class_name, config
        )
    except UnsupportedOption:
        return None
    with np.load(folder / case["inputs_file"]) as file:
        inputs = {
            name: np.moveaxis(value, 1, -1) if value.ndim == 4 else value
            for name, value in file.items()
        }
    dtype = "float16" if config.get("use_fp16") else "float32"
    x, t = inputs.pop("x"), inputs.pop("timesteps").astype(np.float32)
    if class_name == MODULE + "EncoderUNetModel":
        return _classifier(loaded, dtype, x, t, **inputs)
    return _unet(loaded, dtype, x, t, inputs)


def _unet(loaded: Loaded, dtype: str, x, t, inputs) -> dict[str, np.ndarray]:
    network, conditioner = loaded.config.build(dtype=dtype), loaded.config.conditioner()
    batch = {BATCH[name]: value for name, value in inputs.items()}

    @jax.jit
    def apply(params, x, t, batch):
        cond = conditioner.apply(params.get("conditioner", {}), batch, None)
        return network.apply({"params": params["network"]}, x, t, cond)

    return {"out": np.moveaxis(np.asarray(apply(loaded.params, x, t, batch)), -1, 1)}


def _classifier(loaded: Loaded, dtype: str, x, t, y) -> dict[str, Any]:
    network = loaded.config.build(dtype=dtype)

    def total(x, params, t, labels):
        logits = network.apply({"params": params}, x, t)
        log_probs = log_prob(logits, labels)
        return log_probs.sum(), (logits, log_probs)

    evaluate = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, (logits, log_probs)), grad = evaluate(x, loaded.params, t, y.astype(np.int32))
    grad = np.moveaxis(np.asarray(grad), -1, 1)
    return {"logits": logits, "log_prob_y": log_probs, "grad": grad}
