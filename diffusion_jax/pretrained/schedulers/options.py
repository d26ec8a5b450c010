"""How the options of diffusers' schedulers are read, and what many of them share."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.forward import log_snr
from diffusion_jax.core.parameterization import X0, Eps, FlowVelocity, Parameterization, V
from diffusion_jax.core.schedules import (
    Betas,
    Cosine,
    DiscreteSchedule,
    LaplaceBeta,
    Linear,
    ScaledLinear,
    SigmoidBeta,
    ZeroTerminalSNR,
)
from diffusion_jax.core.types import Array, NoiseLevel
from diffusion_jax.guidance import DynamicThreshold, StaticThreshold, Unguided
from diffusion_jax.pretrained.schedulers.table_steps import SPACINGS
from diffusion_jax.samplers.base import Sampler
from diffusion_jax.samplers.karras import Euler, ReferenceEulerChurn

# Below this many steps diffusers' multistep solvers end with lower orders.
FEW_STEPS = 15
Threshold = Unguided | StaticThreshold | DynamicThreshold


@dataclass(frozen=True)
class ScaledTime:
    """The network's time on a flow-matching path: T σ, or T (1 - σ) where its time runs to data.

    Attributes:
      scale: T.
      to_data: 0 is pure noise and T is data.
      rounded: the network is told integers.
    """

    scale: float = 1000.0
    to_data: bool = False
    rounded: bool = False

    def __call__(self, level: NoiseLevel) -> Array:
        time = self.scale * (1.0 - level.t if self.to_data else level.t)
        return jnp.round(time) if self.rounded else time


@dataclass(frozen=True)
class LogSigmaTime:
    """The network's time of a consistency model: scale · log(σ / α).

    Attributes:
      scale: 250 in the released models, a thousand times EDM's.
    """

    scale: float = 250.0

    def __call__(self, level: NoiseLevel) -> Array:
        return -0.5 * self.scale * log_snr(level)


class Options:
    """The options of one config, each of which must be asked for."""

    def __init__(self, class_name, values, call, defaults):
        self.class_name, self.values, self.call, self.defaults = class_name, values, call, defaults
        self.unread = set(values)

    def __getitem__(self, name: str) -> Any:
        self.unread.discard(name)
        return self.values[name]

    def refuse(self, name: str, expected: str) -> ValueError:
        return ValueError(
            f"{name} = {self.values.get(name)!r} of {self.class_name} is not supported; expected "
            f"{expected}"
        )

    def choice(self, name: str, allowed: Sequence[Any]) -> Any:
        value = self[name]
        if value not in allowed or isinstance(value, bool):
            raise self.refuse(name, "one of " + ", ".join(repr(each) for each in allowed))
        return value

    def flag(self, name: str) -> bool:
        if not isinstance(self[name], bool):
            raise self.refuse(name, "True or False")
        return self[name]

    def only(self, *names: str) -> None:
        """Options that do nothing, or nothing sensible, unless they have their default."""
        for name in names:
            default = self.defaults[name]
            if self[name] != default:
                raise self.refuse(name, f"its default {default!r} with these other options")


class Kind(NamedTuple):
    """One class of diffusers.

    Attributes:
      build: options -> the parts of a Scheduler by name.
      defaults: option -> its default.
      call: argument of `step` or `set_timesteps` -> its default.
      inert: options that diffusers reads nowhere in the class, or for others only.
    """

    build: Callable[[Options], dict[str, Any]]
    defaults: Mapping[str, Any]
    call: Mapping[str, Any] = {}
    inert: tuple[str, ...] = ()


_BETAS = {"linear": Linear, "scaled_linear": ScaledLinear, "sigmoid": SigmoidBeta}
PREDICTIONS = {"epsilon": Eps, "sample": X0, "v_prediction": V, "flow_prediction": FlowVelocity}
THREE_PREDICTIONS = ("epsilon", "sample", "v_prediction")
TWO_PREDICTIONS = ("epsilon", "v_prediction")
COMMON_BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")


def _exponential_betas(total: int) -> Betas:
    """ᾱ(u) = e^{-12 u}: the same β everywhere."""
    return Betas(total, (float(-np.expm1(-12.0 / total)),) * total)


def schedule_of(
    o: Options, named: Sequence[str] = COMMON_BETAS, *, last: float = 0.0
) -> DiscreteSchedule:
    """The schedule of the β that the options name; `last` is where zero terminal SNR ends."""
    total, start, end = o["num_train_timesteps"], o["beta_start"], o["beta_end"]
    name, trained = o.choice("beta_schedule", named), o["trained_betas"]
    if trained is not None:
        if len(trained) != total:
            raise o.refuse("trained_betas", f"as many values as num_train_timesteps = {total}")
        schedule = Betas(total, tuple(float(beta) for beta in trained))
    elif name == "squaredcos_cap_v2":
        schedule = Cosine(total)
    elif name == "laplace":
        schedule = LaplaceBeta(total)
    elif name == "exp":
        schedule = _exponential_betas(total)
    else:
        schedule = _BETAS[name](total, beta_start=start, beta_end=end)
    if "rescale_betas_zero_snr" in o.values and o.flag("rescale_betas_zero_snr"):
        return ZeroTerminalSNR(total, schedule, last)
    return schedule


def prediction_of(o: Options, allowed: Sequence[str] = THREE_PREDICTIONS) -> Parameterization:
    """The parameterization that prediction_type names."""
    return PREDICTIONS[o.choice("prediction_type", allowed)]()


def dynamic_threshold(o: Options) -> Threshold | None:
    """Dynamic thresholding, or None where it is off."""
    on = o.flag("thresholding")
    ratio, largest = o["dynamic_thresholding_ratio"], o["sample_max_value"]
    return DynamicThreshold(100.0 * ratio, float(largest)) if on else None


def threshold_of(o: Options) -> Threshold:
    """Thresholding, which goes before clipping."""
    dynamic = dynamic_threshold(o) if "thresholding" in o.values else None
    clip, limit = o.flag("clip_sample"), o["clip_sample_range"]
    if dynamic is not None:
        return dynamic
    return StaticThreshold(float(limit)) if clip else Unguided()


def noise_source(o: Options, threshold: Threshold) -> str:
    """Which x̂0 the noise follows from: diffusers leaves ε̂ as it was before thresholding."""
    return "x0" if isinstance(threshold, Unguided) else "raw_x0"


def respacing_of(
    o: Options, kinds: Sequence[str] = ("karras", "exponential", "beta")
) -> str | None:
    """Which of the respacings is switched on, or None."""
    names = {"lu": "use_lu_lambdas"}
    chosen = [kind for kind in kinds if o.flag(names.get(kind, f"use_{kind}_sigmas"))]
    if len(chosen) > 1:
        raise ValueError(f"{o.class_name} takes one of {', '.join(kinds)} sigmas, got {chosen}")
    return chosen[0] if chosen else None


def spacing_of(o: Options) -> dict[str, Any]:
    """The fields of steps that timestep_spacing and steps_offset stand for."""
    return {"spacing": o.choice("timestep_spacing", SPACINGS), "offset": o["steps_offset"]}


DISCRETE = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None,
}  # fmt: skip
KARRAS_BETAS = {**DISCRETE, "beta_start": 0.00085, "beta_end": 0.012}
DYNAMIC = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
RESPACED = {
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
}  # fmt: skip
FLOW = {
    "use_flow_sigmas": False, "flow_shift": 1.0, "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}  # fmt: skip
SPACED = {"prediction_type": "epsilon", "timestep_spacing": "linspace", "steps_offset": 0}
ZERO_SNR = {"rescale_betas_zero_snr": False}
CHURN = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}


def dynamic_shift(o: Options) -> str | None:
    """The kind of shift by μ, or None where it is off."""
    kind = o.choice("time_shift_type", ("exponential", "linear"))
    return kind if o.flag("use_dynamic_shifting") else None


def solver_names(o: Options, algorithms: Sequence[str], stand_ins: Sequence[str] = ("deis",)):
    """algorithm_type and solver_type, with the names that diffusers replaces replaced."""
    algorithm = o.choice("algorithm_type", (*algorithms, *stand_ins))
    algorithm = "dpmsolver++" if algorithm == "deis" else algorithm
    solver = o.choice("solver_type", ("midpoint", "heun", "logrho", "bh1", "bh2"))
    return algorithm, solver if solver in ("midpoint", "heun") else "midpoint"


def final_sigma(o: Options, algorithm: str) -> str:
    """Where the last step ends; solvers for ε̂ cannot go to clean data."""
    final = o.choice("final_sigmas_type", ("zero", "sigma_min"))
    if final == "zero" and not algorithm.endswith("++"):
        raise o.refuse("final_sigmas_type", f"'sigma_min' with algorithm_type {algorithm!r}")
    return final


def churned(o: Options, parameterization: Parameterization) -> Sampler:
    """Euler's method, with churn where it is asked for."""
    churn = {name: o.call[name] for name in CHURN}
    if churn["s_churn"] == 0.0:
        return Euler()
    return ReferenceEulerChurn(**churn, parameterization=parameterization)
