"""T5's encoder: relative positions, RMS norms, attention without scale."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.types import Array
from diffusion_jax.models.inputs import DType
from diffusion_jax.models.layers import Dense
from diffusion_jax.models.pre_norm import (
    MLP_ACTIVATIONS,
    Encoded,
    TokenEmbed,
    check_architecture,
    check_tokens,
)


@dataclass(frozen=True)
class T5Config:
    """An encoder; the default is that of T5 1.1 small.

    Attributes:
      vocab_size: tokens are 0 … vocab_size - 1.
      width: of the tokens.
      num_layers: blocks of attention and feed-forward network.
      num_heads: heads of the attention.
      head_dim: width of a head; all heads together may be narrower or wider than a token.
      mlp_width: width inside of the feed-forward networks.
      activation: of the feed-forward networks, "gelu_tanh" in T5 1.1, "relu" in T5 1.0.
      gated: multiply what was activated by a second projection, as T5 1.1 does.
      num_buckets: sets of distances that share a bias of the attention, half of them for either
        direction.
      max_distance: distances from here on share the last set of their direction.
      norm_eps: epsilon of the norms.

    Raises:
      ValueError: if a number is out of range.
    """

    vocab_size: int = 32128
    width: int = 512
    num_layers: int = 8
    num_heads: int = 6
    head_dim: int = 64
    mlp_width: int = 1024
    activation: str = "gelu_tanh"
    gated: bool = True
    num_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6

    def __post_init__(self):
        sizes = ("vocab_size", "width", "num_layers", "num_heads", "head_dim", "mlp_width")
        check_architecture(self, *sizes)
        if self.num_buckets < 4:
            raise ValueError(f"num_buckets must be at least 4, got {self.num_buckets}")
        if self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"max_distance must exceed num_buckets // 4 = {self.num_buckets // 4}, below "
                f"which distances have buckets of their own, got {self.max_distance}"
            )

    def build(self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32) -> "T5Encoder":
        """The module, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return T5Encoder(self, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))


def _v1_1(width: int, num_layers: int, num_heads: int, mlp_width: int) -> T5Config:
    return T5Config(width=width, num_layers=num_layers, num_heads=num_heads, mlp_width=mlp_width)


# Released encoders by name; Imagen and DeepFloyd IF read "v1_1_xxl".
T5_ENCODERS: Mapping[str, T5Config] = {
    "v1_1_small": _v1_1(512, 8, 6, 1024),
    "v1_1_base": _v1_1(768, 12, 12, 2048),
    "v1_1_large": _v1_1(1024, 24, 16, 2816),
    "v1_1_xl": _v1_1(2048, 24, 32, 5120),
    "v1_1_xxl": _v1_1(4096, 24, 64, 10240),
}


def distance_buckets(length: int, *, num_buckets: int, max_distance: int) -> np.ndarray:
    """The set of distances to which each pair of places belongs.

    With n = num_buckets // 2 sets for either direction and e = n // 2, a distance d < e has a set
    of its own; beyond, set e + ⌊(n - e) · ln(d / e) / ln(max_distance / e)⌋, at most n - 1.
    Distances to later places are offset by n.

    Args:
      length: N, places.
      num_buckets: sets altogether.
      max_distance: distances from here on share the last set of their direction.

    Returns:
      [N, N] int32, for the place that asks (row) and the place that answers (column).

    Source: Raffel et al. 2020 (arXiv:1910.10683), section 2.1, with the bounds of the released
    code.
    """
    place = np.arange(length)
    offset = place[None, :] - place[:, None]
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    # In float32 as the released code, whose rounding decides on which side a bound falls.
    ratio = np.maximum(distance, exact).astype(np.float32) / np.float32(exact)
    share = np.log(ratio) / np.float32(math.log(max_distance / exact))
    far = exact + (share * np.float32(half - exact)).astype(np.int64)
    bucket = np.where(distance < exact, distance, np.minimum(far, half - 1))
    return (bucket + half * (offset > 0)).astype(np.int32)


