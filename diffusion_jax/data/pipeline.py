"""Data configurations, and batches that can be left and taken up again exactly."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from diffusion_jax.core.types import Batch
from diffusion_jax.data import digits, shapes
from diffusion_jax.data.sources import Arrays, Source, check_keys, stack, take
from diffusion_jax.data.transforms import check_images

_FLIPPABLE = frozenset({"image", "label"})


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


class Batches(Iterator[Batch]):
    """Batches of a source, made by `batches`: a `DataIterator` with an exact position."""

    def __init__(self, iterator: Any, identity: Mapping[str, Any]):
        self._iterator, self._identity = iterator, dict(identity)
        self._checked = "image" not in identity["keys"]

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        if not self._checked:
            check_images(batch["image"])
            self._checked = True
        return batch

    def get_state(self) -> dict[str, Any]:
        """The next batch's number, and what it would be a number of."""
        return {"next_batch": self._iterator.get_state()["next_index"], **self._identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position that `get_state` gave, perhaps in another process.

        The number of processes may have changed if the global batch size has not.

        Raises:
          ValueError: names what differs, if the state is from other data or other options.
        """
        expected = {"next_batch", *self._identity}
        if set(state) != expected:
            raise ValueError(f"a data state has the keys {sorted(expected)}, got {sorted(state)}")
        changed = [
            f"{key} was {state[key]!r} and is {value!r}"
            for key, value in self._identity.items()
            if state[key] != value
        ]
        if changed:
            raise ValueError(
                f"cannot resume the data exactly: {'; '.join(changed)}. Use the options of the "
                "run that was saved"
            )
        self._iterator.set_state({"next_index": int(state["next_batch"])})


def _mirror(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    if rng.random() < 0.5:
        return {**example, "image": example["image"][:, ::-1]}
    return example


def _check_counts(
    source: Source, batch_size: int, seed: int, *, process_index: int, process_count: int
) -> None:
    if batch_size < 1 or process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(
            "batch_size and process_count must be at least 1 and process_index below "
            f"process_count, got {batch_size}, {process_count}, {process_index}"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"the seed must lie in 0 … 2³² - 1, got {seed}")
    if len(source) == 0:
        raise ValueError(f"{source!r} has no examples")
    if len(source) < batch_size * process_count:
        raise ValueError(
            f"{source!r} has {len(source)} examples, fewer than one batch of "
            f"{batch_size} x {process_count} processes; lower the batch size"
        )


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    num_epochs: int | None = None,
    flip: bool = False,
    keys: Sequence[str] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
) -> Batches:
    """Shuffled batches without end, or for some epochs.

    The order of all examples is a function of the seed; epochs follow each other without a
    gap, an incomplete last batch is dropped. Batch k of process p holds the examples
    k·B·P + p, k·B·P + p + P, … of that order, so that the union over the processes depends
    on the global batch size B·P alone.

    Args:
      source: random access to examples.
      batch_size: B, examples per batch of this process.
      seed: of order and flips, in 0 … 2³² - 1.
      shuffle: a new order in every epoch; without it the order of the source.
      num_epochs: None for no end.
      flip: mirror each image left-right with probability 1/2; for image and label only.
      keys: what a batch holds; None for everything numeric.
      process_index: p, which of the processes this is.
      process_count: P, the number of processes.
      num_threads: threads that read ahead; 0 reads in the calling thread. Order and content
        do not depend on it.

    Returns:
      An iterator of dicts of numpy arrays [B, ...] with `get_state` and `set_state`.

    Raises:
      ValueError: if the source is empty or smaller than a batch, an option is out of range, or
        what a batch holds cannot be flipped.
    """
    _check_counts(
        source, batch_size, seed, process_index=process_index, process_count=process_count
    )
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs must be at least 1, or None for no end, got {num_epochs}")
    chosen = check_keys(source[0], keys)
    if flip and not getattr(source, "flippable", True):
        raise ValueError(
            f"{source!r} cannot be flipped: what was computed from an image is not that of its "
            "mirror image; make a cache of data.cache.Mirrored(source), which has both, and leave "
            "flip out"
        )
    if flip and not _FLIPPABLE.issuperset(chosen):
        raise ValueError(
            f"flip mirrors only the image, which makes {sorted(set(chosen) - _FLIPPABLE)} wrong; "
            "choose keys=('image', 'label') or leave flip out"
        )
    import grain

    dataset = grain.MapDataset.source(source)
    dataset = dataset.shuffle(seed=seed) if shuffle else dataset
    dataset = dataset.repeat(num_epochs)
    dataset = dataset.random_map(_mirror, seed=seed) if flip else dataset
    whole = len(dataset) // (batch_size * process_count) * batch_size * process_count
    dataset = dataset[process_index:whole:process_count]
    dataset = dataset.batch(
        batch_size, drop_remainder=True, batch_fn=lambda rows: stack(rows, chosen)
    )
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    identity = {
        "examples": len(source),
        "global_batch_size": batch_size * process_count,
        "seed": seed,
        "shuffle": shuffle,
        "flip": flip,
        "keys": list(chosen),
    }
    return Batches(iter(dataset.to_iter_dataset(options)), identity)
