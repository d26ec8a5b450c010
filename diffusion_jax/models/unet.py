"""The UNet of DDPM and ADM, described level by level."""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import Array, Key
from diffusion_jax.models.attention import AttentionBlock
from diffusion_jax.models.blocks import (
    Downsample,
    GroupNorm,
    ResBlock,
    Upsample,
    default_init,
    zeros_init,
)
from diffusion_jax.models.embeddings import Fourier, Sinusoidal, TimeEmbedding
from diffusion_jax.models.inputs import DType, check_inputs, with_image, with_vector


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
class UNetConfig:
    """A UNet; the default has the widths of DDPM's for CIFAR-10 and ADM's conventions.

    DDPM itself has time_features=Sinusoidal(cos_first=False, freq_shift=1), norm_eps=1e-6 and
    downsample_padding="asymmetric".

    Attributes:
      levels: from the finest resolution to the coarsest; each halves the one before.
      out_channels: channels of the output, twice those of x where the variance is learned.
      time_embed_dim: width of the time embedding; None for 4 · levels[0].channels.
      time_features: what the time embedding is made of.
      norm_groups: groups of every norm; must divide every width.
      norm_eps: epsilon of every norm.
      dropout: rate inside the residual blocks, in [0, 1).
      scale_shift: the time scales and shifts the norm instead of being added (ADM).
      resample: "conv" changes resolution by a convolution, "block" inside a residual
        block (ADM).
      downsample_padding: "symmetric" or "asymmetric", of the convolution on the way down,
        see `Downsample`.
      middle_attention: self-attention at the bottom.
      middle_attention_groups: groups of its norm; None for norm_groups.
      num_heads: heads of every attention. At most one of num_heads and head_dim may be
        given; with neither there is a single head.
      head_dim: width of a head.
      needs_vector: refuse a condition without a vector.
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
    out_channels: int = 3
    time_embed_dim: int | None = None
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
    needs_vector: bool = False
    remat: bool = False

    def __post_init__(self):
        if not isinstance(self.levels, tuple) or not self.levels:
            raise ValueError(f"levels must be a non-empty tuple of LevelConfig, got {self.levels}")
        for name in ("out_channels", "norm_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.resample not in ("conv", "block"):
            raise ValueError(f"resample must be 'conv' or 'block', got {self.resample!r}")
        if self.downsample_padding not in ("symmetric", "asymmetric"):
            raise ValueError(
                "downsample_padding must be 'symmetric' or 'asymmetric', "
                f"got {self.downsample_padding!r}"
            )
        if self.resample == "block" and self.downsample_padding != "symmetric":
            raise ValueError("downsample_padding belongs to resample='conv', got resample='block'")
        self._check_widths()

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
            if groups is not None and (groups < 1 or self.levels[-1].channels % groups):
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
        if self.num_heads is not None and self.head_dim is not None:
            raise ValueError(
                "give num_heads or head_dim or neither, "
                f"got num_heads = {self.num_heads} and head_dim = {self.head_dim}"
            )
        divisor = self.num_heads or self.head_dim or 1
        if divisor < 1 or channels % divisor:
            raise ValueError(
                f"channels = {channels} cannot be split into heads with num_heads = "
                f"{self.num_heads}, head_dim = {self.head_dim}"
            )
        return channels // self.head_dim if self.head_dim else divisor

    def build(self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32) -> "UNet":
        """The module, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return UNet(self, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))


class _Part(nn.Module):
    """A piece of the UNet: knows how this UNet makes its blocks."""

    config: UNetConfig
    level: LevelConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def types(self):
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def res_block(self, name: str, *, resample: Literal["down", "up"] | None = None) -> nn.Module:
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
        config = self.config
        block = nn.remat(AttentionBlock) if config.remat else AttentionBlock
        return block(
            num_heads=config.heads(self.level.channels),
            norm_groups=norm_groups or config.norm_groups,
            norm_eps=config.norm_eps,
            name=name,
            **self.types(),
        )


