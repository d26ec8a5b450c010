"""The pre-norm transformer over tokens: its block, its embeddings, and what an encoder returns."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.core.types import Array
from diffusion_jax.models.attention import Attention
from diffusion_jax.models.blocks import ACTIVATIONS, default_init
from diffusion_jax.models.inputs import at_least_one
from diffusion_jax.models.layers import Dense, LayerNorm


def quick_gelu(x: Array) -> Array:
    """x · sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with.

    Source: Hendrycks & Gimpel 2016 (arXiv:1606.08415), section 2.
    """
    return x * jax.nn.sigmoid(1.702 * x)


# "gelu" is x · Φ(x), "gelu_tanh" its approximation with tanh.
MLP_ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    **ACTIVATIONS,
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
}


class Encoded(NamedTuple):
    """What an encoder says about a sequence of tokens.

    Attributes:
      last: [B, N, C] the encoder's result, token by token.
      hidden: num_layers + 1 arrays [B, N, C]: what enters each block, and what leaves the last,
        no final norm applied. hidden[-2] is the penultimate layer. Under jit a caller who does
        not return them does not pay for them.
      pooled: [B, C] one vector for all; None where an encoder has none.
      projected: [B, D] the pooled vector in the space that texts and images share; None
        without a projection to it.
    """

    last: Array
    hidden: tuple[Array, ...]
    pooled: Array | None = None
    projected: Array | None = None


def check_tokens(ids: Array, mask: Array | None, length: int | None) -> None:
    """Raises ValueError unless ids are integers [B, N], N <= length, and mask bool [B, N]."""
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids must be integers [B, N], got {ids.dtype} of shape {ids.shape}")
    if length is not None and ids.shape[1] > length:
        raise ValueError(
            f"this encoder has {length} positions, got texts of {ids.shape[1]} tokens; "
            "cut them in the tokenizer"
        )
    if mask is not None and (mask.shape != ids.shape or mask.dtype != jnp.bool_):
        raise ValueError(
            f"mask must be bool of shape {ids.shape} as ids, True where a token may be attended "
            f"to, got {mask.dtype} of shape {mask.shape}"
        )


def check_architecture(config, *positive: str) -> None:
    """Raises ValueError unless these fields are at least 1 and the activation is known."""
    at_least_one(config, *positive)
    if config.activation not in MLP_ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {sorted(MLP_ACTIVATIONS)}, got {config.activation!r}"
        )


def layer_norm(eps: float, name: str, *, dtype: jnp.dtype, param_dtype: jnp.dtype) -> LayerNorm:
    """Layer norm with float32 statistics.

    Args:
      eps: added to the variance.
      name: of the module.
      dtype: dtype of the result.
      param_dtype: dtype of the parameters.
    """
    # Two passes: E[x²] - E[x]² loses the small variance of a token with a large mean.
    options = {"dtype": dtype, "param_dtype": param_dtype}
    return LayerNorm(epsilon=eps, use_fast_variance=False, name=name, **options)


class TokenEmbed(nn.Module):
    """The row of a table for each token; a number outside of the table gives NaN.

    Attributes:
      vocab_size: rows.
      features: width of a row.
      std: standard deviation of new rows.
      dtype: dtype of the result.
      param_dtype: dtype of the table.
    """

    vocab_size: int
    features: int
    std: float = 0.02
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        """ids: [B, N] -> [B, N, features]."""
        init, shape = nn.initializers.normal(self.std), (self.vocab_size, self.features)
        table = self.param("embedding", init, shape, self.param_dtype)
        rows = jnp.asarray(table).at[ids].get(mode="fill", wrap_negative_indices=False)
        # Rows are taken before the cast, which would otherwise copy the whole table.
        return rows.astype(self.dtype)


class PreNormBlock(nn.Module):
    """Attention and a feed-forward network, each behind a layer norm and as a residual.

    h = x + attention(norm_1(x)),  y = h + dense_2(act(dense_1(norm_2(h)))).

    Attributes:
      num_heads: of the attention.
      mlp_width: width inside of the feed-forward network.
      activation: a key of `MLP_ACTIVATIONS`.
      norm_eps: epsilon of both norms.
      head_dim: width of a head; None for the width of the tokens / num_heads.
      qkv_bias: biases of the projections to queries, keys and values.
      dtype: dtype of activations; norms and softmax stay float32.
      param_dtype: dtype of the parameters.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.1; Radford et al. 2019, section 2.3,
    for the order.
    """

    num_heads: int
    mlp_width: int
    activation: str = "gelu"
    norm_eps: float = 1e-5
    head_dim: int | None = None
    qkv_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Applies the block.

        Args:
          x: [B, N, C].
          mask: bool, broadcastable to [B, H, N, N]; True where a token may attend.

        Returns:
          [B, N, C].
        """
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = {"kernel_init": default_init, **types}
        attention = Attention(
            self.num_heads,
            head_dim=self.head_dim,
            qkv_bias=self.qkv_bias,
            name="attention",
            **types,
        )
        x = x + attention(layer_norm(self.norm_eps, "norm_1", **types)(x), mask=mask)
        h = layer_norm(self.norm_eps, "norm_2", **types)(x)
        h = MLP_ACTIVATIONS[self.activation](Dense(self.mlp_width, name="dense_1", **dense)(h))
        return x + Dense(x.shape[-1], name="dense_2", **dense)(h)
