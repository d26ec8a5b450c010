"""GLIGEN's position networks: from boxes, keypoints and maps to grounding tokens."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.resize import bicubic_resize, nearest_resize
from diffusion_jax.core.types import Array
from diffusion_jax.models.blocks import default_init, zeros_init
from diffusion_jax.models.convnext import ConvNeXt, ConvNeXtConfig
from diffusion_jax.models.inputs import DType, at_least_one
from diffusion_jax.models.layers import Conv, Dense

RESIZE = {"bicubic": bicubic_resize, "nearest": nearest_resize}


def position_features(x: Array, num_frequencies: int = 8) -> Array:
    """Sines and cosines of coordinates at geometrically spaced frequencies, in float32.

    [sin(f_0 x), cos(f_0 x), sin(f_1 x), …] with f_k = 100^(k / num_frequencies), each over all
    coordinates; without a factor 2π.

    Args:
      x: [..., P] coordinates in [0, 1].
      num_frequencies: number of frequencies.

    Returns:
      [..., 2 · num_frequencies · P] float32.

    Source: Li et al. 2023 (arXiv:2301.07093), section 4.1, and the released code; Mildenhall et
    al. 2020 (arXiv:2003.08934), eq. 4.
    """
    frequencies = 100.0 ** (np.arange(num_frequencies) / num_frequencies)
    angles = jnp.asarray(x, jnp.float32)[..., None, :] * frequencies.astype(np.float32).reshape(
        (1,) * (x.ndim - 1) + (-1, 1)
    )
    waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-2)
    return waves.reshape((*x.shape[:-1], 2 * num_frequencies * x.shape[-1]))


@dataclass(frozen=True)
class TextGroundingConfig:
    """Boxes with a text each; the default is that of GLIGEN on Stable Diffusion 1.4.

    Attributes:
      text_dim: width of a text's features.
      out_dim: width of the tokens.
      hidden: width of the MLP's two hidden layers.
      num_frequencies: frequencies of the boxes' features.

    Raises:
      ValueError: if a number is below 1.
    """

    text_dim: int = 768
    out_dim: int = 768
    hidden: int = 512
    num_frequencies: int = 8

    def __post_init__(self):
        at_least_one(self, "text_dim", "out_dim", "hidden", "num_frequencies")

    def build(
        self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32
    ) -> "TextGrounding":
        """The module, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return TextGrounding(
            config=self, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype)
        )


@dataclass(frozen=True)
class TextImageGroundingConfig:
    """Boxes with a text and an image each, of which either may be missing.

    Attributes:
      feature_dim: width of the features of a text and of an image.
      out_dim: width of the tokens.
      hidden: width of the MLPs' two hidden layers.
      num_frequencies: frequencies of the boxes' features.

    Raises:
      ValueError: if a number is below 1.
    """

    feature_dim: int = 768
    out_dim: int = 768
    hidden: int = 512
    num_frequencies: int = 8

    def __post_init__(self):
        at_least_one(self, "feature_dim", "out_dim", "hidden", "num_frequencies")

    def build(
        self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32
    ) -> "TextImageGrounding":
        """The module, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return TextImageGrounding(
            config=self, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype)
        )


@dataclass(frozen=True)
class KeypointGroundingConfig:
    """The keypoints of several persons.

    Attributes:
      max_persons: number of persons that there is room for.
      num_keypoints: keypoints of a person, 17 in COCO.
      out_dim: width of the tokens.
      hidden: width of the MLP's two hidden layers.
      num_frequencies: frequencies of the points' features.

    Raises:
      ValueError: if a number is below 1.
    """

    max_persons: int = 8
    num_keypoints: int = 17
    out_dim: int = 768
    hidden: int = 512
    num_frequencies: int = 8

    def __post_init__(self):
        at_least_one(self, "max_persons", "num_keypoints", "out_dim", "hidden", "num_frequencies")

    def build(
        self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32
    ) -> "KeypointGrounding":
        """The module, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return KeypointGrounding(
            config=self, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype)
        )


