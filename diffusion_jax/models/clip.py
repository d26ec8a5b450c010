"""CLIP: a tower for texts, a tower for images, and the space where both meet."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.core.types import Array
from diffusion_jax.models.blocks import default_init
from diffusion_jax.models.inputs import DType
from diffusion_jax.models.layers import Conv, Dense
from diffusion_jax.models.pre_norm import (
    Encoded,
    PreNormBlock,
    TokenEmbed,
    check_architecture,
    check_tokens,
    layer_norm,
)


def _check_heads(config) -> None:
    if config.width % config.num_heads:
        raise ValueError(
            f"width must be a multiple of num_heads = {config.num_heads}, got {config.width}"
        )
    if config.projection is not None and config.projection < 1:
        raise ValueError(f"projection must be at least 1 or None, got {config.projection}")


@dataclass(frozen=True)
class CLIPTextConfig:
    """A text tower; the default is that of CLIP ViT-B/32.

    Attributes:
      vocab_size: tokens are 0 … vocab_size - 1.
      length: most tokens of a text.
      width: of the tokens; a multiple of num_heads.
      num_layers: blocks of attention and feed-forward network.
      num_heads: heads of the attention.
      mlp_width: width inside of the feed-forward networks.
      activation: "quick_gelu" for OpenAI's weights, "gelu" for OpenCLIP's.
      norm_eps: epsilon of the norms.
      end_id: the token that ends a text, at whose first place the text is pooled. None pools
        at the largest number of a text, which is the end of it unless tokens were added.
      projection: width of the space shared with images; None without a projection to it.

    Raises:
      ValueError: if a number is out of range or the heads do not divide the width.
    """

    vocab_size: int = 49408
    length: int = 77
    width: int = 512
    num_layers: int = 12
    num_heads: int = 8
    mlp_width: int = 2048
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    end_id: int | None = 49407
    projection: int | None = 512

    def __post_init__(self):
        check_architecture(
            self, "vocab_size", "length", "width", "num_layers", "num_heads", "mlp_width"
        )
        _check_heads(self)

    def build(
        self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32
    ) -> "CLIPTextTower":
        """The module, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return CLIPTextTower(self, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))


@dataclass(frozen=True)
class CLIPVisionConfig:
    """An image tower; the default is that of CLIP ViT-B/32.

    Attributes:
      image_size: height and width of the images, in pixels.
      patch_size: side of the square patches, in pixels. What is left of an image beside whole
        patches is not looked at.
      channels: of the images.
      width: of the tokens; a multiple of num_heads.
      num_layers: blocks of attention and feed-forward network.
      num_heads: heads of the attention.
      mlp_width: width inside of the feed-forward networks.
      activation: "quick_gelu" for OpenAI's weights, "gelu" for OpenCLIP's.
      norm_eps: epsilon of the norms.
      projection: width of the space shared with texts; None without a projection to it.

    Raises:
      ValueError: if a number is out of range or the heads do not divide the width.
    """

    image_size: int = 224
    patch_size: int = 32
    channels: int = 3
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    projection: int | None = 512

    def __post_init__(self):
        sizes = ("image_size", "patch_size", "channels")
        check_architecture(self, *sizes, "width", "num_layers", "num_heads", "mlp_width")
        _check_heads(self)
        if self.patch_size > self.image_size:
            raise ValueError(
                f"patch_size must be at most image_size = {self.image_size}, got {self.patch_size}"
            )

    @property
    def num_tokens(self) -> int:
        """Patches of an image, and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    def build(
        self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32
    ) -> "CLIPVisionTower":
        """The module, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return CLIPVisionTower(self, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers; the default is CLIP ViT-B/32.

    Attributes:
      text: the text tower.
      vision: the image tower; its projection is as wide as that of the text tower.

    Raises:
      ValueError: if a tower has no projection, or theirs differ.
    """

    text: CLIPTextConfig = CLIPTextConfig()
    vision: CLIPVisionConfig = CLIPVisionConfig()

    def __post_init__(self):
        widths = (self.text.projection, self.vision.projection)
        if widths[0] is None or widths[0] != widths[1]:
            raise ValueError(
                f"both towers must project to one width, got {widths[0]} for texts and "
                f"{widths[1]} for images"
            )

    def build(self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32) -> "CLIP":
        """The module, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return CLIP(self, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))


