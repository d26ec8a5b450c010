"""GLIDE's text encoder: a transformer without causal mask, trained with the denoising network."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.core.types import Array
from diffusion_jax.models.blocks import default_init
from diffusion_jax.models.inputs import DType, at_least_one
from diffusion_jax.models.layers import Dense
from diffusion_jax.models.pre_norm import PreNormBlock, TokenEmbed, check_tokens, layer_norm


@dataclass(frozen=True)
class TextTransformerConfig:
    """A text encoder; the default is the one that GLIDE was released with.

    Attributes:
      vector_dim: width of the vector, the network's embed_dim.
      vocab_size: tokens are 0 … vocab_size - 1; the last is the end of a text and pads it.
      length: L, tokens of every text, padding included.
      width: of the tokens; a multiple of num_heads.
      num_layers: blocks of attention and feed-forward network.
      num_heads: heads of the attention.
      final_norm: a layer norm of the result.
      padding: learned embeddings, one for each position, instead of the tokens that are not
        text.

    Raises:
      ValueError: if a number is below 1 or the heads do not divide the width.
    """

    vector_dim: int = 768
    vocab_size: int = 50257
    length: int = 128
    width: int = 512
    num_layers: int = 16
    num_heads: int = 8
    final_norm: bool = True
    padding: bool = True

    def __post_init__(self):
        at_least_one(self, "vector_dim", "vocab_size", "length", "width", "num_layers", "num_heads")
        if self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of num_heads = {self.num_heads}, got {self.width}"
            )

    def build(
        self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32
    ) -> "TextTransformer":
        """The module, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return TextTransformer(self, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))


class TextTransformer(nn.Module):
    """Tokens and a vector of a text; every position attends to every other, padding included.

    The vector is a projection of the last position, which is padding in all but the longest
    texts.

    Attributes:
      config: the architecture.
      dtype: dtype of activations; norms and softmax stay float32.
      param_dtype: dtype of the parameters.

    Source: Nichol et al. 2021 (arXiv:2112.10741), section 4.1 and the released code.
    """

    config: TextTransformerConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Array, mask: Array | None = None) -> tuple[Array, Array]:
        """Encodes.

        Args:
          ids: [B, L] integers, the numbers of the tokens.
          mask: [B, L] bool, True where a token is text; None where all are. Other tokens are
            attended to all the same, as padding.

        Returns:
          Tokens [B, L, width] and the vector [B, vector_dim], of `dtype`.

        Raises:
          ValueError: if a shape or a type does not fit.
        """
        config = self.config
        _check(ids, mask, config.length)
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = TokenEmbed(config.vocab_size, config.width, name="token_embed", **options)
        shape, init = (config.length, config.width), nn.initializers.normal(0.01)
        h = embed(ids) + self._table("position", init, shape)
        if config.padding:
            padding = self._table("padding", init, shape)
            h = h if mask is None else jnp.where(mask[:, :, None], h, padding)
        for i in range(config.num_layers):
            h = PreNormBlock(config.num_heads, 4 * config.width, name=f"block_{i}", **options)(h)
        if config.final_norm:
            h = layer_norm(1e-5, "norm_out", **options)(h)
        vector = Dense(config.vector_dim, kernel_init=default_init, name="vector", **options)
        return h, vector(h[:, -1])

    def _table(self, name: str, init: nn.initializers.Initializer, shape: tuple[int, int]) -> Array:
        """[1, L, width]: one learned embedding for each position."""
        return self.param(name, init, shape, self.param_dtype).astype(self.dtype)[None]


def _check(ids: Array, mask: Array | None, length: int) -> None:
    check_tokens(ids, mask, None)
    if ids.shape[1] != length:
        raise ValueError(
            f"ids must have shape [B, {length}], since this encoder has {length} positions, "
            f"got {ids.shape}; pad or cut the texts"
        )
