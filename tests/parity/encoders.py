"""Runs reference cases of encoders of texts and images through our towers and name tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

from diffusion_jax.io.mapping import convert, prefixed
from diffusion_jax.io.tables.ldm_bert import bert_embedder_config, bert_embedder_rows
from diffusion_jax.models.ldm_bert import LDMBertConfig
from diffusion_jax.pretrained.components.encoders import ENCODERS, LDM_BERT
from tests.parity import layouts

EMBEDDER = "ldm.modules.encoders.modules.BERTEmbedder"
EMBEDDER_PREFIX = "cond_stage_model."
WEIGHTS = "model.safetensors"
# All that encode texts alone or images alone.
CLASSES = set(ENCODERS) - {"CLIPModel"}


def run(case: Mapping[str, Any], folder: Path) -> dict[str, np.ndarray] | None:
    """Our outputs for a case, by name; None if the case is not one of an encoder."""
    if case.get("class") == EMBEDDER:
        return _embedder(case, folder)
    name = case.get("class", "").rpartition(".")[2]
    if case.get("checkpoint_format") != "transformers" or name not in CLASSES:
        return None
    loaded = layouts.load(case, folder, class_name=name)
    return _outputs(case, folder, loaded.module, loaded.params)


def _embedder(case: Mapping[str, Any], folder: Path) -> dict[str, np.ndarray]:
    config = LDMBertConfig(**bert_embedder_config(case["config"]))
    tensors = load_file(folder / case["checkpoint"] / WEIGHTS)
    rows = prefixed(bert_embedder_rows(config.num_layers), source=EMBEDDER_PREFIX)
    params = convert(tensors, rows, LDM_BERT.shapes(config))
    return _outputs(case, folder, config.build(), params)


def _outputs(case: Mapping[str, Any], folder: Path, tower: Any, params: Any) -> dict:
    """Every recorded output; a name that ends with "_masked" is that of a call with the mask."""
    with np.load(folder / case["inputs_file"]) as file:
        inputs = dict(file)
    apply, outputs = jax.jit(tower.apply), {}
    for masked in sorted({name.endswith("_masked") for name in case["outputs"]}):
        if "pixel_values" in inputs:
            arguments = (np.moveaxis(inputs["pixel_values"], 1, -1),)
        else:
            mask = inputs["attention_mask"].astype(bool) if masked else None
            arguments = (inputs["input_ids"].astype(np.int32), mask)
        encoded = apply({"params": params}, *arguments)
        # transformers norms the last hidden state of all towers but CLIP's.
        last = encoded.hidden[-1] if case["class"].startswith("transformers.CLIP") else encoded.last
        values = {
            "last_hidden_state": encoded.last,
            "out": encoded.last,
            "hidden_states": np.stack([*encoded.hidden[:-1], last]),
            "pooler_output": encoded.pooled,
            "text_embeds": encoded.projected,
            "image_embeds": encoded.projected,
        }
        suffix = "_masked" if masked else ""
        outputs |= {
            name + suffix: np.asarray(value) for name, value in values.items() if value is not None
        }
    return outputs
