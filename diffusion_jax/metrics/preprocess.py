"""From images in [-1, 1] to what a feature network was fed with: 8 bits, another size."""

import functools
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.types import Array

Rounding = Literal["nearest", "truncate", "none"]
Resize = Literal["bilinear", "bilinear-corner"]


def to_byte_range(images: Array, rounding: Rounding) -> Array:
    """Images [...] in [-1, 1] as values in [0, 255], as floats.

    b = 127.5 (x + 1), clipped to [0, 255] and then rounded: "nearest" is what saving a picture
    does, "truncate" what guided-diffusion's sampling does, "none" leaves b as it is. Truncated
    pictures are 0.5 of 255 darker on average, which a Fréchet distance notices.

    Args:
      images: [...] floats.
      rounding: "nearest" (halves go up), "truncate" or "none".

    Raises:
      ValueError: if `rounding` is none of these or the images are no floats.
    """
    if rounding not in get_args(Rounding):
        raise ValueError(f"rounding must be one of {get_args(Rounding)}, got {rounding!r}")
    if not jnp.issubdtype(jnp.result_type(images), jnp.floating):
        raise ValueError(f"images must be floats in [-1, 1], got {jnp.result_type(images)}")
    values = jnp.clip((images + 1.0) * 127.5, 0.0, 255.0)
    if rounding == "none":
        return values
    return jnp.floor(values + 0.5 if rounding == "nearest" else values)


@functools.lru_cache(maxsize=16)
def resize_matrix(size: int, target: int, *, method: Resize) -> np.ndarray:
    """Bilinear resizing of one axis as a matrix [target, size]; nothing is smoothed before.

    Output pixel i reads the input at (i + ½) size / target - ½ ("bilinear", PyTorch's with
    align_corners=False) or at i size / target ("bilinear-corner", TensorFlow 1's, which shifts
    the picture by part of a pixel), between the two neighbours, beyond the border the last.

    Args:
      size: pixels of the input, at least 1.
      target: pixels of the output, at least 1.
      method: "bilinear" or "bilinear-corner".

    Raises:
      ValueError: if a size is below 1 or the method is another.
    """
    if size < 1 or target < 1:
        raise ValueError(f"sizes must be at least 1, got {size} and {target}")
    if method not in get_args(Resize):
        raise ValueError(f"method must be one of {get_args(Resize)}, got {method!r}")
    index = np.arange(target)
    offset = 0.5 if method == "bilinear" else 0.0
    position = np.clip((index + offset) * (size / target) - offset, 0.0, size - 1.0)
    left = np.minimum(np.floor(position).astype(int), max(size - 2, 0))
    right = np.minimum(left + 1, size - 1)
    matrix = np.zeros((target, size))
    np.add.at(matrix, (index, left), 1.0 - (position - left))
    np.add.at(matrix, (index, right), position - left)
    matrix = matrix.astype(np.float32)
    matrix.setflags(write=False)
    return matrix
