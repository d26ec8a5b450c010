"""The autoencoder with a codebook: VQ of latent diffusion, and MoVQ with its spatial norm."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.core.resize import nearest_resize
from diffusion_jax.core.types import Array
from diffusion_jax.models.autoencoder import (
    AutoencoderConfig,
    AutoencoderLevel,
    PixelDecoder,
    PixelEncoder,
    check_image,
)
from diffusion_jax.models.blocks import GroupNorm, default_init
from diffusion_jax.models.inputs import DType, at_least_one
from diffusion_jax.models.layers import Conv

# MoVQ has no other number of groups, whatever the norms of its encoder have.
SPATIAL_NORM_GROUPS = 32
# Distances to all codes that are held at once, 64 MiB.
MAX_DISTANCES = 2**24


class SpatialNorm(nn.Module):
    """Group norm whose result a latent scales and shifts pixel by pixel.

    norm(x) · conv_scale(latent) + conv_shift(latent), the latent repeated to the size of x.

    Attributes:
      groups: number of groups; must divide the number of channels.
      eps: added to the variance.
      dtype: dtype of the result; the statistics stay float32.
      param_dtype: dtype of the parameters.

    Source: Zheng et al. 2022 (arXiv:2209.09002), section 3.2.
    """

    groups: int
    eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, latent: Array) -> Array:
        """x: [B, nH, nW, C], latent: [B, H, W, D] -> [B, nH, nW, C]."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = GroupNorm(self.groups, self.eps, name="norm", **types)(x)
        # A 1x1 convolution of repeated pixels is that of the pixels, repeated, at a fraction.
        scale, shift = (
            nearest_resize(
                Conv(x.shape[-1], (1, 1), kernel_init=default_init, name=name, **types)(latent),
                *x.shape[1:3],
            )
            for name in ("scale", "shift")
        )
        return h * scale + shift


class Quantized(NamedTuple):
    """Latents replaced by their nearest codes.

    Attributes:
      latents: [B, H, W, C] float32 codes; their gradient goes to the latents unchanged.
      indices: [B, H, W] int32 rows of the codebook.
      loss: [] float32, draws codes and latents together.
    """

    latents: Array
    indices: Array
    loss: Array