# Released towers by name. Their configurations know no end of a text, so that it is the largest
# number; Stable Diffusion 2 has ViT-H/14 without the last block and the projection.
CLIP_TEXT_TOWERS: Mapping[str, CLIPTextConfig] = {
    "vit_b_32": CLIPTextConfig(end_id=None),
    "vit_l_14": CLIPTextConfig(
        width=768, num_heads=12, mlp_width=3072, end_id=None, projection=768
    ),
    "openclip_vit_h_14": CLIPTextConfig(
        width=1024,
        num_layers=24,
        num_heads=16,
        mlp_width=4096,
        activation="gelu",
        end_id=None,
        projection=1024,
    ),
    "openclip_vit_bigg_14": CLIPTextConfig(
        width=1280,
        num_layers=32,
        num_heads=20,
        mlp_width=5120,
        activation="gelu",
        end_id=None,
        projection=1280,
    ),
}
CLIP_VISION_TOWERS: Mapping[str, CLIPVisionConfig] = {
    "vit_b_32": CLIPVisionConfig(),
    "vit_l_14": CLIPVisionConfig(
        patch_size=14, width=1024, num_layers=24, num_heads=16, mlp_width=4096, projection=768
    ),
    "openclip_vit_h_14": CLIPVisionConfig(
        patch_size=14,
        width=1280,
        num_layers=32,
        num_heads=16,
        mlp_width=5120,
        activation="gelu",
        projection=1024,
    ),
    "openclip_vit_bigg_14": CLIPVisionConfig(
        patch_size=14,
        width=1664,
        num_layers=48,
        num_heads=16,
        mlp_width=8192,
        activation="gelu",
        projection=1280,
    ),
}


def _blocks(config, h: Array, mask: Array | None, types: dict) -> tuple[Array, ...]:
    """All hidden states of a tower, [B, N, C] each. Called inside of the tower's `__call__`."""
    hidden = [h]
    for i in range(config.num_layers):
        block = PreNormBlock(
            config.num_heads,
            config.mlp_width,
            config.activation,
            config.norm_eps,
            name=f"block_{i}",
            **types,
        )
        hidden.append(block(hidden[-1], mask))
    return tuple(hidden)


def _project(config, pooled: Array, types: dict) -> Array | None:
    if config.projection is None:
        return None
    init = nn.initializers.normal(config.width**-0.5)
    dense = Dense(config.projection, use_bias=False, kernel_init=init, name="project", **types)
    return dense(pooled)


class CLIPTextTower(nn.Module):
    """Encodes texts; every token sees itself and those before it.

    Attributes:
      config: the architecture.
      dtype: dtype of activations; norms and softmax stay float32.
      param_dtype: dtype of the parameters.

    Source: Radford et al. 2021 (arXiv:2103.00020), section 2.4.
    """

    config: CLIPTextConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Array, mask: Array | None = None, *, skip: int = 0) -> Encoded:
        """Encodes.

        Args:
          ids: [B, N] integers, the numbers of the tokens; N at most `config.length`.
          mask: [B, N] bool, True where a token may be attended to; None for all of them, as
            Stable Diffusion has it. The first token of a text must be one.
          skip: blocks at the end that `last` leaves out, in 0 … num_layers; 1 is the
            penultimate layer, for the final norm as for any other.

        Returns:
          `last` [B, N, C] behind the final norm, `pooled` [B, C] its place where the text ends
          (of the last layer, whatever `skip`), `projected` [B, D] of that.

        Raises:
          ValueError: if a shape, a type or `skip` does not fit.
        """
        config = self.config
        check_tokens(ids, mask, config.length)
        if not 0 <= skip <= config.num_layers:
            raise ValueError(f"skip must lie in 0 … {config.num_layers}, got {skip}")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        length = ids.shape[1]
        init, shape = nn.initializers.normal(0.01), (config.length, config.width)
        position = self.param("position", init, shape, self.param_dtype)
        embed = TokenEmbed(config.vocab_size, config.width, name="token_embed", **types)
        h = embed(ids) + position[None, :length].astype(self.dtype)

        allowed = jnp.tril(jnp.ones((length, length), jnp.bool_))[None, None]
        if mask is not None:
            allowed = allowed & mask[:, None, None, :]
        hidden = _blocks(config, h, allowed, types)

        norm = layer_norm(config.norm_eps, "norm_out", **types)
        normed = norm(hidden[-1])
        pooled = jnp.take_along_axis(normed, self._ends(ids)[:, None, None], axis=1)[:, 0]
        last = normed if skip == 0 else norm(hidden[-1 - skip])
        return Encoded(last, hidden, pooled, _project(config, pooled, types))

    def _ends(self, ids: Array) -> Array:
        """[B]: the place at which each text is pooled."""
        end_id = self.config.end_id
        return jnp.argmax(ids if end_id is None else ids == end_id, axis=1)


