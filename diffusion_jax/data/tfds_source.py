"""Prepared array_record sets of TFDS as random-access sources, decoded without TensorFlow."""

import io
from typing import Any

import numpy as np

from diffusion_jax.data.decode import decode_image
from diffusion_jax.data.originals import ORIGINALS
from diffusion_jax.data.prepare import data_folder
from diffusion_jax.data.transforms import resize_and_crop, to_float


def open_prepared(name: str, data_dir: str | None = None) -> Any:
    """The TFDS builder of a prepared set, read from its files alone.

    Args:
      name: "mnist", "mnist:1.0.0" or "set/config:version".
      data_dir: folder of prepared sets; None for TFDS's default.

    Raises:
      ValueError: if it is not prepared, not as array_record, or has no image feature.
    """
    from tensorflow_datasets.core import read_only_builder, registered

    folder = data_folder(data_dir)
    if name.split(":")[0] in ORIGINALS:
        prepare = f"prepare it with: diffusion-jax data prepare {name} --data-dir {folder}"
    else:
        prepare = "prepare it with its TFDS builder and file_format='array_record'"
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=str(folder))
    except registered.DatasetNotFoundError as error:
        raise ValueError(f"the data set {name!r} is not in {str(folder)!r}; {prepare}") from error
    file_format = getattr(builder.info.file_format, "value", None)
    if file_format != "array_record":
        raise ValueError(
            f"the data set {name!r} in {str(folder)!r} is stored as {file_format}, which needs "
            f"TensorFlow or ignores sub-splits; expected array_record: {prepare}"
        )
    if "image" not in builder.info.features:
        raise ValueError(
            f"the data set {name!r} has no feature 'image', but {list(builder.info.features)}"
        )
    return builder


def num_classes(builder: Any) -> int | None:
    """The number of classes of a set, None if it has no class label."""
    features = builder.info.features
    return getattr(features["label"], "num_classes", None) if "label" in features else None


class EncodedSource:
    """Random access to a split: image [H, W, C] uint8 as stored, label and caption if there are."""

    def __init__(self, builder: Any, split: str, channels: int):
        import tensorflow_datasets as tfds

        self._name = f"{builder.info.full_name}, split {split!r}"
        self._channels = channels
        self._has_label = num_classes(builder) is not None
        features = builder.info.features
        text = tfds.features.Text
        self._has_caption = "caption" in features and isinstance(features["caption"], text)
        # Decoded here rather than by TFDS, which would ask for OpenCV and not name a bad record.
        skip = {"image": tfds.decode.SkipDecoding()}
        self._records = builder.as_data_source(split, decoders=skip)

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"EncodedSource({self._name}, {len(self)} examples)"

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        name = f"record {index} of {self._name}"
        image = decode_image(io.BytesIO(record["image"]), self._channels, name=name)
        example: dict[str, Any] = {"image": image}
        if self._has_label:
            example["label"] = np.int32(record["label"])
        if self._has_caption:
            example["caption"] = _text(record["caption"], name)
        return example


def _text(value: Any, name: str) -> str:
    try:
        value = value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise ValueError(f"the caption of {name} must be UTF-8 text ({error})") from error
    if not isinstance(value, str):
        raise ValueError(f"the caption of {name} is no text but {type(value).__name__}: {value!r}")
    return value


class SquareSource:
    """Another source's uint8 images as [S, S, C] float32 in [-1, 1]."""

    def __init__(self, source: Any, image_size: int):
        self._source, self._image_size = source, image_size

    def __len__(self) -> int:
        return len(self._source)

    def __repr__(self) -> str:
        return f"SquareSource({self._source!r}, {self._image_size})"

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        example = self._source[index]
        return {**example, "image": to_float(resize_and_crop(example["image"], self._image_size))}