@dataclass(frozen=True)
class MapGroundingConfig:
    """A map in the place of the image: edges, depths, normals or a segmentation.

    Attributes:
      size: side of the square that maps are resized to, a multiple of the encoder's stride.
      num_classes: channels of a one-hot segmentation, which a convolution makes an image of;
        None for maps that are images of 3 channels themselves.
      out_dim: width of the tokens.
      hidden: width of the MLP's two hidden layers.
      encoder: the network that makes the tokens of the map.

    Raises:
      ValueError: if a number is below 1 or the size does not fit the encoder.
    """

    size: int = 448
    num_classes: int | None = None
    out_dim: int = 768
    hidden: int = 512
    encoder: ConvNeXtConfig = ConvNeXtConfig()

    def __post_init__(self):
        at_least_one(self, "size", "num_classes", "out_dim", "hidden")
        if self.size % self.encoder.stride:
            raise ValueError(
                f"size must be a multiple of the encoder's stride {self.encoder.stride}, "
                f"got {self.size}"
            )

    @property
    def num_tokens(self) -> int:
        """Grounding tokens of a map, a square number."""
        return (self.size // self.encoder.stride) ** 2

    def build(
        self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32
    ) -> "MapGrounding":
        """The module, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return MapGrounding(config=self, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))


@dataclass(frozen=True)
class MapDownsamplerConfig:
    """Channels for the network's input, of the same map that `MapGroundingConfig` makes tokens of.

    Attributes:
      size: side of the square that maps are resized to; the result's is a quarter of it, rounded
        down, or the same without convolutions.
      in_channels: channels of a map; with 1, only the first of its channels is read.
      hidden: channels between the two convolutions; None for no convolutions.
      out_channels: channels of the result; without convolutions, in_channels.
      resize: "bicubic" or "nearest".

    Raises:
      ValueError: if a value is out of range or two of them contradict each other.
    """

    size: int = 256
    in_channels: int = 1
    hidden: int | None = 4
    out_channels: int = 8
    resize: str = "bicubic"

    def __post_init__(self):
        at_least_one(self, "size", "in_channels", "hidden", "out_channels")
        if self.resize not in RESIZE:
            raise ValueError(f"resize must be one of {sorted(RESIZE)}, got {self.resize!r}")
        if self.hidden is None and self.out_channels != self.in_channels:
            raise ValueError(
                "without convolutions out_channels is in_channels, got "
                f"out_channels = {self.out_channels} and in_channels = {self.in_channels}"
            )
        if self.hidden is not None and self.size < 4:
            raise ValueError(f"size must be at least 4 for two convolutions, got {self.size}")

    def build(
        self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32
    ) -> "MapDownsampler":
        """The module, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return MapDownsampler(self, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))


class _MLP(nn.Module):
    """Two hidden layers with SiLU, from features to tokens."""

    hidden: int
    out_dim: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, M, F] -> [B, M, out_dim]."""
        options = {
            "kernel_init": default_init,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        h = nn.silu(Dense(self.hidden, name="in", **options)(x))
        h = nn.silu(Dense(self.hidden, name="hidden", **options)(h))
        return Dense(self.out_dim, name="out", **options)(h)


class _Grounding(nn.Module):
    """What the position networks have in common.

    Attributes:
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.
    """

    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def or_null(self, name: str, x: Array, mask: Array) -> Array:
        """x [B, M, F] where mask [B, M] is True, elsewhere the learned null vector of this name."""
        null = self.param(name, zeros_init, (x.shape[-1],), self.param_dtype)
        mask = jnp.asarray(mask, self.dtype)[..., None]
        # A slot that nobody reads may hold anything, and 0 · NaN is NaN.
        x = jnp.where(mask == 0.0, 0.0, x.astype(self.dtype))
        return mask * x + (1.0 - mask) * null.astype(self.dtype).reshape((1, 1, -1))

    def mlp(self, name: str, config) -> nn.Module:
        """The MLP from features to tokens."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return _MLP(config.hidden, config.out_dim, name=name, **types)


