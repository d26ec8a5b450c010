"""The tiny autoencoder: a fast approximation of a large one's encoder and decoder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.core.resize import bicubic_resize, bilinear_resize, nearest_resize
from diffusion_jax.core.types import Array
from diffusion_jax.models.autoencoder import check_image
from diffusion_jax.models.blocks import ACTIVATIONS, default_init
from diffusion_jax.models.inputs import DType, at_least_one
from diffusion_jax.models.layers import Conv

# Latents are kept softly inside of ±3 before they are decoded.
LATENT_BOUND = 3.0


UPSAMPLINGS: Mapping[str, Callable[[Array, int, int], Array]] = {
    "nearest": nearest_resize,
    "bilinear": bilinear_resize,
    "bicubic": bicubic_resize,
}


@dataclass(frozen=True)
class AutoencoderTinyConfig:
    """A tiny autoencoder; the default is TAESD. Nothing is normalized and nothing attends.

    Attributes:
      in_channels: channels of the image that is encoded.
      out_channels: channels of the image that is decoded.
      latent_channels: channels of the latents.
      encoder_channels: width of the encoder.
      decoder_channels: width of the decoder.
      encoder_blocks: blocks of each level of the encoder, from fine to coarse; each level halves
        the resolution of the one before.
      decoder_blocks: blocks of each level of the decoder, from coarse to fine.
      act: activation inside of the blocks, a key of `ACTIVATIONS`; their sum with the shortcut
        always goes through a ReLU.
      upsample: how the decoder raises the resolution, a key of `UPSAMPLINGS`.
      upsample_factor: by how much, at each level but the last.
      latent_magnitude: latents in ± this fill [0, 1] in `scale_latents`.
      latent_shift: what a latent of 0 becomes there.
      scaling_factor: the diffusion sees (latents - shift_factor) · scaling_factor; nothing in the
        network reads it.
      shift_factor: see scaling_factor.

    Raises:
      ValueError: if a value is out of range.

    Source: Bohan 2023 (https://github.com/madebyollin/taesd).
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    encoder_channels: int = 64
    decoder_channels: int = 64
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    act: str = "relu"
    upsample: str = "nearest"
    upsample_factor: int = 2
    latent_magnitude: float = 3.0
    latent_shift: float = 0.5
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    def __post_init__(self):
        at_least_one(self, "in_channels", "out_channels", "latent_channels")
        at_least_one(self, "encoder_channels", "decoder_channels", "upsample_factor")
        for name, table in (("act", ACTIVATIONS), ("upsample", UPSAMPLINGS)):
            if getattr(self, name) not in table:
                raise ValueError(
                    f"{name} must be one of {sorted(table)}, got {getattr(self, name)!r}"
                )
        for name in ("encoder_blocks", "decoder_blocks"):
            blocks = getattr(self, name)
            if not isinstance(blocks, tuple) or not blocks or min(blocks) < 0:
                raise ValueError(f"{name} must be a non-empty tuple of counts, got {blocks}")

    @property
    def factor(self) -> int:
        """Pixels of the encoded image, along each side, to one of the latents."""
        return 2 ** (len(self.encoder_blocks) - 1)

    def scale_latents(self, latents: Array) -> Array:
        """Latents as numbers in [0, 1], to be stored as a picture; loses what lies outside."""
        scaled = latents / (2.0 * self.latent_magnitude) + self.latent_shift
        return jnp.clip(scaled, 0.0, 1.0)

    def unscale_latents(self, scaled: Array) -> Array:
        """Undoes `scale_latents`."""
        return (scaled - self.latent_shift) * (2.0 * self.latent_magnitude)

    def build(
        self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32
    ) -> "AutoencoderTiny":
        """The module, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return AutoencoderTiny(self, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))


class TinyHalf(nn.Module):
    """Either half of a tiny autoencoder.

    Attributes:
      config: the whole autoencoder.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.
    """

    config: AutoencoderTinyConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def conv(self, name: str, channels: int, **options) -> nn.Module:
        """A 3x3 convolution with a pixel of padding on every side."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Conv(
            channels, (3, 3), padding=1, kernel_init=default_init, name=name, **types, **options
        )

    def block(self, name: str, h: Array) -> Array:
        """Three convolutions beside the identity, [B, H, W, C] -> [B, H, W, C]."""
        block = TinyBlock(self.config.act, self.dtype, self.param_dtype, name=name)
        return block(h)