class RMSNorm(nn.Module):
    """y = x / √(mean(x²) + eps) · scale, computed in float32.

    Attributes:
      eps: added to the mean square.
      dtype: dtype of the result.
      param_dtype: dtype of the scale.

    Source: Zhang & Sennrich 2019 (arXiv:1910.07467), eq. 4.
    """

    eps: float
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [..., C] -> [..., C] of `dtype`."""
        init = nn.initializers.ones_init()
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.eps)
        return (h * jnp.broadcast_to(scale, h.shape)).astype(self.dtype)


def _float32_dot(*args, **options):
    return jax.lax.dot_general(*args, **{**options, "preferred_element_type": jnp.float32})


def projection(
    name: str, features: int, fan_in: int, dtype: jnp.dtype, param_dtype: jnp.dtype
) -> Dense:
    """A projection without bias that multiplies in `dtype` and adds up in float32.

    Args:
      name: of the module.
      features: width of the result, which is float32.
      fan_in: new weights have the standard deviation fan_in^(-1/2).
      dtype: dtype of both factors.
      param_dtype: dtype of the weights.
    """
    return Dense(
        features,
        use_bias=False,
        kernel_init=nn.initializers.normal(fan_in**-0.5),
        dot_general=_float32_dot,
        dtype=dtype,
        param_dtype=param_dtype,
        name=name,
    )


class T5Block(nn.Module):
    """Attention and a feed-forward network, each behind an RMS norm and as a residual.

    The residual stream is float32 whatever `dtype`: it grows to thousands in the large
    encoders, where half precision would lose what the blocks add, or overflow.

    Attributes:
      config: the whole encoder.
      dtype: dtype of activations inside of the block; norms and softmax stay float32, and so does
        the last projection where dtype is float16.
      param_dtype: dtype of the parameters.

    Source: Raffel et al. 2020 (arXiv:1910.10683), section 2.1; Shazeer 2020 (arXiv:2002.05202),
    section 2, for the gate.
    """

    config: T5Config
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def norm(self, name: str) -> RMSNorm:
        """A norm of the residual stream."""
        return RMSNorm(self.config.norm_eps, self.dtype, self.param_dtype, name=name)

    @nn.compact
    def __call__(self, x: Array, bias: Array, mask: Array | None = None) -> Array:
        """Applies the block.

        Args:
          x: [B, N, C] float32.
          bias: [H, N, N] float32, added to the logits of the attention.
          mask: [B, N] bool, True where a token may be attended to.

        Returns:
          [B, N, C] float32.
        """
        config, types = self.config, (self.dtype, self.param_dtype)
        attention = T5Attention(config, *types, name="attention")
        x = x + attention(self.norm("norm_1")(x), bias, mask)
        h, act = self.norm("norm_2")(x), MLP_ACTIVATIONS[config.activation]
        up = projection("dense_1", config.mlp_width, config.width, *types)(h)
        if config.gated:
            up = act(projection("gate", config.mlp_width, config.width, *types)(h)) * up
        else:
            up = act(up)
        # What the large encoders multiply here is beyond the range of float16.
        wide = jnp.float32 if self.dtype == jnp.float16 else self.dtype
        down = projection("dense_2", config.width, config.mlp_width, wide, self.param_dtype)
        return x + down(up)


class T5Attention(nn.Module):
    """Attention whose logits are q·k plus a bias of the distance, with no scale.

    Attributes:
      config: the whole encoder.
      dtype: dtype of activations; the softmax and the result stay float32.
      param_dtype: dtype of the parameters.

    Source: Raffel et al. 2020 (arXiv:1910.10683), section 2.1.
    """

    config: T5Config
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, bias: Array, mask: Array | None = None) -> Array:
        """x: [B, N, C], bias: [H, N, N], mask: [B, N] bool or None -> [B, N, C] float32."""
        num_heads, head_dim = self.config.num_heads, self.config.head_dim
        width, inner = x.shape[-1], num_heads * head_dim
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def heads(name: str, fan_in: int) -> Array:
            init = nn.initializers.normal(fan_in**-0.5)
            h = Dense(inner, use_bias=False, kernel_init=init, name=name, **types)(x)
            return h.reshape((*x.shape[:2], num_heads, head_dim))

        # New queries are smaller by √head_dim, the scale that the logits do not have.
        q, k, v = heads("query", width * head_dim), heads("key", width), heads("value", width)
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        logits = logits + bias[None]
        if mask is not None:
            logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        h = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape((*x.shape[:2], inner))
        return projection("out", width, inner, self.dtype, self.param_dtype)(h)


class T5Encoder(nn.Module):
    """Encodes texts; every token sees every other, and only their distances matter.

    Attributes:
      config: the architecture.
      dtype: dtype of activations; norms, softmax and the residual stream stay float32.
      param_dtype: dtype of the parameters.

    Source: Raffel et al. 2020 (arXiv:1910.10683), section 2.1.
    """

    config: T5Config
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Array, mask: Array | None = None) -> Encoded:
        """Encodes.

        Args:
          ids: [B, N] integers, the numbers of the tokens; any N.
          mask: [B, N] bool, True where a token may be attended to, so False for padding; None
            for all of them.

        Returns:
          `last` [B, N, C] of `dtype` behind the final norm, `hidden` in float32; nothing is
          pooled.

        Raises:
          ValueError: if a shape or a type does not fit.
        """
        config = self.config
        check_tokens(ids, mask, None)
        embed = TokenEmbed(
            config.vocab_size,
            config.width,
            1.0,
            jnp.float32,
            self.param_dtype,
            name="token_embed",
        )
        bias = self._bias(ids.shape[1])
        hidden = [embed(ids)]
        for i in range(config.num_layers):
            block = T5Block(config, self.dtype, self.param_dtype, name=f"block_{i}")
            hidden.append(block(hidden[-1], bias, mask))
        norm = RMSNorm(config.norm_eps, self.dtype, self.param_dtype, name="norm_out")
        return Encoded(norm(hidden[-1]), tuple(hidden))

    def _bias(self, length: int) -> Array:
        """[H, N, N] float32, shared by all blocks."""
        config = self.config
        init, shape = (
            nn.initializers.normal(config.width**-0.5),
            (config.num_buckets, config.num_heads),
        )
        table = self.param("distance_bias", init, shape, self.param_dtype)
        buckets = distance_buckets(
            length, num_buckets=config.num_buckets, max_distance=config.max_distance
        )
        return jnp.moveaxis(table.astype(jnp.float32)[buckets], -1, 0)
