"""Guidance: what changes a denoiser's prediction during sampling."""

from diffusion_jax.guidance.base import Chain, Guide, Unguided
from diffusion_jax.guidance.classifier import ClassifierGuidance
from diffusion_jax.guidance.classifier_free import ClassifierFree
from diffusion_jax.guidance.grounding import GroundedUntil
from diffusion_jax.guidance.negative import WithNegative
from diffusion_jax.guidance.threshold import DynamicThreshold, StaticThreshold

# Guides that a system is configured with. ClassifierGuidance is called with a log-probability
# and WithNegative holds arrays, so neither is a row.
GUIDANCE = {"none": Unguided, "classifier_free": ClassifierFree}
THRESHOLDS = {"none": Unguided, "static": StaticThreshold, "dynamic": DynamicThreshold}

__all__ = [
    "GUIDANCE",
    "THRESHOLDS",
    "Chain",
    "ClassifierFree",
    "ClassifierGuidance",
    "DynamicThreshold",
    "GroundedUntil",
    "Guide",
    "StaticThreshold",
    "Unguided",
    "WithNegative",
]
