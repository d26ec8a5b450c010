"""Feed-forward networks of transformer blocks: gated, and what their hidden units compute."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.core.types import Array
from diffusion_jax.models.attention import TILE_BYTES
from diffusion_jax.models.blocks import ACTIVATIONS, default_init
from diffusion_jax.models.layers import Dense
from diffusion_jax.models.pre_norm import MLP_ACTIVATIONS


class HiddenUnits(NamedTuple):
    """What the hidden units of a feed-forward network compute of the layer before them.

    Attributes:
      inputs: numbers that a unit reads; a gated one reads two.
      apply: [..., inputs · N] -> [..., N].
    """

    inputs: int
    apply: Callable[[Array], Array]


def _gated(activation: Callable[[Array], Array]) -> HiddenUnits:
    def apply(x):
        h, gate = jnp.split(x, 2, axis=-1)
        return h * activation(gate)

    return HiddenUnits(2, apply)


HIDDEN_UNITS: Mapping[str, HiddenUnits] = {
    **{name: HiddenUnits(1, activation) for name, activation in MLP_ACTIVATIONS.items()},
    "geglu": _gated(ACTIVATIONS["gelu"]),
    "swiglu": _gated(ACTIVATIONS["silu"]),
}


class GEGLU(nn.Module):
    """Feed-forward network whose hidden units are gated by a GELU of as many others.

    out(h · gelu(g)),  [h, g] = in(x), with the exact GELU x · Φ(x). On a CPU tokens whose hidden
    units would take more than 16 MiB go through in parts.

    Attributes:
      factor: hidden width as a multiple of the width of x.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.

    Source: Shazeer 2020 (arXiv:2002.05202), eq. 6.
    """

    factor: int = 4
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, N, C] -> [B, N, C]."""
        batch, length, width = x.shape
        tiles = 1 if self.is_initializing() else self._tiles(x.shape)
        if tiles == 1:
            return self._whole(x)
        parts = x.reshape(batch, tiles, length // tiles, width)
        scan = nn.scan(
            lambda module, _, part: (None, module._whole(part)),
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        return scan(self, None, parts)[1].reshape(x.shape)

    def _whole(self, x: Array) -> Array:
        width = x.shape[-1]
        options = {
            "kernel_init": default_init,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        h = Dense(2 * self.factor * width, name="in", **options)(x)
        return Dense(width, name="out", **options)(HIDDEN_UNITS["geglu"].apply(h))

    def _tiles(self, shape: tuple[int, ...]) -> int:
        """Parts of equal length that the tokens are cut into, as in `attention`; 1 for none."""
        if jax.default_backend() != "cpu":
            return 1
        batch, length, width = shape
        size = batch * length * 2 * self.factor * width * jnp.dtype(self.dtype).itemsize
        wanted = -(-size // TILE_BYTES)
        return next((n for n in range(wanted, 2 * wanted) if length % n == 0), 1)
