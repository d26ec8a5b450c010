"""The parts that a system is configured with, and the tables that name them."""

from collections.abc import Callable

from diffusion_jax.core.denoiser import TIME_INPUTS, RescaledTime
from diffusion_jax.core.parameterization import (
    PARAMETERIZATIONS,
    X0,
    ConsistencyPreconditioning,
    EDMPreconditioning,
    Eps,
    FlowVelocity,
    Score,
    V,
)
from diffusion_jax.core.schedules import (
    EDM,
    SCHEDULES,
    Betas,
    Cosine,
    CosineLogSNR,
    FlowMatching,
    Laplace,
    LaplaceBeta,
    Linear,
    NoiseSchedule,
    ScaledLinear,
    ShiftedLogSNR,
    Sigmoid,
    SigmoidBeta,
    ZeroTerminalSNR,
)
from diffusion_jax.core.types import Array, NoiseLevel
from diffusion_jax.guidance import (
    GUIDANCE,
    THRESHOLDS,
    ClassifierFree,
    ClassifierGuidance,
    DynamicThreshold,
    StaticThreshold,
    Unguided,
)
from diffusion_jax.losses import (
    LOSSES,
    TIMES,
    VLB,
    WEIGHTS,
    Hybrid,
    LossAware,
    ScheduleTimes,
    Simple,
)
from diffusion_jax.models import (
    ATTENTIONS,
    CLASSIFIERS,
    NETWORKS,
    ClassifierConfig,
    DiTConfig,
    MLPClassifierConfig,
    MLPConfig,
    UNetConfig,
)
from diffusion_jax.samplers import (
    DDIM,
    DDPM,
    DEIS,
    IPNDM,
    KDPM2,
    LCM,
    LMS,
    PNDM,
    SAMPLERS,
    TCD,
    ConsistencyMultistep,
    DPMSolverMultistep,
    DPMSolverSDE,
    DPMSolverSinglestep,
    Euler,
    EulerAncestral,
    EulerChurn,
    FlowHeun,
    Heun,
    HeunChurn,
    KDPM2Ancestral,
    Renoise,
    UniPC,
)

NetworkPart = UNetConfig | MLPConfig | DiTConfig
SchedulePart = (
    Linear
    | ScaledLinear
    | Cosine
    | Sigmoid
    | SigmoidBeta
    | LaplaceBeta
    | Betas
    | ZeroTerminalSNR
    | CosineLogSNR
    | Laplace
    | FlowMatching
    | EDM
    | ShiftedLogSNR
)
ParameterizationPart = (
    Eps | X0 | V | Score | FlowVelocity | EDMPreconditioning | ConsistencyPreconditioning
)
LossPart = Simple | Hybrid | VLB
TimesPart = ScheduleTimes | LossAware
SamplerPart = (
    DDPM
    | DDIM
    | Euler
    | EulerChurn
    | EulerAncestral
    | Heun
    | HeunChurn
    | FlowHeun
    | KDPM2
    | KDPM2Ancestral
    | DPMSolverMultistep
    | DPMSolverSinglestep
    | UniPC
    | DPMSolverSDE
    | Renoise
    | LMS
    | PNDM
    | IPNDM
    | DEIS
    | LCM
    | TCD
    | ConsistencyMultistep
)
GuidancePart = Unguided | ClassifierFree
ClassifierPart = ClassifierConfig | MLPClassifierConfig
ThresholdPart = Unguided | StaticThreshold | DynamicThreshold

# Field name -> the table that its value comes from: how JSON and the command line name parts.
PARTS = {
    "network": NETWORKS,
    "schedule": SCHEDULES,
    "base": SCHEDULES,
    "parameterization": PARAMETERIZATIONS,
    "loss": LOSSES,
    "times": TIMES,
    "weight": WEIGHTS,
    "sampler": SAMPLERS,
    "guidance": {**GUIDANCE, "classifier": ClassifierGuidance},
    "classifier": CLASSIFIERS,
    "threshold": THRESHOLDS,
    "attention": ATTENTIONS,
    "middle_attention": ATTENTIONS,
}
# Fields that may be True or False instead of a part.
SWITCHES = ("attention", "middle_attention")


def time_input(name: str, schedule: NoiseSchedule) -> Callable[[NoiseLevel], Array]:
    """What the network is told about a level of the schedule.

    Args:
      name: one of TIME_INPUTS, or "rescaled_t" for t · 1000 / T of a discrete schedule.

    Raises:
      ValueError: if there is no such name, or the schedule is continuous and the name is not.
    """
    if name == "rescaled_t":
        if schedule.num_timesteps is None:
            raise ValueError(
                "time_input 'rescaled_t' is for discrete schedules; for a continuous one choose "
                "'scaled_t'"
            )
        return RescaledTime(schedule.num_timesteps)
    if name not in TIME_INPUTS:
        known = sorted([*TIME_INPUTS, "rescaled_t"])
        raise ValueError(f"time_input must be one of {known}, got {name!r}")
    return TIME_INPUTS[name]
