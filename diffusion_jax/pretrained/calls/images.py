"""Pictures of a call as arrays: PIL images, files' arrays, and arrays of floats."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion_jax.core.types import Array


def _listed(value: Any, name: str) -> list[Any]:
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError(f"{name} must hold at least one picture, got none")
        return list(value)
    if getattr(value, "ndim", 3) == 4:
        return list(value)
    return [value]


def is_pil(value: Any) -> bool:
    """Whether a value is a picture of PIL, which is not imported for it."""
    return hasattr(value, "convert") and hasattr(value, "resize") and hasattr(value, "mode")


def _array(value: Any, name: str, mode: str, size: tuple[int, int] | None, filter: str) -> Any:
    """One picture [H, W, C]: uint8, or float as it was given."""
    if is_pil(value):
        from PIL import Image

        picture = value.convert(mode)
        if size is not None and picture.size != size[::-1]:
            picture = picture.resize(size[::-1], Image.Resampling[filter.upper()])
        array = np.asarray(picture)
        return array[..., None] if array.ndim == 2 else array
    array = np.asarray(value)
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.dtype.kind not in "uf":
        raise ValueError(
            f"{name} must be a picture of PIL or an array [H, W, C] of uint8 or floats, got "
            f"{array.dtype} of shape {array.shape}"
        )
    if array.dtype.kind == "u" and array.dtype != np.uint8:
        raise ValueError(f"{name} has {array.dtype} numbers; scale it to floats in [0, 1]")
    if size is not None and array.shape[:2] != tuple(size):
        raise ValueError(f"{name} must be {size[0]} x {size[1]} pixels, got {array.shape[:2]}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds numbers that are not finite")
    return array


def images_of(
    value: Any,
    name: str,
    *,
    size: tuple[int, int] | None = None,
    multiple: int = 1,
    filter: str = "lanczos",
    signed: bool = False,
) -> Array:
    """Pictures of a call, [B, H, W, 3] float32 in [-1, 1].

    Args:
      value: a picture or a list of them: of PIL, or arrays [H, W, C] or [B, H, W, C], uint8 or
        floats in [0, 1].
      name: of the word, for errors.
      size: height and width that PIL's pictures are resized to, and that arrays must have.
      multiple: without a size, of what number PIL's pictures are resized to multiples of, down.
      filter: how, a name in PIL's Resampling.
      signed: floats lie in [-1, 1] instead.

    Raises:
      ValueError: if there is none, one is no picture, floats are out of range or sizes differ.
    """
    found = []
    for each in _listed(value, name):
        own = size_for(each, multiple) if size is None else size
        array = _array(each, name, "RGB", own, filter)
        if array.dtype == np.uint8:
            array = array.astype(np.float32) / 127.5 - 1.0
        else:
            low = -1.0 if signed else 0.0
            if array.size and not (array.min() >= low - 1e-3 and array.max() <= 1.0 + 1e-3):
                raise ValueError(
                    f"{name} must lie in [{low:g}, 1], got {array.min():g} … {array.max():g}"
                )
            array = array.astype(np.float32) if signed else 2.0 * array.astype(np.float32) - 1.0
        found.append(array)
    return stacked(found, name)


def stacked(arrays: Sequence[np.ndarray], name: str) -> np.ndarray:
    """Arrays [H, W, C] as one [B, H, W, C].

    Raises:
      ValueError: if their shapes differ.
    """
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        raise ValueError(f"{name} must hold pictures of one size, got {shapes}")
    return np.stack(arrays)


def for_each_image(array: Array, count: int, name: str) -> Array:
    """An array [B, …] for `count` images: one for each, or one, or one for each of several.

    Raises:
      ValueError: if the number does not divide `count`.
    """
    if count % len(array):
        raise ValueError(
            f"{name} must be one, or one for each prompt, got {len(array)} for {count}"
        )
    return np.repeat(np.asarray(array), count // len(array), axis=0)


def masks_of(value: Any, name: str, *, size: tuple[int, int] | None = None) -> np.ndarray:
    """Masks of a call, [B, H, W, 1] float32 of zeros and ones: 1 where a pixel is at least half.

    Args:
      value: a mask or a list of them: pictures of PIL, or arrays [H, W], [H, W, 1] or
        [B, H, W, 1], bool, uint8 or floats in [0, 1].
      name: of the word, for errors.
      size: height and width that PIL's pictures are resized to, and that arrays must have.

    Raises:
      ValueError: if there is none, one is no mask, floats are out of range or sizes differ.
    """
    found = []
    for each in _listed(value, name):
        if not is_pil(each) and np.asarray(each).dtype == bool:
            each = np.asarray(each).astype(np.float32)
        array = _array(each, name, "L", size, "lanczos")
        if array.shape[-1] != 1:
            raise ValueError(f"{name} must have one channel, got {array.shape}")
        if array.dtype == np.uint8:
            array = array.astype(np.float32) / 255.0
        elif array.size and not (array.min() >= 0.0 and array.max() <= 1.0):
            raise ValueError(f"{name} must lie in [0, 1], got {array.min():g} … {array.max():g}")
        found.append((array >= 0.5).astype(np.float32))
    return stacked(found, name)


def size_for(value: Any, multiple: int) -> tuple[int, int] | None:
    """Height and width that pictures of PIL are resized to, multiples of a number; None for arrays.

    Raises:
      ValueError: if the first picture is smaller than that.
    """
    first = _listed(value, "image")[0]
    if not is_pil(first):
        return None
    width, height = (side - side % multiple for side in first.size)
    if not width or not height:
        raise ValueError(f"image must have at least {multiple} x {multiple} pixels")
    return height, width


# Of every colour, what CLIP's image towers were trained with.
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def centered(picture: Any, size: tuple[int, int]) -> Any:
    """The middle of a picture of PIL, as large as fits, resized to a height and width."""
    from PIL import Image

    scale = min(picture.width / size[1], picture.height / size[0])
    width, height = round(size[1] * scale), round(size[0] * scale)
    left, top = (picture.width - width) / 2, (picture.height - height) / 2
    middle = picture.crop((left, top, left + width, top + height))
    return middle.resize(size[::-1], Image.Resampling.LANCZOS)


def clip_pixels(value: Any, name: str, size: int) -> np.ndarray:
    """A picture as CLIP's image tower reads it, [size, size, 3] float32.

    The shorter side is resized to `size` (bicubic), the middle is cut out, and colours are
    normalised.

    Args:
      value: a picture of PIL, or an array [H, W, 3], uint8 or floats in [0, 1].
      name: of the word, for errors.
      size: height and width.

    Raises:
      ValueError: if it is no picture.

    Source: Radford et al. 2021 (arXiv:2103.00020), released code.
    """
    from PIL import Image

    if not is_pil(value):
        [pixels] = images_of([value], name)
        if pixels.shape[-1] != 3:
            raise ValueError(f"{name} must have three channels, got {pixels.shape}")
        value = Image.fromarray(((pixels + 1.0) * 127.5).round().astype(np.uint8))
    picture = value.convert("RGB")
    shorter = min(picture.size)
    if shorter != size:
        shape = (picture.width * size // shorter, picture.height * size // shorter)
        picture = picture.resize(shape, Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    picture = picture.crop((left, top, left + size, top + size))
    array = np.asarray(picture, np.float32) / 255.0
    mean, std = np.asarray(_CLIP_MEAN, np.float32), np.asarray(_CLIP_STD, np.float32)
    return (array - mean[None, None]) / std[None, None]
