"""The text encoder that latent diffusion trains with its denoising network."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.core.types import Array
from diffusion_jax.models.blocks import default_init
from diffusion_jax.models.inputs import DType
from diffusion_jax.models.layers import Dense
from diffusion_jax.models.pre_norm import (
    Encoded,
    PreNormBlock,
    TokenEmbed,
    check_architecture,
    check_tokens,
    layer_norm,
)


@dataclass(frozen=True)
class LDMBertConfig:
    """A text encoder; the default is that of latent diffusion's text-to-image model.

    Attributes:
      vocab_size: tokens are 0 … vocab_size - 1.
      length: most tokens of a text.
      width: of the tokens.
      num_layers: blocks of attention and feed-forward network.
      num_heads: heads of the attention.
      head_dim: width of a head; all heads together may be narrower or wider than a token.
      mlp_width: width inside of the feed-forward networks.
      activation: of the feed-forward networks.
      logits: keep the projection to the vocabulary that released weights hold. Encoding never
        reads it; it is there so that a file can be written as it was read.

    Raises:
      ValueError: if a number is out of range.
    """

    vocab_size: int = 30522
    length: int = 77
    width: int = 1280
    num_layers: int = 32
    num_heads: int = 8
    head_dim: int = 64
    mlp_width: int = 5120
    activation: str = "gelu"
    logits: bool = True

    def __post_init__(self):
        sizes = ("vocab_size", "length", "width", "num_layers", "num_heads", "head_dim")
        check_architecture(self, *sizes, "mlp_width")

    def build(self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32) -> "LDMBert":
        """The module, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return LDMBert(self, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))


class LDMBert(nn.Module):
    """Encodes texts; every token sees every other, padding included unless it is masked.

    Attributes:
      config: the architecture.
      dtype: dtype of activations; norms and softmax stay float32.
      param_dtype: dtype of the parameters.

    Source: Rombach et al. 2022 (arXiv:2112.10752), section 4.3.1 and appendix E.2.1.
    """

    config: LDMBertConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Array, mask: Array | None = None) -> Encoded:
        """Encodes.

        Args:
          ids: [B, N] integers, the numbers of the tokens; N at most `config.length`.
          mask: [B, N] bool, True where a token may be attended to; None for all of them, as
            the released model was trained.

        Returns:
          `last` [B, N, C] behind the final norm; nothing is pooled.

        Raises:
          ValueError: if a shape or a type does not fit.
        """
        config = self.config
        check_tokens(ids, mask, config.length)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init, shape = nn.initializers.normal(0.02), (config.length, config.width)
        position = self.param("position", init, shape, self.param_dtype)
        embed = TokenEmbed(config.vocab_size, config.width, name="token_embed", **types)
        hidden = [embed(ids) + position[None, : ids.shape[1]].astype(self.dtype)]
        allowed = None if mask is None else mask[:, None, None, :]
        for i in range(config.num_layers):
            block = PreNormBlock(
                config.num_heads,
                config.mlp_width,
                config.activation,
                head_dim=config.head_dim,
                qkv_bias=False,
                name=f"block_{i}",
                **types,
            )
            hidden.append(block(hidden[-1], allowed))
        last = layer_norm(1e-5, "norm_out", **types)(hidden[-1])
        if config.logits and self.is_initializing():
            Dense(config.vocab_size, kernel_init=default_init, name="logits", **types)(last)
        return Encoded(last, tuple(hidden))
