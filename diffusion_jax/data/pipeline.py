"""Data configurations: what `DATASETS` calls by name."""

import dataclasses
from typing import ClassVar

from diffusion_jax.data import digits, shapes
from diffusion_jax.data.sources import Arrays, Source, take


@dataclasses.dataclass(frozen=True)
class Digits:
    """The 1,797 real 8x8 digits of scikit-learn, as a TFDS set that is prepared on first use.

    Attributes:
      split: "train" (1,437 digits) or "test" (360).
      data_dir: folder of prepared sets; None for TFDS's default.
    """

    split: str = "train"
    data_dir: str | None = None

    image_size: ClassVar[int] = 8
    channels: ClassVar[int] = 1
    num_classes: ClassVar[int] = digits.NUM_CLASSES

    def source(self) -> Source:
        """Examples of image [8, 8, 1] with the exact values v / 8 - 1, and label []."""
        from diffusion_jax.data.prepare import prepare
        from diffusion_jax.data.tfds_source import EncodedSource, open_prepared

        if self.split not in digits.SPLITS:
            raise ValueError(f"the split must be one of {digits.SPLITS}, got {self.split!r}")
        prepare("digits", data_dir=self.data_dir)
        encoded = EncodedSource(open_prepared("digits", self.data_dir), self.split, self.channels)
        arrays = take(encoded, len(encoded))
        pixels = digits.uint8_to_pixels(arrays["image"])
        return Arrays({**arrays, "image": digits.pixels_to_float(pixels)})

    def oracle(self) -> digits.Oracle:
        """The judge of generated digits, fitted on real training digits."""
        return digits.fit_oracle()


@dataclasses.dataclass(frozen=True)
class ShapesData:
    """Rendered shapes with captions, boxes, masks and keypoints; see `shapes.Shapes`.

    Attributes:
      split: "train" or "test"; they never share an example.
      image_size: 8, 16, 32 or 64 pixels.
      num_objects: fewest and most objects of a scene, within 1 … 4.
      num_examples: length of the split.
      seed: of the whole set, at least 0.
    """

    split: str = "train"
    image_size: int = 16
    num_objects: tuple[int, int] = (1, 2)
    num_examples: int = 50_000
    seed: int = 0

    channels: ClassVar[int] = 3
    num_classes: ClassVar[int] = shapes.NUM_CLASSES

    def source(self) -> shapes.Shapes:
        """Examples as `Shapes.__getitem__` describes them."""
        if self.split not in ("train", "test"):
            raise ValueError(f"the split must be 'train' or 'test', got {self.split!r}")
        return shapes.Shapes(
            size=self.image_size,
            num_objects=tuple(self.num_objects),
            length=self.num_examples,
            # Even seeds are for training and odd ones for testing.
            seed=2 * self.seed + (self.split == "test"),
        )


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of pictures, subfolders included.

    Attributes:
      path: the folder.
      image_size: the shorter side is scaled to this and the middle is cut out.
      channels: 3 for RGB, 1 for grey.
      captions: whether every picture has a caption, see `folder.find_captions`.
      classes: whether the folders directly below `path` are classes.
    """

    path: str
    image_size: int
    channels: int = 3
    captions: bool = False
    classes: bool = False

    @property
    def num_classes(self) -> int | None:
        """The number of class folders; None if `classes` is off."""
        from diffusion_jax.data.folder import class_names, find_images

        return len(class_names(self.path, find_images(self.path))) if self.classes else None

    def source(self) -> Source:
        """Examples of image [S, S, C]; caption and label [] if asked for."""
        from diffusion_jax.data.folder import FolderSource

        return FolderSource(
            self.path,
            self.image_size,
            channels=self.channels,
            captions=self.captions,
            classes=self.classes,
        )


@dataclasses.dataclass(frozen=True)
class WebDataset:
    """Shards of pictures and captions, as webdataset and img2dataset write them.

    Attributes:
      shards: a pattern of uncompressed tar files, such as "set/*.tar", with KEY.jpg (or another
        suffix of `folder.SUFFIXES`) and KEY.txt, or KEY.json that has a string "caption".
      image_size: the shorter side is scaled to this and the middle is cut out.
      channels: 3 for RGB, 1 for grey.
      captions: whether every picture has a caption.
    """

    shards: str
    image_size: int
    channels: int = 3
    captions: bool = True

    def source(self) -> Source:
        """Examples of image [S, S, C]; caption if asked for."""
        from diffusion_jax.data.webdataset import WebDatasetSource

        return WebDatasetSource(
            self.shards, self.image_size, channels=self.channels, captions=self.captions
        )


@dataclasses.dataclass(frozen=True)
class TFDS:
    """A prepared array_record set of TFDS with an `image`, maybe a class `label` or a `caption`.

    Attributes:
      name: such as "cifar10", "mnist" or "set/config:version".
      image_size: the shorter side is scaled to this and the middle is cut out.
      split: a TFDS split such as "train" or "train[:90%]".
      channels: 3 for RGB, 1 for grey.
      data_dir: folder of prepared sets; None for TFDS's default.
      in_memory: decode everything once and keep it as bytes; CIFAR-10 takes 150 MB. Not for
        captions.
    """

    name: str
    image_size: int
    split: str = "train"
    channels: int = 3
    data_dir: str | None = None
    in_memory: bool = False

    @property
    def num_classes(self) -> int | None:
        """The number of classes; None if the set has no class label."""
        from diffusion_jax.data.tfds_source import num_classes, open_prepared

        return num_classes(open_prepared(self.name, self.data_dir))

    def source(self) -> Source:
        """Examples of image [S, S, C], and label [] and the string caption if there are."""
        from diffusion_jax.data.tfds_source import EncodedSource, SquareSource, open_prepared

        builder = open_prepared(self.name, self.data_dir)
        encoded = EncodedSource(builder, self.split, self.channels)
        if self.in_memory:
            if "caption" in encoded[0]:
                raise ValueError(f"{self.name} has captions, which in_memory does not keep")
            encoded = Arrays(take(encoded, len(encoded)))
        return SquareSource(encoded, self.image_size)


@dataclasses.dataclass(frozen=True)
class Cached:
    """Arrays that were computed before, such as latents and text embeddings.

    Attributes:
      folder: a cache that `cache.precompute` wrote.
    """

    folder: str

    def source(self) -> Source:
        """Examples of the arrays that were computed, floating-point ones as float32."""
        from diffusion_jax.data.cache import CachedSource

        return CachedSource(self.folder)
