"""Runs reference cases of autoencoders through our library."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.models import autoencoder
from tests.parity import layouts

Outputs = dict[str, np.ndarray]


def run(case: Mapping[str, Any], folder: Path) -> Outputs | None:
    """Our outputs for a case, by name and in NCHW; None for other classes."""
    handlers = {
        "diffusers.AutoencoderKL": _kl,
        "diffusers.VQModel": _vq,
        "diffusers.AutoencoderTiny": _tiny,
    }
    if case["class"] not in handlers or case.get("checkpoint_format") != "diffusers":
        return None
    loaded = layouts.load(case, folder)
    config, module, params = loaded.config, loaded.module, loaded.params

    def apply(method: str, *args: Any, **kwargs: Any) -> Any:
        call = jax.jit(lambda p, *a: module.apply({"params": p}, *a, method=method, **kwargs))
        return call(params, *args)

    with np.load(folder / case["inputs_file"]) as file:
        inputs = {name: jnp.asarray(_nhwc(value)) for name, value in file.items()}
    return handlers[case["class"]](config, apply, inputs)


def _nhwc(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1) if x.ndim == 4 else x


def _nchw(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return np.moveaxis(x, -1, 1) if x.ndim == 4 else x


def _kl(config: Any, apply: Callable, inputs: Mapping[str, Any]) -> Outputs:
    posterior = apply("encode", inputs["image"])
    outputs = {
        "moments": apply("moments", inputs["image"]),
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "std": posterior.std,
        "mode": posterior.mean,
        "kl": posterior.kl(),
        "decoded": apply("decode", inputs["latents"]),
    }
    if "noise" in inputs:
        with mock.patch.object(autoencoder, "per_image_normal", lambda keys, x: inputs["noise"]):
            outputs["sample"] = posterior.sample(jax.random.key(0))
    return {name: _nchw(value) for name, value in outputs.items()}


def _vq(config: Any, apply: Callable, inputs: Mapping[str, Any]) -> Outputs:
    encoded = apply("encode", inputs["image"])
    quantized, of_latents = apply("quantize", encoded), apply("quantize", inputs["latents"])
    outputs = {
        "encoded": encoded,
        "quantized": quantized.latents,
        "commit_loss": quantized.loss.reshape(1),
        "indices": quantized.indices.reshape(-1),
        "latents_quantized": of_latents.latents,
        "latents_indices": of_latents.indices.reshape(-1),
        "decoded": apply("decode", inputs["latents"]),
    }
    if not config.lookup_from_codebook:
        outputs["decoded_not_quantized"] = apply("decode", inputs["latents"], quantize=False)
    return {name: _nchw(value) for name, value in outputs.items()}


def _tiny(config: Any, apply: Callable, inputs: Mapping[str, Any]) -> Outputs:
    latents = apply("encode", inputs["image"])
    scaled = config.scale_latents(latents)
    outputs = {
        "latents": latents,
        "scaled": scaled,
        "unscaled": config.unscale_latents(scaled),
        "decoded": apply("decode", inputs["latents"]),
    }
    return {name: _nchw(value) for name, value in outputs.items()}