class TinyBlock(nn.Module):
    """ReLU of x plus three convolutions with activations between them.

    Attributes:
      act: a key of `ACTIVATIONS`.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.
    """

    act: str = "relu"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, H, W, C] -> [B, H, W, C]."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = {"padding": 1, "kernel_init": default_init, **types}
        h = x
        for i in range(3):
            h = h if i == 0 else ACTIVATIONS[self.act](h)
            h = Conv(x.shape[-1], (3, 3), name=f"conv_{i}", **conv)(h)
        return nn.relu(h + x)


class TinyEncoder(TinyHalf):
    """From pixels to latents."""

    @nn.compact
    def __call__(self, image: Array) -> Array:
        """image: [B, H, W, in_channels] in [-1, 1] -> [B, ⌈H / factor⌉, ⌈W / factor⌉, C]."""
        config, width = self.config, self.config.encoder_channels
        # The published weights read images in [0, 1].
        h = (image.astype(self.dtype) + 1.0) / 2.0
        h = self.conv("conv_in", width)(h)
        for i, count in enumerate(config.encoder_blocks):
            if i > 0:
                h = self.conv(f"down_{i}", width, strides=2, use_bias=False)(h)
            for j in range(count):
                h = self.block(f"block_{i}_{j}", h)
        return self.conv("conv_out", config.latent_channels)(h)


class TinyDecoder(TinyHalf):
    """From latents to pixels."""

    @nn.compact
    def __call__(self, latents: Array) -> Array:
        """latents: [B, H, W, C] -> [B, H', W', out_channels] in about [-1, 1]."""
        config, width = self.config, self.config.decoder_channels
        h = LATENT_BOUND * jnp.tanh(latents.astype(self.dtype) / LATENT_BOUND)
        h = ACTIVATIONS[config.act](self.conv("conv_in", width)(h))
        for i, count in enumerate(config.decoder_blocks):
            if i > 0:
                size = [config.upsample_factor * side for side in h.shape[1:3]]
                h = UPSAMPLINGS[config.upsample](h, *size)
                h = self.conv(f"up_{i}", width, use_bias=False)(h)
            for j in range(count):
                h = self.block(f"block_{i}_{j}", h)
        return self.conv("conv_out", config.out_channels)(h) * 2.0 - 1.0


class AutoencoderTiny(nn.Module):
    """Autoencoder of plain convolutions that was distilled from a large one.

    `module.apply({"params": params}, image, method="encode")`, and so on. Its latents are those
    of the large one after scaling, as the diffusion sees them.

    Attributes:
      config: the architecture.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.

    Source: Bohan 2023 (https://github.com/madebyollin/taesd).
    """

    config: AutoencoderTinyConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def setup(self):
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.encoder = TinyEncoder(self.config, **types)
        self.decoder = TinyDecoder(self.config, **types)

    def encode(self, image: Array) -> Array:
        """Latents, [B, ⌈H / factor⌉, ⌈W / factor⌉, latent_channels] of `dtype`.

        Args:
          image: [B, H, W, in_channels] in [-1, 1].

        Raises:
          ValueError: if the shape does not fit.
        """
        check_image(image, self.config.in_channels, "the image")
        return self.encoder(image)

    def decode(self, latents: Array) -> Array:
        """Image in about [-1, 1], [B, H', W', out_channels] of `dtype`.

        Args:
          latents: [B, H, W, latent_channels].

        Raises:
          ValueError: if the shape does not fit.
        """
        check_image(latents, self.config.latent_channels, "latents")
        return self.decoder(latents)

    def __call__(self, image: Array) -> Array:
        """Encodes and decodes, [B, H, W, in_channels] -> [B, H, W, out_channels]."""
        return self.decode(self.encode(image))
