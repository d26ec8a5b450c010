"""Autoencoders of latent diffusion: the two halves, and the one with a Gaussian latent."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.core.arrays import per_image_normal
from diffusion_jax.core.types import Array, Key
from diffusion_jax.models.attention import (
    AttentionBlock,
    Implementation,
    check_implementation,
)
from diffusion_jax.models.blocks import (
    ACTIVATIONS,
    Downsample,
    GroupNorm,
    ResBlock,
    Upsample,
    default_init,
)
from diffusion_jax.models.inputs import DType, at_least_one
from diffusion_jax.models.layers import Conv

MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0


@dataclass(frozen=True)
class AutoencoderLevel:
    """One resolution of an autoencoder.

    Attributes:
      channels: width of the level.
      num_blocks: residual blocks in the encoder; the decoder has one more.
      attention: self-attention of the pixels after every residual block.

    Raises:
      ValueError: if a number is below 1.
    """

    channels: int
    num_blocks: int = 2
    attention: bool = False

    def __post_init__(self):
        at_least_one(self, "channels", "num_blocks")


@dataclass(frozen=True)
class AutoencoderConfig:
    """What autoencoders with a Gaussian and with a quantized latent have in common.

    The default has the widths of Stable Diffusion's. The last three attributes are facts about
    released weights that nothing in the network reads: a codec applies the factor.

    Attributes:
      in_channels: channels of the image that is encoded.
      out_channels: channels of the image that is decoded.
      latent_channels: channels of the latents.
      z_channels: channels at the bottom of both halves, from which a 1x1 convolution makes the
        latents and back; None for latent_channels.
      levels: from the finest resolution to the coarsest; each halves the one before.
      up_levels: levels of the decoder in the same order, each with a block more than it says;
        None for those of the encoder.
      middle_attention: self-attention at the bottom of both halves.
      norm_groups: groups of every norm; must divide every width.
      norm_eps: epsilon of every norm.
      act: activation in the residual blocks, a key of `ACTIVATIONS`; before the last
        convolution of either half it is always SiLU.
      scaling_factor: the diffusion sees latents · scaling_factor.
      sample_size: height and width of the training images in pixels.
      force_upcast: compute in float32 where float16 is asked for, as some weights overflow.
      attention_implementation: see `dot_product_attention`; None picks by platform and size.

    Raises:
      ValueError: if a value is out of range or two of them contradict each other.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    z_channels: int | None = None
    levels: tuple[AutoencoderLevel, ...] = (
        AutoencoderLevel(128),
        AutoencoderLevel(256),
        AutoencoderLevel(512),
        AutoencoderLevel(512),
    )
    up_levels: tuple[AutoencoderLevel, ...] | None = None
    middle_attention: bool = True
    norm_groups: int = 32
    norm_eps: float = 1e-6
    act: str = "silu"
    scaling_factor: float = 0.18215
    sample_size: int | tuple[int, int] = 32
    force_upcast: bool = False
    attention_implementation: Implementation | None = None

    def __post_init__(self):
        at_least_one(self, "in_channels", "out_channels", "latent_channels", "z_channels")
        at_least_one(self, "norm_groups")
        check_implementation(self.attention_implementation)
        if self.act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {sorted(ACTIVATIONS)}, got {self.act!r}")
        _check_levels("levels", self.levels, self.norm_groups)
        if self.up_levels is not None:
            _check_levels("up_levels", self.up_levels, self.decoder_groups)
            if len(self.up_levels) != len(self.levels):
                raise ValueError(
                    "up_levels must be as many as levels, since they undo their halvings, "
                    f"got {len(self.up_levels)} and {len(self.levels)}"
                )

    def activation_dtype(self, dtype: DType) -> jnp.dtype:
        """What the activations are computed in where `dtype` is asked for."""
        dtype = jnp.dtype(dtype)
        return jnp.dtype(jnp.float32) if self.force_upcast and dtype == jnp.float16 else dtype

    @property
    def bottom_channels(self) -> int:
        """Channels at the bottom of both halves."""
        return self.latent_channels if self.z_channels is None else self.z_channels

    @property
    def decoder_levels(self) -> tuple[AutoencoderLevel, ...]:
        """Levels of the decoder, from the finest resolution to the coarsest."""
        return self.levels if self.up_levels is None else self.up_levels

    @property
    def decoder_groups(self) -> int:
        """Groups of the norms of the decoder."""
        return self.norm_groups

    @property
    def factor(self) -> int:
        """Pixels of the image, along each side, to one of the latents."""
        return 2 ** (len(self.levels) - 1)


