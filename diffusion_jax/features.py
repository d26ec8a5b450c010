"""Which features an evaluation compares images by: pixels, or Inception's from a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from jax.sharding import Mesh

from diffusion_jax.core.types import Array
from diffusion_jax.io.mapping import convert
from diffusion_jax.io.tables.inception import INCEPTION_IGNORED, inception_rows
from diffusion_jax.metrics import FeatureFn, InceptionFeatures, Pixels, inception_shapes
from diffusion_jax.training.parallel import make_mesh, replicate, shard_batch

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


class _OverDevices:
    """A feature function whose images are split over every device.

    Batches are filled up to the size of the largest one so far, so that few sizes compile.
    """

    def __init__(self, function: FeatureFn, mesh: Mesh):
        self.feature = function.feature
        self._function, self._mesh, self._size = function, mesh, mesh.size

    def __call__(self, images: Array) -> Array:
        """images [B, H, W, C] in [-1, 1] -> [B, D] on the host."""
        count = len(images)
        self._size = max(self._size, -(-count // self._mesh.size) * self._mesh.size)
        filled = np.resize(np.asarray(images), (self._size, *np.shape(images)[1:]))
        return np.asarray(self._function(shard_batch(self._mesh, filled)))[:count]


@dataclass(frozen=True)
class InceptionConfig:
    """Inception v3's features of RGB images; a Fréchet distance over pool3 is called FID.

    Attributes:
      weights: safetensors file with torchvision's names, see `metrics.InceptionFeatures`.
      variant: what the file holds: "tf-2015" or "pytorch-fid" for the network of 2015, resized
        as TensorFlow or as pytorch-fid does, or "torchvision".
      output: "pool3", or "spatial" for sFID.
    """

    weights: str
    variant: str = "pytorch-fid"
    output: Literal["pool3", "spatial"] = "pool3"

    def build(self) -> FeatureFn:
        """The feature function, over all devices; images are rounded to the nearest of 8 bits.

        Raises:
          ValueError: if the variant is unknown, or the file is no safetensors or not its.
          OSError: if there is no such file.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        expected = inception_shapes(self.variant)
        if not Path(self.weights).exists():
            raise FileNotFoundError(f"there is no file of Inception weights {self.weights!r}")
        try:
            tensors = load_file(self.weights)
        except SafetensorError as error:
            raise ValueError(
                f"{self.weights} is no safetensors file ({error}); a released pickle must be "
                "converted first"
            ) from error
        params = convert(tensors, inception_rows(), expected, ignore=INCEPTION_IGNORED)
        mesh = make_mesh()
        function = InceptionFeatures(replicate(mesh, params), self.variant, self.output)
        return _OverDevices(function, mesh)


FEATURES = {"pixels": PixelFeatures, "inception": InceptionConfig}
FeaturesPart = PixelFeatures | InceptionConfig