class TextGrounding(_Grounding):
    """A token for each box: an MLP of its text's features and of its position's.

    MLP([f_text, Fourier(box)]). An unused slot has a learned null vector in the place of both.

    Attributes:
      config: the architecture.
      dtype: dtype of activations; the positions' features are computed in float32.
      param_dtype: dtype of the parameters.

    Source: Li et al. 2023 (arXiv:2301.07093), eq. 5.
    """

    config: TextGroundingConfig = TextGroundingConfig()

    @nn.compact
    def __call__(self, boxes: Array, mask: Array, text: Array) -> Array:
        """Makes the tokens.

        Args:
          boxes: [B, M, 4] xyxy in [0, 1].
          mask: [B, M] True for slots in use; a number between 0 and 1 blends the two.
          text: [B, M, text_dim] features of the boxes' texts.

        Returns:
          [B, M, out_dim] of `dtype`.

        Raises:
          ValueError: if a shape does not fit.
        """
        slots = boxes.shape[:-1]
        _check_shapes(
            boxes=(boxes, (*slots, 4)),
            mask=(mask, slots),
            text=(text, (*slots, self.config.text_dim)),
        )
        position = position_features(boxes, self.config.num_frequencies)
        position = self.or_null("null_position", position, mask)
        text = self.or_null("null_text", text, mask)
        return self.mlp("mlp", self.config)(jnp.concatenate([text, position], axis=-1))


class TextImageGrounding(_Grounding):
    """Two tokens for each box, of its text's and of its image's features.

    [MLP_text([f_text, Fourier(box)]); MLP_image([f_image, Fourier(box)])], with learned null
    vectors in the place of what is missing.

    Attributes:
      config: the architecture.
      dtype: dtype of activations; the positions' features are computed in float32.
      param_dtype: dtype of the parameters.

    Source: Li et al. 2023 (arXiv:2301.07093), section 4.2; both tokens of the released code.
    """

    config: TextImageGroundingConfig = TextImageGroundingConfig()

    @nn.compact
    def __call__(
        self,
        boxes: Array,
        mask: Array,
        text: Array,
        *,
        text_mask: Array,
        image: Array,
        image_mask: Array,
    ) -> Array:
        """Makes the tokens.

        Args:
          boxes: [B, M, 4] xyxy in [0, 1].
          mask: [B, M] True for slots in use.
          text: [B, M, feature_dim] features of the boxes' texts.
          text_mask: [B, M] True for slots with a text.
          image: [B, M, feature_dim] features of the boxes' images.
          image_mask: [B, M] True for slots with an image.

        Returns:
          [B, 2M, out_dim] of `dtype`: the tokens of all texts, then those of all images.

        Raises:
          ValueError: if a shape does not fit.
        """
        slots, features = boxes.shape[:-1], (*boxes.shape[:-1], self.config.feature_dim)
        _check_shapes(
            boxes=(boxes, (*slots, 4)),
            mask=(mask, slots),
            text=(text, features),
            text_mask=(text_mask, slots),
            image=(image, features),
            image_mask=(image_mask, slots),
        )
        position = position_features(boxes, self.config.num_frequencies)
        position = self.or_null("null_position", position, mask)
        text = self.or_null("null_text", text, text_mask)
        image = self.or_null("null_image", image, image_mask)
        tokens = [
            self.mlp("mlp_text", self.config)(jnp.concatenate([text, position], axis=-1)),
            self.mlp("mlp_image", self.config)(jnp.concatenate([image, position], axis=-1)),
        ]
        return jnp.concatenate(tokens, axis=1)


class KeypointGrounding(_Grounding):
    """A token for each keypoint of each person: an MLP of who and what it is, and of where.

    MLP([e_person + e_keypoint, Fourier(point)]). An invisible point has learned null vectors.

    Attributes:
      config: the architecture.
      dtype: dtype of activations; the positions' features are computed in float32.
      param_dtype: dtype of the parameters.

    Source: Li et al. 2023 (arXiv:2301.07093), section 4.2, keypoints; released code.
    """

    config: KeypointGroundingConfig = KeypointGroundingConfig()

    @nn.compact
    def __call__(self, points: Array, mask: Array) -> Array:
        """Makes the tokens.

        Args:
          points: [B, max_persons · num_keypoints, 2] xy in [0, 1], person by person.
          mask: [B, max_persons · num_keypoints] True for visible points.

        Returns:
          [B, max_persons · num_keypoints, out_dim] of `dtype`.

        Raises:
          ValueError: if a shape does not fit.
        """
        config = self.config
        slots = (points.shape[0], config.max_persons * config.num_keypoints)
        _check_shapes(points=(points, (*slots, 2)), mask=(mask, slots))
        shapes = {"person": config.max_persons, "keypoint": config.num_keypoints}
        person, keypoint = (
            self.param(name, zeros_init, (count, config.out_dim), self.param_dtype)
            for name, count in shapes.items()
        )
        who = (person[:, None] + keypoint[None]).reshape((1, slots[1], config.out_dim))
        who = jnp.broadcast_to(who, (*slots, config.out_dim))
        who = self.or_null("null_person", who, mask)
        position = position_features(points, config.num_frequencies)
        position = self.or_null("null_position", position, mask)
        return self.mlp("mlp", config)(jnp.concatenate([who, position], axis=-1))


