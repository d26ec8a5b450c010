"""Training losses, their weights, and how times are drawn."""

from diffusion_jax.losses.base import Loss, averaged
from diffusion_jax.losses.classifier import NoisyCrossEntropy
from diffusion_jax.losses.hybrid import VLB, Hybrid
from diffusion_jax.losses.importance import LossAware, ScheduleTimes, Times
from diffusion_jax.losses.simple import Simple
from diffusion_jax.losses.weights import WEIGHTS, Weight

LOSSES = {"simple": Simple, "hybrid": Hybrid, "vlb": VLB}
TIMES = {"schedule": ScheduleTimes, "loss_aware": LossAware}

__all__ = [
    "LOSSES",
    "TIMES",
    "VLB",
    "WEIGHTS",
    "Hybrid",
    "Loss",
    "LossAware",
    "NoisyCrossEntropy",
    "ScheduleTimes",
    "Simple",
    "Times",
    "Weight",
    "averaged",
]
