"""Calls of Stable Diffusion with an image: image-to-image and inpainting; and RePaint."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from diffusion_jax.core.resize import nearest_resize
from diffusion_jax.core.types import Array, Batch
from diffusion_jax.guidance import Unguided
from diffusion_jax.pretrained.calls.base import (
    PROMPTS,
    STEPS,
    Job,
    Task,
    Texts,
    control_of,
    guidance_of,
    number,
    texts_of,
    whole,
)
from diffusion_jax.pretrained.calls.images import (
    for_each_image,
    images_of,
    is_pil,
    masks_of,
    size_for,
)
from diffusion_jax.pretrained.calls.stable_diffusion import (
    GUIDANCE,
    SIZE,
    denoise_phase,
    encode_texts,
    guidance_condition,
    is_distilled,
    noise_of,
    size_of,
)
from diffusion_jax.pretrained.schedulers import Scheduler, from_config, to_config
from diffusion_jax.systems.inpainting import (
    DenoiseFromImage,
    DenoiseKeeping,
    MaskChannels,
    RePaintPixels,
)
from diffusion_jax.systems.latent_diffusion import DecodeLatents, Denoise2D, EncodeImage
from diffusion_jax.systems.phases import Control
from diffusion_jax.systems.pixel import ToImages

# (pipeline, words, texts, height and width in pixels, whether there is guidance) -> the phases that
# encode what the network is told, and what they read.
Conditioning = Callable[
    [Any, Mapping[str, Any], Texts, tuple[int, int], bool], tuple[tuple[Any, ...], Batch]
]


def _by_texts(
    pipeline: Any, words: Mapping[str, Any], texts: Texts, pixels: tuple[int, int], guided: bool
) -> tuple[tuple[Any, ...], Batch]:
    del pixels, guided
    return encode_texts(pipeline, words, texts)


def _latents_given(image: Any, channels: int) -> Array | None:
    """The image where it is latents already: floats whose last axis are the latents' channels."""
    if is_pil(image) or isinstance(image, list | tuple):
        return None
    array = jnp.asarray(image)
    is_latents = array.ndim == 4 and array.shape[-1] == channels != 3
    return array.astype(jnp.float32) if is_latents and array.dtype.kind == "f" else None


def _image_batch(
    words: Mapping[str, Any], vae: Any, count: int, size: tuple[int, int] | None
) -> tuple[Batch, tuple[int, int]]:
    """The image, or its latents, for every image that is drawn, and the latents' size."""
    latents = _latents_given(words["image"], vae.config.latent_channels)
    if latents is not None:
        height, width = latents.shape[1:3]
        return {"image_latents": for_each_image(latents, count, "image")}, (height, width)
    factor = vae.config.factor
    wanted = size_for(words["image"], factor) if size is None else size
    image = images_of(words["image"], "image", size=wanted)
    if image.shape[1] % factor or image.shape[2] % factor:
        raise ValueError(
            f"height and width of the image must be multiples of {factor}, what the autoencoder "
            f"divides them by, got {image.shape[1:3]}"
        )
    found = image.shape[1] // factor, image.shape[2] // factor
    return {"image": for_each_image(image, count, "image")}, found


def _start_of(
    words: Mapping[str, Any], image: Batch, scheduler: Scheduler, control: Control
) -> Batch:
    """The latents with which a network goes on where another one stopped; {} where it starts anew.

    Raises:
      ValueError: if the image is no latents.
    """
    if words.get("denoising_start") is None:
        return {}
    if "image_latents" not in image:
        raise ValueError(
            "with denoising_start the image must be latents: what a pipeline gives for "
            'output_type="latent" and denoising_end of the same number'
        )
    level = control.grid.level(control.grid.start)
    return {"start_latents": scheduler.from_reference(image["image_latents"], level)}


def _image_to_image(condition: Conditioning, pipeline: Any, words: Mapping[str, Any]) -> Job:
    unet, vae, scheduler = pipeline["unet"], pipeline["vae"], pipeline["scheduler"]
    guide = Unguided() if is_distilled(unet) else guidance_of(words, scheduler)
    guided = not isinstance(guide, Unguided)
    texts = texts_of(words, guided=guided)
    count, factor = texts.num_images, vae.config.factor
    image, size = _image_batch(words, vae, count, None)
    pixels = (size[0] * factor, size[1] * factor)
    encoding, batch = condition(pipeline, words, texts, pixels, guided)
    shape = (*size, vae.config.latent_channels)
    control = control_of(scheduler, words, guide)
    start = _start_of(words, image, scheduler, control)
    batch = {
        **batch,
        **image,
        **start,
        **noise_of(words, count, shape),
        **guidance_condition(words, unet, count),
    }
    phases = (
        *encoding,
        EncodeImage(vae.config, vae.module),
        denoise_phase(unet, scheduler, shape, kind=DenoiseFromImage, noisy=bool(start)),
        DecodeLatents(vae.config, vae.module),
    )
    return Job(phases, batch, {"denoise": control}, count)


