"""The parts that a system is configured with, and the tables that name them."""

from diffusion_jax.core.denoiser import TIME_INPUTS
from diffusion_jax.core.parameterization import PARAMETERIZATIONS, X0, EDMPreconditioning, Eps, V
from diffusion_jax.core.schedules import (
    EDM,
    SCHEDULES,
    Betas,
    Cosine,
    CosineLogSNR,
    Linear,
    ScaledLinear,
    ShiftedLogSNR,
    Sigmoid,
    SigmoidBeta,
    ZeroTerminalSNR,
)
from diffusion_jax.guidance import (
    GUIDANCE,
    THRESHOLDS,
    ClassifierFree,
    DynamicThreshold,
    StaticThreshold,
    Unguided,
)
from diffusion_jax.models import NETWORKS, DiTConfig, MLPConfig, UNetConfig
from diffusion_jax.samplers import DDIM, DDPM, SAMPLERS, DPMSolverMultistep, Euler, Heun

NetworkPart = UNetConfig | MLPConfig | DiTConfig
SchedulePart = (
    Linear
    | ScaledLinear
    | Cosine
    | Sigmoid
    | SigmoidBeta
    | Betas
    | ZeroTerminalSNR
    | CosineLogSNR
    | EDM
    | ShiftedLogSNR
)
ParameterizationPart = Eps | X0 | V | EDMPreconditioning
SamplerPart = DDPM | DDIM | Euler | Heun | DPMSolverMultistep
GuidancePart = Unguided | ClassifierFree
ThresholdPart = Unguided | StaticThreshold | DynamicThreshold

# Field name -> the table that its value comes from: how JSON and the command line name parts.
PARTS = {
    "network": NETWORKS,
    "schedule": SCHEDULES,
    "base": SCHEDULES,
    "parameterization": PARAMETERIZATIONS,
    "sampler": SAMPLERS,
    "guidance": GUIDANCE,
    "threshold": THRESHOLDS,
}


def time_input(name: str):
    """The function of TIME_INPUTS with that name.

    Raises:
      ValueError: if there is none.
    """
    if name not in TIME_INPUTS:
        raise ValueError(f"time_input must be one of {sorted(TIME_INPUTS)}, got {name!r}")
    return TIME_INPUTS[name]
