"""TFDS builders of the library: digits, MNIST and CIFAR-10, encoded without TensorFlow."""

import abc
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from diffusion_jax.data import digits, originals


def encode_png(image: np.ndarray) -> bytes:
    """A [H, W, 1] or [H, W, 3] uint8 image as a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


class _Labelled(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Images with a class label; subclasses say of which shape and where from.

    Not registered with TFDS, because its own mnist and cifar10 have these names.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Left out, TFDS looks them up through importlib_resources, which it does not declare.
    code_path = epath.Path(__file__)
    pkg_dir_path = epath.Path(__file__).parent

    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    homepage: str
    about: str

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.about,
            homepage=self.homepage,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=self.shape, encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=list(self.class_names)),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(dl_manager, split) for split in ("train", "test")}

    def _generate_examples(
        self, dl_manager: Any, split: str
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (image, label) in enumerate(self._read(dl_manager, split)):
            yield index, {"image": io.BytesIO(encode_png(image)), "label": int(label)}

    @abc.abstractmethod
    def _read(self, dl_manager: Any, split: str) -> Iterator[tuple[np.ndarray, int]]:
        """Gives (image [H, W, C] uint8, label) of every example of a split."""


class Digits(_Labelled, skip_registration=True):
    """scikit-learn's 8x8 digits; grey values 0 … 16 are stored as round(255 v / 16)."""

    name = "digits"
    shape = (8, 8, 1)
    class_names = tuple("0123456789")
    homepage = "https://archive.ics.uci.edu/dataset/80"
    about = "1,797 handwritten digits of 8x8 pixels, as shipped with scikit-learn."

    def _read(self, dl_manager, split):
        del dl_manager
        pixels, labels = digits.load_pixels(split)
        yield from zip(digits.pixels_to_uint8(pixels), labels, strict=True)


class Mnist(_Labelled, skip_registration=True):
    """MNIST from its four original idx files."""

    name = "mnist"
    shape = (28, 28, 1)
    class_names = tuple("0123456789")
    homepage = "http://yann.lecun.com/exdb/mnist/"
    about = "70,000 handwritten digits of 28x28 pixels."
    MANUAL_DOWNLOAD_INSTRUCTIONS = "the four files named *-ubyte.gz"

    def _read(self, dl_manager, split):
        yield from originals.read_mnist(dl_manager.manual_dir, split)


class Cifar10(_Labelled, skip_registration=True):
    """CIFAR-10 from its original binary archive."""

    name = "cifar10"
    shape = (32, 32, 3)
    class_names = originals.CIFAR10_CLASSES
    homepage = "https://www.cs.toronto.edu/~kriz/cifar.html"
    about = "60,000 colour photographs of 32x32 pixels in 10 classes."
    MANUAL_DOWNLOAD_INSTRUCTIONS = "the file cifar-10-binary.tar.gz"

    def _read(self, dl_manager, split):
        yield from originals.read_cifar10(dl_manager.manual_dir, split)


BUILDERS = {"digits": Digits, "mnist": Mnist, "cifar10": Cifar10}
