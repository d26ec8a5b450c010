"""Guidance: what changes a denoiser's prediction during sampling."""

from diffusion_jax.guidance.base import Chain, Guide, Unguided
from diffusion_jax.guidance.classifier_free import ClassifierFree
from diffusion_jax.guidance.threshold import DynamicThreshold, StaticThreshold

GUIDANCE = {"none": Unguided, "classifier_free": ClassifierFree}
THRESHOLDS = {"none": Unguided, "static": StaticThreshold, "dynamic": DynamicThreshold}

__all__ = [
    "GUIDANCE",
    "THRESHOLDS",
    "Chain",
    "ClassifierFree",
    "DynamicThreshold",
    "Guide",
    "StaticThreshold",
    "Unguided",
]
