"""Thresholding of x̂0 to the range of the data."""

import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.arrays import per_example
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import Array, DenoiseFn, NoiseLevel, Prediction


def _thresholded(prediction: Prediction, x0: Array) -> Prediction:
    raw = prediction.x0 if prediction.raw_x0 is None else prediction.raw_x0
    return prediction._replace(x0=x0, raw_x0=raw)


@struct.dataclass
class StaticThreshold:
    """Clips x̂0 to [-limit, limit]. Samplers derive ε̂ from the clipped x̂0.

    Attributes:
      limit: largest magnitude of the data.

    Source: Ho et al. 2020 (arXiv:2006.11239), section 3.2 and released code; named in Saharia
    et al. 2022 (arXiv:2205.11487), section 2.3.
    """

    limit: float = 1.0

    def validate(self) -> None:
        """Raises ValueError unless limit > 0; for values, not tracers."""
        if not float(self.limit) > 0.0:
            raise ValueError(f"limit must be positive, got {self.limit}")

    def __call__(self, denoise: DenoiseFn, uncond: Condition) -> DenoiseFn:
        del uncond

        def clipped(x: Array, level: NoiseLevel, cond: Condition):
            prediction = denoise(x, level, cond)
            return _thresholded(prediction, jnp.clip(prediction.x0, -self.limit, self.limit))

        return clipped


@struct.dataclass
class DynamicThreshold:
    """Clips each image of x̂0 at a percentile of its own magnitudes and rescales it to [-1, 1].

    s = min(max(1, percentile of |x̂0| over the image), largest), x̂0 <- clip(x̂0, -s, s) / s.

    Attributes:
      percentile: in (0, 100].
      largest: most that s may be, positive; None for no such bound, as in the paper.

    Source: Saharia et al. 2022 (arXiv:2205.11487), section 2.3; the bound: diffusers'
    sample_max_value.
    """

    percentile: float = 99.5
    largest: float | None = None

    def validate(self) -> None:
        """Raises ValueError unless percentile lies in (0, 100] and largest is positive.

        For values, not tracers.
        """
        if not 0.0 < float(self.percentile) <= 100.0:
            raise ValueError(f"percentile must lie in (0, 100], got {self.percentile}")
        if self.largest is not None and not float(self.largest) > 0.0:
            raise ValueError(f"largest must be positive or None, got {self.largest}")

    def __call__(self, denoise: DenoiseFn, uncond: Condition) -> DenoiseFn:
        del uncond

        def thresholded(x: Array, level: NoiseLevel, cond: Condition):
            prediction = denoise(x, level, cond)
            magnitude = jnp.abs(prediction.x0).reshape(x.shape[0], -1)
            limit = jnp.maximum(jnp.percentile(magnitude, self.percentile, axis=1), 1.0)
            if self.largest is not None:
                limit = jnp.minimum(limit, self.largest)
            limit = per_example(limit, x)
            return _thresholded(prediction, jnp.clip(prediction.x0, -limit, limit) / limit)

        return thresholded
