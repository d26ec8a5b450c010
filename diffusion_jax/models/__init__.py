"""Networks: linen modules from x_t, the time and a condition to a prediction."""

from diffusion_jax.models.dit import DiT, DiTConfig
from diffusion_jax.models.embeddings import Fourier, Sinusoidal
from diffusion_jax.models.mlp import MLP, MLPConfig
from diffusion_jax.models.unet import LevelConfig, UNet, UNetConfig

NETWORKS = {"unet": UNetConfig, "mlp": MLPConfig, "dit": DiTConfig}

__all__ = [
    "MLP",
    "NETWORKS",
    "DiT",
    "DiTConfig",
    "Fourier",
    "LevelConfig",
    "MLPConfig",
    "Sinusoidal",
    "UNet",
    "UNetConfig",
]
