"""Negative conditions: guidance away from what a picture should not show."""

import jax

from diffusion_jax.core import struct
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import Array, DenoiseFn, NoiseLevel, Prediction
from diffusion_jax.guidance.base import Guide


@struct.dataclass
class WithNegative:
    """A guide that is told a negative condition in place of the null condition.

    With classifier-free guidance x̂0 = x̂0(n) + scale · (x̂0(c) - x̂0(n)), n the negative
    condition: scale = 1 still is the conditional prediction, and n = ∅ the guide itself.

    Attributes:
      guide: such as `ClassifierFree`.
      negative: fills the same slots as the condition, one example for each image; tokens may
        have another length.

    Source: none; the practice of Stable Diffusion's "negative prompt".
    """

    guide: Guide
    negative: Condition

    def validate(self) -> None:
        """Checks the knobs of the guide; for values, not tracers."""
        if hasattr(self.guide, "validate"):
            self.guide.validate()

    def __call__(self, denoise: DenoiseFn, uncond: Condition) -> DenoiseFn:
        """Guides `denoise`; raises ValueError unless there is one negative for each image."""
        del uncond
        guided = self.guide(denoise, self.negative)

        def checked(x: Array, level: NoiseLevel, cond: Condition) -> Prediction:
            counts = {leaf.shape[0] for leaf in jax.tree.leaves(self.negative)}
            if counts - {x.shape[0]}:
                raise ValueError(
                    f"the negative condition holds {sorted(counts)} examples for {x.shape[0]} "
                    "images; repeat it for each of them"
                )
            return guided(x, level, cond)

        return checked
