"""Classifier-free guidance."""

import math

import jax
import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.arrays import halves, per_example, twice
from diffusion_jax.core.condition import Condition, together
from diffusion_jax.core.types import Array, DenoiseFn, NoiseLevel, Prediction

RESCALE_SPACES = ("eps", "v", "x0")


@struct.dataclass
class ClassifierFree:
    """Extrapolates from the unconditional through the conditional prediction.

    x̂0 = x̂0(c) + (scale - 1) · (x̂0(c) - x̂0(∅)). The weights sum to one, so mixing in x0,
    eps or v gives the same sample. scale = 1 turns guidance off exactly, 0 is unconditional;
    the paper's w is scale - 1. Both predictions come from one network call of 2B examples;
    learned variances are those of the conditional half.

    Rescaling brings the guided output o (o = eps, v or x0) back to the standard deviation over
    the image that the conditional output has: o <- (φ std(o(c)) / std(o) + 1 - φ) · o. It
    does depend on the space, and published numbers are in that of the network's own output.

    An interval restricts guidance to the levels with lo < σ / α <= hi. Elsewhere the prediction
    is the conditional one, and where the whole batch has one level only that is computed; for
    this the network stands in the compiled program twice.

    Attributes:
      scale: guidance scale, 1 or larger in practice.
      rescale: φ in [0, 1], about 0.7 with zero terminal SNR; None for no rescaling.
      rescale_in: "eps" (meaningless at alpha = 0), "v" or "x0"; given with `rescale` only.
      interval: (lo, hi] of σ / α, the noise-to-signal ratio; None for everywhere.

    Raises:
      ValueError: if only one of `rescale` and `rescale_in` is given, or the space is unknown.

    Source: Ho & Salimans 2022 (arXiv:2207.12598), eq. 6; rescaling: Lin et al. 2023
    (arXiv:2305.08891), section 3.4; interval: Kynkäänniemi et al. 2024 (arXiv:2404.07724).
    """

    scale: float = 7.5
    rescale: float | None = None
    rescale_in: str | None = struct.field(pytree_node=False, default=None)
    interval: tuple[float, float] | None = None

    def __post_init__(self):
        if (self.rescale is None) != (self.rescale_in is None):
            raise ValueError(
                "rescale and rescale_in belong together: give both or neither, got "
                f"{self.rescale} and {self.rescale_in!r}"
            )
        if self.rescale_in is not None and self.rescale_in not in RESCALE_SPACES:
            raise ValueError(f"rescale_in must be one of {RESCALE_SPACES}, got {self.rescale_in!r}")

    def validate(self) -> None:
        """Raises ValueError unless every knob is in its range; for values, not tracers."""
        if not math.isfinite(float(self.scale)):
            raise ValueError(f"scale must be a finite number, got {self.scale}")
        if self.rescale is not None and not 0.0 <= float(self.rescale) <= 1.0:
            raise ValueError(f"rescale must lie in [0, 1], got {self.rescale}")
        if self.interval is not None:
            low, high = (float(end) for end in self.interval)
            if not 0.0 <= low < high:
                raise ValueError(
                    f"interval must be (lo, hi) with 0 <= lo < hi in units of σ / α, got "
                    f"{(low, high)}"
                )

    def __call__(self, denoise: DenoiseFn, uncond: Condition) -> DenoiseFn:
        """Guides `denoise`; `uncond` is the null condition, or one to be avoided."""

        def both(x: Array, level: NoiseLevel, cond: Condition) -> tuple[Prediction, Prediction]:
            prediction = denoise(twice(x), twice(level), together(cond, uncond))
            conditional = jax.tree.map(lambda field: halves(field)[0], prediction)
            x0_cond, x0_uncond = halves(prediction.x0)
            x0 = x0_cond + (self.scale - 1.0) * (x0_cond - x0_uncond)
            if self.rescale is not None:
                x0 = self._rescaled(x0, x0_cond, x, level)
            return conditional._replace(x0=x0), conditional

        def guided_in_interval(x: Array, level: NoiseLevel, cond: Condition) -> Prediction:
            ratio = jnp.asarray(level.sigma) / jnp.asarray(level.alpha)
            inside = (ratio > self.interval[0]) & (ratio <= self.interval[1])
            if inside.ndim == 0:
                return jax.lax.cond(inside, lambda *a: both(*a)[0], denoise, x, level, cond)
            guided, conditional = both(x, level, cond)
            x0 = jnp.where(per_example(inside, x), guided.x0, conditional.x0)
            return conditional._replace(x0=x0)

        if self.interval is not None:
            return guided_in_interval
        return lambda x, level, cond: both(x, level, cond)[0]

    def _rescaled(self, x0: Array, x0_cond: Array, x: Array, level: NoiseLevel) -> Array:
        # Every output is a multiple of x0 - zero, with `zero` the x0 for which the output
        # vanishes; the multiple cancels in the ratio of the standard deviations.
        alpha, sigma = per_example(level.alpha, x), per_example(level.sigma, x)
        zero = {
            "eps": lambda: x / alpha,
            "v": lambda: alpha * x / (alpha**2 + sigma**2),
            "x0": lambda: jnp.zeros_like(x),
        }[self.rescale_in]()
        axes = tuple(range(1, x.ndim))
        wanted = jnp.std(x0_cond - zero, axis=axes, keepdims=True)
        std = jnp.std(x0 - zero, axis=axes, keepdims=True)
        # A constant output has no deviation that could be brought back.
        ratio = jnp.where(std > 0, wanted / jnp.where(std > 0, std, 1.0), 1.0)
        return x0 + self.rescale * (ratio - 1.0) * (x0 - zero)
