"""Calls of Stable Diffusion's upscaler: a text and an image to one of four times its size."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.guidance import Unguided
from diffusion_jax.pretrained.calls.base import (
    PROMPTS,
    STEPS,
    Job,
    Task,
    control_of,
    guidance_of,
    texts_of,
    whole,
)
from diffusion_jax.pretrained.calls.images import for_each_image, images_of
from diffusion_jax.pretrained.calls.stable_diffusion import denoise_phase, encode_texts, noise_of
from diffusion_jax.systems.latent_diffusion import DecodeLatents
from diffusion_jax.systems.super_resolution import DenoiseNoised, NoiseLowRes

# What diffusers' pipeline refuses to exceed where model_index.json says nothing.
MAX_NOISE_LEVEL = 350


def _noise_level(pipeline: Any, words: Mapping[str, Any]) -> int:
    level = whole(words, "noise_level", 0)
    told = pipeline["unet"].config.conditioners.values()
    most = min(
        pipeline.options.get("max_noise_level", MAX_NOISE_LEVEL),
        pipeline["low_res_scheduler"].schedule.num_timesteps - 1,
        *(options["num_classes"] - 1 for kind, options in told if kind == "label"),
    )
    if level > most:
        raise ValueError(f"noise_level must lie in [0, {most}], got {level}")
    return level


def _upscale(pipeline: Any, words: Mapping[str, Any]) -> Job:
    unet, vae, scheduler = pipeline["unet"], pipeline["vae"], pipeline["scheduler"]
    guide = guidance_of(words, scheduler)
    texts = texts_of(words, guided=not isinstance(guide, Unguided))
    count = texts.num_images
    low_res = images_of(words["image"], "image", multiple=vae.config.factor, filter="bicubic")
    low_res = for_each_image(low_res, count, "image")
    level = _noise_level(pipeline, words)
    shape = (*low_res.shape[1:3], vae.config.latent_channels)
    if shape[-1] + low_res.shape[-1] != unet.config.in_channels:
        raise ValueError(
            f"the network reads {unet.config.in_channels} channels, latents have {shape[-1]} and "
            f"the image {low_res.shape[-1]}"
        )
    encoding, batch = encode_texts(pipeline, words, texts)
    batch = {
        **batch,
        **noise_of(words, count, shape),
        "low_res": low_res,
        "noise_level": np.full(count, level, np.int32),
        # The embedding of the level is a table of labels in released networks.
        "label": np.full(count, level, np.int32),
    }
    phases = (
        *encoding,
        NoiseLowRes(pipeline["low_res_scheduler"].schedule),
        denoise_phase(unet, scheduler, shape, kind=DenoiseNoised),
        DecodeLatents(vae.config, vae.module),
    )
    return Job(phases, batch, {"denoise": control_of(scheduler, words, guide)}, count)


UPSCALE = Task(
    "super_resolution",
    {
        **PROMPTS,
        **STEPS,
        "num_inference_steps": 75,
        "guidance_scale": 9.0,
        "image": None,
        "noise_level": 20,
        "latents": None,
        "clip_skip": None,
    },
    ("image",),
    _upscale,
    ("prompt", "image"),
)
