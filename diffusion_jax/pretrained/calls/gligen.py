"""Calls of GLIGEN: a text, and boxes with texts and images of their own."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_jax.core.types import Batch
from diffusion_jax.data.tokenizers import check_prompts
from diffusion_jax.guidance import Chain, GroundedUntil, Unguided
from diffusion_jax.pretrained.calls.base import (
    PROMPTS,
    STEPS,
    Job,
    Task,
    control_of,
    guidance_of,
    number,
    texts_of,
)
from diffusion_jax.pretrained.calls.images import (
    centered,
    clip_pixels,
    for_each_image,
    images_of,
    is_pil,
)
from diffusion_jax.pretrained.calls.stable_diffusion import (
    SIZE,
    denoise_phase,
    encode_texts,
    noise_of,
    size_of,
)
from diffusion_jax.pretrained.networks import Loaded
from diffusion_jax.samplers import KDPM2, PNDM, DPMSolverSDE, Heun, HeunChurn, KDPM2Ancestral
from diffusion_jax.systems.gligen import (
    DenoiseInBoxes,
    EncodeBoxImages,
    EncodeBoxTexts,
    OutsideChannels,
)
from diffusion_jax.systems.latent_diffusion import DecodeLatents, Denoise2D, EncodeImage
from diffusion_jax.systems.phases import Control

# Boxes that there is room for, as in training; unused ones hold the null token.
SLOTS = 30
GATES = ("paper", "always")


def _boxes(words: Mapping[str, Any]) -> np.ndarray:
    """The boxes [N, 4].

    Raises:
      ValueError: if there are too many, or one is no box.
    """
    try:
        boxes = np.asarray(words["gligen_boxes"], np.float64)
    except (TypeError, ValueError):
        boxes = np.zeros(0)
    if boxes.ndim != 2 or boxes.shape[1:] != (4,) or not 1 <= len(boxes) <= SLOTS:
        raise ValueError(
            f"gligen_boxes must be 1 to {SLOTS} boxes [left, top, right, bottom] in [0, 1], got "
            f"{words['gligen_boxes']!r}"
        )
    ordered = (boxes[:, :2] <= boxes[:, 2:]).all()
    if not (ordered and boxes.min() >= 0.0 and boxes.max() <= 1.0):
        raise ValueError(
            "gligen_boxes must be [left, top, right, bottom] in [0, 1] with left <= right and "
            f"top <= bottom, got {boxes.tolist()}"
        )
    return boxes


def _slots(values: np.ndarray) -> np.ndarray:
    """Values [N, …] with zeros behind them, [SLOTS, …]."""
    return np.concatenate(
        [values, np.zeros((SLOTS - len(values), *values.shape[1:]), values.dtype)]
    )


def _one_each(values: Any, name: str, count: int) -> list[Any]:
    if not isinstance(values, list | tuple) or len(values) != count:
        got = (
            f"{len(values)} entries" if isinstance(values, list | tuple) else type(values).__name__
        )
        raise ValueError(
            f"{name} must be a list with one entry for each of {count} boxes, got {got}"
        )
    return list(values)


def _texts(pipeline: Any, phrases: Sequence[str | None], words: Mapping[str, Any]) -> Batch:
    """Integers of the phrases, one for each slot; None and free slots hold the empty text."""
    texts = check_prompts(["" if phrase is None else phrase for phrase in phrases])
    texts += ("",) * (SLOTS - len(texts))
    found = pipeline["tokenizer"](list(texts), on_long_prompt=words["on_long_prompt"])
    return {"box_ids": found.ids, "box_ids_mask": found.mask}


def _chosen(mask: Any, name: str, count: int) -> np.ndarray:
    """A mask over boxes [N] of ones and zeros; a number stands for all of them."""
    listed = [mask] * count if isinstance(mask, int) else _one_each(mask, name, count)
    if any(each not in (0, 1) for each in listed):
        raise ValueError(f"{name} must hold zeros and ones, got {mask!r}")
    return np.asarray(listed, np.float32)


def _text_boxes(pipeline: Any, words: Mapping[str, Any], count: int) -> Batch:
    phrases = _one_each(words["gligen_phrases"], "gligen_phrases", count)
    return _texts(pipeline, check_prompts(phrases), words)


def _text_image_boxes(pipeline: Any, words: Mapping[str, Any], count: int) -> Batch:
    batch: dict[str, Any] = {}
    given: dict[str, list[Any]] = {}
    for kind, name in (("text", "phrases"), ("image", "images")):
        value, mask = words[f"gligen_{name}"], words[f"input_{name}_mask"]
        given[kind] = [None] * count if value is None else _one_each(value, f"gligen_{name}", count)
        there = np.asarray([each is not None for each in given[kind]], np.float32)
        if mask is not None:
            there *= _chosen(mask, f"input_{name}_mask", count)
        batch[f"box_{kind}_mask"] = _slots(there)
    if words["gligen_phrases"] is None and words["gligen_images"] is None:
        raise ValueError("boxes need gligen_phrases, gligen_images or both")
    batch |= _texts(pipeline, given["text"], words)
    if words["gligen_images"] is None:
        width = pipeline["unet"].config.grounding.feature_dim
        return {**batch, "box_image": np.zeros((SLOTS, width), np.float32)}
    size = pipeline["image_encoder"].config.image_size
    blank = np.zeros((size, size, 3), np.float32)
    pixels = [
        blank if each is None else clip_pixels(each, "gligen_images", size)
        for each in given["image"]
    ]
    # The encoder compiles for 1, 2, 4, 8, 16 and 30 images; blank ones belong to free slots.
    pixels += [blank] * (min(SLOTS, 1 << (count - 1).bit_length()) - count)
    norm = np.float32(number(words, "gligen_normalize_constant"))
    return {**batch, "box_pixels": np.stack(pixels), "box_norm": norm}


def _called_times(control: Control) -> np.ndarray:
    """The times at which diffusers' schedulers call the network, in order."""
    times = np.asarray(control.grid.levels.t)[: int(control.grid.stop)]
    if isinstance(control.sampler, PNDM) and not control.sampler.runge_kutta_start:
        return np.insert(times, 1, times[1])
    if isinstance(control.sampler, Heun | HeunChurn):
        return np.repeat(times, 2)[1:]
    if isinstance(control.sampler, KDPM2 | KDPM2Ancestral | DPMSolverSDE):
        middle = np.asarray(control.grid.middle.t)[: len(times)]
        return np.stack([times, middle], axis=1).ravel()[:-1]
    return times


