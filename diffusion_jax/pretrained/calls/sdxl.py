"""Calls of Stable Diffusion XL: texts to images, image-to-image with its refiner, inpainting."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.types import Array, Batch
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
    number,
    texts_of,
    whole,
)
from diffusion_jax.pretrained.calls.image_to_image import image_to_image, inpainting
from diffusion_jax.pretrained.calls.stable_diffusion import (
    SIZE,
    denoise_phase,
    guidance_condition,
    is_distilled,
    noise_of,
    size_of,
)
from diffusion_jax.pretrained.networks import Loaded
from diffusion_jax.systems.latent_diffusion import DecodeLatents, EncodeTextsTwice

_SIZES = ("original_size", "crops_coords_top_left", "target_size")
_NEGATIVE_SIZES = tuple(f"negative_{name}" for name in _SIZES)
# Of refiners, with diffusers' defaults.
_SCORES: Mapping[str, float] = {"aesthetic_score": 6.0, "negative_aesthetic_score": 2.5}
_POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def _check(words: Mapping[str, Any], zeros: bool) -> None:
    """Refuses words that say nothing beside others, or without them."""
    for text, embeds, pooled in (
        ("prompt_2", "prompt_embeds", _POOLED[0]),
        ("negative_prompt_2", "negative_prompt_embeds", _POOLED[1]),
    ):
        if words[text] is not None and words[embeds] is not None:
            raise ValueError(f"give either {text} or {embeds}")
        if (words[embeds] is None) != (words[pooled] is None):
            raise ValueError(f"{embeds} and {pooled} belong together; give both")
    if zeros and words["negative_prompt_2"] is not None:
        raise ValueError("negative_prompt_2 needs a negative_prompt")


def _second(
    words: Mapping[str, Any], name: str, first: tuple[str, ...], repeats: int
) -> tuple[str, ...]:
    """Texts for the second encoder: those of the word, or the first one's where it is empty."""
    if words[name] is None or (isinstance(words[name], str) and not words[name]):
        return first
    texts = check_prompts(words[name])
    count = len(first) // repeats
    if len(texts) not in (1, count):
        raise ValueError(f"{name} must be one text, or one for each prompt, got {len(texts)}")
    texts = texts * count if len(texts) == 1 else texts
    return tuple(text for text in texts for _ in range(repeats))


def _pooled(words: Mapping[str, Any], name: str, num_images: int) -> Array:
    """Pooled embeddings of a call, repeated for every image."""
    pooled = jnp.asarray(words[name])
    repeats = whole(words, "num_images_per_prompt")
    if pooled.ndim != 2 or len(pooled) * repeats != num_images:
        raise ValueError(f"{name} must be one row for each prompt, got {pooled.shape}")
    return jnp.repeat(pooled, repeats, axis=0)


def _skip(words: Mapping[str, Any], encoders: Sequence[Loaded]) -> int:
    """How many blocks more than the last one of each encoder are left out."""
    skip = 0 if words["clip_skip"] is None else whole(words, "clip_skip", 0)
    fewest = min(encoder.config.num_layers for encoder in encoders)
    if skip >= fewest:
        raise ValueError(f"clip_skip must lie in [0, {fewest}), got {skip}")
    return skip


def _encode(pipeline: Any, words: Mapping[str, Any], texts: Texts) -> tuple[tuple[Any, ...], Batch]:
    repeats = whole(words, "num_images_per_prompt")
    zeros = (
        bool(pipeline.options.get("force_zeros_for_empty_prompt", True))
        and words["negative_prompt"] is None
    )
    _check(words, zeros)
    batch: dict[str, Any] = {}
    for null, first, second, embeds, pooled in (
        ("", texts.prompts, "prompt_2", "prompt_embeds", _POOLED[0]),
        ("null_", texts.negatives, "negative_prompt_2", "negative_prompt_embeds", _POOLED[1]),
    ):
        if null and first is not None and zeros:
            if texts.prompts is not None:
                batch["null_zeros"] = np.zeros(texts.num_images, np.float32)
            else:
                for name in ("tokens", "text_embedding"):
                    batch[f"null_{name}"] = jnp.zeros_like(batch[name])
        elif first is not None:
            for name, given, tokenizer in (
                ("ids", first, pipeline["tokenizer"]),
                ("ids_2", _second(words, second, first, repeats), pipeline["tokenizer_2"]),
            ):
                if tokenizer is not None:
                    found = tokenizer(list(given), on_long_prompt=words["on_long_prompt"])
                    batch[f"{null}{name}"] = found.ids
        elif words[embeds] is not None:
            batch[f"{null}tokens"] = embeds_of(words, embeds)
            batch[f"{null}text_embedding"] = _pooled(words, pooled, texts.num_images)
    names = [name for name in ("text_encoder", "text_encoder_2") if pipeline[name] is not None]
    encoders = [pipeline[name] for name in names]
    modules = tuple(encoder.module for encoder in encoders)
    return (EncodeTextsTwice(modules, tuple(names), _skip(words, encoders) + 1),), batch