def nearest_codes(latents: Array, codebook: Array) -> Array:
    """argmin_k ‖latent - code_k‖ of every pixel, the first of equally near ones.

    Args:
      latents: [B, H, W, C].
      codebook: [K, C].

    Returns:
      [B, H, W] int32.

    Source: van den Oord et al. 2017 (arXiv:1711.00937), eq. 1.
    """
    codebook = codebook.astype(jnp.float32)
    lengths = jnp.square(codebook).sum(-1)

    def nearest(latent):
        # ‖latent‖² is the same for every code. Fewer bits would choose other codes.
        products = jnp.matmul(codebook, latent, precision=jax.lax.Precision.HIGHEST)
        return jnp.argmin(lengths - 2.0 * products)

    flat = latents.astype(jnp.float32).reshape(-1, latents.shape[-1])
    at_once = max(1, MAX_DISTANCES // codebook.shape[0])
    indices = jax.lax.map(nearest, flat, batch_size=min(at_once, flat.shape[0]))
    return indices.astype(jnp.int32).reshape(latents.shape[:-1])


@dataclass(frozen=True)
class VQModelConfig(AutoencoderConfig):
    """An autoencoder with a codebook; the default is VQ-f4 of latent diffusion.

    Attributes:
      num_codes: rows of the codebook.
      norm: "group", or "spatial" for MoVQ's, which tells every norm of the decoder the latents.
      commitment_weight: β of β · mean ‖z - stop(code)‖², which draws latents to their codes.
      codebook_weight: of mean ‖stop(z) - code‖², which draws codes to their latents. Latent
        diffusion was trained with 1 and 0.25, van den Oord et al. with 0.25 and 1.
      lookup_from_codebook: what is decoded without quantization are indices, not latents.

    Raises:
      ValueError: if a value is out of range or two of them contradict each other.
    """

    latent_channels: int = 3
    levels: tuple[AutoencoderLevel, ...] = (
        AutoencoderLevel(128),
        AutoencoderLevel(256),
        AutoencoderLevel(512),
    )
    scaling_factor: float = 1.0
    num_codes: int = 8192
    norm: Literal["group", "spatial"] = "group"
    commitment_weight: float = 1.0
    codebook_weight: float = 0.25
    lookup_from_codebook: bool = False

    def __post_init__(self):
        if self.norm not in ("group", "spatial"):
            raise ValueError(f"norm must be 'group' or 'spatial', got {self.norm!r}")
        super().__post_init__()
        at_least_one(self, "num_codes")
        wrong = [e.channels for e in self.decoder_levels if e.channels % self.decoder_groups]
        if wrong:
            raise ValueError(
                f"every width of the decoder must be a multiple of the {self.decoder_groups} "
                f"groups of its norms, got channels = {wrong[0]}"
            )

    @property
    def decoder_groups(self) -> int:
        """Groups of the norms of the decoder."""
        return SPATIAL_NORM_GROUPS if self.norm == "spatial" else self.norm_groups

    def build(self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32) -> "VQModel":
        """The module, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name; see `force_upcast` for float16.
          param_dtype: of the parameters, a dtype or its name.
        """
        dtype = self.activation_dtype(dtype)
        return VQModel(self, dtype=dtype, param_dtype=jnp.dtype(param_dtype))


class VQModel(nn.Module):
    """Autoencoder whose latents are replaced by their nearest codes before they are decoded.

    `module.apply({"params": params}, image, method="encode")`, and so on. A diffusion is trained
    on what `encode` says, before quantization.

    Attributes:
      config: the architecture.
      dtype: dtype of activations; norms, softmax and the distances to codes stay float32.
      param_dtype: dtype of the parameters.

    Source: van den Oord et al. 2017 (arXiv:1711.00937); Rombach et al. 2022 (arXiv:2112.10752),
    section 3.1; Zheng et al. 2022 (arXiv:2209.09002) for norm="spatial".
    """

    config: VQModelConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def setup(self):
        config, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = {"kernel_size": (1, 1), "kernel_init": default_init, **types}
        self.encoder = PixelEncoder(
            config, norm_groups=config.norm_groups, features=config.bottom_channels, **types
        )
        norm = SpatialNorm if config.norm == "spatial" else GroupNorm
        self.decoder = PixelDecoder(config, norm, config.decoder_groups, **types)
        self.quant_conv = Conv(config.latent_channels, **conv)
        self.post_quant_conv = Conv(config.bottom_channels, **conv)
        self.codebook = self.param(
            "codebook", _codebook_init, (config.num_codes, config.latent_channels), self.param_dtype
        )

    def encode(self, image: Array) -> Array:
        """Latents before quantization.

        Args:
          image: [B, H, W, in_channels] in [-1, 1].

        Returns:
          [B, ⌊H / factor⌋, ⌊W / factor⌋, latent_channels] of `dtype`.

        Raises:
          ValueError: if the shape does not fit.
        """
        return self.quant_conv(self.encoder(image))

    def quantize(self, latents: Array) -> Quantized:
        """The nearest codes of latents [B, H, W, latent_channels].

        The loss is commitment_weight · mean ‖z - stop(code)‖² + codebook_weight ·
        mean ‖stop(z) - code‖², means over all numbers; the gradient of the codes goes straight
        through to the latents.

        Raises:
          ValueError: if the shape does not fit.

        Source: van den Oord et al. 2017 (arXiv:1711.00937), eq. 1 to 3.
        """
        config, stop = self.config, jax.lax.stop_gradient
        check_image(latents, config.latent_channels, "latents")
        latents = latents.astype(jnp.float32)
        indices = nearest_codes(stop(latents), stop(self.codebook))
        codes = self.look_up(indices)
        loss = config.commitment_weight * jnp.square(latents - stop(codes)).mean()
        loss += config.codebook_weight * jnp.square(stop(latents) - codes).mean()
        # Not latents + stop(codes - latents), which would round the codes.
        straight = stop(codes) + (latents - stop(latents))
        return Quantized(straight, indices, loss)

    def look_up(self, indices: Array) -> Array:
        """Codes of indices [B, H, W], [B, H, W, latent_channels] float32."""
        return jnp.take(self.codebook, indices, axis=0).astype(jnp.float32)

    def decode(self, latents: Array, *, quantize: bool = True) -> Array:
        """Image in about [-1, 1], [B, factor · H, factor · W, out_channels] of `dtype`.

        Args:
          latents: [B, H, W, latent_channels]; indices [B, H, W] where they are not quantized
            and the configuration says lookup_from_codebook.
          quantize: replace the latents by their nearest codes first.

        Raises:
          ValueError: if the shape does not fit.
        """
        if quantize:
            return self.decode_codes(self.quantize(latents).latents)
        if self.config.lookup_from_codebook:
            return self.decode_codes(self.look_up(latents))
        return self.decode_codes(latents)

    def decode_codes(self, codes: Array) -> Array:
        """Image of latents [B, H, W, latent_channels] as they are; see `decode`."""
        check_image(codes, self.config.latent_channels, "latents")
        latent = codes if self.config.norm == "spatial" else None
        return self.decoder(self.post_quant_conv(codes), latent)

    def __call__(self, image: Array) -> tuple[Array, Quantized]:
        """Encodes, quantizes and decodes, for training.

        Args:
          image: [B, H, W, in_channels] in [-1, 1]; H and W multiples of the factor.

        Returns:
          The reconstruction [B, H, W, out_channels] and the quantized latents.
        """
        quantized = self.quantize(self.encode(image))
        return self.decode_codes(quantized.latents), quantized


def _codebook_init(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -1.0 / shape[0], 1.0 / shape[0])
