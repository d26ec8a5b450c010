"""Exponential integrators, which keep x itself on the path of a table or a straight one."""

import math
from typing import Any

from diffusion_jax.core.schedules import DiscreteSchedule, FlowMatching
from diffusion_jax.guidance import Unguided
from diffusion_jax.pretrained.schedulers.options import (
    DISCRETE,
    DYNAMIC,
    FEW_STEPS,
    FLOW,
    RESPACED,
    SPACED,
    ZERO_SNR,
    Kind,
    Options,
    ScaledTime,
    dynamic_shift,
    dynamic_threshold,
    final_sigma,
    prediction_of,
    respacing_of,
    schedule_of,
    solver_names,
    spacing_of,
)
from diffusion_jax.pretrained.schedulers.rate_steps import FlowKarrasSteps, FlowSteps
from diffusion_jax.pretrained.schedulers.ratio_steps import (
    LEAST_ALPHAS_CUMPROD,
    RatioSteps,
    ratios32,
)
from diffusion_jax.samplers.deis import DEIS
from diffusion_jax.samplers.dpm_singlestep import DPMSolverSinglestep
from diffusion_jax.samplers.dpm_solver import DPMSolverMultistep
from diffusion_jax.samplers.unipc import UniPC


def _flow_path(
    o: Options, base: DiscreteSchedule, final: float | None, **steps: Any
) -> dict[str, Any]:
    shift = float(o["flow_shift"])
    steps = FlowSteps(base.num_timesteps, shift, final=final, told="cut", **steps)
    return {
        "schedule": FlowMatching(shift),
        "parameterization": prediction_of(o, ("epsilon", "sample", "flow_prediction")),
        "time_input": ScaledTime(float(base.num_timesteps), rounded=True),
        "steps": steps,
    }


def _path(
    o: Options, *, last: float = 0.0, respacing: str | None, told: str, final: str, **steps: Any
) -> dict[str, Any]:
    """Schedule, steps, prediction and time of a solver, on the table's path or a straight one."""
    base = schedule_of(o, last=last)
    spacing = spacing_of(o) if "timestep_spacing" in o.values else {}
    if o.flag("use_flow_sigmas"):
        if respacing is not None:
            raise o.refuse("use_flow_sigmas", f"False with {respacing} sigmas")
        dynamic = dynamic_shift(o)
        if dynamic == "linear":
            raise o.refuse("time_shift_type", "'exponential'")
        end = {"zero": 0.0, "sigma_min": float(ratios32(base)[0]), "last": None}[final]
        return _flow_path(o, base, end, dynamic=dynamic, mu_needed=False, start="complement")
    o.only("flow_shift", "use_dynamic_shifting", "time_shift_type")
    return {
        "schedule": base,
        "parameterization": prediction_of(o),
        "steps": RatioSteps(
            **spacing, integers=True, respacing=respacing, told=told, final=final, **steps
        ),
    }


def _told_by_solvers(o: Options, respacing: str | None) -> str:
    """Solvers round the times of some respacings and cut those of others."""
    exact_betas = o["beta_schedule"] == "squaredcos_cap_v2"
    rounded = respacing in ("karras", "lu") and not exact_betas
    return "rounded" if rounded else "cut"


def _dropped_variance(o: Options) -> str | None:
    kind = o.choice("variance_type", (None, "learned", "learned_range"))
    return None if kind is None else "range"


def _dpm_multistep(o: Options) -> dict[str, Any]:
    algorithms = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
    algorithm, solver = solver_names(o, algorithms)
    respacing = respacing_of(o, ("karras", "lu", "exponential", "beta"))
    parts = _path(
        o,
        last=LEAST_ALPHAS_CUMPROD,
        respacing=respacing,
        told=_told_by_solvers(o, respacing),
        final=final_sigma(o, algorithm),
        half_log_snr_min=float(o["lambda_min_clipped"]),
        custom=("timesteps",),
    )
    sampler = DPMSolverMultistep(
        o.choice("solver_order", (1, 2, 3)),
        algorithm,
        solver,
        lower_order_below=FEW_STEPS if o.flag("lower_order_final") else 0,
        euler_at_final=o.flag("euler_at_final"),
        variant="reference",
    )
    threshold = dynamic_threshold(o) or Unguided()
    learned = _dropped_variance(o)
    return {**parts, "sampler": sampler, "threshold": threshold, "learned_variance": learned}