def _pair(words: Mapping[str, Any], name: str, default: tuple[int, int]) -> np.ndarray:
    pair = np.asarray(default if words[name] is None else words[name])
    if pair.shape != (2,) or pair.dtype.kind not in "iuf" or not np.isfinite(pair).all():
        raise ValueError(f"{name} must be two numbers of pixels, got {words[name]!r}")
    return pair


def _repeated(pairs: Mapping[str, Sequence[np.ndarray]], count: int) -> Batch:
    return {
        name: np.tile(np.concatenate(each).astype(np.float32), (count, 1))
        for name, each in pairs.items()
    }


def _sizes(words: Mapping[str, Any], size: tuple[int, int], count: int, guided: bool) -> Batch:
    """What the network is told of sizes and crops, [B, 6] numbers of pixels."""
    defaults = zip(_SIZES, (size, (0, 0), size), strict=True)
    found = {"sizes": [_pair(words, name, default) for name, default in defaults]}
    if guided:
        given = [words[name] is not None for name in _NEGATIVE_SIZES]
        if any(given) and not (given[0] and given[2]):
            raise ValueError(
                "negative_original_size and negative_target_size belong together; give both"
            )
        negatives = [_pair(words, name, (0, 0)) for name in _NEGATIVE_SIZES]
        found["null_sizes"] = negatives if any(given) else found["sizes"]
    return _repeated(found, count)


def _sizes_with_image(
    pipeline: Any, words: Mapping[str, Any], size: tuple[int, int], count: int, guided: bool
) -> Batch:
    """The same with an image: every negative size has the positive one as its own default.

    A refiner is told an aesthetic score in place of the target size, [B, 5], and as negative
    crop (0, 0) by default. diffusers takes negative_crops_coords_top_left and does not use it with
    networks that are told no score; here it counts wherever it is given.
    """
    scored = bool(pipeline.options.get("requires_aesthetics_score", False))
    unused = ("target_size", "negative_target_size") if scored else tuple(_SCORES)
    given = [name for name in unused if words[name] is not None]
    if given:
        told = "aesthetic scores, not target sizes" if scored else "no aesthetic scores"
        raise ValueError(f"the network of this pipeline is told {told}; leave {given[0]} out")
    found: dict[str, list[np.ndarray]] = {}
    original, crop, target = size, (0, 0), size
    for null in ("", "negative_") if guided else ("",):
        original = _pair(words, f"{null}original_size", original)
        crop = _pair(words, f"{null}crops_coords_top_left", (0, 0) if scored else crop)
        target = _pair(words, f"{null}target_size", target)
        last = target
        if scored:
            name = f"{null}aesthetic_score"
            score = _SCORES[name] if words[name] is None else number(words, name)
            last = np.asarray([score])
        found["null_sizes" if null else "sizes"] = [original, crop, last]
    return _repeated(found, count)


def _condition(
    pipeline: Any, words: Mapping[str, Any], texts: Texts, pixels: tuple[int, int], guided: bool
) -> tuple[tuple[Any, ...], Batch]:
    """What the network is told in calls with an image."""
    encoding, batch = _encode(pipeline, words, texts)
    return encoding, batch | _sizes_with_image(pipeline, words, pixels, texts.num_images, guided)


def _text_to_image(pipeline: Any, words: Mapping[str, Any]) -> Job:
    unet, vae, scheduler = pipeline["unet"], pipeline["vae"], pipeline["scheduler"]
    guide = Unguided() if is_distilled(unet) else guidance_of(words, scheduler)
    guided = not isinstance(guide, Unguided)
    texts = texts_of(words, guided=guided)
    encoding, batch = _encode(pipeline, words, texts)
    size = size_of(words, unet, vae.config.factor)
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


_WORDS: Mapping[str, Any] = {
    **PROMPTS,
    **STEPS,
    **dict.fromkeys(("prompt_2", "negative_prompt_2", *_POOLED, *_SIZES, *_NEGATIVE_SIZES)),
    "guidance_scale": 5.0,
    "guidance_rescale": 0.0,
    "latents": None,
    "clip_skip": None,
}
_WITH_IMAGE: Mapping[str, Any] = {
    **_WORDS,
    "image": None,
    **dict.fromkeys(_SCORES),
}
_END: Mapping[str, Any] = {"denoising_end": None}
_PART: Mapping[str, Any] = {**_END, "denoising_start": None}

TEXT_TO_IMAGE = Task("text_to_image", {**_WORDS, **SIZE, **_END}, (), _text_to_image)
IMAGE_TO_IMAGE = image_to_image({**_WITH_IMAGE, **_PART, "strength": 0.3}, _condition)
INPAINTING = inpainting(
    {**_WITH_IMAGE, **_PART, **SIZE, "strength": 0.9999, "mask_image": None}, _condition
)
