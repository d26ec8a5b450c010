"""diffusion_jax: image diffusion in JAX, from DDPM to GLIGEN."""

from diffusion_jax.core.arrays import as_arrays, image_keys
from diffusion_jax.core.condition import Condition, Grounding
from diffusion_jax.core.denoiser import make_denoiser
from diffusion_jax.core.forward import add_noise, log_snr
from diffusion_jax.core.parameterization import PARAMETERIZATIONS
from diffusion_jax.core.params import by_glob, merge, partition
from diffusion_jax.core.schedules import SCHEDULES
from diffusion_jax.core.timesteps import TIMESTEPS, Grid, Steps, sections
from diffusion_jax.core.types import NoiseLevel, Prediction
from diffusion_jax.guidance import GUIDANCE, THRESHOLDS
from diffusion_jax.losses import LOSSES, TIMES, WEIGHTS
from diffusion_jax.losses.vlb import bits_per_dim
from diffusion_jax.models import CLASSIFIERS, NETWORKS
from diffusion_jax.samplers import SAMPLERS, fit_grid, initial_noise, sample
from diffusion_jax.systems import SYSTEMS, diffusion_stage

__version__ = "0.1.0"

__all__ = [
    "CLASSIFIERS",
    "GUIDANCE",
    "LOSSES",
    "NETWORKS",
    "PARAMETERIZATIONS",
    "SAMPLERS",
    "SCHEDULES",
    "SYSTEMS",
    "THRESHOLDS",
    "TIMES",
    "TIMESTEPS",
    "WEIGHTS",
    "Condition",
    "Grid",
    "Grounding",
    "NoiseLevel",
    "Prediction",
    "Steps",
    "add_noise",
    "as_arrays",
    "bits_per_dim",
    "by_glob",
    "diffusion_stage",
    "fit_grid",
    "image_keys",
    "initial_noise",
    "log_snr",
    "make_denoiser",
    "merge",
    "partition",
    "sample",
    "sections",
]
