"""Small networks that make vectors and tokens of what a network is told."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.core.types import Array
from diffusion_jax.models.attention import dot_product_attention
from diffusion_jax.models.blocks import ACTIVATIONS, default_init
from diffusion_jax.models.layers import Conv, Dense, LayerNorm
from diffusion_jax.models.pre_norm import layer_norm


class _Embedding(nn.Module):
    """What the embeddings have in common.

    Attributes:
      features: width of the result.
      dtype: dtype of activations; norm statistics and softmax stay float32.
      param_dtype: dtype of the parameters.
    """

    features: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def types(self):
        """Arguments that every module takes."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def dense(self, name: str, features: int | None = None, *, bias: bool = True) -> Dense:
        """A linear layer, to the width of the result unless another is given."""
        return Dense(
            features or self.features, bias, kernel_init=default_init, name=name, **self.types()
        )

    def norm(self, name: str) -> LayerNorm:
        """A layer norm, with statistics in float32."""
        return layer_norm(1e-5, name, **self.types())


class LinearEmbedding(_Embedding):
    """W x + b.

    Attributes:
      features: width of the result.
      bias: whether there is a b.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.
    """

    bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [..., F] -> [..., features]."""
        return self.dense("dense", bias=self.bias)(x)


class MLPEmbedding(_Embedding):
    """Two linear layers with an activation between them.

    Attributes:
      features: width of the hidden layer and of the result.
      act: a key of `ACTIVATIONS`.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.
    """

    act: str = "silu"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, F] -> [B, features]."""
        return self.dense("dense_2")(ACTIVATIONS[self.act](self.dense("dense_1")(x)))


class PooledTokens(_Embedding):
    """One vector of a text: the mean token, plus a learned position, asks all tokens and itself.

    Attributes:
      features: width of the result.
      num_heads: attention heads; must divide the width of the tokens.
      dtype: dtype of activations; norm statistics and softmax stay float32.
      param_dtype: dtype of the parameters.

    Source: Saharia et al. 2022 (arXiv:2205.11487), section 2.4, and DeepFloyd IF's released code.
    """

    num_heads: int = 64

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """tokens: [B, L, D] -> [B, features]."""
        width = tokens.shape[-1]
        if width % self.num_heads:
            raise ValueError(
                f"the width of the tokens must be a multiple of num_heads = {self.num_heads}, "
                f"got {width}"
            )
        tokens = self.norm("norm_in")(tokens)
        init = nn.initializers.normal(width**-0.5)
        position = self.param("position", init, (1, width), self.param_dtype)
        first = tokens.mean(1, keepdims=True) + position.astype(self.dtype)[None]
        tokens = jnp.concatenate([first, tokens], axis=1)

        def heads(name, x):
            h = self.dense(name, width)(x)
            return h.reshape((*h.shape[:2], self.num_heads, width // self.num_heads))

        q, k, v = heads("query", first), heads("key", tokens), heads("value", tokens)
        pooled = dot_product_attention(q, k, v).reshape(tokens.shape[0], width)
        return self.norm("norm_out")(self.dense("proj")(pooled))


class TextImageEmbedding(_Embedding):
    """LN(W_text text) + W_image image.

    Attributes:
      features: width of the result.
      dtype: dtype of activations; norm statistics stay float32.
      param_dtype: dtype of the parameters.

    Source: Kandinsky 2.1's released code.
    """

    @nn.compact
    def __call__(self, text: Array, image: Array) -> Array:
        """text: [B, D], image: [B, D'] -> [B, features]."""
        return self.dense("image_proj")(image) + self.norm("norm")(self.dense("text_proj")(text))


class ImageEmbedding(_Embedding):
    """LN(W image).

    Attributes:
      features: width of the result.
      dtype: dtype of activations; norm statistics stay float32.
      param_dtype: dtype of the parameters.

    Source: Kandinsky 2.2's released code.
    """

    @nn.compact
    def __call__(self, image: Array) -> Array:
        """image: [B, D] -> [B, features]."""
        return self.norm("norm")(self.dense("image_proj")(image))


class ImageTokens(_Embedding):
    """LN(W image), cut into tokens.

    Attributes:
      features: width of a token.
      num_tokens: tokens of an image.
      dtype: dtype of activations; norm statistics stay float32.
      param_dtype: dtype of the parameters.

    Source: Kandinsky 2.2's released code.
    """

    num_tokens: int = 32

    @nn.compact
    def __call__(self, image: Array) -> Array:
        """image: [B, D] -> [B, num_tokens, features]."""
        tokens = self.dense("image_proj", self.num_tokens * self.features)(image)
        return self.norm("norm")(tokens.reshape(image.shape[0], self.num_tokens, self.features))


class TextImageTokens(_Embedding):
    """Tokens of an image, followed by those of a text.

    Attributes:
      features: width of a token.
      num_tokens: tokens of an image.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.

    Source: Kandinsky 2.1's released code.
    """

    num_tokens: int = 10

    @nn.compact
    def __call__(self, tokens: Array, image: Array) -> Array:
        """tokens: [B, L, D], image: [B, D'] -> [B, num_tokens + L, features]."""
        seen = self.dense("image_proj", self.num_tokens * self.features)(image)
        seen = seen.reshape(image.shape[0], self.num_tokens, self.features)
        return jnp.concatenate([seen, self.dense("text_proj")(tokens)], axis=1)


class HintEncoder(nn.Module):
    """Eight convolutions with SiLU between them, three of which halve the resolution.

    Attributes:
      widths: channels of every convolution but the last.
      features: channels of the result.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.

    Source: Zhang et al. 2023 (arXiv:2302.05543), section 3.3; widths of Kandinsky 2.2's released
    code.
    """

    widths: Sequence[int] = (16, 16, 32, 32, 96, 96, 256)
    features: int = 4
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hint: Array) -> Array:
        """hint: [B, 8H, 8W, 3] -> [B, H, W, features]."""
        h = hint
        for i, width in enumerate((*self.widths, self.features)):
            h = Conv(
                width,
                (3, 3),
                strides=2 if i in (2, 4, 6) else 1,
                padding=1,
                kernel_init=default_init,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f"conv_{i}",
            )(h)
            h = nn.silu(h) if i < len(self.widths) else h
        return h
