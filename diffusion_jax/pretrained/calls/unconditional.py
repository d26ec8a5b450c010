"""Calls of models that are told nothing but the time: DDPM, DDIM, PNDM; and of labels: DiT."""

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.pretrained.calls.base import STEPS, Job, Task, control_of, guidance_of, whole
from diffusion_jax.pretrained.calls.stable_diffusion import denoise_phase, noise_of
from diffusion_jax.systems.latent_diffusion import DecodeLatents
from diffusion_jax.systems.pixel import ToImages


def _size(unet: Any) -> tuple[int, int]:
    size = unet.config.kept.get("sample_size")
    if size is None:
        raise ValueError("the network's configuration has no sample_size, the size of an image")
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _unconditional(pipeline: Any, words: Mapping[str, Any]) -> Job:
    unet, count = pipeline["unet"], whole(words, "batch_size")
    shape = (*_size(unet), unet.config.in_channels)
    draw = denoise_phase(unet, pipeline["scheduler"], shape)
    controls = {"denoise": control_of(pipeline["scheduler"], words)}
    return Job((draw, ToImages()), noise_of(words, count, shape), controls, count)


def labels_of(words: Mapping[str, Any], num_classes: int, names: Mapping[str, str]) -> np.ndarray:
    """The class labels of a call, [B].

    Args:
      words: with class_labels, numbers or names of classes.
      num_classes: numbers lie below it.
      names: "2" -> "great white shark, white shark", the names of each class.

    Raises:
      ValueError: if there is none, or one is no class.
    """
    labels = np.atleast_1d(np.asarray(words["class_labels"]))
    if labels.dtype.kind == "U":
        known = {each.strip(): int(i) for i, text in names.items() for each in text.split(",")}
        if unknown := sorted(set(labels.ravel().tolist()) - set(known)):
            near = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"class_labels must be numbers or among {len(known)} names of classes, got "
                f"{unknown}{hint}"
            )
        labels = np.asarray([known[each] for each in labels.ravel()])
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
    names = pipeline.options.get("id2label") or {}
    labels = labels_of(words, config.num_classes, names)
    size = config.network.base_size * config.network.patch_size
    shape = (size, size, config.in_channels)
    draw = denoise_phase(dit, scheduler, shape, component="transformer", typed=False)
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
