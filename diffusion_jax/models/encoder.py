"""The way down and the bottom: the half that a UNet shares with a classifier."""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import Array, Key
from diffusion_jax.models.attention import AttentionBlock, PixelAttention
from diffusion_jax.models.blocks import (
    ACTIVATIONS,
    Downsample,
    GroupNorm,
    ResBlock,
    average_pool,
    default_init,
    fir_downsample,
)
from diffusion_jax.models.embeddings import TimeEmbedding
from diffusion_jax.models.inputs import with_image, with_vector
from diffusion_jax.models.layers import Conv, Dense
from diffusion_jax.models.levels import EncoderConfig, LevelConfig
from diffusion_jax.models.text_attention import TextAttention, TextAttentionBlock
from diffusion_jax.models.transformer import SpatialTransformer, SpatialTransformerBlock


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
        """Heads of this level's attention where its specification says nothing."""
        return self.config.heads(self.level.channels)

    @property
    def resample(self) -> str:
        """How this level changes the resolution."""
        return self.config.resample_of(self.level)

    @property
    def norm_groups(self) -> int | None:
        """Groups of this level's norms."""
        return None if self.resample == "pyramid" else self.config.norm_groups

    def heads(self, spec: TextAttention | SpatialTransformer) -> int:
        """Heads of an attention, as it says or as the network has them."""
        says_nothing = spec.num_heads is spec.head_dim is None
        return spec.heads(self.level.channels, self.num_heads() if says_nothing else 1)

    def _block(self, module: type[nn.Module]) -> type[nn.Module]:
        return nn.remat(module) if self.config.remat else module

    def res_block(
        self,
        name: str,
        *,
        resample: Literal["down", "up", "fir_down", "fir_up"] | None = None,
        norm_groups_in: int | None = None,
    ) -> nn.Module:
        """A residual block of this level's width."""
        config, level = self.config, self.level
        return self._block(ResBlock)(
            channels=level.channels,
            norm_groups=self.norm_groups,
            norm_eps=config.norm_eps,
            dropout=config.dropout,
            scale_shift=config.scale_shift,
            resample=resample,
            act=config.act,
            time_act=level.time_act,
            out_scale=level.out_scale,
            norm_groups_in=norm_groups_in,
            name=name,
            **self.types(),
        )

    def attend(self, name: str, h: Array, cond: Condition, *, place: int = 0) -> Array:
        """This level's attention, if it has any.

        Args:
          name: of the module.
          h: [B, H, W, C].
          cond: its tokens, token_mask and grounding are read as the level's attention says.
          place: number of the residual block that it follows.

        Returns:
          [B, H, W, C].
        """
        spec, config = self.level.attention, self.config
        implementation = config.attention_implementation
        options = {"name": name, **self.types()}
        if not spec:
            return h
        if isinstance(spec, SpatialTransformer):
            transformer = self._block(SpatialTransformerBlock)(
                spec,
                self.heads(spec),
                spec.depth_at(place),
                self.norm_groups,
                implementation,
                **options,
            )
            return transformer(h, cond.tokens, cond.token_mask, cond.grounding)
        if isinstance(spec, TextAttention):
            text = self._block(TextAttentionBlock)(
                spec, self.heads(spec), self.norm_groups, implementation, **options
            )
            return text(h, cond.tokens, cond.token_mask)
        spec = PixelAttention(self.num_heads()) if spec is True else spec
        pixels = self._block(AttentionBlock)(
            spec.num_heads,
            spec.norm_groups or self.norm_groups,
            config.norm_eps,
            GroupNorm if spec.norm else None,
            spec.head_dim,
            self.level.out_scale,
            implementation,
            **options,
        )
        return pixels(h)


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
    def __call__(
        self, h: Array, emb: Array, cond: Condition, image: Array, *, keys: Key | None
    ) -> tuple[Array, list[Array], Array]:
        """Applies the blocks.

        Args:
          h: [B, H, W, C].
          emb: [B, E].
          cond: what attention reads.
          image: [B, H, W, C_x] the input at this resolution, which a pyramid reads.
          keys: [B] or None.

        Returns:
          [B, H', W', channels], the skips, and the input at the new resolution.
        """
        skips = []
        for j in range(self.level.num_blocks):
            h = self.res_block(f"res_{j}")(h, emb, keys)
            h = self.attend(f"attn_{j}", h, cond, place=j)
            skips.append(h)
        if self.last:
            return h, skips, image
        if self.resample == "block":
            h = self.res_block("downsample", resample="down")(h, emb, keys)
        elif self.resample == "pool":
            h = average_pool(h)
        elif self.resample == "pyramid":
            h = self.res_block("downsample", resample="fir_down")(h, emb, keys)
            image = fir_downsample(image)
            seen = Dense(self.level.channels, name="image", **self.types())
            h = h + seen(image)
        else:
            padding = self.config.downsample_padding
            h = Downsample(padding, name="downsample", **self.types())(h)
        return h, [*skips, h], image