class MapGrounding(_Grounding):
    """A token for each pixel of the features of a map.

    MLP(ConvNeXt(resize(map)) + position), with a learned null vector in the place of all
    features of an example without a map; the learned positions are added to it as well.

    Attributes:
      config: the architecture.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.

    Source: Li et al. 2023 (arXiv:2301.07093), section 4.2, spatially-aligned conditions; released
    code.
    """

    config: MapGroundingConfig = MapGroundingConfig()

    @nn.compact
    def __call__(self, map: Array, mask: Array) -> Array:
        """Makes the tokens.

        Args:
          map: [B, H, W, C], images in [-1, 1] or a one-hot segmentation. It is resized to a
            square by repeating and leaving out pixels.
          mask: [B] True where there is a map.

        Returns:
          [B, num_tokens, out_dim] of `dtype`, row by row.

        Raises:
          ValueError: if a shape does not fit.
        """
        config, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        channels = config.num_classes or 3
        _check_shapes(map=(map, (*map.shape[:3], channels)), mask=(mask, map.shape[:1]))
        h = nearest_resize(map, config.size, config.size).astype(self.dtype)
        if config.num_classes is not None:
            h = Conv(3, (3, 3), padding=1, kernel_init=default_init, name="conv_in", **types)(h)
        h = ConvNeXt(config.encoder, name="encoder", **types)(h)
        h = h.reshape((h.shape[0], config.num_tokens, h.shape[-1]))
        mask = jnp.broadcast_to(jnp.asarray(mask)[:, None], h.shape[:2])
        h = self.or_null("null_feature", h, mask)
        shape = (1, config.num_tokens, h.shape[-1])
        position = self.param("position", nn.initializers.normal(0.02), shape, self.param_dtype)
        return self.mlp("mlp", config)(h + position.astype(self.dtype))


class MapDownsampler(nn.Module):
    """A map as channels of the network's input: resized, then two convolutions of stride 2.

    Attributes:
      config: the architecture.
      dtype: dtype of activations; the resizing is float32.
      param_dtype: dtype of the parameters.

    Source: Li et al. 2023 (arXiv:2301.07093), released code, grounding downsamplers.
    """

    config: MapDownsamplerConfig = MapDownsamplerConfig()
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, map: Array) -> Array:
        """Makes the channels.

        Args:
          map: [B, H, W, C], images in [-1, 1] or a one-hot segmentation.

        Returns:
          [B, size / 4, size / 4, out_channels] of `dtype`; [B, size, size, in_channels] without
          convolutions.

        Raises:
          ValueError: if map is no image of in_channels.
        """
        config = self.config
        if config.in_channels == 1:
            # Grey maps are stored as colours: their channels say the same.
            map = map[..., :1]
        _check_shapes(map=(map, (*map.shape[:3], config.in_channels)))
        h = RESIZE[config.resize](map, config.size, config.size).astype(self.dtype)
        if config.hidden is None:
            return h
        options = {
            "kernel_size": (4, 4),
            "strides": 2,
            "padding": 1,
            "kernel_init": default_init,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        h = nn.silu(Conv(config.hidden, name="conv_1", **options)(h))
        return Conv(config.out_channels, name="conv_2", **options)(h)


GROUNDINGS = {
    "text": TextGroundingConfig,
    "text_image": TextImageGroundingConfig,
    "keypoint": KeypointGroundingConfig,
    "map": MapGroundingConfig,
}


def _check_shapes(**pairs: tuple[Array, tuple[int, ...]]) -> None:
    """Raises ValueError, naming the argument, unless every array has its shape."""
    for name, (array, shape) in pairs.items():
        if jnp.shape(array) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {jnp.shape(array)}")
