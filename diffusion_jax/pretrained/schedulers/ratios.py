"""Schedulers that keep x / α and work on the ratios σ/α of a table of β."""

from collections.abc import Sequence
from typing import Any

from diffusion_jax.core.denoiser import edm_time, network_time
from diffusion_jax.pretrained.schedulers.options import (
    CHURN,
    CLIP,
    COMMON_BETAS,
    DISCRETE,
    KARRAS_BETAS,
    PREDICTIONS,
    RESPACED,
    SPACED,
    THREE_PREDICTIONS,
    TWO_PREDICTIONS,
    ZERO_SNR,
    Kind,
    Options,
    churned,
    prediction_of,
    respacing_of,
    schedule_of,
    spacing_of,
    threshold_of,
)
from diffusion_jax.pretrained.schedulers.ratio_steps import (
    LEAST_ALPHAS_CUMPROD,
    RatioSteps,
    ratios32,
)
from diffusion_jax.samplers.ancestral import EulerAncestral, KDPM2Ancestral
from diffusion_jax.samplers.base import Sampler
from diffusion_jax.samplers.dpm_sde import DPMSolverSDE
from diffusion_jax.samplers.karras import Heun
from diffusion_jax.samplers.kdpm2 import KDPM2
from diffusion_jax.samplers.lms import LMS


def _exploding(
    o: Options,
    sampler: Sampler,
    predictions: Sequence[str] = THREE_PREDICTIONS,
    betas: Sequence[str] = COMMON_BETAS,
    **more: Any,
) -> dict[str, Any]:
    """What Euler, Heun, LMS, KDPM2 and their stochastic relatives have in common."""
    steps = {"respacing": respacing_of(o)} if "use_karras_sigmas" in o.values else {}
    steps = {**spacing_of(o), **steps, **more}
    return {
        "schedule": schedule_of(o, betas, last=LEAST_ALPHAS_CUMPROD),
        "parameterization": prediction_of(o, predictions),
        "sampler": sampler,
        "steps": RatioSteps(**steps),
        "scaled": True,
        "noise": "hypot" if steps["spacing"] == "leading" else "largest",
    }


def _euler(o: Options) -> dict[str, Any]:
    kind = o.choice("prediction_type", (*THREE_PREDICTIONS, "original_sample"))
    named = PREDICTIONS["sample" if kind == "original_sample" else kind]()
    respacing = respacing_of(o)
    interpolation = o.choice("interpolation_type", ("linear", "log_linear"))
    continuous = o.choice("timestep_type", ("discrete", "continuous")) == "continuous"
    low, high = o["sigma_min"], o["sigma_max"]
    if interpolation == "log_linear":
        table = ratios32(schedule_of(o, last=LEAST_ALPHAS_CUMPROD))
        low, high = float(table[0]) if low is None else low, high or float(table[-1])
        respacing = respacing or "log_linear"
    parts = _exploding(
        o,
        churned(o, named),
        (*THREE_PREDICTIONS, "original_sample"),
        respacing=respacing,
        final=o.choice("final_sigmas_type", ("zero", "sigma_min")),
        sigma_min=low,
        sigma_max=high,
        custom=("timesteps", "sigmas"),
    )
    tells_sigma = continuous and kind == "v_prediction"
    return {**parts, "time_input": edm_time if tells_sigma else network_time}


def _euler_ancestral(o: Options) -> dict[str, Any]:
    return _exploding(o, EulerAncestral(), TWO_PREDICTIONS)


def _heun(o: Options) -> dict[str, Any]:
    betas = (*COMMON_BETAS, "exp")
    parts = _exploding(o, Heun(), betas=betas, custom=("timesteps",))
    return {**parts, "threshold": threshold_of(o)}


def _lms(o: Options) -> dict[str, Any]:
    return _exploding(o, LMS(o.call["order"]))


def _told(o: Options) -> str:
    return "rounded" if o.flag("use_karras_sigmas") else "exact"


def _kdpm2(o: Options) -> dict[str, Any]:
    return _exploding(o, KDPM2(), TWO_PREDICTIONS, told=_told(o), middle="mean")


def _kdpm2_ancestral(o: Options) -> dict[str, Any]:
    sampler = KDPM2Ancestral(variant="reference")
    return _exploding(o, sampler, TWO_PREDICTIONS, told=_told(o), middle="next")


def _dpm_sde(o: Options) -> dict[str, Any]:
    return _exploding(o, DPMSolverSDE(o.call["s_noise"]), TWO_PREDICTIONS, middle="mean")


RATIOS: dict[str, Kind] = {
    "EulerDiscreteScheduler": Kind(
        _euler,
        {**DISCRETE, **SPACED, "interpolation_type": "linear", **RESPACED, "sigma_min": None,
         "sigma_max": None, "timestep_type": "discrete", **ZERO_SNR,
         "final_sigmas_type": "zero"},
        CHURN,
    ),
    "EulerAncestralDiscreteScheduler": Kind(
        _euler_ancestral, {**DISCRETE, **SPACED, **ZERO_SNR}
    ),
    "HeunDiscreteScheduler": Kind(
        _heun, {**KARRAS_BETAS, **SPACED, **RESPACED, **CLIP, "clip_sample": False}
    ),
    "LMSDiscreteScheduler": Kind(_lms, {**DISCRETE, **SPACED, **RESPACED}, {"order": 4}),
    "KDPM2DiscreteScheduler": Kind(_kdpm2, {**KARRAS_BETAS, **SPACED, **RESPACED}),
    "KDPM2AncestralDiscreteScheduler": Kind(
        _kdpm2_ancestral, {**KARRAS_BETAS, **SPACED, **RESPACED}
    ),
    # The seed of its own noise has no counterpart: noise follows from the keys.
    "DPMSolverSDEScheduler": Kind(
        _dpm_sde,
        {**KARRAS_BETAS, **SPACED, **RESPACED, "noise_sampler_seed": None},
        {"s_noise": 1.0},
        ("noise_sampler_seed",),
    ),
}  # fmt: skip
