"""Exponential moving average of the parameters, the weights that samples are drawn with."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from diffusion_jax.core.types import Array, Params


@dataclass(frozen=True)
class EMA:
    """Exponential moving average with a decay that grows from 2/11 to its final value.

    ema ← d_n · ema + (1 - d_n) · params,  d_n = min(decay, (1 + n) / (10 + n)),
    where n counts the updates, the present one included. Without warm-up d_n = decay, and
    short runs then average mostly the random initialisation.

    Attributes:
      decay: final decay in [0, 1); 0 makes the average equal to the parameters.
      warmup: whether the decay grows as above.

    Raises:
      ValueError: if `decay` is outside [0, 1).

    Source: Rombach et al. 2022 (arXiv:2112.10752), the released training code.
    """

    decay: float = 0.9999
    warmup: bool = True

    def __post_init__(self):
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"the EMA decay must lie in [0, 1), got {self.decay}")

    def decay_at(self, step: Array | int) -> Array:
        """Decay d_n of update number n.

        Args:
          step: [] n, 1 for the first update.

        Returns:
          [] float32 in [0, 1).
        """
        decay = jnp.float32(self.decay)
        if not self.warmup:
            return decay
        n = jnp.asarray(step, jnp.float32)
        return jnp.minimum(decay, (1.0 + n) / (10.0 + n))

    def update(self, ema: Params, params: Params, step: Array | int) -> Params:
        """The average after update number `step`.

        Args:
          ema: average so far.
          params: tree of the same structure, shapes and dtypes, after the optimizer's update.
          step: [] number of the update, 1 for the first.

        Returns:
          tree like `ema`.
        """
        decay = self.decay_at(step)
        # The weights sum to one exactly, since 1 - decay is taken from the rounded decay.
        keep, add = decay, 1.0 - decay
        return jax.tree.map(lambda e, p: (keep * e + add * p).astype(e.dtype), ema, params)
