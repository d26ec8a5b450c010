"""Codec: between images and what is diffused."""

from collections.abc import Callable
from typing import NamedTuple

from diffusion_jax.core.types import Array, Key, Params


class Codec(NamedTuple):
    """A pair of maps between images [B, H, W, C] in [-1, 1] and x0.

    Attributes:
      init: key -> parameters, {} if there are none.
      encode: (params, image, keys [B]) -> x0.
      decode: (params, x0) -> image.
    """

    init: Callable[[Key], Params]
    encode: Callable[[Params, Array, Key], Array]
    decode: Callable[[Params, Array], Array]


PIXELS = Codec(
    init=lambda key: {},
    encode=lambda params, image, keys: image,
    decode=lambda params, x0: x0,
)
