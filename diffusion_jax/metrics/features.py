"""What a metric is measured on: feature functions, and the declaration of what they are."""

from typing import NamedTuple, Protocol

import numpy as np

from diffusion_jax.core.types import Array

POOL, SPATIAL = "inception-pool3", "inception-mixed6-spatial"
# Variants that have the weights which the name FID stands for.
_FID_VARIANTS = ("tf-2015", "pytorch-fid")


class Feature(NamedTuple):
    """Which numbers an image became. Distances compare equal declarations only.

    Attributes:
      name: "pixels", "inception-pool3", or a name of your own with its version.
      variant: weights and implementation: "tf-2015"; "none" without weights.
      resize: filter that brought the image to the network's size; "none" without.
    """

    name: str
    variant: str = "none"
    resize: str = "none"

    def __str__(self) -> str:
        return self.name if self.variant == "none" else f"{self.name} ({self.variant})"

    @property
    def frechet_label(self) -> str:
        """What a Fréchet distance over this feature is called.

        "FID" over Inception's pool3 with the weights of 2015 and "sFID" over its spatial
        features; everything else is a "Fréchet distance over …".
        """
        if self.variant in _FID_VARIANTS and self.name in (POOL, SPATIAL):
            return "FID" if self.name == POOL else "sFID"
        return f"Fréchet distance over {self}"


class FeatureFn(Protocol):
    """A function from images to features that says which features they are."""

    @property
    def feature(self) -> Feature: ...

    def __call__(self, images: Array) -> Array:
        """images [B, H, W, C] in [-1, 1] -> features [B, D]."""
        ...


class Pixels:
    """The pixels themselves as features, [B, H, W, C] -> [B, H W C]."""

    feature = Feature("pixels")

    def __call__(self, images: Array) -> Array:
        """images [B, H, W, C] in [-1, 1] -> [B, H W C]."""
        if np.ndim(images) != 4:
            raise ValueError(f"images must be [B, H, W, C], got {np.shape(images)}")
        return images.reshape(len(images), -1)
