"""Conditioners: from a batch to the routes into the network."""

from diffusion_jax.conditioners.base import UNCONDITIONAL, Conditioner, combine, with_dropout
from diffusion_jax.conditioners.label import label

CONDITIONERS = {"label": label}

__all__ = ["CONDITIONERS", "UNCONDITIONAL", "Conditioner", "combine", "label", "with_dropout"]