class Middle(Part):
    """The bottom: a residual block, attention, a residual block."""

    @nn.compact
    def __call__(self, h: Array, emb: Array, cond: Condition, keys: Key | None) -> Array:
        """h: [B, H, W, C], emb: [B, E], keys: [B] or None -> [B, H, W, C]."""
        for j in range(self.level.num_blocks):
            h = self.res_block(f"res_{j}")(h, emb, keys)
            if j == 0:
                h = self.attend("attn", h, cond)
        return h


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

    def embed(self, t: Array, cond: Condition) -> Array:
        """The time and cond.vector as one embedding, [B] -> [B, E]."""
        config = self.config
        emb = TimeEmbedding(
            config.time_features,
            config.time_channels or config.levels[0].channels,
            config.embed_dim,
            self.param_dtype,
            config.outer_act or config.act,
            config.time_act_last,
            name="time_embed",
        )(t, cond.time)
        emb = with_vector(emb, cond, concat=config.concat_vector)
        return emb if config.embed_act is None else ACTIVATIONS[config.embed_act](emb)

    def encode(
        self, x: Array, t: Array, cond: Condition, *, keys: Key | None
    ) -> tuple[Array, list[Array], Array]:
        """Everything up to the bottom; to be called once, inside of a compact method.

        Args:
          x: [B, H, W, C] noisy images; H and W multiples of 2^(levels - 1), or any where
            convolutions change the resolution.
          t: [B].
          cond: vector [B, embed_dim], image [B, H, W, C'], and what the levels attend to.
          keys: [B] or None.

        Returns:
          The bottom [B, H', W', C'], every output on the way down [B, H_j, W_j, C_j] and the
          embedding [B, E].

        Raises:
          ValueError: if x is no image of a fitting size.
        """
        config = self.config
        _check_size(x, config)
        emb = self.embed(t, cond)
        image = with_image(2.0 * x - 1.0 if config.center_input else x, cond)
        conv_in = Conv(
            config.levels[0].channels,
            (config.conv_in_kernel, config.conv_in_kernel),
            padding=(config.conv_in_kernel - 1) // 2,
            kernel_init=default_init,
            name="conv_in",
            **self.types(),
        )
        h = conv_in(image)
        skips = [h]
        for i, level in enumerate(config.levels):
            last = i == len(config.levels) - 1
            down = DownLevel(config, level, last=last, name=f"down_{i}", **self.types())
            h, made, image = down(h, emb, cond, image, keys=keys)
            skips += made
        if config.middle is not None:
            h = Middle(config, config.middle, name="mid", **self.types())(h, emb, cond, keys)
        return h, skips, emb


def _check_size(x: Array, config: EncoderConfig) -> None:
    """Raises ValueError unless x is [B, H, W, C] and can be halved as often as there are levels."""
    if x.ndim != 4:
        raise ValueError(f"x must be images of shape [B, H, W, C], got {x.shape}")
    factor = 2 ** (len(config.levels) - 1)
    # A convolution takes any size, and the way up takes that of the skip.
    if set(config.resamplings()) <= {"conv"}:
        return
    if x.shape[1] % factor or x.shape[2] % factor:
        raise ValueError(
            f"height and width must be multiples of {factor}, since the network has "
            f"{len(config.levels)} levels, got {x.shape[1]} x {x.shape[2]}"
        )
