"""Classifier guidance: the gradient of a log-probability moves the prediction."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.arrays import per_example
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import Array, DenoiseFn, LogProb, NoiseLevel, Prediction

FORMS = ("score", "mean")

# (x_t [B, ...], level, cond) -> [B, ...].
Gradient = Callable[[Array, NoiseLevel, Condition], Array]


@struct.dataclass
class ClassifierGuidance:
    """Moves sampling along scale · ∇_{x_t} log p(y | x_t), taken at x_t and its own level.

    score: ε̂' = ε̂ - σ scale ∇ log p(y | x_t), hence x̂0' = x̂0 + scale (σ² / α) ∇ log p(y | x_t),
           for any sampler: calling the object makes a guided denoiser;
    mean:  x_s ~ N(μ + scale Σ ∇ log p(y | x_t), Σ), for ancestral sampling: give `gradient` to
           `MeanShift`, the sampler that draws so.

    Any differentiable log-probability or similarity will do: a classifier trained on noisy
    images, or a CLIP-like model's exp(logit scale) · ⟨f(x_t, t), g(text)⟩. With the exact
    log p(y | x_t) the score form at scale 1 is the exact conditional denoiser, and scale w on a
    conditional model is classifier-free guidance of scale 1 + w. Scale 0 is no guidance.

    The released code clips x̂0 before this guidance and not after it: guide the thresholded
    denoiser, that is guidance(threshold(denoise, uncond), log_prob). Learned variances stay.
    The score form divides by alpha and has no meaning at zero signal.

    Attributes:
      scale: 1 or less on a conditional model, about 10 on an unconditional one.
      form: "score" or "mean".

    Raises:
      ValueError: if the form is another.

    Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), algorithm 1 (mean) and 2 (score); text:
    Nichol et al. 2021 (arXiv:2112.10741), section 2.4.
    """

    scale: float = 1.0
    form: str = struct.field(pytree_node=False, default="score")

    def __post_init__(self):
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {FORMS}, got {self.form!r}")

    def validate(self) -> None:
        """Raises ValueError unless the scale is finite; for values, not tracers."""
        if not math.isfinite(float(self.scale)):
            raise ValueError(f"scale must be a finite number, got {self.scale}")

    def gradient(self, log_prob: LogProb) -> Gradient:
        """scale · ∇_{x_t} log p(y | x_t), each example by itself.

        Args:
          log_prob: (x [B, ...], level, cond) -> [B].

        Returns:
          (x, level, cond) -> [B, ...]; raises ValueError if log_prob gives another shape.
        """

        def scaled_gradient(x: Array, level: NoiseLevel, cond: Condition) -> Array:
            # No example depends on another, so the gradient of the sum holds one for each.
            def total(x):
                value = log_prob(x, level, cond)
                if value.shape != x.shape[:1]:
                    raise ValueError(
                        f"log_prob must give one number per example, shape {x.shape[:1]} for x of "
                        f"shape {x.shape}, got {value.shape}; pick the label's log-probability"
                    )
                return jnp.sum(value.astype(x.dtype))

            return self.scale * jax.grad(total)(x)

        return scaled_gradient

    def __call__(self, denoise: DenoiseFn, log_prob: LogProb) -> DenoiseFn:
        """The denoiser guided in the score form.

        Args:
          denoise: predicts x̂0 [B, ...]; no gradient passes through it.
          log_prob: (x [B, ...], level, cond) -> [B].

        Raises:
          ValueError: in the mean form, which is no denoiser.
        """
        if self.form != "score":
            raise ValueError(
                f"form {self.form!r} is a step of the ancestral sampler, not a denoiser; wrap the "
                "sampler in MeanShift with `gradient`, or choose the form 'score'"
            )
        gradient = self.gradient(log_prob)

        def guided(x: Array, level: NoiseLevel, cond: Condition) -> Prediction:
            prediction = denoise(x, level, cond)
            shift = per_example(level.sigma**2 / level.alpha, x) * gradient(x, level, cond)
            return prediction._replace(x0=prediction.x0 + shift)

        return guided
