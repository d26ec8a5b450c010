"""Ancestral sampling whose mean is moved along a gradient: ADM's classifier guidance."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.arrays import per_image_normal
from diffusion_jax.core.types import Array, Key, NoiseLevel
from diffusion_jax.samplers.base import Denoise, StepInfo
from diffusion_jax.samplers.ddpm import DDPM


@struct.dataclass
class MeanShift:
    """Draws x_s ~ N(μ + Σ g(x_t), Σ), with μ and Σ of ancestral sampling.

    g is taken at x_t and its own level, not at μ. No noise is added in a step that ends at
    sigma = 0, unless the sampler has noise_at_end; the mean is moved there too, by Σ as
    `DDPM.moments` gives it. With g = scale · ∇_{x_t} log p(y | x_t) this is classifier guidance.
    As the steps become many it agrees with guidance of the score: for the variance "large" its
    shift is α_t / α_s times that of the score.

    Build it inside of the compiled function: a new gradient function compiles anew.

    Attributes:
      sampler: the ancestral sampler that gives μ and Σ.
      gradient: (x_t [B, ...], level) -> g [B, ...], the scale included.

    Raises:
      ValueError: if another sampler is to be wrapped, or the gradient has not x's shape.

    Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), algorithm 1.
    """

    sampler: DDPM
    gradient: Callable[[Array, NoiseLevel], Array] = struct.field(pytree_node=False)

    def __post_init__(self):
        if not isinstance(self.sampler, DDPM):
            raise ValueError(
                "a mean is shifted in ancestral sampling only: expected the sampler DDPM, got "
                f"{type(self.sampler).__name__}; guide other samplers in the form 'score'"
            )

    @property
    def variance(self) -> str:
        """The kind of variance of the sampler."""
        return self.sampler.variance

    def validate(self) -> None:
        """Checks the knobs of the sampler; for values, not tracers."""
        self.sampler.validate()

    def init(self, x_T: Array) -> Any:
        return self.sampler.init(x_T)

    def step(
        self,
        keys: Key,
        denoise: Denoise,
        state: Any,
        level: NoiseLevel,
        next_level: NoiseLevel,
        info: StepInfo,
    ) -> Any:
        del info
        x = state.x
        mean, std = self.sampler.moments(denoise(x, level), x, level, next_level)
        gradient = self.gradient(x, level)
        if gradient.shape != x.shape:
            raise ValueError(f"the gradient has shape {gradient.shape} for x of shape {x.shape}")
        noise = jnp.where(self.sampler.adds_noise(level, next_level), std, 0.0)
        return state.replace(x=mean + std**2 * gradient + noise * per_image_normal(keys, x))
