"""Systems: the models of the papers, each a composition of parts."""

from diffusion_jax.systems.cascade import System, single
from diffusion_jax.systems.classifier_free import ClassifierFreeSystem
from diffusion_jax.systems.classifier_guidance import ClassifierGuidanceSystem
from diffusion_jax.systems.codec import PIXELS, Codec
from diffusion_jax.systems.ddpm import DDPMSystem
from diffusion_jax.systems.stage import Stage, diffusion_stage

SYSTEMS = {
    "ddpm": DDPMSystem,
    "classifier_guidance": ClassifierGuidanceSystem,
    "classifier_free": ClassifierFreeSystem,
}

__all__ = [
    "PIXELS",
    "SYSTEMS",
    "ClassifierFreeSystem",
    "ClassifierGuidanceSystem",
    "Codec",
    "DDPMSystem",
    "Stage",
    "System",
    "diffusion_stage",
    "single",
]
