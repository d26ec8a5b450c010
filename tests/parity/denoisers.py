"""Runs reference cases of diffusers' UNets: what `from_pretrained` loads, as the peer is called."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.io.tables.options import UnsupportedOption
from diffusion_jax.models import SpatialTransformer, UNetConfig
from tests.parity import layouts

CLASSES = ("diffusers.UNet2DModel", "diffusers.UNet2DConditionModel")
# Kind of class embedding -> the name of `class_labels` in our batch.
LABELS = {"label": "label", "noise_level": "noise_level"}
ADDED = {
    "text_embeds": "text_embedding",
    "image_embeds": "image_embedding",
    "time_ids": "sizes",
    "hint": "hint",
}
GROUNDED = {
    "boxes": "boxes",
    "masks": "box_mask",
    "positive_embeddings": "box_text",
    "phrases_embeddings": "box_text",
    "phrases_masks": "box_text_mask",
    "image_embeddings": "box_image",
    "image_masks": "box_image_mask",
}


def run(case: Mapping[str, Any], folder: Path) -> dict[str, np.ndarray] | None:
    """Our outputs for a case, by name and in NCHW; None if the case's form is not implemented."""
    if case.get("class") not in CLASSES or case["checkpoint_format"] != "diffusers":
        return None
    try:
        loaded = layouts.load(case, folder)
    except UnsupportedOption:
        return None
    config, params, network = loaded.config, loaded.params, loaded.module
    conditioner = config.conditioner()

    def forward(x, t, batch, gate):
        cond = conditioner.apply(params.get("conditioner", {}), batch, None)
        if cond.grounding is not None:
            cond = cond.replace(grounding=cond.grounding.replace(gate=gate))
        return network.apply({"params": params["network"]}, x, t, cond), cond

    # GLIGEN's adapters are switched off by a gate of zero.
    off = "enabled=False" in case.get("call", "")
    outputs = {}
    for name, arguments in calls(case, folder).items():
        if not masks_are_ours(config.network, arguments):
            return None
        x = nhwc(arguments.pop("sample"))
        t = np.broadcast_to(np.float32(arguments.pop("timestep")), x.shape[:1])
        batch = batch_of(config, arguments)
        gate = np.full(x.shape[0], float(not off), np.float32)
        out, cond = jax.jit(forward)(x, t, batch, gate)
        outputs[name] = np.asarray(out).transpose(0, 3, 1, 2)
        if "position_net_objs" in case["outputs"]:
            outputs["position_net_objs"] = np.asarray(cond.grounding.objects)
    return outputs


def masks_are_ours(network: UNetConfig, arguments: Mapping[str, Any]) -> bool:
    """Whether the peer masks what we do, the tokens wherever they are attended to.

    Its transformer blocks take attention_mask for the pixels', or for the first attention to the
    tokens where both are, which its encoder_attention_mask leaves unmasked.
    """
    transformers = [
        level.attention
        for level in network.all_levels()
        if isinstance(level.attention, SpatialTransformer)
    ]
    if "attention_mask" in arguments and transformers:
        return False
    return "encoder_attention_mask" not in arguments or not any(
        transformer.tokens_only for transformer in transformers
    )


def batch_of(config: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The peer's arguments besides sample and time under the names of our batch."""
    left = dict(arguments)
    batch: dict[str, Any] = {}
    labels = left.pop("class_labels", None)
    if labels is not None and "label" in config.conditioners:
        # A UNet2DConditionModel without class embedding does not look at labels.
        kind, _ = config.conditioners["label"]
        batch[LABELS.get(kind, "vector")] = labels
    if "timestep_cond" in left:
        batch["guidance"] = left.pop("timestep_cond")
    if "encoder_hidden_states" in left:
        batch["tokens"] = left.pop("encoder_hidden_states")
    # The peer's text attention prefers attention_mask, and its masks are 1 or 0.
    for name in ("encoder_attention_mask", "attention_mask"):
        if name in left:
            batch["token_mask"] = np.asarray(left.pop(name)) > 0.5
    for name, value in left.pop("added_cond_kwargs", {}).items():
        batch[ADDED[name]] = nhwc(value) if name == "hint" else value
    grounded = left.pop("cross_attention_kwargs", {}).get("gligen", {})
    grounded |= {
        name.removeprefix("gligen."): left.pop(name)
        for name in list(left)
        if name.startswith("gligen.")
    }
    batch |= {GROUNDED[name]: value for name, value in grounded.items()}
    if left:
        raise ValueError(f"arguments of the peer that have no place here: {sorted(left)}")
    return {name: jnp.asarray(value) for name, value in batch.items()}


def nhwc(value: Any) -> np.ndarray:
    """[B, C, H, W] -> [B, H, W, C] float32."""
    return np.asarray(value, np.float32).transpose(0, 2, 3, 1)


def calls(case: Mapping[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Arguments of every call of a case; without `calls`, one call with all inputs by name."""
    with np.load(folder / case["inputs_file"]) as file:
        inputs = dict(file)
    if not case.get("calls"):
        names = [name for name in case["outputs"] if name != "position_net_objs"]
        return {name: dict(inputs) for name in names}

    def resolved(value):
        if "input" in value:
            return inputs[value["input"]]
        if "value" in value:
            return value["value"]
        return {name: resolved(each) for name, each in value.items()}

    return {
        output: {name: resolved(value) for name, value in arguments.items()}
        for output, arguments in case["calls"].items()
    }
