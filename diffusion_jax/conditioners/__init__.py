"""Conditioners: from a batch to the routes into the network."""

from diffusion_jax.conditioners.base import UNCONDITIONAL, Conditioner, combine, with_dropout
from diffusion_jax.conditioners.grounding import (
    keypoints,
    map_channels,
    map_tokens,
    text_boxes,
    text_image_boxes,
)
from diffusion_jax.conditioners.label import label

CONDITIONERS = {
    "keypoints": keypoints,
    "label": label,
    "map_channels": map_channels,
    "map_tokens": map_tokens,
    "text_boxes": text_boxes,
    "text_image_boxes": text_image_boxes,
}

__all__ = [
    "CONDITIONERS",
    "UNCONDITIONAL",
    "Conditioner",
    "combine",
    "keypoints",
    "label",
    "map_channels",
    "map_tokens",
    "text_boxes",
    "text_image_boxes",
    "with_dropout",
]