class CLIPVisionTower(nn.Module):
    """Encodes images: patches and a class token attend to each other.

    Attributes:
      config: the architecture.
      dtype: dtype of activations; norms and softmax stay float32.
      param_dtype: dtype of the parameters.

    Source: Radford et al. 2021 (arXiv:2103.00020), section 2.4; Dosovitskiy et al. 2021
    (arXiv:2010.11929), section 3.1.
    """

    config: CLIPVisionConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> Encoded:
        """Encodes.

        Args:
          images: [B, image_size, image_size, channels], with the mean and the standard deviation
            that the weights were trained with; for CLIP these are of each colour.

        Returns:
          `last` [B, 1 + P, C], the class token and P patches, row by row, without a final norm;
          `pooled` [B, C] the normed class token; `projected` [B, D] of that.

        Raises:
          ValueError: if the images have another size.
        """
        config = self.config
        size = (config.image_size, config.image_size, config.channels)
        if images.ndim != 4 or images.shape[1:] != size:
            raise ValueError(
                f"images must have shape [B, {', '.join(map(str, size))}], got {images.shape}; "
                "resize them"
            )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        patches = Conv(
            config.width,
            (config.patch_size, config.patch_size),
            strides=config.patch_size,
            padding="VALID",
            use_bias=False,
            kernel_init=default_init,
            name="patch_in",
            **types,
        )(images.astype(self.dtype))
        batch, std = images.shape[0], config.width**-0.5
        patches = patches.reshape(batch, -1, config.width)
        init = nn.initializers.normal(std)
        first = self.param("class_token", init, (config.width,), self.param_dtype)
        first = jnp.broadcast_to(first.astype(self.dtype), (batch, 1, config.width))
        position = self.param("position", init, (config.num_tokens, config.width), self.param_dtype)
        h = jnp.concatenate([first, patches], axis=1) + position.astype(self.dtype)[None]
        h = layer_norm(config.norm_eps, "norm_in", **types)(h)
        hidden = _blocks(config, h, None, types)
        pooled = layer_norm(config.norm_eps, "norm_out", **types)(hidden[-1][:, 0])
        return Encoded(hidden[-1], hidden, pooled, _project(config, pooled, types))


class CLIPMatch(NamedTuple):
    """How well texts describe images.

    Attributes:
      logits: [I, T] float32, for every image and every text.
      text: what the text tower says.
      image: what the image tower says.
    """

    logits: Array
    text: Encoded
    image: Encoded


class CLIP(nn.Module):
    """Both towers and the temperature of their cosine similarity.

    logits = exp(logit_scale) · ⟨v / |v|, u / |u|⟩ for the projections v of images, u of texts.

    Attributes:
      config: the architecture.
      dtype: dtype of activations; norms, softmax and the similarity stay float32.
      param_dtype: dtype of the parameters.

    Source: Radford et al. 2021 (arXiv:2103.00020), figure 3.
    """

    config: CLIPConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def setup(self):
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.text = CLIPTextTower(self.config.text, **types)
        self.vision = CLIPVisionTower(self.config.vision, **types)
        init = nn.initializers.constant(math.log(1.0 / 0.07))
        self.logit_scale = self.param("logit_scale", init, (), self.param_dtype)

    def __call__(self, ids: Array, images: Array, mask: Array | None = None) -> CLIPMatch:
        """Compares every image with every text.

        Args:
          ids: [T, N] integers, as of `CLIPTextTower`.
          images: [I, H, W, C], as of `CLIPVisionTower`.
          mask: [T, N] bool or None, as of `CLIPTextTower`.

        Returns:
          logits [I, T], and what both towers return.
        """
        text, image = self.text(ids, mask), self.vision(images)
        u, v = (_normalize(side.projected) for side in (text, image))
        scale = jnp.exp(self.logit_scale.astype(jnp.float32))
        return CLIPMatch(scale * (v @ u.T), text, image)


def _normalize(x: Array | None) -> Array:
    x = jnp.asarray(x, jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