class DownLevel(_Part):
    """One level on the way down; ends by halving the resolution unless it is the last.

    Attributes:
      config: the whole UNet.
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
        else:
            padding = self.config.downsample_padding
            h = Downsample(padding, name="downsample", **self.types())(h)
        return h, [*skips, h]


class Middle(_Part):
    """The bottom: a residual block, self-attention, a residual block."""

    @nn.compact
    def __call__(self, h: Array, emb: Array, keys: Key | None) -> Array:
        """h: [B, H, W, C], emb: [B, E], keys: [B] or None -> [B, H, W, C]."""
        h = self.res_block("res_0")(h, emb, keys)
        if self.config.middle_attention:
            h = self.attention("attn", norm_groups=self.config.middle_attention_groups)(h)
        return self.res_block("res_1")(h, emb, keys)


class UpLevel(_Part):
    """One level on the way up; ends by doubling the resolution unless it is the last.

    Attributes:
      config: the whole UNet.
      level: this level.
      last: keep the resolution.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.
    """

    last: bool = False

    @nn.compact
    def __call__(self, h: Array, skips: list[Array], emb: Array, *, keys: Key | None) -> Array:
        """Applies one residual block to each skip.

        Args:
          h: [B, H, W, C].
          skips: [B, H, W, C_j] each, in the order in which they are read.
          emb: [B, E].
          keys: [B] or None.

        Returns:
          [B, H', W', channels].
        """
        for j, skip in enumerate(skips):
            h = jnp.concatenate([h, skip], axis=-1)
            h = self.res_block(f"res_{j}")(h, emb, keys)
            if self.level.attention:
                h = self.attention(f"attn_{j}")(h)
        if self.last:
            return h
        if self.config.resample == "block":
            return self.res_block("upsample", resample="up")(h, emb, keys)
        return Upsample(name="upsample", **self.types())(h)


class UNet(nn.Module):
    """UNet that predicts noise, data or velocity from a noisy image and the time.

    Attributes:
      config: the architecture.
      dtype: dtype of activations; norms, softmax and the time embedding stay float32.
      param_dtype: dtype of the parameters.

    Source: Ho et al. 2020 (arXiv:2006.11239), appendix B; Dhariwal & Nichol 2021
    (arXiv:2105.05233), section 3.
    """

    config: UNetConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Condition, *, keys: Key | None = None) -> Array:
        """Predicts.

        Args:
          x: [B, H, W, C] noisy images; H and W multiples of 2^(levels - 1).
          t: [B] times as the network was trained with.
          cond: vector [B, embed_dim] is added to the time embedding, image [B, H, W, C']
            is concatenated to x.
          keys: [B], one per example, in training; they switch dropout on.

        Returns:
          [B, H, W, out_channels] of `dtype`.

        Raises:
          ValueError: if a shape does not fit, or the condition fills a slot that is not read.
        """
        config = self.config
        self._check_size(x)
        check_inputs(
            x, t, cond, keys=keys, embed_dim=config.embed_dim, needs_vector=config.needs_vector
        )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        base, depth = config.levels[0].channels, len(config.levels)

        emb = TimeEmbedding(
            config.time_features, base, config.embed_dim, self.param_dtype, name="time_embed"
        )(t)
        emb = with_vector(emb, cond)

        h = nn.Conv(base, (3, 3), padding=1, kernel_init=default_init, name="conv_in", **types)(
            with_image(x, cond)
        )
        skips = [h]
        for i, level in enumerate(config.levels):
            down = DownLevel(config, level, last=i == depth - 1, name=f"down_{i}", **types)
            h, made = down(h, emb, keys)
            skips += made
        h = Middle(config, config.levels[-1], name="mid", **types)(h, emb, keys)
        for i, level in enumerate(reversed(config.levels)):
            taken = [skips.pop() for _ in range(level.num_blocks + 1)]
            up = UpLevel(config, level, last=i == depth - 1, name=f"up_{i}", **types)
            h = up(h, taken, emb, keys=keys)

        h = nn.silu(GroupNorm(config.norm_groups, config.norm_eps, name="norm_out", **types)(h))
        return nn.Conv(
            config.out_channels, (3, 3), padding=1, kernel_init=zeros_init, name="conv_out", **types
        )(h)

    def _check_size(self, x: Array) -> None:
        factor = 2 ** (len(self.config.levels) - 1)
        if x.ndim != 4:
            raise ValueError(f"x must be images of shape [B, H, W, C], got {x.shape}")
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"height and width must be multiples of {factor}, since the UNet has "
                f"{len(self.config.levels)} levels, got {x.shape[1]} x {x.shape[2]}"
            )