def _dpm_singlestep(o: Options) -> dict[str, Any]:
    algorithm, solver = solver_names(o, ("dpmsolver++", "dpmsolver", "sde-dpmsolver++"))
    respacing = respacing_of(o)
    parts = _path(
        o,
        respacing=respacing,
        told="rounded" if respacing == "karras" else "cut",
        final=final_sigma(o, algorithm),
        half_log_snr_min=float(o["lambda_min_clipped"]),
        custom=("timesteps",),
    )
    sampler = DPMSolverSinglestep(
        o.choice("solver_order", (1, 2, 3)),
        algorithm,
        solver,
        lower_order_final=o.flag("lower_order_final"),
        variant="reference",
    )
    threshold = dynamic_threshold(o) or Unguided()
    learned = _dropped_variance(o)
    return {**parts, "sampler": sampler, "threshold": threshold, "learned_variance": learned}


def _deis(o: Options) -> dict[str, Any]:
    o.choice("algorithm_type", ("deis", "dpmsolver", "dpmsolver++"))
    o.choice("solver_type", ("logrho", "midpoint", "heun", "bh1", "bh2"))
    respacing = respacing_of(o)
    told = "rounded" if respacing == "karras" else "cut"
    parts = _path(o, respacing=respacing, told=told, final="last")
    lower = FEW_STEPS if o.flag("lower_order_final") else 0
    sampler = DEIS(o.choice("solver_order", (1, 2, 3)), lower_order_below=lower)
    return {**parts, "sampler": sampler, "threshold": dynamic_threshold(o) or Unguided()}


def _unipc_path(o: Options) -> dict[str, Any]:
    respacing = respacing_of(o)
    final = o.choice("final_sigmas_type", ("zero", "sigma_min"))
    low, high, terminal = o["sigma_min"], o["sigma_max"], o["shift_terminal"]
    if not o.flag("use_flow_sigmas"):
        o.only("shift_terminal")
        final = "last" if final == "sigma_min" else final
        told = "rounded" if respacing == "karras" else "cut"
        ends = {"sigma_min": low, "sigma_max": high}
        return _path(
            o, last=LEAST_ALPHAS_CUMPROD, respacing=respacing, told=told, final=final, **ends
        )
    base = schedule_of(o, last=LEAST_ALPHAS_CUMPROD)
    spacing_of(o)
    end, dynamic = {"zero": 0.0, "sigma_min": None}[final], dynamic_shift(o)
    parts = _flow_path(
        o, base, end, dynamic=dynamic, terminal=terminal, start="unit", custom=("sigmas",)
    )
    if respacing == "karras":
        o.only("flow_shift", "use_dynamic_shifting", "shift_terminal")
        parts["steps"] = FlowKarrasSteps(base, "zero" if end == 0.0 else "last", low, high)
    elif respacing is not None:
        raise o.refuse("use_flow_sigmas", f"False with {respacing} sigmas")
    return parts


def _unipc(o: Options) -> dict[str, Any]:
    solver = o.choice("solver_type", ("bh1", "bh2", "midpoint", "heun", "logrho"))
    predict, threshold = o.flag("predict_x0"), dynamic_threshold(o)
    if threshold is not None and not predict:
        raise o.refuse("thresholding", "False with predict_x0 = False")
    o.only("solver_p")
    sampler = UniPC(
        o["solver_order"],
        solver if solver in ("bh1", "bh2") else "bh2",
        predict="x0" if predict else "eps",
        disable_corrector=tuple(o["disable_corrector"]),
        lower_order_final=o.flag("lower_order_final"),
    )
    return {**_unipc_path(o), "sampler": sampler, "threshold": threshold or Unguided()}


_SOLVER = {
    **DISCRETE, "solver_order": 2, "prediction_type": "epsilon", **DYNAMIC,
    "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": True,
    **RESPACED, **FLOW,
}  # fmt: skip

SOLVERS: dict[str, Kind] = {
    "DPMSolverMultistepScheduler": Kind(
        _dpm_multistep,
        {**_SOLVER, **SPACED, "euler_at_final": False, "use_lu_lambdas": False,
         "final_sigmas_type": "zero", "lambda_min_clipped": -math.inf, "variance_type": None,
         **ZERO_SNR},
    ),
    "DPMSolverSinglestepScheduler": Kind(
        _dpm_singlestep,
        {**_SOLVER, "lower_order_final": False, "final_sigmas_type": "zero",
         "lambda_min_clipped": -math.inf, "variance_type": None},
    ),
    "DEISMultistepScheduler": Kind(
        _deis, {**_SOLVER, **SPACED, "algorithm_type": "deis", "solver_type": "logrho"}
    ),
    "UniPCMultistepScheduler": Kind(
        _unipc,
        {**{k: v for k, v in _SOLVER.items() if k != "algorithm_type"}, **SPACED,
         "predict_x0": True, "solver_type": "bh2", "disable_corrector": (), "solver_p": None,
         "final_sigmas_type": "zero", **ZERO_SNR, "sigma_min": None, "sigma_max": None,
         "shift_terminal": None},
    ),
}  # fmt: skip
