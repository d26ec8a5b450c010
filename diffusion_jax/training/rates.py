"""Learning rates in cycles: warm-up and decay, one after another."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from diffusion_jax.core.types import Array

SHAPES = ("cosine", "linear")


@dataclass(frozen=True)
class Cycle:
    """A warm-up and a decay of the factor that multiplies the learning rate.

    With n the updates since the cycle began, W = warmup_steps and L = length:
    f(n) = start + (peak - start) · n / W while n < W, then
    cosine: f(n) = floor + (peak - floor) · ½ (1 + cos(π (n - W) / (L - W))),
    linear: f(n) = floor + (peak - floor) · (1 - n / L).
    The line runs down from the cycle's beginning, so that with a warm-up the peak is not
    reached and the factor jumps down at W, by (peak - floor) · W / L.

    Attributes:
      length: L, updates until `floor`.
      warmup_steps: W, less than L; 0 for none.
      start: factor at n = 0, at least 0.
      peak: factor that the warm-up leads to, at least 0.
      floor: factor at the end, at least 0.
      shape: "cosine" or "linear".

    Raises:
      ValueError: if a number is out of range or the shape unknown.

    Source: Rombach et al. 2022 (arXiv:2112.10752), the released training code.
    """

    length: int
    warmup_steps: int = 0
    start: float = 0.0
    peak: float = 1.0
    floor: float = 0.0
    shape: str = "cosine"

    def __post_init__(self):
        if self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {SHAPES}, got {self.shape!r}")
        if not 0 <= self.warmup_steps < self.length:
            raise ValueError(
                "warmup_steps must lie in [0, length), got "
                f"{self.warmup_steps} with length = {self.length}"
            )
        for name in ("start", "peak", "floor"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    def factor_at(self, step: Array | float) -> Array:
        """The factor after `step` updates of this cycle, []; `floor` beyond its end."""
        n = jnp.asarray(step, jnp.result_type(float))
        # As a float, because released configurations have lengths beyond int32.
        length, warmup = float(self.length), float(self.warmup_steps)
        if self.shape == "cosine":
            progress = (n - warmup) / (length - warmup)
            # The square of the half angle stays accurate where 1 + cos cancels.
            decay = jnp.cos(0.5 * jnp.pi * jnp.clip(progress, 0.0, 1.0)) ** 2
        else:
            decay = 1.0 - jnp.clip(n / length, 0.0, 1.0)
        factor = self.floor + (self.peak - self.floor) * decay
        if not self.warmup_steps:
            return factor
        rise = self.start + (self.peak - self.start) / warmup * n
        return jnp.where(n < warmup, rise, factor)


def factor_at(cycles: Sequence[Cycle], step: Array | float) -> Array:
    """The factor of cycles that follow each other, [].

    A cycle's last update, the one after `length` updates, belongs to it and not to the next one,
    whose own `start` is therefore skipped. Beyond the last cycle its `floor` stays.

    Args:
      cycles: at least one.
      step: [] updates so far.

    Raises:
      ValueError: if there is no cycle.

    Source: Rombach et al. 2022 (arXiv:2112.10752), the released training code.
    """
    if not cycles:
        raise ValueError("expected at least one cycle, got none")
    n = jnp.asarray(step, jnp.result_type(float))
    begin = float(sum(cycle.length for cycle in cycles[:-1]))
    factor = cycles[-1].factor_at(n - begin)
    for cycle in reversed(cycles[:-1]):
        end, begin = begin, begin - cycle.length
        factor = jnp.where(n <= end, cycle.factor_at(n - begin), factor)
    return factor
