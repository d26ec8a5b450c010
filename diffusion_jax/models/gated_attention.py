"""GLIGEN's adapters: gated attention to grounded objects, the identity when they are new.

A transformer block with an adapter applies it between its self- and its cross-attention, as
FUSERS[kind](num_heads, head_dim, name="fuser")(x, cond.grounding.objects, cond.grounding.gate),
and skips it where a condition has no grounding.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.core.resize import bicubic_resize
from diffusion_jax.core.types import Array
from diffusion_jax.models.attention import Attention, Implementation
from diffusion_jax.models.blocks import zeros_init
from diffusion_jax.models.feed_forward import GEGLU
from diffusion_jax.models.layers import Dense
from diffusion_jax.models.pre_norm import layer_norm


class _Gated(nn.Module):
    """What the adapters have in common: two residuals, each behind a learned gate.

    Attributes:
      num_heads: attention heads.
      head_dim: width of a head; None for the width of x / num_heads.
      implementation: of the attention, see `dot_product_attention`.
      dtype: dtype of activations; norm statistics and softmax are float32.
      param_dtype: dtype of the parameters.
    """

    num_heads: int
    head_dim: int | None = None
    implementation: Implementation | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def types(self) -> dict[str, Any]:
        """Arguments that every module takes."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def norm(self, name: str) -> nn.Module:
        """A layer norm, with statistics in float32."""
        return layer_norm(1e-5, name, **self.types())

    def attention(self) -> nn.Module:
        """The attention, whose projections to queries, keys and values have no biases."""
        return Attention(
            self.num_heads,
            head_dim=self.head_dim,
            qkv_bias=False,
            implementation=self.implementation,
            name="attn",
            **self.types(),
        )

    def gated(self, name: str, gate: Array, h: Array) -> Array:
        """gate · tanh(alpha) · h, with alpha the parameter of this name."""
        alpha = self.param(name, zeros_init, (), self.param_dtype)
        rate = gate.astype(jnp.float32) * jnp.tanh(alpha.astype(jnp.float32))
        return rate.astype(self.dtype)[:, None, None] * h

    def feed_forward(self, x: Array, gate: Array) -> Array:
        """x + gate · tanh(alpha_ff) · FF(LN(x))."""
        h = GEGLU(name="ff", **self.types())(self.norm("norm_ff")(x))
        return x + self.gated("alpha_ff", gate, h)


class GatedSelfAttention(_Gated):
    """Visual tokens attend to themselves and to grounded objects, behind gates that start at zero.

    x ← x + gate · tanh(α_attn) · SA(LN([x; P objects]))[:N],
    x ← x + gate · tanh(α_ff) · FF(LN(x)),  P a projection to the width of x.

    Both α start at 0, so that a new adapter is exactly the identity. Its first gradients reach
    the α alone.

    Attributes:
      num_heads: attention heads; must divide the width of x, unless head_dim is given.
      head_dim: width of a head; None for the width of x / num_heads.
      implementation: of the attention, see `dot_product_attention`.
      dtype: dtype of activations; norm statistics and softmax are float32.
      param_dtype: dtype of the parameters.

    Source: Li et al. 2023 (arXiv:2301.07093), eq. 8; the gated feed-forward network is that of
    the released code.
    """

    @nn.compact
    def __call__(self, x: Array, objects: Array, gate: Array) -> Array:
        """Applies the adapter.

        Args:
          x: [B, N, C] visual tokens.
          objects: [B, M, D] grounding tokens. Unused slots hold the learned null token and are
            attended to, as in the released weights.
          gate: [B] multiplier in [0, 1] for scheduled sampling; 0 makes the identity.

        Returns:
          [B, N, C] of `dtype`.

        Raises:
          ValueError: if the shapes do not fit.
        """
        _check(x, objects, gate)
        x = x.astype(self.dtype)
        objects = Dense(x.shape[-1], name="object_proj", **self.types())(objects)
        h = self.norm("norm_attn")(jnp.concatenate([x, objects], axis=1))
        # Queries from objects would be discarded afterwards, so they are never made.
        h = self.attention()(h[:, : x.shape[1]], h)
        return self.feed_forward(x + self.gated("alpha_attn", gate, h), gate)


