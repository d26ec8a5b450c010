"""Which features an evaluation compares images by: pixels, or Inception's from a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import jax

from diffusion_jax.core.types import Array
from diffusion_jax.io.mapping import convert
from diffusion_jax.io.tables.inception import INCEPTION_IGNORED, inception_rows
from diffusion_jax.metrics import FeatureFn, InceptionFeatures, Pixels, inception_shapes

# A covariance over more is not estimated from the numbers of images that there are.
MAX_PIXELS = 4096


class FeatureConfig(Protocol):
    """A choice of features. Implementations are frozen dataclasses."""

    def build(self) -> FeatureFn:
        """The feature function, its weights loaded."""
        ...


class _SmallPixels(Pixels):
    def __call__(self, images: Array) -> Array:
        features = super().__call__(images)
        if features.shape[1] > MAX_PIXELS:
            raise ValueError(
                f"pixel features of {features.shape[1]} values are too many (at most "
                f"{MAX_PIXELS}); choose --evaluation.features inception"
            )
        return features


@dataclass(frozen=True)
class PixelFeatures:
    """The pixels themselves, for images of at most 4096 values."""

    def build(self) -> FeatureFn:
        """The feature function."""
        return _SmallPixels()


@dataclass(frozen=True)
class InceptionConfig:
    """Inception v3's pool3 of RGB images, over which a Fréchet distance is called FID.

    Attributes:
      weights: safetensors file with torchvision's names, see `metrics.InceptionFeatures`.
      variant: what the file holds: "tf-2015" or "pytorch-fid" for the network of 2015, resized
        as TensorFlow or as pytorch-fid does, or "torchvision".
    """

    weights: str
    variant: str = "pytorch-fid"

    def build(self) -> FeatureFn:
        """The feature function.

        Raises:
          ValueError: if the variant is unknown, or the file's tensors are not its.
          OSError: if there is no such file.
        """
        from safetensors.numpy import load_file

        expected = inception_shapes(self.variant)
        if not Path(self.weights).exists():
            raise FileNotFoundError(f"there is no file of Inception weights {self.weights!r}")
        tensors = load_file(self.weights)
        params = convert(tensors, inception_rows(), expected, ignore=INCEPTION_IGNORED)
        return InceptionFeatures(jax.device_put(params), self.variant)


FEATURES = {"pixels": PixelFeatures, "inception": InceptionConfig}
FeaturesPart = PixelFeatures | InceptionConfig
