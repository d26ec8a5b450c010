"""Calls of Stable Diffusion 1 and 2: texts to images."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.types import Array, Batch
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
    number,
    texts_of,
    whole,
)
from diffusion_jax.pretrained.networks import Loaded
from diffusion_jax.pretrained.schedulers import Scheduler
from diffusion_jax.systems.latent_diffusion import DecodeLatents, Denoise2D, EncodeTexts

GUIDANCE: Mapping[str, Any] = {"guidance_scale": 7.5, "guidance_rescale": 0.0}
SIZE: Mapping[str, Any] = {"height": None, "width": None}


def size_of(words: Mapping[str, Any], unet: Loaded, factor: int) -> tuple[int, int]:
    """Height and width of the latents; those of training where the call says nothing.

    Raises:
      ValueError: if they are no multiples of the factor that the autoencoder divides them by.
    """
    found = []
    trained = unet.config.kept.get("sample_size") or 64
    trained = (trained, trained) if isinstance(trained, int) else tuple(trained)
    for name, default in zip(("height", "width"), trained, strict=True):
        size = default * factor if words[name] is None else whole(words, name)
        if size % factor:
            raise ValueError(
                f"height and width must be multiples of {factor}, what the autoencoder divides "
                f"them by, got {name} = {size}"
            )
        found.append(size // factor)
    return found[0], found[1]


def encode_texts(
    pipeline: Any, words: Mapping[str, Any], texts: Texts
) -> tuple[tuple[EncodeTexts, ...], Batch]:
    """The phase that encodes prompts, and what it reads, or the embeddings that were given.

    diffusers' clip_skip leaves out as many blocks more than the usual none.
    """
    encoder: Loaded = pipeline["text_encoder"]
    batch: dict[str, Array] = {}
    for name, given, embeds in (
        ("ids", texts.prompts, "prompt_embeds"),
        ("null_ids", texts.negatives, "negative_prompt_embeds"),
    ):
        if given is not None:
            found = pipeline["tokenizer"](list(given), on_long_prompt=words["on_long_prompt"])
            batch[name] = found.ids
            if getattr(encoder.config, "use_attention_mask", False):
                batch[f"{name}_mask"] = found.mask
        elif words[embeds] is not None:
            batch["tokens" if name == "ids" else "null_tokens"] = embeds_of(words, embeds)
    skip = words.get("clip_skip")
    skip = 0 if skip is None else whole(words, "clip_skip", 0)
    return (EncodeTexts(encoder.module, skip=skip),), batch


def denoise_phase(
    unet: Loaded, scheduler: Scheduler, shape: tuple[int, ...], **fields: Any
) -> Denoise2D:
    """The phase that draws latents of a shape; `fields` are further ones of the phase."""
    kind: type[Denoise2D] = fields.pop("kind", Denoise2D)
    doubled = unet.config.network.out_channels == 2 * shape[-1]
    learned = scheduler.learned_variance if doubled else None
    return kind(
        name=fields.pop("name", "denoise"),
        gives=fields.pop("gives", "latents"),
        shape=shape,
        config=unet.config,
        module=unet.module,
        parameterization=scheduler.parameterization,
        time_input=scheduler.time_input,
        **{"learned_variance": learned, "drop_variance": doubled and learned is None, **fields},
    )


def noise_of(words: Mapping[str, Any], num_images: int, shape: tuple[int, ...]) -> Batch:
    """The noise that a call brings along as latents [B, H, W, C], of standard deviation 1.

    Raises:
      ValueError: if it has another shape.
    """
    if words["latents"] is None:
        return {}
    latents = jnp.asarray(words["latents"], jnp.float32)
    if latents.shape != (num_images, *shape):
        raise ValueError(f"latents must have shape {(num_images, *shape)}, got {latents.shape}")
    return {"noise_latents": latents}


def guidance_condition(words: Mapping[str, Any], unet: Loaded, num_images: int) -> Batch:
    """What a distilled network is told of the guidance scale, w - 1 for each image."""
    if not is_distilled(unet):
        return {}
    scale = number(words, "guidance_scale")
    return {"guidance": np.full(num_images, scale - 1.0, np.float32)}


def is_distilled(unet: Loaded) -> bool:
    """Whether guidance is an input of the network, as of latent consistency models."""
    return any(kind == "guidance_scale" for kind, _ in unet.config.conditioners.values())


def _text_to_image(pipeline: Any, words: Mapping[str, Any]) -> Job:
    unet, vae, scheduler = pipeline["unet"], pipeline["vae"], pipeline["scheduler"]
    guide = Unguided() if is_distilled(unet) else guidance_of(words, scheduler)
    texts = texts_of(words, guided=not isinstance(guide, Unguided))
    encoding, batch = encode_texts(pipeline, words, texts)
    shape = (*size_of(words, unet, vae.config.factor), vae.config.latent_channels)
    batch = {
        **batch,
        **noise_of(words, texts.num_images, shape),
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
    {**PROMPTS, **STEPS, **GUIDANCE, **SIZE, "latents": None, "clip_skip": None},
    (),
    _text_to_image,
)