class ResizedGatedSelfAttention(_Gated):
    """Like `GatedSelfAttention`, but what is added is the objects' own result, resized.

    x ← x + gate · tanh(α_attn) · resize(SA(LN([x; P objects]))[N:]),
    x ← x + gate · tanh(α_ff) · FF(LN(x)).

    For objects that are the tokens of a square map, such as depth or edges: their result is a
    map as well, which is resized bicubically to that of the visual tokens.

    Attributes:
      num_heads: attention heads; must divide the width of x, unless head_dim is given.
      head_dim: width of a head; None for the width of x / num_heads.
      implementation: of the attention, see `dot_product_attention`.
      dtype: dtype of activations; norm statistics, softmax and the resizing are float32.
      param_dtype: dtype of the parameters.

    Source: Li et al. 2023 (arXiv:2301.07093), released code, fuser type gatedSA2.
    """

    @nn.compact
    def __call__(self, x: Array, objects: Array, gate: Array) -> Array:
        """Applies the adapter.

        Args:
          x: [B, N, C] visual tokens of a square map, row by row.
          objects: [B, M, D] grounding tokens of a square map, row by row.
          gate: [B] multiplier in [0, 1] for scheduled sampling; 0 makes the identity.

        Returns:
          [B, N, C] of `dtype`.

        Raises:
          ValueError: if the shapes do not fit, or N or M is no square.
        """
        _check(x, objects, gate)
        batch, num_visual, width = x.shape
        side, object_side = _side("visual", num_visual), _side("grounding", objects.shape[1])
        x = x.astype(self.dtype)
        objects = Dense(width, name="object_proj", **self.types())(objects)
        h = self.norm("norm_attn")(jnp.concatenate([x, objects], axis=1))
        h = self.attention()(h[:, num_visual:], h)
        h = bicubic_resize(h.reshape(batch, object_side, object_side, width), side, side)
        h = h.reshape(x.shape)
        return self.feed_forward(x + self.gated("alpha_attn", gate, h), gate)


class GatedCrossAttention(_Gated):
    """Visual tokens attend to grounded objects alone, behind gates that start at zero.

    x ← x + gate · tanh(α_attn) · CA(LN(x), objects),
    x ← x + gate · tanh(α_ff) · FF(LN(x)).

    Attributes:
      num_heads: attention heads; must divide the width of x, unless head_dim is given.
      head_dim: width of a head; None for the width of x / num_heads.
      implementation: of the attention, see `dot_product_attention`.
      dtype: dtype of activations; norm statistics and softmax are float32.
      param_dtype: dtype of the parameters.

    Source: Li et al. 2023 (arXiv:2301.07093), section 6.2, the ablation of gated self-attention;
    released code, fuser type gatedCA.
    """

    @nn.compact
    def __call__(self, x: Array, objects: Array, gate: Array) -> Array:
        """Applies the adapter.

        Args:
          x: [B, N, C] visual tokens.
          objects: [B, M, D] grounding tokens, unused slots with the learned null token.
          gate: [B] multiplier in [0, 1] for scheduled sampling; 0 makes the identity.

        Returns:
          [B, N, C] of `dtype`.

        Raises:
          ValueError: if the shapes do not fit.
        """
        _check(x, objects, gate)
        x = x.astype(self.dtype)
        h = self.attention()(self.norm("norm_attn")(x), objects)
        return self.feed_forward(x + self.gated("alpha_attn", gate, h), gate)


# Kind of adapter -> module; what "fuser_type" in released configurations chooses.
FUSERS: Mapping[str, type[_Gated]] = {
    "self": GatedSelfAttention,
    "self_resized": ResizedGatedSelfAttention,
    "cross": GatedCrossAttention,
}


def _check(x: Array, objects: Array, gate: Array) -> None:
    batch = x.shape[:1]
    fits = x.ndim == objects.ndim == 3 and gate.shape == batch == objects.shape[:1]
    if not fits:
        raise ValueError(
            "x must have shape [B, N, C], objects [B, M, D] and gate [B], "
            f"got x {x.shape}, objects {objects.shape} and gate {gate.shape}"
        )


def _side(name: str, count: int) -> int:
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"the {name} tokens must make a square map, got {count} of them")
    return side
