"""Networks: linen modules from x_t, the time and a condition to a prediction."""

from diffusion_jax.models.adm import adm_classifier, adm_levels, adm_unet, adm_upsampler
from diffusion_jax.models.classifier import (
    ClassifierConfig,
    MLPClassifier,
    MLPClassifierConfig,
    NoisyClassifier,
)
from diffusion_jax.models.dit import DiT, DiTConfig
from diffusion_jax.models.embeddings import Fourier, Sinusoidal
from diffusion_jax.models.levels import LevelConfig
from diffusion_jax.models.mlp import MLP, MLPConfig
from diffusion_jax.models.prior import Prior, PriorConfig
from diffusion_jax.models.unet import UNet, UNetConfig

NETWORKS = {"unet": UNetConfig, "mlp": MLPConfig, "dit": DiTConfig}
# Networks from x_t and the time to the logits of classes.
CLASSIFIERS = {"unet": ClassifierConfig, "mlp": MLPClassifierConfig}

__all__ = [
    "CLASSIFIERS",
    "MLP",
    "NETWORKS",
    "ClassifierConfig",
    "DiT",
    "DiTConfig",
    "Fourier",
    "LevelConfig",
    "MLPClassifier",
    "MLPClassifierConfig",
    "MLPConfig",
    "NoisyClassifier",
    "Prior",
    "PriorConfig",
    "Sinusoidal",
    "UNet",
    "UNetConfig",
    "adm_classifier",
    "adm_levels",
    "adm_unet",
    "adm_upsampler",
]
