"""A small residual MLP over flattened data, for vectors and for quick work."""

import math
from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import Array, Key
from diffusion_jax.models.blocks import Dropout, default_init, zeros_init
from diffusion_jax.models.embeddings import Fourier, Sinusoidal, TimeEmbedding
from diffusion_jax.models.inputs import DType, check_inputs, with_image, with_vector
from diffusion_jax.models.layers import Dense, LayerNorm


@dataclass(frozen=True)
class TrunkConfig:
    """What the MLP and the MLP classifier have in common.

    Attributes:
      width: hidden width, also of the time embedding.
      depth: residual blocks.
      time_features: what the time embedding is made of.
      dropout: rate inside the blocks, in [0, 1).
      remat: recompute every block in the backward pass, for memory.

    Raises:
      ValueError: if a value is out of range.
    """

    width: int = 256
    depth: int = 3
    time_features: Sinusoidal | Fourier = Sinusoidal()
    dropout: float = 0.0
    remat: bool = False

    def __post_init__(self):
        for name, least in (("width", 4), ("depth", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")

    @property
    def embed_dim(self) -> int:
        """Width of the time embedding and of cond.vector."""
        return self.width


@dataclass(frozen=True)
class MLPConfig(TrunkConfig):
    """A residual MLP.

    Attributes:
      out_channels: size of the output's last axis; None for that of x.
      needs_vector: refuse a condition without a vector.

    Raises:
      ValueError: if a value is out of range.
    """

    out_channels: int | None = None
    needs_vector: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.out_channels is not None and self.out_channels < 1:
            raise ValueError(f"out_channels must be at least 1 or None, got {self.out_channels}")

    def build(self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32) -> "MLP":
        """The module, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return MLP(self, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))


class MLPBlock(nn.Module):
    """Norm, SiLU, dense, twice, with the time added in between, as a residual.

    Attributes:
      dropout: rate before the last layer.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.
    """

    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, emb: Array, keys: Key | None = None) -> Array:
        """x: [B, W], emb: [B, E], keys: [B] or None -> [B, W]."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = x.shape[-1]
        h = nn.silu(LayerNorm(epsilon=1e-5, name="norm", **types)(x))
        h = Dense(width, kernel_init=default_init, name="dense_1", **types)(h)
        emb = nn.silu(emb.astype(self.dtype))
        h = h + Dense(width, kernel_init=default_init, name="time", **types)(emb)
        h = Dropout(self.dropout, name="dropout")(nn.silu(h), keys)
        return x + Dense(width, kernel_init=zeros_init, name="dense_2", **types)(h)


class Trunk(nn.Module):
    """A module that begins as the MLP does.

    Attributes:
      config: the architecture.
      dtype: dtype of activations; the time embedding stays float32.
      param_dtype: dtype of the parameters.
    """

    config: TrunkConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def types(self):
        """Arguments that every module takes."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def features(self, x: Array, t: Array, cond: Condition, *, keys: Key | None) -> Array:
        """Everything but the last layer; to be called once, inside of a compact method.

        Args:
          x: [B, ..., C] noisy data of one fixed shape.
          t: [B].
          cond: vector [B, width], image [B, ..., C'], or neither.
          keys: [B] or None.

        Returns:
          [B, width].
        """
        config, types = self.config, self.types()
        emb = TimeEmbedding(
            config.time_features, config.width, config.width, self.param_dtype, name="time_embed"
        )(t)
        emb = with_vector(emb, cond)
        h = with_image(x, cond).reshape(x.shape[0], -1)
        h = Dense(config.width, kernel_init=default_init, name="dense_in", **types)(h)
        block = nn.remat(MLPBlock) if config.remat else MLPBlock
        for i in range(config.depth):
            h = block(config.dropout, name=f"block_{i}", **types)(h, emb, keys)
        return nn.silu(LayerNorm(epsilon=1e-5, name="norm_out", **types)(h))


class MLP(Trunk):
    """Residual MLP over all numbers of an example at once.

    Attributes:
      config: the architecture.
      dtype: dtype of activations; the time embedding stays float32.
      param_dtype: dtype of the parameters.

    Source: none; the smallest network that serves the library's conventions.
    """

    config: MLPConfig

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Condition, *, keys: Key | None = None) -> Array:
        """Predicts.

        Args:
          x: [B, ..., C] noisy data of one fixed shape.
          t: [B] times as the network was trained with.
          cond: vector [B, width] is added to the time embedding, image [B, ..., C'] is
            concatenated to x.
          keys: [B], one per example, in training; they switch dropout on.

        Returns:
          [B, ..., out_channels] of `dtype`.

        Raises:
          ValueError: if a shape does not fit, or the condition fills a slot that is not read.
        """
        config = self.config
        check_inputs(
            x, t, cond, keys=keys, embed_dim=config.embed_dim, needs_vector=config.needs_vector
        )
        h = self.features(x, t, cond, keys=keys)
        out_shape = x.shape[:-1] + (config.out_channels or x.shape[-1],)
        size = math.prod(out_shape[1:])
        h = Dense(size, kernel_init=zeros_init, name="dense_out", **self.types())(h)
        return h.reshape(out_shape)
