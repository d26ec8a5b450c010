"""Attention of pixels to a text and to each other in one softmax."""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.core.types import Array
from diffusion_jax.models.attention import Implementation, dot_product_attention
from diffusion_jax.models.blocks import GroupNorm, default_init, zeros_init
from diffusion_jax.models.inputs import at_least_one
from diffusion_jax.models.layers import Dense
from diffusion_jax.models.pre_norm import layer_norm

TEXT_NORMS = (None, "layer", "group")


@dataclass(frozen=True)
class TextAttention:
    """Attention whose keys and values are those of the text, followed by those of the pixels.

    GLIDE, DeepFloyd IF and unCLIP's decoders have it wherever ADM has self-attention.

    Attributes:
      num_heads: heads; with neither this nor head_dim those of the network.
      head_dim: width of a head; at most one of num_heads and head_dim may be given.
      text_norm: norm of the text before its projection: "layer" of every token, "group" of
        all tokens together, None for none.
      text_norm_groups: groups of the norm "group"; must divide the width of the text.
      text_only: leave the keys and values of the pixels out.
      norm_eps: epsilon of both norms.

    Raises:
      ValueError: if a value is out of range.
    """

    num_heads: int | None = None
    head_dim: int | None = None
    text_norm: Literal["layer", "group"] | None = None
    text_norm_groups: int = 32
    text_only: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self):
        at_least_one(self, "num_heads", "head_dim", "text_norm_groups")
        if self.num_heads is not None and self.head_dim is not None:
            raise ValueError(
                "give num_heads or head_dim or neither, "
                f"got num_heads = {self.num_heads} and head_dim = {self.head_dim}"
            )
        if self.text_norm not in TEXT_NORMS:
            raise ValueError(f"text_norm must be one of {TEXT_NORMS}, got {self.text_norm!r}")
        if self.text_norm != "group" and self.text_norm_groups != TextAttention.text_norm_groups:
            raise ValueError(
                "text_norm_groups belongs to text_norm='group', "
                f"got {self.text_norm_groups} with {self.text_norm!r}"
            )

    def heads(self, channels: int, num_heads: int) -> int:
        """Number of heads at a width.

        Args:
          channels: width of the pixels.
          num_heads: number of heads where this specification says nothing.

        Raises:
          ValueError: if the width cannot be split as specified.
        """
        number = channels // self.head_dim if self.head_dim else self.num_heads or num_heads
        if channels % (self.head_dim or number):
            raise ValueError(
                f"channels = {channels} cannot be split into heads with num_heads = {number}, "
                f"head_dim = {self.head_dim}"
            )
        return number


class JointAttention(nn.Module):
    """softmax(q [k_text; k]ᵀ / √D) [v_text; v] for every head.

    Attributes:
      num_heads: must divide the width of the tokens that ask.
      text_only: leave k and v out.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.

    Source: Nichol et al. 2021 (arXiv:2112.10741), section 4.1.
    """

    num_heads: int
    text_only: bool = False
    implementation: Implementation | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, text: Array, mask: Array | None = None) -> Array:
        """Attends from x to the text and to x.

        Args:
          x: [B, N, C] tokens that ask.
          text: [B, L, D] tokens of the text.
          mask: [B, L] bool, True where a token of the text may be attended to.

        Returns:
          [B, N, C].
        """
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = x.shape[-1]

        def heads(name, tokens):
            h = Dense(width, kernel_init=default_init, name=name, **options)(tokens)
            return h.reshape(h.shape[:2] + (self.num_heads, width // self.num_heads))

        q, k, v = heads("query", x), heads("text_key", text), heads("text_value", text)
        if not self.text_only:
            k = jnp.concatenate([k, heads("key", x)], axis=1)
            v = jnp.concatenate([v, heads("value", x)], axis=1)
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (0, k.shape[1] - mask.shape[1])), constant_values=True)
            mask = mask[:, None, None, :]
        h = dot_product_attention(q, k, v, mask=mask, implementation=self.implementation)
        return Dense(width, kernel_init=zeros_init, name="out", **options)(h.reshape(x.shape))


class TextAttentionBlock(nn.Module):
    """Attention of all pixels of an image to a text and to each other, as a residual.

    The output projection starts at zero, so that a new block is the identity.

    Attributes:
      spec: what kind of attention.
      num_heads: number of heads where the specification says nothing.
      norm_groups: groups of the norm of the pixels.
      implementation: of the attention, see `dot_product_attention`.
      dtype: dtype of activations; norms and softmax stay float32.
      param_dtype: dtype of the parameters.

    Source: Nichol et al. 2021 (arXiv:2112.10741), section 4.1; Saharia et al. 2022
    (arXiv:2205.11487), section D.1 for the norm of the text.
    """

    spec: TextAttention
    num_heads: int
    norm_groups: int
    implementation: Implementation | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, tokens: Array, mask: Array | None = None) -> Array:
        """Applies the block.

        Args:
          x: [B, H, W, C].
          tokens: [B, L, D] of the text.
          mask: [B, L] bool, True where a token may be attended to; None for all. Where
            `spec.text_only`, every text must have such a token.

        Returns:
          [B, H, W, C].
        """
        spec = self.spec
        batch, height, width, channels = x.shape
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = GroupNorm(self.norm_groups, spec.norm_eps, name="norm", **options)(x)
        h = h.reshape(batch, height * width, channels)
        text = tokens.astype(self.dtype)
        if spec.text_norm == "layer":
            text = layer_norm(spec.norm_eps, "text_norm", **options)(text)
        elif spec.text_norm == "group":
            norm = GroupNorm(spec.text_norm_groups, spec.norm_eps, name="text_norm", **options)
            text = norm(text)
        num_heads = spec.heads(channels, self.num_heads)
        attention = JointAttention(
            num_heads, spec.text_only, self.implementation, name="attention", **options
        )
        return x.astype(self.dtype) + attention(h, text, mask).reshape(x.shape)
