"""Embeddings of the time: sinusoidal and Gaussian Fourier features, and the MLP behind them."""

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.types import Array
from diffusion_jax.models.blocks import ACTIVATIONS
from diffusion_jax.models.layers import Dense, Embed


def sinusoidal_embedding(
    t: Array,
    dim: int,
    *,
    cos_first: bool = True,
    freq_shift: int = 0,
    max_period: float = 10000.0,
    scale: float = 1.0,
) -> Array:
    """Sines and cosines of the time at geometrically spaced frequencies, in float32.

    [cos(s·t·f_k), sin(s·t·f_k)],  f_k = max_period^(-k / (dim // 2 - freq_shift)).

    Args:
      t: [B] times in the unit that the network was trained with.
      dim: width of the result; an odd width ends with a zero.
      cos_first: cosines before sines (ADM, Stable Diffusion) or after them (DDPM).
      freq_shift: 1 makes the last frequency exactly 1 / max_period (DDPM), 0 does not (ADM).
      max_period: longest period divided by 2π.
      scale: s, multiplies t; 1000 for times in [0, 1].

    Returns:
      [B, dim] float32.

    Raises:
      ValueError: if `t` is not one-dimensional or `dim` is too small for `freq_shift`.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.5; Ho et al. 2020
    (arXiv:2006.11239), appendix B.
    """
    if jnp.ndim(t) != 1:
        raise ValueError(f"t must have shape [B], got {jnp.shape(t)}")
    half = dim // 2
    if half - freq_shift < 1:
        raise ValueError(f"dim must be at least {2 * freq_shift + 2}, got {dim}")
    # Rounded as in the code that released weights were trained with: at t = 1000 a last bit of
    # a frequency moves its angle by 6e-5, more than all the rounding of a network does.
    exponent = np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32)
    exponent = exponent / np.float32(half - freq_shift)
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angles = scale * (jnp.asarray(t, jnp.float32)[:, None] * frequencies[None])
    waves = [jnp.cos(angles), jnp.sin(angles)]
    embedding = jnp.concatenate(waves if cos_first else waves[::-1], axis=1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


@dataclass(frozen=True)
class Sinusoidal:
    """Options of `sinusoidal_embedding`.

    Attributes:
      cos_first: cosines before sines.
      freq_shift: 0 or 1, subtracted from the number of frequencies in the exponent.
      max_period: longest period divided by 2π.
      scale: multiplies the time.

    Raises:
      ValueError: if `freq_shift` is not 0 or 1, or `max_period` is not above 1.
    """

    cos_first: bool = True
    freq_shift: int = 0
    max_period: float = 10000.0
    scale: float = 1.0

    def __post_init__(self):
        if self.freq_shift not in (0, 1):
            raise ValueError(f"freq_shift must be 0 or 1, got {self.freq_shift}")
        if not self.max_period > 1.0:
            raise ValueError(f"max_period must be above 1, got {self.max_period}")


@dataclass(frozen=True)
class Fourier:
    """Options of `FourierFeatures`.

    Attributes:
      num_frequencies: half the width of the features.
      scale: standard deviation of the random frequencies.
      log: take the features of log t, as networks that are told the noise level σ do.
      cos_first: cosines before sines.

    Raises:
      ValueError: if `num_frequencies` < 1 or `scale` is not positive.
    """

    num_frequencies: int = 128
    scale: float = 16.0
    log: bool = True
    cos_first: bool = False

    def __post_init__(self):
        if self.num_frequencies < 1:
            raise ValueError(f"num_frequencies must be at least 1, got {self.num_frequencies}")
        if not self.scale > 0.0:
            raise ValueError(f"scale must be positive, got {self.scale}")


class FourierFeatures(nn.Module):
    """Sines and cosines at frequencies that were drawn once and are not trained.

    [sin(2π·w·u), cos(2π·w·u)],  u = log t or t,  w ~ N(0, scale²).

    Attributes:
      config: number, scale and argument of the features.
      param_dtype: dtype of the stored frequencies.

    Source: Tancik et al. 2020 (arXiv:2006.10739); Song et al. 2021 (arXiv:2011.13456), appendix C.
    """

    config: Fourier
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, t: Array) -> Array:
        """t: [B], positive where `config.log` -> [B, 2 · num_frequencies] float32."""
        config = self.config
        init = nn.initializers.normal(config.scale)
        weight = self.param("weight", init, (config.num_frequencies,), self.param_dtype)
        weight = jax.lax.stop_gradient(weight).astype(jnp.float32)
        time = jnp.asarray(t, jnp.float32)
        time = jnp.log(time) if config.log else time
        angles = 2.0 * math.pi * time[:, None] * weight[None]
        waves = [jnp.sin(angles), jnp.cos(angles)]
        return jnp.concatenate(waves[::-1] if config.cos_first else waves, axis=1)


@dataclass(frozen=True)
class Learned:
    """A learned vector of every time as its features.

    Attributes:
      num_timesteps: T; the network is told integer times 0 … T - 1.

    Raises:
      ValueError: if `num_timesteps` < 1.
    """

    num_timesteps: int

    def __post_init__(self):
        if self.num_timesteps < 1:
            raise ValueError(f"num_timesteps must be at least 1, got {self.num_timesteps}")


class TimeEmbedding(nn.Module):
    """Features of the time followed by a two-layer MLP, all in float32.

    Attributes:
      features: which features.
      channels: width of sinusoidal and learned features; Fourier features bring their own.
      embed_dim: width of the hidden layer and of the result.
      param_dtype: dtype of the parameters.
      act: activation of the hidden layer, a key of `ACTIVATIONS`.
      act_last: activation of the result; None for none.

    Source: Ho et al. 2020 (arXiv:2006.11239), appendix B.
    """

    features: Sinusoidal | Fourier | Learned
    channels: int
    embed_dim: int
    param_dtype: jnp.dtype = jnp.float32
    act: str = "silu"
    act_last: str | None = None

    @nn.compact
    def __call__(self, t: Array, extra: Array | None = None) -> Array:
        """Embeds.

        Args:
          t: [B].
          extra: [B, F] added to the features; None for nothing.

        Returns:
          [B, embed_dim] float32.

        Raises:
          ValueError: if `extra` does not have the width of the features.
        """
        h = self._features(t)
        if extra is not None:
            if extra.shape != h.shape:
                raise ValueError(
                    f"cond.time is added to the features of the time and must have shape "
                    f"{h.shape}, got {extra.shape}"
                )
            h = h + extra.astype(jnp.float32)
        # Half precision here would blur neighbouring times for a cost that nobody can measure.
        options = {"dtype": jnp.float32, "param_dtype": self.param_dtype}
        h = ACTIVATIONS[self.act](Dense(self.embed_dim, name="dense_1", **options)(h))
        h = Dense(self.embed_dim, name="dense_2", **options)(h)
        return h if self.act_last is None else ACTIVATIONS[self.act_last](h)

    def _features(self, t: Array) -> Array:
        features = self.features
        if isinstance(features, Fourier):
            return FourierFeatures(features, param_dtype=self.param_dtype, name="fourier")(t)
        if isinstance(features, Learned):
            table = Embed(
                features.num_timesteps,
                self.channels,
                dtype=jnp.float32,
                param_dtype=self.param_dtype,
                name="learned",
            )
            return table(jnp.asarray(t, jnp.int32))
        return sinusoidal_embedding(
            t,
            self.channels,
            cos_first=features.cos_first,
            freq_shift=features.freq_shift,
            max_period=features.max_period,
            scale=features.scale,
        )
