"""Runs reference cases of diffusion priors, their text projection and DiT through our library."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.conditioners.clip_projection import clip_projection
from diffusion_jax.core.condition import Condition
from diffusion_jax.models.prior import restore_embedding
from diffusion_jax.pretrained.networks import Loaded
from tests.parity import layouts
from tests.parity.denoisers import calls


def run(case: Mapping[str, Any], folder: Path) -> dict[str, np.ndarray] | None:
    """Our outputs for a case, by name and in the peer's layout; None for other classes."""
    handlers = {
        "PriorTransformer": _prior,
        "UnCLIPTextProjModel": _projection,
        "DiTTransformer2DModel": _dit,
        "Transformer2DModel": _dit,
    }
    name = case["class"].rsplit(".", 1)[-1]
    if name not in handlers or case.get("checkpoint_format") != "diffusers":
        return None
    return handlers[name](case, folder, layouts.load(case, folder))


def _times(arguments: dict[str, Any], batch: int) -> np.ndarray:
    return np.broadcast_to(np.asarray(arguments.pop("timestep"), np.float32), (batch,))


def _prior(case, folder, loaded: Loaded) -> dict[str, np.ndarray] | None:
    if case["call"] == "post_process_latents":
        with np.load(folder / case["inputs_file"]) as file:
            out = restore_embedding(loaded.params["codec"], jnp.asarray(file["prior_latents"]))
        return {"out": np.asarray(out)}
    apply = jax.jit(loaded.module.apply)
    outputs = {}
    for name, arguments in calls(case, folder).items():
        x = np.asarray(arguments.pop("hidden_states"), np.float32)
        t = _times(arguments, len(x))
        mask = arguments.pop("attention_mask", None)
        cond = Condition(
            vector=arguments.pop("proj_embedding"),
            tokens=arguments.pop("encoder_hidden_states", None),
            token_mask=None if mask is None else np.asarray(mask).astype(bool),
        )
        if arguments:
            return None
        out = np.asarray(apply({"params": loaded.params["network"]}, x, t, cond))
        # Without a query the peer keeps the axis of x's one token.
        outputs[name] = out[:, None] if x.ndim == 2 and not loaded.config.query else out
    return outputs


def _projection(case, folder, loaded: Loaded) -> dict[str, np.ndarray]:
    with np.load(folder / case["inputs_file"]) as file:
        inputs = dict(file)
    size = len(inputs["image_embeddings"])
    embedding, tokens = inputs["prompt_embeds"], inputs["text_encoder_hidden_states"]
    # The peer's batch is the empty prompts, then the prompts.
    batch = {
        "image_embedding": inputs["image_embeddings"],
        "null_text_embedding": embedding[:-size],
        "null_text_tokens": tokens[:-size],
        "text_embedding": embedding[-size:],
        "text_tokens": tokens[-size:],
    }
    conditioner = clip_projection(loaded.config)
    cond = jax.jit(lambda p, b: conditioner.apply(p, b, None))(loaded.params, batch)
    outputs = _named("nocfg", cond)
    if len(embedding) > size:
        uncond = jax.jit(conditioner.null)(loaded.params, batch)
        outputs |= _named("cfg", jax.tree.map(lambda *a: np.concatenate(a), uncond, cond))
    return outputs


def _named(prefix: str, cond: Condition) -> dict[str, np.ndarray]:
    return {
        f"{prefix}.text_encoder_hidden_states": np.asarray(cond.tokens),
        f"{prefix}.additive_clip_time_embeddings": np.asarray(cond.vector),
    }


def _dit(case, folder, loaded: Loaded) -> dict[str, np.ndarray] | None:
    conditioner, network = loaded.config.conditioner(), loaded.module

    @jax.jit
    def apply(params, x, t, labels):
        cond = conditioner.apply(params["conditioner"], {"label": labels}, None)
        return network.apply({"params": params["network"]}, x, t, cond)

    outputs = {}
    for name, arguments in calls(case, folder).items():
        x = np.asarray(arguments.pop("hidden_states"), np.float32).transpose(0, 2, 3, 1)
        t = _times(arguments, len(x))
        labels = np.broadcast_to(np.asarray(arguments.pop("class_labels"), np.int32), (len(x),))
        if arguments:
            return None
        outputs[name] = np.asarray(apply(loaded.params, x, t, labels)).transpose(0, 3, 1, 2)
    return outputs
