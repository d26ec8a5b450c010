"""Calls of unCLIP: texts to embeddings of images, to small images, to larger ones."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.types import Array, Batch
from diffusion_jax.guidance import ClassifierFree, Guide, Unguided
from diffusion_jax.pretrained.calls.base import (
    STEPS,
    Job,
    Task,
    control_of,
    number,
    texts_of,
    whole,
)
from diffusion_jax.pretrained.calls.stable_diffusion import denoise_phase
from diffusion_jax.pretrained.schedulers import CLASSES, Scheduler, from_config, to_config
from diffusion_jax.systems.dalle2 import (
    DenoiseEmbedding,
    DenoiseLastApart,
    EncodeCaptions,
    ProjectEmbeddings,
    ResizeLowRes,
    RestoreEmbedding,
)
from diffusion_jax.systems.phases import Control
from diffusion_jax.systems.pixel import ToImages

_STAGES = ("prior", "decoder", "super_res")


def _text(
    pipeline: Any, words: Mapping[str, Any], *, guided: bool
) -> tuple[EncodeCaptions, Batch, int]:
    """The phase that encodes texts, what the phases read of them, and the number of images.

    Raises:
      ValueError: if there is not one of a prompt and a text_model_output with its mask.
    """
    given, given_mask = words["text_model_output"], words["text_attention_mask"]
    if (words["prompt"] is None) == (given is None) or (given is None) != (given_mask is None):
        raise ValueError("give either a prompt, or a text_model_output and its text_attention_mask")
    repeats = whole(words, "num_images_per_prompt")
    batch, embeds = {}, None
    if given is not None:
        batch, embeds = _given_text(pipeline, given, given_mask, repeats)
    texts = texts_of(
        {
            "prompt": words["prompt"],
            "prompt_embeds": embeds,
            "negative_prompt": None,
            "negative_prompt_embeds": None,
            "num_images_per_prompt": repeats,
        },
        guided=guided,
    )
    for null, prompts in (("", texts.prompts), ("null_", texts.negatives)):
        if prompts is not None:
            found = pipeline["tokenizer"](list(prompts), on_long_prompt=words["on_long_prompt"])
            batch[f"{null}ids"] = found.ids
            batch[f"{null}text_mask"] = np.asarray(found.mask, bool)
    return EncodeCaptions(pipeline["text_encoder"].module), batch, texts.num_images


def _given_text(
    pipeline: Any, output: Any, mask: Any, repeats: int
) -> tuple[dict[str, Any], Array]:
    """A text's embedding, tokens and mask, for every image; and the embeddings as given."""
    try:
        embedding, tokens = (jnp.asarray(output[i], jnp.float32) for i in (0, 1))
    except (TypeError, IndexError, KeyError) as error:
        raise ValueError(
            "text_model_output must be the embeddings [P, D] and the tokens [P, L, D] of CLIP's "
            f"text tower, got {type(output).__name__}"
        ) from error
    mask = np.asarray(mask, bool)
    config = pipeline["prior"].config
    count, length, width = len(embedding), config.num_text_tokens, config.data_dim
    expected = ((count, width), (count, length, width), (count, length))
    shapes = (embedding.shape, tokens.shape, mask.shape)
    if shapes != expected:
        raise ValueError(
            "text_model_output and text_attention_mask must have the shapes [P, "
            f"{width}], [P, {length}, {width}] and [P, {length}], got {shapes}"
        )
    batch = {"text_embedding": embedding, "text_tokens": tokens, "text_mask": mask}
    return {name: np.repeat(value, repeats, axis=0) for name, value in batch.items()}, embedding


def _noise(
    words: Mapping[str, Any], stage: str, gives: str, count: int, shape: tuple[int, ...]
) -> Batch:
    """The noise of a stage that a call brings along, [B, …] of standard deviation 1."""
    name = f"{stage}_latents"
    if words[name] is None:
        return {}
    noise = jnp.asarray(words[name], jnp.float32)
    if noise.shape != (count, *shape):
        raise ValueError(f"{name} must have shape {(count, *shape)}, got {noise.shape}")
    return {f"noise_{gives}": noise}


