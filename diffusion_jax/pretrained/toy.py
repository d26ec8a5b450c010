"""A Stable Diffusion with GLIGEN's boxes of 600,000 parameters, with random weights.

Everything that a released pipeline does can be tried with it in seconds; its pictures are noise.
"""

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax.core.types import Params
from diffusion_jax.data.byte_pairs import openai_clip_vocabulary
from diffusion_jax.data.tokenizers import Tokenizer, from_folder
from diffusion_jax.pretrained.components import COMPONENTS
from diffusion_jax.pretrained.networks import Loaded
from diffusion_jax.pretrained.pipelines import Pipeline
from diffusion_jax.pretrained.schedulers import from_config

_LENGTH = 77
_WIDTH = 16
_VAE_CHANNELS = [8, 8, 16]
_NETWORKS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "unet": (
        "UNet2DConditionModel",
        {
            "sample_size": 16,
            "block_out_channels": [_WIDTH, 2 * _WIDTH],
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 2,
            "cross_attention_dim": _WIDTH,
            "attention_type": "gated",
        },
    ),
    "vae": (
        "AutoencoderKL",
        {
            "sample_size": 64,
            "block_out_channels": _VAE_CHANNELS,
            "down_block_types": ["DownEncoderBlock2D"] * len(_VAE_CHANNELS),
            "up_block_types": ["UpDecoderBlock2D"] * len(_VAE_CHANNELS),
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 4,
        },
    ),
    "text_encoder": (
        "CLIPTextModel",
        {
            "architectures": ["CLIPTextModel"],
            "vocab_size": len(openai_clip_vocabulary([])[0]),
            "hidden_size": _WIDTH,
            "intermediate_size": 2 * _WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": _LENGTH,
            "hidden_act": "quick_gelu",
            "eos_token_id": 2,
        },
    ),
}
_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def _random_params(shapes: Any, rng: np.random.Generator) -> Params:
    """Kernels of variance 1 / fan-in, norms that do nothing, gates half open."""

    def random(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        if leaf.ndim >= 2:
            deviation = 1.0 / math.sqrt(math.prod(leaf.shape[:-1]))
            return rng.normal(0.0, deviation, leaf.shape).astype(leaf.dtype)
        if leaf.ndim == 0:
            return np.full((), 0.5, leaf.dtype)
        value = 1.0 if path[-1].key == "scale" else 0.0
        return np.full(leaf.shape, value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(random, shapes)


def _tokenizer() -> Tokenizer:
    """CLIP's, with an alphabet of bytes and no merges: every letter is a token."""
    vocabulary, _ = openai_clip_vocabulary([])
    about = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": _LENGTH,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
        return from_folder(folder)


def toy_pipeline(seed: int = 0, *, in_channels: int = 4) -> Pipeline:
    """A small `StableDiffusionGLIGENPipeline` with random weights, of 64 x 64 pixels.

    It is called, trained, saved, and loaded by diffusers as a released one.

    Args:
      seed: of the weights.
      in_channels: of the UNet: 4, or 9 for one that is told a masked image and its mask.

    Source: none; a convention of this library.
    """
    rng = np.random.default_rng(seed)
    parts: dict[str, Any] = {"tokenizer": _tokenizer(), "scheduler": from_config(_SCHEDULER)}
    for name, (class_name, options) in _NETWORKS.items():
        component = COMPONENTS[class_name]
        if name == "unet":
            options = {**options, "in_channels": in_channels}
        config = component.read(options)
        params = _random_params(component.shapes(config), rng)
        parts[name] = Loaded(class_name, config, config.build(), params)
    return Pipeline("StableDiffusionGLIGENPipeline", parts)
