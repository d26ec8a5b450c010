"""The gated feed-forward network of transformer blocks."""

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.core.types import Array, Key
from diffusion_jax.models.blocks import Dropout, default_init


class GEGLU(nn.Module):
    """Feed-forward network whose hidden units are gated by a GELU of as many others.

    out(h · gelu(g)),  [h, g] = in(x), with the exact GELU x · Φ(x).

    Attributes:
      factor: hidden width as a multiple of the width of x.
      dropout: rate of the hidden units, in [0, 1).
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.

    Source: Shazeer 2020 (arXiv:2002.05202), eq. 6.
    """

    factor: int = 4
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, keys: Key | None = None) -> Array:
        """x: [B, N, C], keys: [B] or None -> [B, N, C]."""
        width = x.shape[-1]
        options = {
            "kernel_init": default_init,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        h = nn.Dense(2 * self.factor * width, name="in", **options)(x)
        h, gate = jnp.split(h, 2, axis=-1)
        h = Dropout(self.dropout, name="dropout")(h * nn.gelu(gate, approximate=False), keys)
        return nn.Dense(width, name="out", **options)(h)
