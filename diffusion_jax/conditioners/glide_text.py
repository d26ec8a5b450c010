"""GLIDE's text as tokens and a vector, by an encoder that learns with the denoising network."""

import jax
import jax.numpy as jnp

from diffusion_jax.conditioners.base import Conditioner
from diffusion_jax.core.condition import Condition
from diffusion_jax.models.inputs import DType
from diffusion_jax.models.text_transformer import TextTransformerConfig


def glide_text(config: TextTransformerConfig, *, dtype: DType = jnp.float32) -> Conditioner:
    """Encodes `batch["tokens"]` [B, L] integers with `batch["token_mask"]` [B, L] bool.

    The network attends to all L tokens, to padding as well, so `token_mask` stays empty. The
    null condition is the encoding of the empty text, all padding.

    Args:
      config: the encoder; its vector_dim is the network's embed_dim.
      dtype: of the activations, a dtype or its name.

    Returns:
      A conditioner that fills `tokens` [B, L, width] and `vector` [B, vector_dim].

    Raises:
      ValueError: at use, if tokens or mask are missing or of another shape or type.

    Source: Nichol et al. 2021 (arXiv:2112.10741), section 4.1; section 2.3 for the null.
    """
    module = config.build(dtype=dtype)

    def init(key):
        shape = (1, config.length)
        return module.init(key, jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool))["params"]

    def encode(params, ids, mask):
        tokens, vector = module.apply({"params": params}, ids, mask)
        return Condition(tokens=tokens, vector=vector)

    def apply(params, batch, keys):
        del keys
        missing = [name for name in ("tokens", "token_mask") if name not in batch]
        if missing:
            raise ValueError(f"the batch has no {missing[0]!r}, only {sorted(batch)}")
        return encode(params, batch["tokens"], batch["token_mask"])

    def null(params, batch):
        size = batch["tokens"].shape[0]
        ids = jnp.full((1, config.length), config.vocab_size - 1, jnp.int32)
        cond = encode(params, ids, jnp.zeros((1, config.length), bool))
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (size, *a.shape[1:])), cond)

    return Conditioner(init, apply, null)
