"""Calls of models that are told nothing but the time: DDPM, DDIM, PNDM; and of labels: DiT."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.pretrained.calls.base import STEPS, Job, Task, control_of, guidance_of, whole
from diffusion_jax.pretrained.calls.stable_diffusion import denoise_phase, noise_of
from diffusion_jax.systems.latent_diffusion import DecodeLatents
from diffusion_jax.systems.pixel import ToImages


def _size(unet: Any) -> tuple[int, int]:
    size = unet.config.kept["sample_size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _unconditional(pipeline: Any, words: Mapping[str, Any]) -> Job:
    unet, count = pipeline["unet"], whole(words, "batch_size")
    shape = (*_size(unet), unet.config.in_channels)
    draw = denoise_phase(unet, pipeline["scheduler"], shape)
    controls = {"denoise": control_of(pipeline["scheduler"], words)}
    return Job((draw, ToImages()), noise_of(words, count, shape), controls, count)


def labels_of(words: Mapping[str, Any], num_classes: int) -> np.ndarray:
    """The class labels of a call, [B].

    Raises:
      ValueError: if there is none, or one is no class.
    """
    labels = np.atleast_1d(np.asarray(words["class_labels"]))
    integers = labels.ndim == 1 and labels.size and labels.dtype.kind in "iu"
    if not integers or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"class_labels must be whole numbers in [0, {num_classes}), got "
            f"{words['class_labels']!r}"
        )
    return labels.astype(np.int32)


def _label_to_image(pipeline: Any, words: Mapping[str, Any]) -> Job:
    dit, vae, scheduler = pipeline["transformer"], pipeline["vae"], pipeline["scheduler"]
    config = dit.config
    labels = labels_of(words, config.num_classes)
    size = config.network.base_size * config.network.patch_size
    shape = (size, size, config.in_channels)
    # As published, samplers see no learned variance of a DiT.
    doubled = config.network.out_channels == 2 * config.in_channels
    draw = denoise_phase(
        dit,
        scheduler,
        shape,
        component="transformer",
        typed=False,
        learned_variance=None,
        drop_variance=doubled,
    )
    guide = guidance_of(words, scheduler)
    batch = {"label": labels, **noise_of(words, len(labels), shape)}
    controls = {"denoise": control_of(scheduler, words, guide)}
    phases = (draw, DecodeLatents(vae.config, vae.module))
    return Job(phases, batch, controls, len(labels))


_WORDS: Mapping[str, Any] = {**STEPS, "latents": None}
DDPM = Task(
    "unconditional",
    {**_WORDS, "num_inference_steps": 1000, "batch_size": 1},
    (),
    _unconditional,
    ("batch_size",),
)
DDIM = DDPM._replace(
    words={**DDPM.words, "num_inference_steps": 50, "use_clipped_model_output": None}
)
PNDM = DDPM._replace(words={**DDPM.words, "num_inference_steps": 50})
DIT = Task(
    "label_to_image",
    {**_WORDS, "class_labels": None, "guidance_scale": 4.0},
    ("class_labels",),
    _label_to_image,
    ("class_labels",),
)
