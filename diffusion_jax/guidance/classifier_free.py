"""Classifier-free guidance."""

import math

from flax import struct

from diffusion_jax.core.arrays import halves, twice
from diffusion_jax.core.condition import Condition, together
from diffusion_jax.core.types import Array, DenoiseFn, NoiseLevel, Prediction


@struct.dataclass
class ClassifierFree:
    """Extrapolates from the unconditional through the conditional prediction.

    x̂0 = x̂0(c) + (scale - 1) · (x̂0(c) - x̂0(∅)). The weights sum to one, so mixing in x0,
    eps or v gives the same sample. scale = 1 turns guidance off exactly, 0 is unconditional;
    the paper's w is scale - 1. Both predictions come from one network call of 2B examples.

    Attributes:
      scale: guidance scale, 1 or larger in practice.

    Source: Ho & Salimans 2022 (arXiv:2207.12598), eq. 6.
    """

    scale: float = 7.5

    def validate(self) -> None:
        """Raises ValueError unless the scale is finite; for values, not tracers."""
        if not math.isfinite(float(self.scale)):
            raise ValueError(f"scale must be a finite number, got {self.scale}")

    def __call__(self, denoise: DenoiseFn, uncond: Condition) -> DenoiseFn:
        """Guides `denoise`; the learned variance, if any, stays that of the conditional half."""

        def guided(x: Array, level: NoiseLevel, cond: Condition) -> Prediction:
            x0, var_frac = denoise(twice(x), twice(level), together(cond, uncond))
            x0_cond, x0_uncond = halves(x0)
            if var_frac is not None:
                var_frac, _ = halves(var_frac)
            return Prediction(x0_cond + (self.scale - 1.0) * (x0_cond - x0_uncond), var_frac)

        return guided