def _check_levels(name: str, levels: tuple[AutoencoderLevel, ...], groups: int) -> None:
    if not isinstance(levels, tuple) or not levels:
        raise ValueError(f"{name} must be a non-empty tuple of AutoencoderLevel, got {levels}")
    for level in levels:
        if level.channels % groups:
            raise ValueError(
                f"every width of {name} must be a multiple of the {groups} groups of its norms, "
                f"got channels = {level.channels}"
            )


def check_image(x: Array, channels: int, what: str) -> None:
    """Raises ValueError unless x is [B, H, W, channels]."""
    if x.ndim != 4 or x.shape[-1] != channels:
        raise ValueError(f"{what} must have shape [B, H, W, {channels}], got {x.shape}")


class Piece(nn.Module):
    """A piece of an autoencoder: knows how its blocks are made.

    Attributes:
      config: the whole autoencoder.
      norm: class of every norm, which takes the arguments of a `GroupNorm`.
      norm_groups: groups of every norm.
      dtype: dtype of activations; norms and softmax stay float32.
      param_dtype: dtype of the parameters.
    """

    config: AutoencoderConfig
    norm: Callable[..., nn.Module] = GroupNorm
    norm_groups: int = 32
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def types(self):
        """Arguments that every module takes."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def shared(self):
        """Arguments that every piece takes."""
        return {"norm": self.norm, "norm_groups": self.norm_groups, **self.types()}

    def res_block(self, name: str, channels: int) -> nn.Module:
        """A residual block without time."""
        config = self.config
        return ResBlock(
            channels=channels, norm_eps=config.norm_eps, act=config.act, name=name, **self.shared()
        )

    def attention(self, name: str) -> nn.Module:
        """Self-attention between all pixels, with one head."""
        return AttentionBlock(
            num_heads=1,
            norm_eps=self.config.norm_eps,
            implementation=self.config.attention_implementation,
            name=name,
            **self.shared(),
        )

    def conv(self, name: str, channels: int) -> nn.Module:
        """A 3x3 convolution that keeps the resolution."""
        return Conv(
            channels, (3, 3), padding=1, kernel_init=default_init, name=name, **self.types()
        )


class Middle(Piece):
    """The bottom of either half: a residual block, self-attention, a residual block."""

    @nn.compact
    def __call__(self, h: Array, latent: Array | None = None) -> Array:
        """h: [B, H, W, C], latent: what the norms are told or None -> [B, H, W, C]."""
        channels = h.shape[-1]
        h = self.res_block("res_0", channels)(h, latent=latent)
        if self.config.middle_attention:
            h = self.attention("attn")(h, latent=latent)
        return self.res_block("res_1", channels)(h, latent=latent)


class PixelEncoder(Piece):
    """From pixels to the bottom.

    Attributes:
      config: the whole autoencoder.
      norm: class of every norm.
      norm_groups: groups of every norm.
      dtype: dtype of activations; norms and softmax stay float32.
      param_dtype: dtype of the parameters.
      features: channels of the result.
    """

    features: int = 8

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, H, W, in_channels] -> [B, ⌊H / factor⌋, ⌊W / factor⌋, features]."""
        config = self.config
        check_image(x, config.in_channels, "the image")
        h = self.conv("conv_in", config.levels[0].channels)(x)
        for i, level in enumerate(config.levels):
            last = i == len(config.levels) - 1
            h = DownLevel(config, level=level, last=last, name=f"down_{i}", **self.shared())(h)
        h = Middle(config, name="mid", **self.shared())(h)
        norm_out = self.norm(self.norm_groups, config.norm_eps, name="norm_out", **self.types())
        return self.conv("conv_out", self.features)(nn.silu(norm_out(h)))


