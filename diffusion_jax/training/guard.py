"""Guard: tells which updates are bad, so that the training step leaves them out."""

import math
from dataclasses import dataclass

import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.types import Array


@struct.dataclass
class GuardState:
    """What a guard remembers.

    Attributes:
      mean_norm: [] float32, running mean of the good updates' gradient norms, from 0.
      good: [] int32, good updates.
      skipped: [] int32, bad updates.
      in_a_row: [] int32, bad updates since the last good one.
    """

    mean_norm: Array
    good: Array
    skipped: Array
    in_a_row: Array

    @classmethod
    def start(cls) -> "GuardState":
        """The memory of no update."""
        # Arrays of their own, since one buffer cannot be donated twice.
        counts = [jnp.zeros((), jnp.int32) for _ in range(3)]
        return cls(jnp.zeros((), jnp.float32), *counts)


@dataclass(frozen=True)
class Guard:
    """Leaves out updates whose loss or gradient is not finite or much larger than usual.

    An update is bad if its loss or the global norm g of its gradient is not finite, or if
    g > spike · m_n / (1 - decay^n) after n ≥ warmup good updates, m being their running mean:
    m ← decay · m + (1 - decay) · g, from 0. A bad update is never applied, however many come
    in a row: parameters, average, optimizer and the loss's memory keep their bits, as if its
    batch had not been drawn. Only the number of steps goes on, and with it noise and data.

    With the defaults nothing is watched. Otherwise whoever calls the step stops the run when the
    metric skipped_in_a_row exceeds `max_skipped`; a norm that has risen for good is left out for
    ever. Every state has the memory, so that a run that was stopped can go on with a guard.

    Attributes:
      max_skipped: bad updates in a row that a run survives.
      spike: how many times the usual norm is bad, above 1; None to look at finiteness only.
      decay: of the running mean, in [0, 1).
      warmup: good updates before norms are compared, at least 1.

    Raises:
      ValueError: if a number is out of range, or decay or warmup is set without spike.
    """

    max_skipped: int = 0
    spike: float | None = None
    decay: float = 0.99
    warmup: int = 100

    def __post_init__(self):
        if self.max_skipped < 0:
            raise ValueError(f"max_skipped must be at least 0, got {self.max_skipped}")
        if self.spike is None:
            if (self.decay, self.warmup) != (Guard.decay, Guard.warmup):
                raise ValueError(
                    f"decay = {self.decay} and warmup = {self.warmup} are those of the usual norm, "
                    "which only spike looks at; set spike or leave both out"
                )
        elif not (math.isfinite(self.spike) and self.spike > 1.0):
            raise ValueError(f"spike must be a finite number above 1, got {self.spike}")
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay}")
        if self.warmup < 1:
            raise ValueError(f"warmup must be at least 1, got {self.warmup}")

    @property
    def watches(self) -> bool:
        """Whether any update can be left out."""
        return self.max_skipped > 0 or self.spike is not None

    def is_bad(self, memory: GuardState, loss: Array, norm: Array) -> Array:
        """Whether an update must not be applied, [] bool.

        Args:
          memory: as it was before the update.
          loss: [] mean over the whole batch.
          norm: [] global norm of the gradient before clipping.
        """
        bad = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
        if self.spike is None:
            return bad
        correction = 1.0 - jnp.float32(self.decay) ** memory.good.astype(jnp.float32)
        high = norm * correction > self.spike * memory.mean_norm
        return bad | (high & (memory.good >= self.warmup))

    def update(self, memory: GuardState, norm: Array, bad: Array) -> GuardState:
        """The memory after an update of this gradient norm, [], which was `bad` or not."""
        mean = self.decay * memory.mean_norm + (1.0 - self.decay) * norm.astype(jnp.float32)
        return GuardState(
            mean_norm=jnp.where(bad, memory.mean_norm, mean),
            good=memory.good + ~bad,
            skipped=memory.skipped + bad,
            in_a_row=jnp.where(bad, memory.in_a_row + 1, 0),
        )
