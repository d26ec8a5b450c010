"""Calls of DeepFloyd IF: texts to small images, and small images to larger ones."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.core.types import Batch
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
from diffusion_jax.pretrained.calls.images import for_each_image, images_of
from diffusion_jax.pretrained.calls.stable_diffusion import SIZE, denoise_phase, noise_of
from diffusion_jax.systems.latent_diffusion import EncodeTexts
from diffusion_jax.systems.phases import Phase
from diffusion_jax.systems.pixel import ToImages
from diffusion_jax.systems.super_resolution import NoiseLowRes

# Tokens of T5 that the networks were trained with, whatever the tokenizer says.
LENGTH = 77


def _pixels(words: Mapping[str, Any], unet: Any) -> tuple[int, int]:
    trained = unet.config.kept["sample_size"]
    trained = (trained, trained) if isinstance(trained, int) else tuple(trained)
    height, width = (
        default if words[name] is None else whole(words, name)
        for name, default in zip(("height", "width"), trained, strict=True)
    )
    return height, width


def _encode_texts(
    pipeline: Any, words: Mapping[str, Any], texts: Texts
) -> tuple[tuple[Phase, ...], Batch]:
    """Prompts in lower case, stripped, as tokens of T5, which sees no padding."""
    batch: dict[str, Any] = {}
    for name, given, embeds in (
        ("ids", texts.prompts, "prompt_embeds"),
        ("null_ids", texts.negatives, "negative_prompt_embeds"),
    ):
        if given is not None:
            tokenizer = pipeline["tokenizer"].with_length(LENGTH)
            prompts = [text.lower().strip() for text in given]
            found = tokenizer(prompts, on_long_prompt=words["on_long_prompt"])
            batch |= {name: found.ids, f"{name}_mask": found.mask}
        elif words[embeds] is not None:
            batch["tokens" if name == "ids" else "null_tokens"] = embeds_of(words, embeds)
    encoder = pipeline["text_encoder"]
    if encoder is None:
        # Released without it for the second stage: the first one's embeddings do.
        if texts.prompts is not None or texts.negatives is not None:
            raise ValueError(
                "this pipeline has no text_encoder; give prompt_embeds, and "
                "negative_prompt_embeds for guidance"
            )
        return (), batch
    return (EncodeTexts(encoder.module),), batch


def _prepared(pipeline: Any, words: Mapping[str, Any], channels: int) -> tuple[Any, ...]:
    if words["clean_caption"]:
        raise ValueError(
            "clean_caption is not done here: clean the prompt before, and pass False; a prompt is "
            "put into lower case and stripped"
        )
    unet, scheduler = pipeline["unet"], pipeline["scheduler"]
    guide = guidance_of(words, scheduler)
    texts = texts_of(words, guided=not isinstance(guide, Unguided))
    encoding, batch = _encode_texts(pipeline, words, texts)
    shape = (*_pixels(words, unet), channels)
    batch = {**batch, **noise_of(words, texts.num_images, shape)}
    draw = denoise_phase(unet, scheduler, shape)
    return encoding, draw, batch, {"denoise": control_of(scheduler, words, guide)}, texts.num_images


def _base(pipeline: Any, words: Mapping[str, Any]) -> Job:
    channels = pipeline["unet"].config.in_channels
    encoding, draw, batch, controls, count = _prepared(pipeline, words, channels)
    return Job((*encoding, draw, ToImages()), batch, controls, count)


def _super_resolution(pipeline: Any, words: Mapping[str, Any]) -> Job:
    channels = pipeline["unet"].config.in_channels // 2
    encoding, draw, batch, controls, count = _prepared(pipeline, words, channels)
    image = images_of(words["image"], "image", signed=True)
    image = for_each_image(image, count, "image")
    schedule = pipeline["image_noising_scheduler"].schedule
    level = whole(words, "noise_level", 0)
    if level >= schedule.num_timesteps:
        raise ValueError(f"noise_level must lie in [0, {schedule.num_timesteps}), got {level}")
    batch = {**batch, "low_res": image, "noise_level": np.full(count, level, np.float32)}
    noise = NoiseLowRes(schedule, draw.shape[:2])
    return Job((*encoding, noise, draw, ToImages()), batch, controls, count)


_WORDS: Mapping[str, Any] = {
    **PROMPTS, **STEPS, **SIZE, "latents": None, "clean_caption": False,
}  # fmt: skip
BASE = Task(
    "text_to_image",
    {**_WORDS, "num_inference_steps": 100, "guidance_scale": 7.0},
    (),
    _base,
)
SUPER_RESOLUTION = Task(
    "super_resolution",
    {**_WORDS, "guidance_scale": 4.0, "image": None, "noise_level": 250},
    ("image",),
    _super_resolution,
)