class DownLevel(Piece):
    """One level of the encoder; ends by halving the resolution unless it is the last.

    Attributes:
      config: the whole autoencoder.
      norm: class of every norm.
      norm_groups: groups of every norm.
      dtype: dtype of activations; norms and softmax stay float32.
      param_dtype: dtype of the parameters.
      level: this level.
      last: keep the resolution.
    """

    level: AutoencoderLevel = AutoencoderLevel(128)
    last: bool = False

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """h: [B, H, W, C] -> [B, H', W', channels]."""
        for j in range(self.level.num_blocks):
            h = self.res_block(f"res_{j}", self.level.channels)(h)
            if self.level.attention:
                h = self.attention(f"attn_{j}")(h)
        return h if self.last else Downsample("asymmetric", name="downsample", **self.types())(h)


class PixelDecoder(Piece):
    """From the bottom to pixels."""

    @nn.compact
    def __call__(self, z: Array, latent: Array | None = None) -> Array:
        """Decodes.

        Args:
          z: [B, H, W, z_channels].
          latent: what the norms are told besides the image, [B, H, W, C]; None for a
            `GroupNorm`.

        Returns:
          [B, factor · H, factor · W, out_channels] of `dtype`.
        """
        config, levels = self.config, self.config.decoder_levels
        h = self.conv("conv_in", levels[-1].channels)(z)
        h = Middle(config, name="mid", **self.shared())(h, latent)
        for i, level in enumerate(reversed(levels)):
            last = i == len(levels) - 1
            up = UpLevel(config, level=level, last=last, name=f"up_{i}", **self.shared())
            h = up(h, latent)
        norm_out = self.norm(self.norm_groups, config.norm_eps, name="norm_out", **self.types())
        h = norm_out(h) if latent is None else norm_out(h, latent)
        return self.conv("conv_out", config.out_channels)(nn.silu(h))


class UpLevel(Piece):
    """One level of the decoder; ends by doubling the resolution unless it is the last.

    Attributes:
      config: the whole autoencoder.
      norm: class of every norm.
      norm_groups: groups of every norm.
      dtype: dtype of activations; norms and softmax stay float32.
      param_dtype: dtype of the parameters.
      level: this level.
      last: keep the resolution.
    """

    level: AutoencoderLevel = AutoencoderLevel(128)
    last: bool = False

    @nn.compact
    def __call__(self, h: Array, latent: Array | None = None) -> Array:
        """h: [B, H, W, C], latent: what the norms are told or None -> [B, H', W', channels]."""
        for j in range(self.level.num_blocks + 1):
            h = self.res_block(f"res_{j}", self.level.channels)(h, latent=latent)
            if self.level.attention:
                h = self.attention(f"attn_{j}")(h, latent=latent)
        return h if self.last else Upsample(name="upsample", **self.types())(h)


class DiagonalGaussian(NamedTuple):
    """What a Gaussian autoencoder says about the latents of an image.

    Attributes:
      mean: [B, H, W, C] float32.
      logvar: [B, H, W, C] float32 log of the variance, in [-30, 20].
    """

    mean: Array
    logvar: Array

    @property
    def std(self) -> Array:
        """Standard deviation, [B, H, W, C]."""
        return jnp.exp(0.5 * self.logvar)

    def sample(self, keys: Key) -> Array:
        """mean + std · noise, image i drawn from keys[i] alone, [B, H, W, C]."""
        return self.mean + self.std * per_image_normal(keys, self.mean)

    def kl(self) -> Array:
        """Kullback-Leibler divergence from the standard normal in nats, [B].

        ½ Σ (mean² + exp(logvar) - 1 - logvar).

        Source: Kingma & Welling 2014 (arXiv:1312.6114), appendix B.
        """
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * terms.sum(tuple(range(1, terms.ndim)))


def diagonal_gaussian(moments: Array) -> DiagonalGaussian:
    """Takes moments [B, H, W, 2C] apart and clamps the log variance to [-30, 20]."""
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return DiagonalGaussian(mean, jnp.clip(logvar, MIN_LOGVAR, MAX_LOGVAR))


