"""Runs the tokenizers' cases: transformers' CLIP, BERT and T5, and GLIDE's byte pairs."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.data.tokenizers import Tokenizer, from_folder

GLIDE = "glide_text2im.tokenizer.bpe.Encoder"
CLASSES = ("CLIPTokenizer", "BertTokenizer", "T5Tokenizer")


def run(case: Mapping[str, Any], folder: Path) -> dict[str, np.ndarray] | None:
    """Ids and masks of a tokenizer's texts, or None where the case is another one."""
    checkpoint = folder / case.get("checkpoint", "")
    with warnings.catch_warnings():
        # Some texts are too long on purpose.
        warnings.simplefilter("ignore")
        if case.get("class") == GLIDE:
            return _glide(from_folder(checkpoint, length=case["text_ctx"]), case["texts"])
        name = case.get("class", "").removeprefix("transformers.").removesuffix("Fast")
        if case.get("checkpoint_format") != "transformers-tokenizer" or name not in CLASSES:
            return None
        return _transformers(checkpoint, case)


def _transformers(checkpoint: Path, case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    tokenizer = from_folder(checkpoint)
    ids, mask = tokenizer(case["texts"])
    outputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "input_ids_longest": tokenizer(case["texts"], padding="longest").ids,
    }
    if "sentencepiece_ids" in case["outputs"]:
        # Recorded without a limit, and padded with -1.
        longest = from_folder(checkpoint, backend="sentencepiece", length=10**5)
        ids, mask = longest(case["texts"], padding="longest")
        outputs["sentencepiece_ids"] = np.where(mask, ids, -1)
    return outputs


def _glide(tokenizer: Tokenizer, texts: list[str]) -> dict[str, np.ndarray]:
    ids, mask = tokenizer(texts)
    lengths = [len(tokenizer.encode(text, 10**5)[0]) for text in texts]
    return {"tokens": ids, "mask": mask, "lengths": np.asarray(lengths)}
