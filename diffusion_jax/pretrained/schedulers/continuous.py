"""Schedulers of EDM, consistency and flow-matching models."""

from typing import Any

from diffusion_jax.core.denoiser import edm_time
from diffusion_jax.core.parameterization import (
    ConsistencyPreconditioning,
    EDMPreconditioning,
    FlowVelocity,
)
from diffusion_jax.core.schedules import EDM, FlowMatching
from diffusion_jax.guidance import StaticThreshold, Unguided
from diffusion_jax.pretrained.schedulers.options import (
    CHURN,
    DYNAMIC,
    FEW_STEPS,
    RESPACED,
    TWO_PREDICTIONS,
    Kind,
    LogSigmaTime,
    Options,
    ScaledTime,
    churned,
    dynamic_shift,
    dynamic_threshold,
    final_sigma,
    respacing_of,
    solver_names,
)
from diffusion_jax.pretrained.schedulers.rate_steps import EDMSteps, FlowSteps
from diffusion_jax.samplers.base import Sampler
from diffusion_jax.samplers.consistency import ConsistencyMultistep
from diffusion_jax.samplers.dpm_solver import DPMSolverMultistep
from diffusion_jax.samplers.flow import FlowHeun, Renoise
from diffusion_jax.samplers.karras import Euler


def _edm(o: Options, final: str) -> dict[str, Any]:
    negated = o.choice("prediction_type", TWO_PREDICTIONS) == "v_prediction"
    return {
        "schedule": EDM(o["sigma_min"], o["sigma_max"]),
        "parameterization": EDMPreconditioning(o["sigma_data"], negated),
        "steps": EDMSteps(
            o.choice("sigma_schedule", ("karras", "exponential")), float(o["rho"]), final
        ),
        "time_input": edm_time,
        "noise": "hypot",
    }


def _edm_euler(o: Options) -> dict[str, Any]:
    parts = _edm(o, o.choice("final_sigmas_type", ("zero", "sigma_min")))
    return {**parts, "sampler": churned(o, parts["parameterization"])}


def _edm_dpm(o: Options) -> dict[str, Any]:
    algorithm, solver = solver_names(o, ("dpmsolver++", "sde-dpmsolver++"))
    order = o.choice("solver_order", (1, 2, 3))
    if order == 3 and algorithm == "sde-dpmsolver++":
        raise o.refuse("solver_order", "1 or 2 with algorithm_type 'sde-dpmsolver++'")
    sampler = DPMSolverMultistep(
        order,
        algorithm,
        solver,
        lower_order_below=FEW_STEPS if o.flag("lower_order_final") else 0,
        euler_at_final=o.flag("euler_at_final"),
        variant="reference",
    )
    parts = _edm(o, final_sigma(o, algorithm))
    return {**parts, "sampler": sampler, "threshold": dynamic_threshold(o) or Unguided()}


def _consistency(o: Options) -> dict[str, Any]:
    low, high, data = o["sigma_min"], o["sigma_max"], o["sigma_data"]
    return {
        "schedule": EDM(low, high),
        "parameterization": ConsistencyPreconditioning(data, low),
        "threshold": StaticThreshold(1.0) if o.flag("clip_denoised") else Unguided(),
        "sampler": ConsistencyMultistep(low, o["s_noise"]),
        "steps": EDMSteps(
            rho=float(o["rho"]), final="sigma_min", training_steps=o["num_train_timesteps"]
        ),
        "time_input": LogSigmaTime(),
        "noise": "largest",
    }


def _flow_match(o: Options, sampler: Sampler, **steps: Any) -> dict[str, Any]:
    total, shift = o["num_train_timesteps"], float(o["shift"])
    return {
        "schedule": FlowMatching(shift),
        "parameterization": FlowVelocity(),
        "sampler": sampler,
        "steps": FlowSteps(total, shift, **steps),
        "time_input": ScaledTime(float(total)),
    }


def _flow_euler(o: Options) -> dict[str, Any]:
    inverted, terminal = o.flag("invert_sigmas"), o["shift_terminal"]
    parts = _flow_match(
        o,
        Renoise() if o.flag("stochastic_sampling") else Euler(),
        dynamic=dynamic_shift(o),
        terminal=terminal,
        respacing=respacing_of(o),
        inverted=inverted,
        custom=("timesteps", "sigmas"),
    )
    if not inverted:
        return parts
    if o["stochastic_sampling"]:
        raise o.refuse("stochastic_sampling", "False with invert_sigmas")
    velocity = FlowVelocity(towards_data=True)
    time = ScaledTime(float(o["num_train_timesteps"]), to_data=True)
    return {**parts, "parameterization": velocity, "time_input": time}


def _flow_heun(o: Options) -> dict[str, Any]:
    return _flow_match(o, FlowHeun())


_EDM = {
    "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "rho": 7.0,
    "final_sigmas_type": "zero",
}  # fmt: skip

CONTINUOUS: dict[str, Kind] = {
    "EDMEulerScheduler": Kind(_edm_euler, _EDM, CHURN, ("num_train_timesteps",)),
    "EDMDPMSolverMultistepScheduler": Kind(
        _edm_dpm,
        {**_EDM, "solver_order": 2, **DYNAMIC, "algorithm_type": "dpmsolver++",
         "solver_type": "midpoint", "lower_order_final": True, "euler_at_final": False},
        inert=("num_train_timesteps",),
    ),
    "CMStochasticIterativeScheduler": Kind(
        _consistency,
        {"num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5,
         "s_noise": 1.0, "rho": 7.0, "clip_denoised": True},
    ),
    # The numbers that its pipelines make μ of, from the size of the image.
    "FlowMatchEulerDiscreteScheduler": Kind(
        _flow_euler,
        {"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False,
         "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
         "max_image_seq_len": 4096, "invert_sigmas": False, "shift_terminal": None, **RESPACED,
         "time_shift_type": "exponential", "stochastic_sampling": False},
        inert=("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
    ),
    "FlowMatchHeunDiscreteScheduler": Kind(
        _flow_heun, {"num_train_timesteps": 1000, "shift": 1.0}
    ),
}  # fmt: skip