@dataclass(frozen=True)
class AutoencoderKLConfig(AutoencoderConfig):
    """An autoencoder with a Gaussian latent; the default has the widths of Stable Diffusion's.

    Attributes:
      quant_conv: a 1x1 convolution makes the moments of what the encoder says.
      post_quant_conv: a 1x1 convolution makes what the decoder reads of the latents.
      shift_factor: the diffusion sees (latents - shift_factor) · scaling_factor; None for 0.
      latents_mean: one number a channel, which some diffusions subtract instead, or None.
      latents_std: one number a channel, by which they divide, or None.

    Raises:
      ValueError: if a value is out of range or two of them contradict each other.
    """

    quant_conv: bool = True
    post_quant_conv: bool = True
    force_upcast: bool = True
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("latents_mean", "latents_std"):
            numbers = getattr(self, name)
            if numbers is not None and len(numbers) != self.latent_channels:
                raise ValueError(
                    f"{name} must be one number for each of the {self.latent_channels} channels "
                    f"of the latents, got {numbers}"
                )
        both = self.quant_conv and self.post_quant_conv
        if not both and self.bottom_channels != self.latent_channels:
            raise ValueError(
                "without quant_conv or post_quant_conv z_channels must be latent_channels = "
                f"{self.latent_channels}, got {self.bottom_channels}"
            )

    def build(
        self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32
    ) -> "AutoencoderKL":
        """The module, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name; see `force_upcast` for float16.
          param_dtype: of the parameters, a dtype or its name.
        """
        dtype = self.activation_dtype(dtype)
        return AutoencoderKL(self, dtype=dtype, param_dtype=jnp.dtype(param_dtype))


class AutoencoderKL(nn.Module):
    """Autoencoder whose encoder says a mean and a log variance of the latents.

    `module.apply({"params": params}, image, method="encode")`, and so on. Latents are as the
    decoder reads them: factors of the configuration are not applied.

    Attributes:
      config: the architecture.
      dtype: dtype of activations; norms, softmax and the Gaussian stay float32.
      param_dtype: dtype of the parameters.

    Source: Rombach et al. 2022 (arXiv:2112.10752), section 3.1 and appendix G; Kingma & Welling
    2014 (arXiv:1312.6114).
    """

    config: AutoencoderKLConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def setup(self):
        config, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = {"kernel_size": (1, 1), "kernel_init": default_init, **types}
        self.encoder = PixelEncoder(
            config, norm_groups=config.norm_groups, features=2 * config.bottom_channels, **types
        )
        self.decoder = PixelDecoder(config, norm_groups=config.decoder_groups, **types)
        if config.quant_conv:
            self.quant_conv = Conv(2 * config.latent_channels, **conv)
        if config.post_quant_conv:
            self.post_quant_conv = Conv(config.bottom_channels, **conv)

    def moments(self, image: Array) -> Array:
        """Mean and unclamped log variance, one after the other in the channels.

        Args:
          image: [B, H, W, in_channels] in [-1, 1].

        Returns:
          [B, ⌊H / factor⌋, ⌊W / factor⌋, 2 · latent_channels] of `dtype`.

        Raises:
          ValueError: if the shape does not fit.
        """
        h = self.encoder(image)
        return self.quant_conv(h) if self.config.quant_conv else h

    def encode(self, image: Array) -> DiagonalGaussian:
        """Distribution of the latents, of [B, ⌊H / factor⌋, ⌊W / factor⌋, latent_channels].

        Args:
          image: [B, H, W, in_channels] in [-1, 1].

        Raises:
          ValueError: if the shape does not fit.
        """
        return diagonal_gaussian(self.moments(image))

    def decode(self, latents: Array) -> Array:
        """Image in about [-1, 1], [B, factor · H, factor · W, out_channels] of `dtype`.

        Args:
          latents: [B, H, W, latent_channels].

        Raises:
          ValueError: if the shape does not fit.
        """
        check_image(latents, self.config.latent_channels, "latents")
        return self.decoder(
            self.post_quant_conv(latents) if self.config.post_quant_conv else latents
        )

    def __call__(self, image: Array, keys: Key | None = None) -> tuple[Array, DiagonalGaussian]:
        """Encodes and decodes, for training.

        Args:
          image: [B, H, W, in_channels] in [-1, 1]; H and W multiples of the factor.
          keys: [B], to draw the latents; None to take their mean.

        Returns:
          The reconstruction [B, H, W, out_channels] and the distribution of the latents.
        """
        posterior = self.encode(image)
        latents = posterior.mean if keys is None else posterior.sample(keys)
        return self.decode(latents), posterior
