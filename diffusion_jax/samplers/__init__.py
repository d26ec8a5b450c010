"""Samplers: pure steps from noise to data, and the loop that runs them."""

from diffusion_jax.samplers.ancestral import EulerAncestral, KDPM2Ancestral
from diffusion_jax.samplers.base import (
    Sampler,
    SamplerState,
    StepInfo,
    advance,
    fit_grid,
    initial_noise,
    sample,
)
from diffusion_jax.samplers.consistency import LCM, TCD, ConsistencyMultistep
from diffusion_jax.samplers.ddim import DDIM
from diffusion_jax.samplers.ddpm import DDPM
from diffusion_jax.samplers.deis import DEIS
from diffusion_jax.samplers.dpm_sde import DPMSolverSDE
from diffusion_jax.samplers.dpm_singlestep import DPMSolverSinglestep
from diffusion_jax.samplers.dpm_solver import DPMSolverMultistep
from diffusion_jax.samplers.flow import FlowHeun, Renoise
from diffusion_jax.samplers.inversion import DDIMInversion, decode, encode, slerp
from diffusion_jax.samplers.karras import Euler, EulerChurn, Heun, HeunChurn, ReferenceEulerChurn
from diffusion_jax.samplers.kdpm2 import KDPM2
from diffusion_jax.samplers.likelihood import Likelihood, bits_per_dimension, log_likelihood
from diffusion_jax.samplers.lms import LMS
from diffusion_jax.samplers.mean_shift import MeanShift
from diffusion_jax.samplers.pndm import IPNDM, PNDM
from diffusion_jax.samplers.repaint import RePaint
from diffusion_jax.samplers.unipc import UniPC

SAMPLERS = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "euler": Euler,
    "heun": Heun,
    "euler_churn": EulerChurn,
    "heun_churn": HeunChurn,
    "euler_ancestral": EulerAncestral,
    "kdpm2": KDPM2,
    "kdpm2_ancestral": KDPM2Ancestral,
    "dpm_solver_sde": DPMSolverSDE,
    "flow_heun": FlowHeun,
    "renoise": Renoise,
    "dpm_solver_multistep": DPMSolverMultistep,
    "dpm_solver_singlestep": DPMSolverSinglestep,
    "unipc": UniPC,
    "lms": LMS,
    "pndm": PNDM,
    "ipndm": IPNDM,
    "deis": DEIS,
    "lcm": LCM,
    "tcd": TCD,
    "consistency_multistep": ConsistencyMultistep,
}

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "IPNDM",
    "KDPM2",
    "LCM",
    "LMS",
    "PNDM",
    "SAMPLERS",
    "TCD",
    "ConsistencyMultistep",
    "DDIMInversion",
    "DPMSolverMultistep",
    "DPMSolverSDE",
    "DPMSolverSinglestep",
    "Euler",
    "EulerAncestral",
    "EulerChurn",
    "FlowHeun",
    "Heun",
    "HeunChurn",
    "KDPM2Ancestral",
    "Likelihood",
    "MeanShift",
    "RePaint",
    "ReferenceEulerChurn",
    "Renoise",
    "Sampler",
    "SamplerState",
    "StepInfo",
    "UniPC",
    "bits_per_dimension",
    "decode",
    "encode",
    "advance",
    "fit_grid",
    "initial_noise",
    "log_likelihood",
    "sample",
    "slerp",
]
