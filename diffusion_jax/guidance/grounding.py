"""GLIGEN's scheduled sampling: grounded for the first part of the steps alone."""

import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import Array, DenoiseFn, NoiseLevel


@struct.dataclass
class GroundedUntil:
    """Switches the gated attention to the grounding off at times that are not above `time`.

    x̂0 = D(x_t, c, g · 1[t > time]) with the gate g of the condition; a gate of 0 leaves the
    network as it was before it was grounded, bit for bit. Stands before guidance in a `Chain`.

    Attributes:
      time: in the units of the level's t; -inf for always grounded, inf for never.

    Source: Li et al. 2023 (arXiv:2301.07093), eq. 10.
    """

    time: Array | float = -jnp.inf

    def __call__(self, denoise: DenoiseFn, uncond: Condition) -> DenoiseFn:
        del uncond

        def gated(x: Array, level: NoiseLevel, cond: Condition):
            if cond.grounding is None:
                return denoise(x, level, cond)
            is_on = (jnp.asarray(level.t) > self.time).astype(cond.grounding.gate.dtype)
            gate = cond.grounding.gate * is_on
            return denoise(x, level, cond.replace(grounding=cond.grounding.replace(gate=gate)))

        return gated