def _gate(control: Control, words: Mapping[str, Any]) -> GroundedUntil:
    """Grounded for the first int(beta · calls) calls of the network, as diffusers has it.

    Calls are told apart by their times: two at one time are grounded both or not at all.
    """
    beta = number(words, "gligen_scheduled_sampling_beta", 0.0, 1.0)
    times = _called_times(control)
    count = int(beta * len(times))
    if count == 0:
        return GroundedUntil(np.inf)
    if count == len(times):
        return GroundedUntil(-np.inf)
    return GroundedUntil(float(times[count - 1] + times[count]) / 2.0)


def _outside(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """1 where no box is, [h, w, 1]."""
    outside = np.ones((*size, 1), np.float32)
    for left, top, right, bottom in boxes:
        rows = slice(int(top * size[0]), int(bottom * size[0]))
        outside[rows, int(left * size[1]) : int(right * size[1])] = 0.0
    return outside


def _inpainted(
    words: Mapping[str, Any], boxes: np.ndarray, vae: Loaded, count: int, size: tuple[int, int]
) -> Batch:
    """The image that is kept outside of the boxes, and where that is.

    Pictures of another size are cut to the shape of the result and resized.

    Raises:
      ValueError: if it is no image, or an array of another size.
    """
    pixels = (size[0] * vae.config.factor, size[1] * vae.config.factor)
    given = words["gligen_inpaint_image"]
    given = list(given) if isinstance(given, list | tuple) else [given]
    given = [
        centered(each, pixels) if is_pil(each) and each.size != pixels[::-1] else each
        for each in given
    ]
    image = images_of(given, "gligen_inpaint_image", size=pixels)
    outside = _outside(boxes, size)
    return {
        "image": for_each_image(image, count, "gligen_inpaint_image"),
        "outside": np.broadcast_to(outside, (count, *outside.shape)),
    }


def _grounded(pipeline: Any, words: Mapping[str, Any]) -> Job:
    unet, vae, scheduler = pipeline["unet"], pipeline["vae"], pipeline["scheduler"]
    with_images = "gligen_images" in words
    guide = guidance_of(words, scheduler)
    texts = texts_of(words, guided=not isinstance(guide, Unguided))
    count, channels = texts.num_images, vae.config.latent_channels
    encoding, batch = encode_texts(pipeline, words, texts)
    size = size_of(words, unet, vae.config.factor)
    boxes = _boxes(words)
    told = (_text_image_boxes if with_images else _text_boxes)(pipeline, words, len(boxes))
    told = {
        **told,
        "boxes": _slots(boxes.astype(np.float32)),
        "box_mask": _slots(np.ones(len(boxes), np.float32)),
    }
    told = {name: np.broadcast_to(value, (count, *np.shape(value))) for name, value in told.items()}
    shape = (*size, channels)
    batch = {**batch, **told, **noise_of(words, count, shape)}
    encoding = (*encoding, EncodeBoxTexts(pipeline["text_encoder"].module))
    if "box_pixels" in batch:
        modules = pipeline["image_encoder"].module, pipeline["image_project"].module
        encoding = (*encoding, EncodeBoxImages(*modules))
    kind: type[Denoise2D] = Denoise2D
    inpaints = words["gligen_inpaint_image"] is not None
    expected = 2 * channels + 1 if inpaints else channels
    if unet.config.in_channels != expected:
        raise ValueError(
            f"{'with' if inpaints else 'without'} a gligen_inpaint_image the network must read "
            f"{expected} channels, this one reads {unet.config.in_channels}"
        )
    if inpaints:
        batch |= _inpainted(words, boxes, vae, count, size)
        encoding = (*encoding, EncodeImage(vae.config, vae.module), OutsideChannels())
        kind = DenoiseInBoxes
    control = control_of(scheduler, words, guide)
    gate = words.get("gligen_gate", "paper")
    if gate not in GATES:
        raise ValueError(f"gligen_gate must be one of {GATES}, got {gate!r}")
    if gate == "paper":
        control = control.replace(guide=Chain((_gate(control, words), guide)))
    phases = (
        *encoding,
        denoise_phase(unet, scheduler, shape, kind=kind),
        DecodeLatents(vae.config, vae.module),
    )
    return Job(phases, batch, {"denoise": control}, count)


_WORDS: Mapping[str, Any] = {
    **PROMPTS,
    **STEPS,
    **SIZE,
    "guidance_scale": 7.5,
    "latents": None,
    "clip_skip": None,
    "gligen_scheduled_sampling_beta": 0.3,
    "gligen_phrases": None,
    "gligen_boxes": None,
    "gligen_inpaint_image": None,
}
TEXT_BOXES = Task("grounded_text_to_image", _WORDS, ("gligen_boxes",), _grounded)
# diffusers leaves the gate on here whatever its gligen_scheduled_sampling_beta; "paper" heeds it.
TEXT_IMAGE_BOXES = Task(
    "grounded_text_to_image",
    {
        **_WORDS,
        "gligen_gate": "always",
        "gligen_images": None,
        "input_phrases_mask": None,
        "input_images_mask": None,
        "gligen_normalize_constant": 28.7,
    },
    ("gligen_boxes",),
    _grounded,
)