def _scheduler(pipeline: Any, stage: str) -> Scheduler:
    """That of a stage; steps of UnCLIP's end where the next one starts."""
    scheduler = pipeline[f"{stage}_scheduler"]
    if "prev_timestep" not in CLASSES[scheduler.class_name].call:
        return scheduler
    return from_config(to_config(scheduler), prev_timestep="next")


def _control(words: Mapping[str, Any], stage: str, scheduler: Scheduler, guide: Guide) -> Control:
    # One step has no beginning and no end in these grids.
    steps = whole(words, f"{stage}_num_inference_steps", 2)
    return control_of(scheduler, {**STEPS, "num_inference_steps": steps}, guide)


def _size(unet: Any) -> tuple[int, int]:
    size = unet.config.kept["sample_size"]
    return (size, size) if isinstance(size, int) else tuple(size)


def _text_to_image(pipeline: Any, words: Mapping[str, Any]) -> Job:
    scales = {stage: number(words, f"{stage}_guidance_scale") for stage in ("prior", "decoder")}
    # As diffusers has it, guidance of one stage is that of both, whatever the other's scale.
    guided = max(scales.values()) > 1.0
    guides = {
        name: ClassifierFree(scale) if guided else Unguided() for name, scale in scales.items()
    }
    encode, batch, count = _text(pipeline, words, guided=guided)
    prior, decoder, first, last = (
        pipeline[name] for name in ("prior", "decoder", "super_res_first", "super_res_last")
    )
    schedulers = {stage: _scheduler(pipeline, stage) for stage in _STAGES}
    shapes = {
        "prior": (prior.config.data_dim,),
        "decoder": (*_size(decoder), decoder.config.in_channels),
        "super_res": (*_size(first), first.config.in_channels // 2),
    }
    gives = {"prior": "prior_sample", "decoder": "low_res", "super_res": "latents"}
    for stage in _STAGES:
        batch |= _noise(words, stage, gives[stage], count, shapes[stage])
    draw_prior = DenoiseEmbedding(
        name="prior",
        gives=gives["prior"],
        shape=shapes["prior"],
        module=prior.module,
        parameterization=schedulers["prior"].parameterization,
        time_input=schedulers["prior"].time_input,
        component="prior",
    )
    draw_small = denoise_phase(
        decoder,
        schedulers["decoder"],
        shapes["decoder"],
        name="decoder",
        gives=gives["decoder"],
        index=1,
        component="decoder",
    )
    draw_large = denoise_phase(
        first,
        schedulers["super_res"],
        shapes["super_res"],
        kind=DenoiseLastApart,
        name="super_res",
        gives=gives["super_res"],
        index=2,
        component="super_res_first",
        last_module=last.module,
    )
    project = pipeline["text_proj"]
    phases = (
        encode,
        draw_prior,
        RestoreEmbedding(),
        ProjectEmbeddings(project.config, project.module),
        draw_small,
        ResizeLowRes(shapes["super_res"][:2]),
        draw_large,
        ToImages(),
    )
    controls = {
        stage: _control(words, stage, schedulers[stage], guides.get(stage, Unguided()))
        for stage in _STAGES
    }
    return Job(phases, batch, controls, count)


TEXT_TO_IMAGE = Task(
    "text_to_image",
    {
        "prompt": None,
        "num_images_per_prompt": 1,
        "on_long_prompt": "warn",
        "prior_num_inference_steps": 25,
        "decoder_num_inference_steps": 25,
        "super_res_num_inference_steps": 7,
        "prior_latents": None,
        "decoder_latents": None,
        "super_res_latents": None,
        "text_model_output": None,
        "text_attention_mask": None,
        "prior_guidance_scale": 4.0,
        "decoder_guidance_scale": 8.0,
    },
    (),
    _text_to_image,
)
