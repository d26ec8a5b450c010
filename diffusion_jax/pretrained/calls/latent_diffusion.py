"""Calls of latent diffusion as first released: texts to images, and small images to larger ones."""

from collections.abc import Mapping
from typing import Any

from diffusion_jax.core.types import Batch
from diffusion_jax.guidance import ClassifierFree, Guide, Unguided
from diffusion_jax.pretrained.calls.base import (
    PROMPTS,
    STEPS,
    Job,
    Task,
    control_of,
    embeds_of,
    number,
    texts_of,
)
from diffusion_jax.pretrained.calls.images import images_of
from diffusion_jax.pretrained.calls.stable_diffusion import SIZE, denoise_phase, noise_of, size_of
from diffusion_jax.systems.latent_diffusion import DecodeLatents, EncodeTexts

# Tokens of BERT that the encoder was trained with, and what the latents are smaller by, whatever
# tokenizer and autoencoder say.
LENGTH = 77
FACTOR = 8
# What the sides of a picture are cut down to multiples of before it is made larger.
MULTIPLE = 32


def _text_to_image(pipeline: Any, words: Mapping[str, Any]) -> Job:
    unet, vae, encoder = pipeline["unet"], pipeline["vqvae"], pipeline["bert"]
    scheduler, scale = pipeline["scheduler"], number(words, "guidance_scale")
    guide: Guide = Unguided() if scale == 1.0 else ClassifierFree(scale)
    texts = texts_of(words, guided=not isinstance(guide, Unguided))
    batch: Batch = {}
    tokenizer = pipeline["tokenizer"].with_length(LENGTH)
    for name, given, embeds, tokens in (
        ("ids", texts.prompts, "prompt_embeds", "tokens"),
        ("null_ids", texts.negatives, "negative_prompt_embeds", "null_tokens"),
    ):
        if given is not None:
            found = tokenizer(list(given), on_long_prompt=words["on_long_prompt"])
            batch = {**batch, name: found.ids}
        elif words[embeds] is not None:
            batch = {**batch, tokens: embeds_of(words, embeds)}
    shape = (*size_of(words, unet, FACTOR), unet.config.in_channels)
    batch = {**batch, **noise_of(words, texts.num_images, shape)}
    phases = (
        EncodeTexts(encoder.module, component="bert"),
        denoise_phase(unet, scheduler, shape),
        DecodeLatents(vae.config, vae.module, component="vqvae"),
    )
    return Job(phases, batch, {"denoise": control_of(scheduler, words, guide)}, texts.num_images)


def _super_resolution(pipeline: Any, words: Mapping[str, Any]) -> Job:
    unet, vae, scheduler = pipeline["unet"], pipeline["vqvae"], pipeline["scheduler"]
    low_res = images_of(words["image"], "image", multiple=MULTIPLE, signed=True)
    count = len(low_res)
    shape = (*low_res.shape[1:3], unet.config.in_channels // 2)
    if low_res.shape[-1] != shape[-1]:
        raise ValueError(f"image must have {shape[-1]} channels, got {low_res.shape}")
    batch = {"channels": low_res, **noise_of(words, count, shape)}
    decode = DecodeLatents(vae.config, vae.module, component="vqvae", apply_scale=False)
    phases = (denoise_phase(unet, scheduler, shape), decode)
    return Job(phases, batch, {"denoise": control_of(scheduler, words)}, count)


TEXT_TO_IMAGE = Task(
    "text_to_image",
    {**PROMPTS, **STEPS, **SIZE, "latents": None, "guidance_scale": 1.0},
    (),
    _text_to_image,
)
SUPER_RESOLUTION = Task(
    "super_resolution",
    {**STEPS, "num_inference_steps": 100, "latents": None, "image": None},
    ("image",),
    _super_resolution,
    ("image",),
)
