"""GLIGEN's grounding: boxes with texts and images, keypoints and maps, as grounding tokens."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.conditioners.base import Conditioner
from diffusion_jax.core.condition import Condition, Grounding
from diffusion_jax.core.types import Array, Batch
from diffusion_jax.models.convnext import ConvNeXtConfig
from diffusion_jax.models.grounding import (
    KeypointGroundingConfig,
    MapDownsamplerConfig,
    MapGroundingConfig,
    TextGroundingConfig,
    TextImageGroundingConfig,
)
from diffusion_jax.models.inputs import DType


def _read(batch: Batch, names: Mapping[str, str]) -> dict[str, Array]:
    missing = sorted(name for name in names.values() if name not in batch)
    if missing:
        raise ValueError(f"the batch has no {', '.join(missing)}, only {sorted(batch)}")
    return {argument: jnp.asarray(batch[name]) for argument, name in names.items()}


def _grounding(
    config: Any, names: Mapping[str, str], example: Mapping[str, tuple[int, ...]], dtype: DType
) -> Conditioner:
    """A position network as a conditioner.

    Args:
      config: of the network.
      names: arguments of the network -> names in the batch.
      example: shapes of the arguments, by which parameters are made.
      dtype: of the tokens.
    """
    module = config.build(dtype=dtype)

    def tokens(params, arguments):
        objects = module.apply({"params": params}, **arguments)
        return Condition(grounding=Grounding(objects, jnp.ones(objects.shape[0])))

    def init(key):
        zeros = {name: jnp.zeros(shape) for name, shape in example.items()}
        # Compiled, so that only the parameters are computed.
        return jax.jit(module.init)(key, **zeros)["params"]

    def apply(params, batch, keys):
        del keys
        return tokens(params, _read(batch, names))

    def null(params, batch):
        read = _read(batch, names)
        return tokens(params, {name: jnp.zeros_like(value) for name, value in read.items()})

    return Conditioner(init, apply, null)


def text_boxes(
    *,
    text_dim: int = 768,
    out_dim: int = 768,
    hidden: int = 512,
    num_frequencies: int = 8,
    dtype: DType = jnp.float32,
) -> Conditioner:
    """Makes a token of each box with a text.

    Reads `batch["boxes"]` [B, M, 4] xyxy in [0, 1], `batch["box_mask"]` [B, M] True for boxes
    that are there, and `batch["box_text"]` [B, M, text_dim] features of their texts. The null
    condition has no boxes.

    Args:
      text_dim: width of a text's features.
      out_dim: width of the tokens.
      hidden: width of the MLP's two hidden layers.
      num_frequencies: frequencies of the boxes' features.
      dtype: of the tokens.

    Returns:
      A conditioner that fills `grounding`, objects [B, M, out_dim] with gate 1.

    Raises:
      ValueError: if a number is out of range; at use, if the batch lacks a name or a shape does
        not fit.

    Source: Li et al. 2023 (arXiv:2301.07093), eq. 5.
    """
    config = TextGroundingConfig(text_dim, out_dim, hidden, num_frequencies)
    names = {"boxes": "boxes", "mask": "box_mask", "text": "box_text"}
    example = {"boxes": (1, 1, 4), "mask": (1, 1), "text": (1, 1, config.text_dim)}
    return _grounding(config, names, example, dtype)


def text_image_boxes(
    *,
    feature_dim: int = 768,
    out_dim: int = 768,
    hidden: int = 512,
    num_frequencies: int = 8,
    dtype: DType = jnp.float32,
) -> Conditioner:
    """Makes two tokens of each box with a text, an image or both.

    Reads what `text_boxes` does, `batch["box_image"]` [B, M, feature_dim] features of the boxes'
    images, and `batch["box_text_mask"]` and `batch["box_image_mask"]` [B, M], True for boxes with
    a text and with an image. The null condition has no boxes.

    Args:
      feature_dim: width of the features of a text and of an image.
      out_dim: width of the tokens.
      hidden: width of the MLPs' two hidden layers.
      num_frequencies: frequencies of the boxes' features.
      dtype: of the tokens.

    Returns:
      A conditioner that fills `grounding`, objects [B, 2M, out_dim] with gate 1.

    Raises:
      ValueError: if a number is out of range; at use, if the batch lacks a name or a shape does
        not fit.

    Source: Li et al. 2023 (arXiv:2301.07093), section 4.2.
    """
    config = TextImageGroundingConfig(feature_dim, out_dim, hidden, num_frequencies)
    names = {
        "boxes": "boxes",
        "mask": "box_mask",
        "text": "box_text",
        "text_mask": "box_text_mask",
        "image": "box_image",
        "image_mask": "box_image_mask",
    }
    features, slots = (1, 1, config.feature_dim), (1, 1)
    example = {
        "boxes": (1, 1, 4),
        "mask": slots,
        "text": features,
        "text_mask": slots,
        "image": features,
        "image_mask": slots,
    }
    return _grounding(config, names, example, dtype)


def keypoints(
    *,
    max_persons: int = 8,
    num_keypoints: int = 17,
    out_dim: int = 768,
    hidden: int = 512,
    num_frequencies: int = 8,
    dtype: DType = jnp.float32,
) -> Conditioner:
    """Makes a token of each keypoint of each person.

    Reads `batch["keypoints"]` [B, max_persons · num_keypoints, 2] xy in [0, 1], person by person,
    and `batch["keypoint_mask"]` [B, max_persons · num_keypoints], True for visible points. The
    null condition has none.

    Args:
      max_persons: number of persons that there is room for.
      num_keypoints: keypoints of a person, 17 in COCO.
      out_dim: width of the tokens.
      hidden: width of the MLP's two hidden layers.
      num_frequencies: frequencies of the points' features.
      dtype: of the tokens.

    Returns:
      A conditioner that fills `grounding`, objects [B, max_persons · num_keypoints, out_dim] with
      gate 1.

    Raises:
      ValueError: if a number is out of range; at use, if the batch lacks a name or a shape does
        not fit.

    Source: Li et al. 2023 (arXiv:2301.07093), section 4.2, keypoints.
    """
    config = KeypointGroundingConfig(max_persons, num_keypoints, out_dim, hidden, num_frequencies)
    slots = (1, config.max_persons * config.num_keypoints)
    names = {"points": "keypoints", "mask": "keypoint_mask"}
    return _grounding(config, names, {"points": (*slots, 2), "mask": slots}, dtype)


def map_tokens(
    *,
    size: int = 448,
    num_classes: int | None = None,
    out_dim: int = 768,
    hidden: int = 512,
    encoder: ConvNeXtConfig = ConvNeXtConfig(),
    name: str = "map",
    dtype: DType = jnp.float32,
) -> Conditioner:
    """Makes tokens of a map: of edges, depths, normals or a segmentation.

    Reads `batch[name]` [B, H, W, C], images in [-1, 1] or a one-hot segmentation, and
    `batch[name + "_mask"]` [B], True where there is a map. The null condition has none.

    Args:
      size: side of the square that maps are resized to, a multiple of the encoder's stride.
      num_classes: channels of a one-hot segmentation; None for maps that are images.
      out_dim: width of the tokens.
      hidden: width of the MLP's two hidden layers.
      encoder: the network that makes the tokens of the map.
      name: of the map in the batch.
      dtype: of the tokens.

    Returns:
      A conditioner that fills `grounding`, objects [B, num_tokens, out_dim] with gate 1.

    Raises:
      ValueError: if a number is out of range; at use, if the batch lacks a name or a shape does
        not fit.

    Source: Li et al. 2023 (arXiv:2301.07093), section 4.2, spatially-aligned conditions.
    """
    config = MapGroundingConfig(size, num_classes, out_dim, hidden, encoder)
    names = {"map": name, "mask": f"{name}_mask"}
    shape = (1, config.size, config.size, config.num_classes or 3)
    return _grounding(config, names, {"map": shape, "mask": (1,)}, dtype)


def map_channels(
    *,
    size: int = 256,
    in_channels: int = 1,
    hidden: int | None = 4,
    out_channels: int = 8,
    resize: str = "bicubic",
    name: str = "map",
    dtype: DType = jnp.float32,
) -> Conditioner:
    """Makes channels of the network's input of a map, beside its tokens.

    Reads `batch[name]` [B, H, W, C], images in [-1, 1] or a one-hot segmentation. The null
    condition has the same channels: guidance is towards the tokens alone.

    Args:
      size: side of the square that maps are resized to, four times the side of x; that of x
        without convolutions.
      in_channels: channels of a map; with 1, only the first of its channels is read.
      hidden: channels between the two convolutions; None for no convolutions.
      out_channels: channels of the result; without convolutions, in_channels.
      resize: "bicubic" or "nearest".
      name: of the map in the batch.
      dtype: of the channels.

    Returns:
      A conditioner that fills `image` [B, size / 4, size / 4, out_channels].

    Raises:
      ValueError: if an option is out of range; at use, if the batch lacks the map or it is no
        image of in_channels.

    Source: Li et al. 2023 (arXiv:2301.07093), released code, grounding downsamplers.
    """
    config = MapDownsamplerConfig(size, in_channels, hidden, out_channels, resize)
    module = config.build(dtype=dtype)

    def init(key):
        zeros = jnp.zeros((1, config.size, config.size, config.in_channels))
        return dict(jax.jit(module.init)(key, zeros).get("params", {}))

    def apply(params, batch, keys=None):
        del keys
        [value] = _read(batch, {"map": name}).values()
        return Condition(image=module.apply({"params": params}, value))

    return Conditioner(init, apply, apply)
