"""Calls of Stable Diffusion XL: texts to images."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.core.types import Batch
from diffusion_jax.data.tokenizers import check_prompts
from diffusion_jax.guidance import Unguided
from diffusion_jax.pretrained.calls.base import (
    PROMPTS,
    STEPS,
    Job,
    Task,
    Texts,
    control_of,
    embeds_of,
    guidance_of,
    texts_of,
    whole,
)
from diffusion_jax.pretrained.calls.stable_diffusion import (
    SIZE,
    denoise_phase,
    guidance_condition,
    is_distilled,
    noise_of,
    size_of,
)
from diffusion_jax.systems.latent_diffusion import DecodeLatents, EncodeTextsTwice

_SIZES = ("original_size", "crops_coords_top_left", "target_size")
_POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def _second(words: Mapping[str, Any], name: str, first: tuple[str, ...] | None, repeats: int):
    """Texts for the second encoder: those of the word, or the first one's."""
    if words[name] is None or first is None:
        return first
    texts = check_prompts(words[name])
    count = len(first) // repeats
    if len(texts) not in (1, count):
        raise ValueError(f"{name} must be one text, or one for each prompt, got {len(texts)}")
    texts = texts * count if len(texts) == 1 else texts
    return tuple(text for text in texts for _ in range(repeats))


def _encode(pipeline: Any, words: Mapping[str, Any], texts: Texts) -> tuple[tuple[Any, ...], Batch]:
    repeats = whole(words, "num_images_per_prompt")
    zeros = (
        bool(pipeline.options.get("force_zeros_for_empty_prompt", True))
        and words["negative_prompt"] is None
    )
    batch: dict[str, Any] = {}
    for null, first, second, embeds, pooled in (
        ("", texts.prompts, "prompt_2", "prompt_embeds", _POOLED[0]),
        ("null_", texts.negatives, "negative_prompt_2", "negative_prompt_embeds", _POOLED[1]),
    ):
        if null and first is not None and zeros:
            if texts.prompts is None:
                raise ValueError(
                    "with prompt_embeds give negative_prompt_embeds and "
                    "negative_pooled_prompt_embeds, or a negative_prompt"
                )
            batch["null_zeros"] = np.zeros(texts.num_images, np.float32)
        elif first is not None:
            for name, given, tokenizer in (
                ("ids", first, pipeline["tokenizer"]),
                ("ids_2", _second(words, second, first, repeats), pipeline["tokenizer_2"]),
            ):
                if tokenizer is not None:
                    found = tokenizer(list(given), on_long_prompt=words["on_long_prompt"])
                    batch[f"{null}{name}"] = found.ids
        elif words[embeds] is not None:
            if words[pooled] is None:
                raise ValueError(f"{embeds} and {pooled} belong together; give both")
            batch[f"{null}tokens"] = embeds_of(words, embeds)
            batch[f"{null}text_embedding"] = np.repeat(np.asarray(words[pooled]), repeats, axis=0)
    names = [name for name in ("text_encoder", "text_encoder_2") if pipeline[name] is not None]
    skip = 0 if words["clip_skip"] is None else whole(words, "clip_skip", 0)
    modules = tuple(pipeline[name].module for name in names)
    return (EncodeTextsTwice(modules, tuple(names), skip + 1),), batch


def _sizes(words: Mapping[str, Any], size: tuple[int, int], count: int, guided: bool) -> Batch:
    """What the network is told of sizes and crops, [B, 6] numbers of pixels."""
    found = {}
    defaults = (size, (0, 0), size)
    values = [
        default if words[name] is None else tuple(words[name])
        for name, default in zip(_SIZES, defaults, strict=True)
    ]
    found["sizes"] = values
    negatives = [words[f"negative_{name}"] for name in _SIZES]
    if guided and negatives[0] is not None and negatives[2] is not None:
        negatives[1] = (0, 0) if negatives[1] is None else negatives[1]
        found["null_sizes"] = [tuple(each) for each in negatives]
    elif guided:
        if any(each is not None for each in negatives):
            raise ValueError(
                "negative_original_size and negative_target_size belong together; give both"
            )
        found["null_sizes"] = values
    for name, pairs in found.items():
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"{', '.join(_SIZES)} must be pairs of pixels, got {pairs}")
        found[name] = np.tile(np.asarray(pairs, np.float32).reshape(1, -1), (count, 1))
    return found


def _text_to_image(pipeline: Any, words: Mapping[str, Any]) -> Job:
    unet, vae, scheduler = pipeline["unet"], pipeline["vae"], pipeline["scheduler"]
    guide = Unguided() if is_distilled(unet) else guidance_of(words, scheduler)
    guided = not isinstance(guide, Unguided)
    texts = texts_of(words, guided=guided)
    encoding, batch = _encode(pipeline, words, texts)
    size = size_of(words, unet, vae)
    shape = (*size, vae.config.latent_channels)
    pixels = (size[0] * vae.config.factor, size[1] * vae.config.factor)
    batch = {
        **batch,
        **noise_of(words, texts.num_images, shape),
        **_sizes(words, pixels, texts.num_images, guided),
        **guidance_condition(words, unet, texts.num_images),
    }
    phases = (
        *encoding,
        denoise_phase(unet, scheduler, shape),
        DecodeLatents(vae.config, vae.module),
    )
    return Job(phases, batch, {"denoise": control_of(scheduler, words, guide)}, texts.num_images)


TEXT_TO_IMAGE = Task(
    "text_to_image",
    {
        **PROMPTS,
        **STEPS,
        **SIZE,
        **dict.fromkeys(("prompt_2", "negative_prompt_2", *_POOLED, *_SIZES)),
        **dict.fromkeys(f"negative_{name}" for name in _SIZES),
        "guidance_scale": 5.0,
        "guidance_rescale": 0.0,
        "latents": None,
        "clip_skip": None,
    },
    (),
    _text_to_image,
)
