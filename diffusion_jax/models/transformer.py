"""Transformer blocks between the convolutions of a UNet, as in latent diffusion."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.core.condition import Grounding
from diffusion_jax.core.types import Array
from diffusion_jax.models.attention import Attention, Implementation
from diffusion_jax.models.blocks import GroupNorm, default_init, zeros_init
from diffusion_jax.models.feed_forward import GEGLU
from diffusion_jax.models.gated_attention import FUSERS
from diffusion_jax.models.inputs import at_least_one
from diffusion_jax.models.layers import Dense
from diffusion_jax.models.pre_norm import layer_norm


@dataclass(frozen=True)
class SpatialTransformer:
    """Transformer blocks over pixels, which attend to each other and to tokens.

    Attributes:
      num_heads: heads; with neither this nor head_dim those of the network.
      head_dim: width of a head; at most one of num_heads and head_dim may be given.
      depth: transformer blocks in each place, or their numbers in the level's places in turn.
      tokens_only: the first attention of a block is to the tokens too. (It heeds the mask of the
        tokens, as diffusers' does not.)
      fuser: GLIGEN's adapter in every block, a key of `FUSERS`; None without.

    Raises:
      ValueError: if a value is out of range.
    """

    num_heads: int | None = None
    head_dim: int | None = None
    depth: int | tuple[int, ...] = 1
    tokens_only: bool = False
    fuser: str | None = None

    def __post_init__(self):
        at_least_one(self, "num_heads", "head_dim")
        if self.num_heads is not None and self.head_dim is not None:
            raise ValueError(
                "give num_heads or head_dim or neither, "
                f"got num_heads = {self.num_heads} and head_dim = {self.head_dim}"
            )
        depths = self.depth if isinstance(self.depth, tuple) else (self.depth,)
        if not depths or any(depth < 1 for depth in depths):
            raise ValueError(f"every depth must be at least 1, got {self.depth}")
        if self.fuser is not None and self.fuser not in FUSERS:
            raise ValueError(f"fuser must be None or one of {list(FUSERS)}, got {self.fuser!r}")

    def depth_at(self, index: int) -> int:
        """Number of transformer blocks in the level's place number `index`."""
        return self.depth[index] if isinstance(self.depth, tuple) else self.depth

    def heads(self, channels: int, num_heads: int) -> int:
        """Number of heads at a width.

        Args:
          channels: width of the pixels.
          num_heads: number of heads where this specification says nothing.

        Raises:
          ValueError: if the width is too small for a head.
        """
        number = channels // self.head_dim if self.head_dim else self.num_heads or num_heads
        if not 1 <= number <= channels:
            raise ValueError(
                f"channels = {channels} cannot be split into heads with num_heads = {number}, "
                f"head_dim = {self.head_dim}"
            )
        return number


class TransformerBlock(nn.Module):
    """Attention of the pixels to each other, to the tokens, and a feed-forward network.

    x ← x + Attn(LN(x)),  x ← fuser(x),  x ← x + Attn(LN(x), tokens),  x ← x + GEGLU(LN(x)).

    Attributes:
      num_heads: attention heads.
      head_dim: width of a head.
      tokens_only: the first attention is to the tokens too.
      fuser: GLIGEN's adapter, a key of `FUSERS`; None without.
      implementation: of the attention, see `dot_product_attention`.
      dtype: dtype of activations; norm statistics and softmax stay float32.
      param_dtype: dtype of the parameters.

    Source: Rombach et al. 2022 (arXiv:2112.10752), table 15; Li et al. 2023 (arXiv:2301.07093),
    eq. 8 for the fuser.
    """

    num_heads: int
    head_dim: int
    tokens_only: bool = False
    fuser: str | None = None
    implementation: Implementation | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        tokens: Array,
        mask: Array | None = None,
        grounding: Grounding | None = None,
    ) -> Array:
        """Applies the block.

        Args:
          x: [B, N, C] pixels.
          tokens: [B, L, D].
          mask: [B, L] bool, True where a token may be attended to; None for all.
          grounding: what the fuser reads; None skips it.

        Returns:
          [B, N, C].
        """
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        mask = None if mask is None else mask[:, None, None, :]

        def normed(name):
            return layer_norm(1e-5, name, **types)(x)

        def attention(name):
            return Attention(
                self.num_heads,
                head_dim=self.head_dim,
                qkv_bias=False,
                implementation=self.implementation,
                name=name,
                **types,
            )

        if self.tokens_only:
            x = x + attention("attn_1")(normed("norm_1"), tokens, mask=mask)
        else:
            x = x + attention("attn_1")(normed("norm_1"))
        if self.fuser is not None and grounding is not None:
            fuser = FUSERS[self.fuser](
                self.num_heads, self.head_dim, self.implementation, name="fuser", **types
            )
            x = fuser(x, grounding.objects, grounding.gate)
        x = x + attention("attn_2")(normed("norm_2"), tokens, mask=mask)
        return x + GEGLU(name="ff", **types)(normed("norm_3"))


class SpatialTransformerBlock(nn.Module):
    """Transformer blocks over all pixels of an image, as a residual.

    The last projection starts at zero, so that a new block is the identity.

    Attributes:
      spec: what kind of blocks.
      num_heads: attention heads.
      depth: number of transformer blocks.
      norm_groups: groups of the norm of the pixels.
      implementation: of the attention, see `dot_product_attention`.
      dtype: dtype of activations; norm statistics and softmax stay float32.
      param_dtype: dtype of the parameters.

    Source: Rombach et al. 2022 (arXiv:2112.10752), appendix E.2.1.
    """

    spec: SpatialTransformer
    num_heads: int
    depth: int
    norm_groups: int | None
    implementation: Implementation | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        tokens: Array,
        mask: Array | None = None,
        grounding: Grounding | None = None,
    ) -> Array:
        """Applies the blocks.

        Args:
          x: [B, H, W, C].
          tokens: [B, L, D].
          mask: [B, L] bool, True where a token may be attended to; None for all.
          grounding: what GLIGEN's fusers read; None skips them.

        Returns:
          [B, H, W, C].
        """
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, height, width, channels = x.shape
        # Released networks round down where the heads do not divide the width.
        head_dim = self.spec.head_dim or channels // self.num_heads
        h = GroupNorm(self.norm_groups, 1e-6, name="norm", **types)(x)
        h = h.reshape(batch, height * width, channels)
        inner = self.num_heads * head_dim
        h = Dense(inner, kernel_init=default_init, name="proj_in", **types)(h)
        for i in range(self.depth):
            block = TransformerBlock(
                self.num_heads,
                head_dim,
                self.spec.tokens_only,
                self.spec.fuser,
                self.implementation,
                name=f"block_{i}",
                **types,
            )
            h = block(h, tokens.astype(self.dtype), mask, grounding)
        h = Dense(channels, kernel_init=zeros_init, name="proj_out", **types)(h)
        return x.astype(self.dtype) + h.reshape(x.shape)
