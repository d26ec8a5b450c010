"""Training losses."""

from diffusion_jax.losses.simple import simple, uniform

__all__ = ["simple", "uniform"]