def _inpainting(condition: Conditioning, pipeline: Any, words: Mapping[str, Any]) -> Job:
    unet, vae, scheduler = pipeline["unet"], pipeline["vae"], pipeline["scheduler"]
    guide = Unguided() if is_distilled(unet) else guidance_of(words, scheduler)
    guided = not isinstance(guide, Unguided)
    texts = texts_of(words, guided=guided)
    count, channels = texts.num_images, vae.config.latent_channels
    size = size_of(words, unet, vae.config.factor)
    pixels = (size[0] * vae.config.factor, size[1] * vae.config.factor)
    shape = (*size, channels)
    told = unet.config.in_channels != channels
    if told and unet.config.in_channels != 2 * channels + 1:
        raise ValueError(
            f"inpainting needs a network of {channels} or {2 * channels + 1} input channels, this "
            f"one has {unet.config.in_channels}"
        )
    if told and words.get("denoising_start") is not None:
        raise ValueError(
            "a network of its own for inpainting is told what is known of the image, so it cannot "
            "go on from latents alone: leave denoising_start out, or take a network of "
            f"{channels} input channels"
        )
    encoding, batch = condition(pipeline, words, texts, pixels, guided)
    image, found = _image_batch(words, vae, count, pixels)
    if found != size:
        raise ValueError(f"image must have latents of {size}, as height and width say, got {found}")
    mask = for_each_image(
        masks_of(words["mask_image"], "mask_image", size=pixels), count, "mask_image"
    )
    control = control_of(scheduler, words, guide)
    start = _start_of(words, image, scheduler, control)
    batch = {
        **batch,
        **image,
        **start,
        **noise_of(words, count, shape),
        **guidance_condition(words, unet, count),
        "mask": nearest_resize(jnp.asarray(mask), *size),
    }
    # With latents of the caller's own, or at full strength, nothing of the image is in the start.
    from_noise = number(words, "strength", 0.0, 1.0) == 1.0 or words["latents"] is not None
    from_noise = from_noise and not start
    encode = [EncodeImage(vae.config, vae.module)]
    kind: type[Denoise2D] = DenoiseKeeping
    if told:
        if "image" not in batch:
            raise ValueError("a network for inpainting needs the image itself, not its latents")
        batch["known_image"] = batch["image"] * (mask < 0.5)
        encode = [] if from_noise else encode
        encode += [
            EncodeImage(
                vae.config,
                vae.module,
                purpose="known_posterior",
                source="known_image",
                target="known_latents",
            ),
            MaskChannels(),
        ]
        kind = DenoiseFromImage
    phases = (
        *encoding,
        *encode,
        denoise_phase(unet, scheduler, shape, kind=kind, from_noise=from_noise, noisy=bool(start)),
        DecodeLatents(vae.config, vae.module),
    )
    return Job(phases, batch, {"denoise": control}, count)


def _repaint(pipeline: Any, words: Mapping[str, Any]) -> Job:
    unet, scheduler = pipeline["unet"], pipeline["scheduler"]
    jumps = {name: whole(words, name) for name in ("jump_length", "jump_n_sample")}
    if scheduler.class_name != "RePaintScheduler":
        raise ValueError(
            f"RePaint needs a RePaintScheduler, this pipeline has a {scheduler.class_name}; see "
            "samplers.RePaint for others"
        )
    scheduler = from_config(to_config(scheduler), **{**dict(scheduler.call), **jumps})
    if (
        words["sampler"] is not None
        or words["timesteps"] is not None
        or words["sigmas"] is not None
    ):
        raise ValueError("RePaint has its own sampler and times; see samplers.RePaint for others")
    size = size_for(words["image"], 32)
    image = images_of(words["image"], "image", size=size, signed=True)
    mask = masks_of(words["mask_image"], "mask_image", size=size)
    count = len(image)
    shape = image.shape[1:]
    known = for_each_image(mask, count, "mask_image") >= 0.5
    batch = {"image": image, "known": known, **noise_of(words, count, shape)}
    draw = denoise_phase(unet, scheduler, shape, kind=RePaintPixels)
    return Job((draw, ToImages()), batch, {"denoise": control_of(scheduler, words)}, count)


def image_to_image(words: Mapping[str, Any], condition: Conditioning = _by_texts) -> Task:
    """The task of pipelines whose network is told what `condition` gives.

    Args:
      words: those of the call with their defaults; "strength" is one of them.
      condition: see `Conditioning`.
    """
    prepare = functools.partial(_image_to_image, condition)
    return Task("image_to_image", words, ("image",), prepare, ("prompt", "image"))


def inpainting(words: Mapping[str, Any], condition: Conditioning = _by_texts) -> Task:
    """The task of pipelines whose network is told what `condition` gives, see `image_to_image`."""
    prepare = functools.partial(_inpainting, condition)
    needs = ("image", "mask_image")
    return Task("inpainting", words, needs, prepare, ("prompt", "image", "mask_image"))


_WORDS: Mapping[str, Any] = {
    **PROMPTS,
    **STEPS,
    **GUIDANCE,
    "latents": None,
    "clip_skip": None,
    "image": None,
}
IMAGE_TO_IMAGE = image_to_image({**_WORDS, "strength": 0.8})
INPAINTING = inpainting({**_WORDS, **SIZE, "strength": 1.0, "mask_image": None})
REPAINT = Task(
    "inpainting",
    {
        **STEPS,
        "num_inference_steps": 250,
        "jump_length": 10,
        "jump_n_sample": 10,
        "latents": None,
        "image": None,
        "mask_image": None,
    },
    ("image", "mask_image"),
    _repaint,
    ("image", "mask_image"),
)
