"""The way down and the bottom: the half that a UNet shares with a classifier."""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import Array, Key
from diffusion_jax.models.attention import AttentionBlock
from diffusion_jax.models.blocks import Downsample, ResBlock, average_pool, default_init
from diffusion_jax.models.embeddings import Fourier, Sinusoidal, TimeEmbedding
from diffusion_jax.models.inputs import with_image, with_vector

RESAMPLE = ("conv", "block", "pool")


@dataclass(frozen=True)
class LevelConfig:
    """One resolution of a UNet.

    Attributes:
      channels: width of the level.
      num_blocks: residual blocks on the way down; the way up has one more.
      attention: self-attention after every residual block.

    Raises:
      ValueError: if a number is below 1.
    """

    channels: int
    num_blocks: int = 2
    attention: bool = False

    def __post_init__(self):
        for name in ("channels", "num_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class EncoderConfig:
    """What a UNet and a half-UNet classifier have in common.

    Attributes:
      levels: from the finest resolution to the coarsest; each halves the one before.
      time_embed_dim: width of the time embedding; None for 4 · levels[0].channels.
      time_channels: width of its sinusoidal features; None for levels[0].channels.
      time_features: what the time embedding is made of.
      norm_groups: groups of every norm; must divide every width.
      norm_eps: epsilon of every norm.
      dropout: rate inside the residual blocks, in [0, 1).
      scale_shift: the time scales and shifts the norm instead of being added (ADM).
      resample: "conv" changes resolution by a convolution, "block" inside a residual
        block (ADM), "pool" without parameters.
      downsample_padding: "symmetric" or "asymmetric", of the convolution on the way down,
        see `Downsample`.
      middle_attention: self-attention at the bottom.
      middle_attention_groups: groups of its norm; None for norm_groups.
      num_heads: heads of every attention. At most one of num_heads and head_dim may be
        given; with neither there is a single head.
      head_dim: width of a head.
      remat: recompute every block in the backward pass, for memory.

    Raises:
      ValueError: if a value is out of range or two of them contradict each other.
    """

    levels: tuple[LevelConfig, ...] = (
        LevelConfig(128),
        LevelConfig(256, attention=True),
        LevelConfig(256),
        LevelConfig(256),
    )
    time_embed_dim: int | None = None
    time_channels: int | None = None
    time_features: Sinusoidal | Fourier = Sinusoidal()
    norm_groups: int = 32
    norm_eps: float = 1e-5
    dropout: float = 0.0
    scale_shift: bool = False
    resample: str = "conv"
    downsample_padding: str = "symmetric"
    middle_attention: bool = True
    middle_attention_groups: int | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    remat: bool = False

    def __post_init__(self):
        if not isinstance(self.levels, tuple) or not self.levels:
            raise ValueError(f"levels must be a non-empty tuple of LevelConfig, got {self.levels}")
        at_least_one(self, "norm_groups", "time_embed_dim", "time_channels")
        at_least_one(self, "num_heads", "head_dim", "middle_attention_groups")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.time_channels is not None and isinstance(self.time_features, Fourier):
            raise ValueError(
                "time_channels belongs to sinusoidal features; Fourier features have their "
                f"num_frequencies, got time_channels = {self.time_channels}"
            )
        self._check_resampling()
        self._check_widths()

    def _check_resampling(self):
        if self.resample not in RESAMPLE:
            raise ValueError(f"resample must be one of {RESAMPLE}, got {self.resample!r}")
        if self.downsample_padding not in ("symmetric", "asymmetric"):
            raise ValueError(
                "downsample_padding must be 'symmetric' or 'asymmetric', "
                f"got {self.downsample_padding!r}"
            )
        if self.resample != "conv" and self.downsample_padding != "symmetric":
            raise ValueError(
                f"downsample_padding belongs to resample='conv', got resample={self.resample!r}"
            )

    def _check_widths(self):
        for level in self.levels:
            if level.channels % self.norm_groups:
                raise ValueError(
                    f"every width must be a multiple of norm_groups = {self.norm_groups}, "
                    f"got channels = {level.channels}"
                )
            if level.attention:
                self.heads(level.channels)
        groups = self.middle_attention_groups
        if groups is not None and not self.middle_attention:
            raise ValueError("middle_attention_groups belongs to middle_attention=True")
        if self.middle_attention:
            self.heads(self.levels[-1].channels)
            if groups is not None and self.levels[-1].channels % groups:
                raise ValueError(
                    f"middle_attention_groups must divide {self.levels[-1].channels}, got {groups}"
                )

    @property
    def embed_dim(self) -> int:
        """Width of the time embedding and of cond.vector."""
        return self.time_embed_dim or 4 * self.levels[0].channels

    def heads(self, channels: int) -> int:
        """Attention heads at a width.

        Raises:
          ValueError: if the width cannot be split as configured.
        """
        return split_heads(channels, self.num_heads, self.head_dim)


def at_least_one(config: object, *names: str) -> None:
    """Raises ValueError, naming the field, if one of these is neither None nor at least 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def split_heads(channels: int, num_heads: int | None, head_dim: int | None) -> int:
    """Number of heads of a width, from their number or from their width; 1 with neither.

    Raises:
      ValueError: if both are given, or if they do not divide the width.
    """
    if num_heads is not None and head_dim is not None:
        raise ValueError(
            "give num_heads or head_dim or neither, "
            f"got num_heads = {num_heads} and head_dim = {head_dim}"
        )
    if channels % (num_heads or head_dim or 1):
        raise ValueError(
            f"channels = {channels} cannot be split into heads with num_heads = "
            f"{num_heads}, head_dim = {head_dim}"
        )
    return channels // head_dim if head_dim else num_heads or 1


class Part(nn.Module):
    """A piece of the network: knows how this network makes its blocks.

    Attributes:
      config: the whole network.
      level: this level.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.
    """

    config: EncoderConfig
    level: LevelConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def types(self):
        """Arguments that every module takes."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def num_heads(self) -> int:
        """Heads of this level's attention."""
        return self.config.heads(self.level.channels)

    def res_block(self, name: str, *, resample: Literal["down", "up"] | None = None) -> nn.Module:
        """A residual block of this level's width."""
        config = self.config
        block = nn.remat(ResBlock) if config.remat else ResBlock
        return block(
            channels=self.level.channels,
            norm_groups=config.norm_groups,
            norm_eps=config.norm_eps,
            dropout=config.dropout,
            scale_shift=config.scale_shift,
            resample=resample,
            name=name,
            **self.types(),
        )

    def attention(self, name: str, *, norm_groups: int | None = None) -> nn.Module:
        """Self-attention between the pixels of this level."""
        config = self.config
        block = nn.remat(AttentionBlock) if config.remat else AttentionBlock
        return block(
            num_heads=self.num_heads(),
            norm_groups=norm_groups or config.norm_groups,
            norm_eps=config.norm_eps,
            name=name,
            **self.types(),
        )


class DownLevel(Part):
    """One level on the way down; ends by halving the resolution unless it is the last.

    Attributes:
      config: the whole network.
      level: this level.
      last: keep the resolution.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.
    """

    last: bool = False

    @nn.compact
    def __call__(self, h: Array, emb: Array, keys: Key | None) -> tuple[Array, list[Array]]:
        """h: [B, H, W, C], emb: [B, E], keys: [B] or None -> ([B, H', W', C'], the skips)."""
        skips = []
        for j in range(self.level.num_blocks):
            h = self.res_block(f"res_{j}")(h, emb, keys)
            if self.level.attention:
                h = self.attention(f"attn_{j}")(h)
            skips.append(h)
        if self.last:
            return h, skips
        if self.config.resample == "block":
            h = self.res_block("downsample", resample="down")(h, emb, keys)
        elif self.config.resample == "pool":
            h = average_pool(h)
        else:
            padding = self.config.downsample_padding
            h = Downsample(padding, name="downsample", **self.types())(h)
        return h, [*skips, h]


class Middle(Part):
    """The bottom: a residual block, self-attention, a residual block."""

    @nn.compact
    def __call__(self, h: Array, emb: Array, keys: Key | None) -> Array:
        """h: [B, H, W, C], emb: [B, E], keys: [B] or None -> [B, H, W, C]."""
        h = self.res_block("res_0")(h, emb, keys)
        if self.config.middle_attention:
            h = self.attention("attn", norm_groups=self.config.middle_attention_groups)(h)
        return self.res_block("res_1")(h, emb, keys)


class Encoder(nn.Module):
    """A module that begins as a UNet does.

    Attributes:
      config: the architecture.
      dtype: dtype of activations; norms, softmax and the time embedding stay float32.
      param_dtype: dtype of the parameters.
    """

    config: EncoderConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def types(self):
        """Arguments that every module takes."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def encode(
        self, x: Array, t: Array, cond: Condition, *, keys: Key | None
    ) -> tuple[Array, list[Array], Array]:
        """Everything up to the bottom; to be called once, inside of a compact method.

        Args:
          x: [B, H, W, C] noisy images; H and W multiples of 2^(levels - 1).
          t: [B].
          cond: vector [B, embed_dim], image [B, H, W, C'], or neither.
          keys: [B] or None.

        Returns:
          The bottom [B, H', W', C'], every output on the way down [B, H_j, W_j, C_j] and the
          embedding [B, embed_dim].

        Raises:
          ValueError: if x is no image of a fitting size.
        """
        config, base = self.config, self.config.levels[0].channels
        _check_size(x, len(config.levels))
        emb = TimeEmbedding(
            config.time_features,
            config.time_channels or base,
            config.embed_dim,
            self.param_dtype,
            name="time_embed",
        )(t)
        emb = with_vector(emb, cond)
        conv_in = nn.Conv(
            base, (3, 3), padding=1, kernel_init=default_init, name="conv_in", **self.types()
        )
        h = conv_in(with_image(x, cond))
        skips = [h]
        for i, level in enumerate(config.levels):
            last = i == len(config.levels) - 1
            down = DownLevel(config, level, last=last, name=f"down_{i}", **self.types())
            h, made = down(h, emb, keys)
            skips += made
        h = Middle(config, config.levels[-1], name="mid", **self.types())(h, emb, keys)
        return h, skips, emb


def _check_size(x: Array, num_levels: int) -> None:
    """Raises ValueError unless x is [B, H, W, C] and can be halved num_levels - 1 times."""
    factor = 2 ** (num_levels - 1)
    if x.ndim != 4:
        raise ValueError(f"x must be images of shape [B, H, W, C], got {x.shape}")
    if x.shape[1] % factor or x.shape[2] % factor:
        raise ValueError(
            f"height and width must be multiples of {factor}, since the network has "
            f"{num_levels} levels, got {x.shape[1]} x {x.shape[2]}"
        )
