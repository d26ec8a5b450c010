"""Samplers: pure steps from noise to data, and the loop that runs them."""

from diffusion_jax.samplers.base import (
    Sampler,
    SamplerState,
    StepInfo,
    fit_grid,
    initial_noise,
    sample,
)
from diffusion_jax.samplers.ddim import DDIM
from diffusion_jax.samplers.ddpm import DDPM
from diffusion_jax.samplers.dpm_solver import DPMSolverMultistep
from diffusion_jax.samplers.karras import Euler, Heun
from diffusion_jax.samplers.mean_shift import MeanShift

SAMPLERS = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "euler": Euler,
    "heun": Heun,
    "dpm_solver_pp_2m": DPMSolverMultistep,
}

__all__ = [
    "DDIM",
    "DDPM",
    "SAMPLERS",
    "DPMSolverMultistep",
    "Euler",
    "Heun",
    "MeanShift",
    "Sampler",
    "SamplerState",
    "StepInfo",
    "fit_grid",
    "initial_noise",
    "sample",
]
