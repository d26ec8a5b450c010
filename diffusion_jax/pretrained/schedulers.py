"""diffusers' scheduler_config.json as schedule, grid, sampler, prediction and threshold, and back.

| classes, without "Scheduler" | options |
| --- | --- |
| DDPM, DDIM, DDIMInverse, UnCLIP, PNDM, IPNDM, RePaint | all |
| EulerDiscrete, EulerAncestralDiscrete, HeunDiscrete, LMSDiscrete | all |
| KDPM2Discrete, KDPM2AncestralDiscrete, DPMSolverSDE | all |
| DPMSolverMultistep, DPMSolverSinglestep, DEISMultistep | all |
| UniPCMultistep | all but solver_p |
| EDMEuler, EDMDPMSolverMultistep | all |
| FlowMatchEulerDiscrete, FlowMatchHeunDiscrete | all |
| LCM, TCD, CMStochasticIterative | all |

"All" means every value with which diffusers 0.42.1 gives a finite sample. Values that it accepts
and ignores are refused, unless they are its defaults or options that it stores for others to
read. Every other class (SASolver, CogVideoX's, VQDiffusion, ScoreSdeVe, Amused, …) is refused by
name.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.arrays import per_example
from diffusion_jax.core.denoiser import edm_time, network_time
from diffusion_jax.core.forward import log_snr
from diffusion_jax.core.grid import Grid
from diffusion_jax.core.parameterization import (
    X0,
    ConsistencyPreconditioning,
    EDMPreconditioning,
    Eps,
    FlowVelocity,
    Parameterization,
    V,
)
from diffusion_jax.core.schedules import (
    EDM,
    Betas,
    Cosine,
    CosineLogSNR,
    DiscreteSchedule,
    FlowMatching,
    LaplaceBeta,
    Linear,
    NoiseSchedule,
    ScaledLinear,
    SigmoidBeta,
    ZeroTerminalSNR,
)
from diffusion_jax.core.types import Array, NoiseLevel
from diffusion_jax.guidance import DynamicThreshold, StaticThreshold, Unguided
from diffusion_jax.pretrained.scheduler_grids import (
    SPACINGS,
    DistilledSteps,
    PNDMSteps,
    ReferenceSteps,
    RepaintSteps,
    TableSteps,
)
from diffusion_jax.pretrained.scheduler_rates import (
    EDMSteps,
    FlowKarrasSteps,
    FlowSteps,
    SineSteps,
)
from diffusion_jax.pretrained.scheduler_ratios import (
    LEAST_ALPHAS_CUMPROD,
    RatioSteps,
    ratios32,
)
from diffusion_jax.samplers.ancestral import EulerAncestral, KDPM2Ancestral
from diffusion_jax.samplers.base import Sampler, fit_grid
from diffusion_jax.samplers.consistency import LCM, TCD, ConsistencyMultistep
from diffusion_jax.samplers.ddim import DDIM
from diffusion_jax.samplers.ddpm import DDPM
from diffusion_jax.samplers.deis import DEIS
from diffusion_jax.samplers.dpm_sde import DPMSolverSDE
from diffusion_jax.samplers.dpm_singlestep import DPMSolverSinglestep
from diffusion_jax.samplers.dpm_solver import DPMSolverMultistep
from diffusion_jax.samplers.flow import FlowHeun, Renoise
from diffusion_jax.samplers.karras import Euler, Heun, ReferenceEulerChurn
from diffusion_jax.samplers.inversion import DDIMInversion
from diffusion_jax.samplers.kdpm2 import KDPM2
from diffusion_jax.samplers.lms import LMS
from diffusion_jax.samplers.pndm import IPNDM, PNDM
from diffusion_jax.samplers.unipc import UniPC

# What diffusers writes beside the options.
PRIVATE = ("_class_name", "_diffusers_version", "_use_default_values")
# Below this many steps diffusers' multistep solvers end with lower orders.
_FEW_STEPS = 15
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


@dataclass(frozen=True)
class Scheduler:
    """What one scheduler_config.json says, part by part.

    Attributes:
      class_name: the class in diffusers.
      options: every option of the class with its value, defaults filled in.
      call: arguments of diffusers' `set_timesteps` and `step` that were given and that no
        config holds, such as eta.
      schedule: of training.
      parameterization: what the network says.
      sampler: what the class does in `step`. RePaint's is to be wrapped with the known pixels:
        `RePaint(scheduler.sampler, known, mask, share_noise=True)`.
      steps: what it does in `set_timesteps`; see `grid`.
      threshold: what is done to x̂0.
      learned_variance: what the second half of the network's channels means, or None.
      time_input: what the network is told about a level.
      scaled: the class keeps x / α where this library keeps x; see `to_reference`.
      noise: the std of the noise that the class starts from: "unit", "largest" (the largest σ/α)
        or "hypot" (√(1 + that²)).
    """

    class_name: str
    options: tuple[tuple[str, Any], ...]
    call: tuple[tuple[str, Any], ...]
    schedule: NoiseSchedule
    parameterization: Parameterization
    sampler: Sampler
    steps: ReferenceSteps
    threshold: Threshold = Unguided()
    learned_variance: str | None = None
    time_input: Callable[[NoiseLevel], Array] = network_time
    scaled: bool = False
    noise: str = "unit"

    def grid(
        self,
        num_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        max_steps: int = 1000,
    ) -> Grid:
        """The grid that `set_timesteps` makes of these arguments.

        Args:
          num_steps: N; or the steps one by one:
          timesteps, sigmas: where the class takes them.
          mu: the shift of a flow-matching path that the image's size asks for.
          max_steps: length that the grid is padded to.

        Raises:
          ValueError: if the class takes no such argument, or a value is out of range.
        """
        given = {"timesteps": timesteps, "sigmas": sigmas, "mu": mu}
        grid = self.steps.grid(self.schedule, num_steps, **given, max_steps=max_steps)
        return fit_grid(self.sampler, grid, self.schedule)

    def init_noise_sigma(self, grid: Grid) -> float:
        """The std of the noise that the class starts from, in its own units."""
        if self.noise == "unit":
            return 1.0
        if isinstance(self.schedule, EDM):
            largest = self.schedule.sigma_max
        else:
            alpha, sigma = (np.asarray(f, np.float64) for f in grid.levels[1:])
            largest = float(np.max(sigma / alpha))
        return largest if self.noise == "largest" else math.hypot(largest, 1.0)

    def x_T(self, unit_noise: Array, grid: Grid) -> Array:
        """Where the class starts: unit normal noise [B, ...] brought to the grid's first level."""
        level = grid.level(0)
        return self.from_reference(self.init_noise_sigma(grid) * jnp.asarray(unit_noise), level)

    def from_reference(self, x: Array, level: NoiseLevel) -> Array:
        """This library's x_t [B, ...] of the class's sample."""
        return x * per_example(level.alpha, x) if self.scaled else x

    def to_reference(self, x: Array, level: NoiseLevel) -> Array:
        """The class's sample of this library's x_t [B, ...]."""
        return x / per_example(level.alpha, x) if self.scaled else x


class _Options:
    """The options of one config, each of which must be asked for."""

    def __init__(self, class_name: str, values: Mapping[str, Any], call: Mapping[str, Any]):
        self.class_name, self.values, self.call = class_name, values, call
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
            default = CLASSES[self.class_name].defaults[name]
            if self[name] != default:
                raise self.refuse(name, f"its default {default!r} with these other options")


class _Class(NamedTuple):
    """One class of diffusers.

    Attributes:
      build: options -> the parts of a Scheduler by name.
      defaults: option -> its default.
      call: argument of `step` or `set_timesteps` -> its default.
      inert: options that diffusers reads nowhere in the class, or for others only.
    """

    build: Callable[[_Options], dict[str, Any]]
    defaults: Mapping[str, Any]
    call: Mapping[str, Any] = {}
    inert: tuple[str, ...] = ()


# --- options that many classes share

_BETAS = {"linear": Linear, "scaled_linear": ScaledLinear, "sigmoid": SigmoidBeta}
_PREDICTIONS = {"epsilon": Eps, "sample": X0, "v_prediction": V, "flow_prediction": FlowVelocity}
_THREE = ("epsilon", "sample", "v_prediction")
_TWO = ("epsilon", "v_prediction")
_COMMON_BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")


def _exponential_betas(total: int) -> Betas:
    """ᾱ(u) = e^{-12 u}: the same β everywhere."""
    return Betas(total, (float(-np.expm1(-12.0 / total)),) * total)


def _schedule(
    o: _Options, named: Sequence[str] = _COMMON_BETAS, *, last: float = 0.0
) -> DiscreteSchedule:
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


def _prediction(o: _Options, allowed: Sequence[str] = _THREE) -> Parameterization:
    return _PREDICTIONS[o.choice("prediction_type", allowed)]()


def _dynamic_threshold(o: _Options) -> Threshold | None:
    on = o.flag("thresholding")
    ratio, largest = o["dynamic_thresholding_ratio"], o["sample_max_value"]
    return DynamicThreshold(100.0 * ratio, float(largest)) if on else None


def _threshold(o: _Options) -> Threshold:
    dynamic = _dynamic_threshold(o) if "thresholding" in o.values else None
    clip, limit = o.flag("clip_sample"), o["clip_sample_range"]
    if dynamic is not None:
        return dynamic
    return StaticThreshold(float(limit)) if clip else Unguided()


def _eps_of(o: _Options, threshold: Threshold) -> str:
    """Which x̂0 the noise follows from: diffusers leaves ε̂ as it was before thresholding."""
    return "x0" if isinstance(threshold, Unguided) else "raw_x0"


def _respacing(o: _Options, kinds: Sequence[str] = ("karras", "exponential", "beta")) -> str | None:
    names = {"lu": "use_lu_lambdas"}
    chosen = [kind for kind in kinds if o.flag(names.get(kind, f"use_{kind}_sigmas"))]
    if len(chosen) > 1:
        raise ValueError(f"{o.class_name} takes one of {', '.join(kinds)} sigmas, got {chosen}")
    return chosen[0] if chosen else None


def _spacing(o: _Options) -> dict[str, Any]:
    return {"spacing": o.choice("timestep_spacing", SPACINGS), "offset": o["steps_offset"]}


_DISCRETE = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None,
}  # fmt: skip
_KARRAS_BETAS = {**_DISCRETE, "beta_start": 0.00085, "beta_end": 0.012}
_DYNAMIC = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_RESPACED = {
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
}  # fmt: skip
_FLOW = {
    "use_flow_sigmas": False, "flow_shift": 1.0, "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}  # fmt: skip
_SPACED = {"prediction_type": "epsilon", "timestep_spacing": "linspace", "steps_offset": 0}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_CHURN = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}


# --- classes that work on x itself, at the times of the table


def _ddpm(o: _Options) -> dict[str, Any]:
    kinds = {
        "fixed_small": ("small", None), "fixed_small_log": ("small", None),
        "fixed_large": ("large", None), "learned": ("learned", "variance"),
        "learned_range": ("learned_range", "range"),
    }  # fmt: skip
    variance, learned = kinds[o.choice("variance_type", tuple(kinds))]
    return {
        "schedule": _schedule(o, (*_COMMON_BETAS, "laplace", "sigmoid")),
        "parameterization": _prediction(o),
        "threshold": _threshold(o),
        "learned_variance": learned,
        "sampler": DDPM(variance, noise_at_end=True),
        "steps": TableSteps(**_spacing(o), custom=True),
    }


def _ddim(o: _Options) -> dict[str, Any]:
    threshold = _threshold(o)
    eps = "x0" if o.call["use_clipped_model_output"] else _eps_of(o, threshold)
    return {
        "schedule": _schedule(o),
        "parameterization": _prediction(o),
        "threshold": threshold,
        "sampler": DDIM(o.call["eta"], noise_from=eps),
        "steps": TableSteps(**_spacing(o), end="stride", clean=o.flag("set_alpha_to_one")),
    }


def _ddim_inverse(o: _Options) -> dict[str, Any]:
    threshold = _threshold(o)
    o.choice("timestep_spacing", ("leading", "trailing"))
    steps = TableSteps(**_spacing(o), end="stride", clean=o.flag("set_alpha_to_one"), inverse=True)
    return {
        "schedule": _schedule(o),
        "parameterization": _prediction(o),
        "threshold": threshold,
        "sampler": DDIMInversion(variant="reference"),
        "steps": steps,
    }


def _unclip(o: _Options) -> dict[str, Any]:
    kinds = {"fixed_small_log": ("small", None), "learned_range": ("learned_range", "range")}
    variance, learned = kinds[o.choice("variance_type", tuple(kinds))]
    o.choice("beta_schedule", ("squaredcos_cap_v2",))
    return {
        "schedule": Cosine(o["num_train_timesteps"]),
        "parameterization": _prediction(o, ("epsilon", "sample")),
        "threshold": _threshold(o),
        "learned_variance": learned,
        "sampler": DDPM(variance, noise_at_end=True, variant="unclip"),
        "steps": TableSteps("linspace", end=o.call["prev_timestep"]),
    }


def _pndm(o: _Options) -> dict[str, Any]:
    parameterization = _prediction(o, _TWO)
    start = not o.flag("skip_prk_steps")
    return {
        "schedule": _schedule(o),
        "parameterization": parameterization,
        "sampler": PNDM(start, "v" if isinstance(parameterization, V) else "eps"),
        "steps": PNDMSteps(**_spacing(o), clean=o.flag("set_alpha_to_one"), runge_kutta=start),
    }


def _ipndm(o: _Options) -> dict[str, Any]:
    trained = o["trained_betas"]
    return {
        "schedule": CosineLogSNR(-40.0, 40.0),
        "parameterization": V(),
        "sampler": IPNDM(variant="reference"),
        "steps": SineSteps(None if trained is None else tuple(float(b) for b in trained)),
    }


def _repaint(o: _Options) -> dict[str, Any]:
    threshold = StaticThreshold(1.0) if o.flag("clip_sample") else Unguided()
    return {
        "schedule": _schedule(o, (*_COMMON_BETAS, "sigmoid")),
        "parameterization": Eps(),
        "threshold": threshold,
        "sampler": DDIM(o["eta"], noise_from=_eps_of(o, threshold)),
        "steps": RepaintSteps(o.call["jump_length"], o.call["jump_n_sample"]),
    }


def _distilled(o: _Options, sampler: Sampler, threshold: Threshold, **steps) -> dict[str, Any]:
    original = o.call["original_inference_steps"]
    trained = o["original_inference_steps"]
    return {
        "schedule": _schedule(o),
        "parameterization": _prediction(o),
        "threshold": threshold,
        "sampler": sampler,
        "steps": DistilledSteps(
            trained if original is None else original, o.call["strength"], **steps
        ),
    }


def _lcm(o: _Options) -> dict[str, Any]:
    return _distilled(o, LCM(o["timestep_scaling"]), _threshold(o))


def _tcd(o: _Options) -> dict[str, Any]:
    o.only("clip_sample", "thresholding")
    every, eta = o.call["original_inference_steps"] is not None, o.call["eta"]
    return _distilled(o, TCD(eta), Unguided(), stage=eta, every=every, clean=False)


# --- classes that keep x / α


def _exploding(
    o: _Options,
    sampler: Sampler,
    predictions: Sequence[str] = _THREE,
    betas: Sequence[str] = _COMMON_BETAS,
    **more: Any,
) -> dict[str, Any]:
    """What Euler, Heun, LMS, KDPM2 and their stochastic relatives have in common."""
    steps = {"respacing": _respacing(o)} if "use_karras_sigmas" in o.values else {}
    steps = {**_spacing(o), **steps, **more}
    return {
        "schedule": _schedule(o, betas, last=LEAST_ALPHAS_CUMPROD),
        "parameterization": _prediction(o, predictions),
        "sampler": sampler,
        "steps": RatioSteps(**steps),
        "scaled": True,
        "noise": "hypot" if steps["spacing"] == "leading" else "largest",
    }


def _churned(o: _Options, parameterization: Parameterization) -> Sampler:
    churn = {name: o.call[name] for name in _CHURN}
    if churn["s_churn"] == 0.0:
        return Euler()
    return ReferenceEulerChurn(**churn, parameterization=parameterization)


def _euler(o: _Options) -> dict[str, Any]:
    kind = o.choice("prediction_type", (*_THREE, "original_sample"))
    named = _PREDICTIONS["sample" if kind == "original_sample" else kind]()
    respacing = _respacing(o)
    interpolation = o.choice("interpolation_type", ("linear", "log_linear"))
    continuous = o.choice("timestep_type", ("discrete", "continuous")) == "continuous"
    if interpolation == "log_linear" and respacing is None:
        respacing = "log_linear"
    elif interpolation == "log_linear" and None in (o["sigma_min"], o["sigma_max"]):
        raise o.refuse(
            "interpolation_type", f"'linear' with {respacing} sigmas of the table's ends"
        )
    parts = _exploding(
        o,
        _churned(o, named),
        (*_THREE, "original_sample"),
        respacing=respacing,
        final=o.choice("final_sigmas_type", ("zero", "sigma_min")),
        sigma_min=o["sigma_min"],
        sigma_max=o["sigma_max"],
        custom=("timesteps", "sigmas"),
    )
    tells_sigma = continuous and kind == "v_prediction"
    return {**parts, "time_input": edm_time if tells_sigma else network_time}


def _euler_ancestral(o: _Options) -> dict[str, Any]:
    return _exploding(o, EulerAncestral(), _TWO)


def _heun(o: _Options) -> dict[str, Any]:
    betas = (*_COMMON_BETAS, "exp")
    parts = _exploding(o, Heun(), betas=betas, custom=("timesteps",))
    return {**parts, "threshold": _threshold(o)}


def _lms(o: _Options) -> dict[str, Any]:
    return _exploding(o, LMS(o.call["order"]))


def _told(o: _Options) -> str:
    return "rounded" if o.flag("use_karras_sigmas") else "exact"


def _kdpm2(o: _Options) -> dict[str, Any]:
    return _exploding(o, KDPM2(), _TWO, told=_told(o), middle="mean")


def _kdpm2_ancestral(o: _Options) -> dict[str, Any]:
    sampler = KDPM2Ancestral(variant="reference")
    return _exploding(o, sampler, _TWO, told=_told(o), middle="next")


def _dpm_sde(o: _Options) -> dict[str, Any]:
    return _exploding(o, DPMSolverSDE(o.call["s_noise"]), _TWO, middle="mean")


# --- exponential integrators, which work on x itself


def _flow_path(
    o: _Options, base: DiscreteSchedule, final: float | None, **steps: Any
) -> dict[str, Any]:
    shift = float(o["flow_shift"])
    steps = FlowSteps(base.num_timesteps, shift, final=final, told="cut", **steps)
    return {
        "schedule": FlowMatching(shift),
        "parameterization": _prediction(o, ("epsilon", "sample", "flow_prediction")),
        "time_input": ScaledTime(float(base.num_timesteps), rounded=True),
        "steps": steps,
    }


def _dynamic_shift(o: _Options) -> str | None:
    kind = o.choice("time_shift_type", ("exponential", "linear"))
    return kind if o.flag("use_dynamic_shifting") else None


def _path(
    o: _Options, *, last: float = 0.0, respacing: str | None, told: str, final: str, **steps: Any
) -> dict[str, Any]:
    """Schedule, steps, prediction and time of a solver, on the table's path or a straight one."""
    base = _schedule(o, last=last)
    spacing = _spacing(o) if "timestep_spacing" in o.values else {}
    if o.flag("use_flow_sigmas"):
        if respacing is not None:
            raise o.refuse("use_flow_sigmas", f"False with {respacing} sigmas")
        dynamic = _dynamic_shift(o)
        if dynamic == "linear":
            raise o.refuse("time_shift_type", "'exponential'")
        end = {"zero": 0.0, "sigma_min": float(ratios32(base)[0]), "last": None}[final]
        return _flow_path(o, base, end, dynamic=dynamic, mu_needed=False, start="complement")
    o.only("flow_shift", "use_dynamic_shifting", "time_shift_type")
    return {
        "schedule": base,
        "parameterization": _prediction(o),
        "steps": RatioSteps(
            **spacing, integers=True, respacing=respacing, told=told, final=final, **steps
        ),
    }


def _told_by_solvers(o: _Options, respacing: str | None) -> str:
    """Solvers round the times of some respacings and cut those of others."""
    exact_betas = o["beta_schedule"] == "squaredcos_cap_v2"
    rounded = respacing in ("karras", "lu") and not exact_betas
    return "rounded" if rounded else "cut"


def _solver_names(o: _Options, algorithms: Sequence[str], stand_ins: Sequence[str] = ("deis",)):
    """algorithm_type and solver_type, with the names that diffusers replaces replaced."""
    algorithm = o.choice("algorithm_type", (*algorithms, *stand_ins))
    algorithm = "dpmsolver++" if algorithm == "deis" else algorithm
    solver = o.choice("solver_type", ("midpoint", "heun", "logrho", "bh1", "bh2"))
    return algorithm, solver if solver in ("midpoint", "heun") else "midpoint"


def _dropped_variance(o: _Options) -> str | None:
    kind = o.choice("variance_type", (None, "learned", "learned_range"))
    return None if kind is None else "range"


def _final_sigma(o: _Options, algorithm: str) -> str:
    final = o.choice("final_sigmas_type", ("zero", "sigma_min"))
    if final == "zero" and not algorithm.endswith("++"):
        raise o.refuse("final_sigmas_type", f"'sigma_min' with algorithm_type {algorithm!r}")
    return final


def _dpm_multistep(o: _Options) -> dict[str, Any]:
    algorithms = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
    algorithm, solver = _solver_names(o, algorithms)
    respacing = _respacing(o, ("karras", "lu", "exponential", "beta"))
    parts = _path(
        o,
        last=LEAST_ALPHAS_CUMPROD,
        respacing=respacing,
        told=_told_by_solvers(o, respacing),
        final=_final_sigma(o, algorithm),
        half_log_snr_min=float(o["lambda_min_clipped"]),
        custom=("timesteps",),
    )
    sampler = DPMSolverMultistep(
        o.choice("solver_order", (1, 2, 3)),
        algorithm,
        solver,
        lower_order_below=_FEW_STEPS if o.flag("lower_order_final") else 0,
        euler_at_final=o.flag("euler_at_final"),
        variant="reference",
    )
    threshold = _dynamic_threshold(o) or Unguided()
    learned = _dropped_variance(o)
    return {**parts, "sampler": sampler, "threshold": threshold, "learned_variance": learned}


def _dpm_singlestep(o: _Options) -> dict[str, Any]:
    algorithm, solver = _solver_names(o, ("dpmsolver++", "dpmsolver", "sde-dpmsolver++"))
    respacing = _respacing(o)
    parts = _path(
        o,
        respacing=respacing,
        told="rounded" if respacing == "karras" else "cut",
        final=_final_sigma(o, algorithm),
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
    threshold = _dynamic_threshold(o) or Unguided()
    learned = _dropped_variance(o)
    return {**parts, "sampler": sampler, "threshold": threshold, "learned_variance": learned}


def _deis(o: _Options) -> dict[str, Any]:
    o.choice("algorithm_type", ("deis", "dpmsolver", "dpmsolver++"))
    o.choice("solver_type", ("logrho", "midpoint", "heun", "bh1", "bh2"))
    respacing = _respacing(o)
    told = "rounded" if respacing == "karras" else "cut"
    parts = _path(o, respacing=respacing, told=told, final="last")
    lower = _FEW_STEPS if o.flag("lower_order_final") else 0
    sampler = DEIS(o.choice("solver_order", (1, 2, 3)), lower_order_below=lower)
    return {**parts, "sampler": sampler, "threshold": _dynamic_threshold(o) or Unguided()}


def _unipc_path(o: _Options) -> dict[str, Any]:
    respacing = _respacing(o)
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
    base = _schedule(o, last=LEAST_ALPHAS_CUMPROD)
    _spacing(o)
    end, dynamic = {"zero": 0.0, "sigma_min": None}[final], _dynamic_shift(o)
    parts = _flow_path(
        o, base, end, dynamic=dynamic, terminal=terminal, start="unit", custom=("sigmas",)
    )
    if respacing == "karras":
        o.only("flow_shift", "use_dynamic_shifting", "shift_terminal")
        parts["steps"] = FlowKarrasSteps(base, "zero" if end == 0.0 else "last", low, high)
    elif respacing is not None:
        raise o.refuse("use_flow_sigmas", f"False with {respacing} sigmas")
    return parts


def _unipc(o: _Options) -> dict[str, Any]:
    solver = o.choice("solver_type", ("bh1", "bh2", "midpoint", "heun", "logrho"))
    predict, threshold = o.flag("predict_x0"), _dynamic_threshold(o)
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


# --- EDM, consistency and flow-matching models


def _edm(o: _Options, final: str) -> dict[str, Any]:
    negated = o.choice("prediction_type", _TWO) == "v_prediction"
    return {
        "schedule": EDM(o["sigma_min"], o["sigma_max"]),
        "parameterization": EDMPreconditioning(o["sigma_data"], negated),
        "steps": EDMSteps(
            o.choice("sigma_schedule", ("karras", "exponential")), float(o["rho"]), final
        ),
        "time_input": edm_time,
        "noise": "hypot",
    }


def _edm_euler(o: _Options) -> dict[str, Any]:
    parts = _edm(o, o.choice("final_sigmas_type", ("zero", "sigma_min")))
    return {**parts, "sampler": _churned(o, parts["parameterization"])}


def _edm_dpm(o: _Options) -> dict[str, Any]:
    algorithm, solver = _solver_names(o, ("dpmsolver++", "sde-dpmsolver++"))
    order = o.choice("solver_order", (1, 2, 3))
    if order == 3 and algorithm == "sde-dpmsolver++":
        raise o.refuse("solver_order", "1 or 2 with algorithm_type 'sde-dpmsolver++'")
    sampler = DPMSolverMultistep(
        order,
        algorithm,
        solver,
        lower_order_below=_FEW_STEPS if o.flag("lower_order_final") else 0,
        euler_at_final=o.flag("euler_at_final"),
        variant="reference",
    )
    parts = _edm(o, _final_sigma(o, algorithm))
    return {**parts, "sampler": sampler, "threshold": _dynamic_threshold(o) or Unguided()}


def _consistency(o: _Options) -> dict[str, Any]:
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


def _flow_match(o: _Options, sampler: Sampler, **steps: Any) -> dict[str, Any]:
    total, shift = o["num_train_timesteps"], float(o["shift"])
    return {
        "schedule": FlowMatching(shift),
        "parameterization": FlowVelocity(),
        "sampler": sampler,
        "steps": FlowSteps(total, shift, **steps),
        "time_input": ScaledTime(float(total)),
    }


def _flow_euler(o: _Options) -> dict[str, Any]:
    inverted, terminal = o.flag("invert_sigmas"), o["shift_terminal"]
    parts = _flow_match(
        o,
        Renoise() if o.flag("stochastic_sampling") else Euler(),
        dynamic=_dynamic_shift(o),
        terminal=terminal,
        respacing=_respacing(o),
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


def _flow_heun(o: _Options) -> dict[str, Any]:
    return _flow_match(o, FlowHeun())


_SOLVER = {
    **_DISCRETE, "solver_order": 2, "prediction_type": "epsilon", **_DYNAMIC,
    "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": True,
    **_RESPACED, **_FLOW,
}  # fmt: skip
_EDM = {
    "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "rho": 7.0,
    "final_sigmas_type": "zero",
}  # fmt: skip
_DISTILLED = {
    **_KARRAS_BETAS, "beta_schedule": "scaled_linear", "original_inference_steps": 50,
    **_CLIP, "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 0,
    "prediction_type": "epsilon", **_DYNAMIC, "timestep_spacing": "leading",
    "timestep_scaling": 10.0, **_ZERO_SNR,
}  # fmt: skip
_DISTILLED_CALL = {"original_inference_steps": None, "strength": 1.0}
_DISTILLED_INERT = ("set_alpha_to_one", "steps_offset", "timestep_spacing")

CLASSES: dict[str, _Class] = {
    "DDPMScheduler": _Class(
        _ddpm,
        {**_DISCRETE, "variance_type": "fixed_small", **_CLIP, **_DYNAMIC, **_SPACED,
         "timestep_spacing": "leading", **_ZERO_SNR},
    ),
    "DDIMScheduler": _Class(
        _ddim,
        {**_DISCRETE, **_CLIP, "set_alpha_to_one": True, **_DYNAMIC, **_SPACED,
         "timestep_spacing": "leading", **_ZERO_SNR},
        {"eta": 0.0, "use_clipped_model_output": False},
    ),
    "DDIMInverseScheduler": _Class(
        _ddim_inverse,
        {**_DISCRETE, **_CLIP, "set_alpha_to_one": True, **_SPACED,
         "timestep_spacing": "leading", **_ZERO_SNR},
    ),
    "UnCLIPScheduler": _Class(
        _unclip,
        {"num_train_timesteps": 1000, "variance_type": "fixed_small_log", **_CLIP,
         "prediction_type": "epsilon", "beta_schedule": "squaredcos_cap_v2"},
        {"prev_timestep": "next"},
    ),
    "PNDMScheduler": _Class(
        _pndm,
        {**_DISCRETE, "skip_prk_steps": False, "set_alpha_to_one": False, **_SPACED,
         "timestep_spacing": "leading"},
    ),
    "IPNDMScheduler": _Class(
        _ipndm,
        {"num_train_timesteps": 1000, "trained_betas": None},
        inert=("num_train_timesteps",),
    ),
    "RePaintScheduler": _Class(
        _repaint,
        {**_DISCRETE, "eta": 0.0, "clip_sample": True},
        {"jump_length": 10, "jump_n_sample": 10},
    ),
    "EulerDiscreteScheduler": _Class(
        _euler,
        {**_DISCRETE, **_SPACED, "interpolation_type": "linear", **_RESPACED, "sigma_min": None,
         "sigma_max": None, "timestep_type": "discrete", **_ZERO_SNR,
         "final_sigmas_type": "zero"},
        _CHURN,
    ),
    "EulerAncestralDiscreteScheduler": _Class(
        _euler_ancestral, {**_DISCRETE, **_SPACED, **_ZERO_SNR}
    ),
    "HeunDiscreteScheduler": _Class(
        _heun, {**_KARRAS_BETAS, **_SPACED, **_RESPACED, **_CLIP, "clip_sample": False}
    ),
    "LMSDiscreteScheduler": _Class(_lms, {**_DISCRETE, **_SPACED, **_RESPACED}, {"order": 4}),
    "KDPM2DiscreteScheduler": _Class(_kdpm2, {**_KARRAS_BETAS, **_SPACED, **_RESPACED}),
    "KDPM2AncestralDiscreteScheduler": _Class(
        _kdpm2_ancestral, {**_KARRAS_BETAS, **_SPACED, **_RESPACED}
    ),
    # The seed of its own noise has no counterpart: noise follows from the keys.
    "DPMSolverSDEScheduler": _Class(
        _dpm_sde,
        {**_KARRAS_BETAS, **_SPACED, **_RESPACED, "noise_sampler_seed": None},
        {"s_noise": 1.0},
        ("noise_sampler_seed",),
    ),
    "DPMSolverMultistepScheduler": _Class(
        _dpm_multistep,
        {**_SOLVER, **_SPACED, "euler_at_final": False, "use_lu_lambdas": False,
         "final_sigmas_type": "zero", "lambda_min_clipped": -math.inf, "variance_type": None,
         **_ZERO_SNR},
    ),
    "DPMSolverSinglestepScheduler": _Class(
        _dpm_singlestep,
        {**_SOLVER, "lower_order_final": False, "final_sigmas_type": "zero",
         "lambda_min_clipped": -math.inf, "variance_type": None},
    ),
    "DEISMultistepScheduler": _Class(
        _deis, {**_SOLVER, **_SPACED, "algorithm_type": "deis", "solver_type": "logrho"}
    ),
    "UniPCMultistepScheduler": _Class(
        _unipc,
        {**{k: v for k, v in _SOLVER.items() if k != "algorithm_type"}, **_SPACED,
         "predict_x0": True, "solver_type": "bh2", "disable_corrector": (), "solver_p": None,
         "final_sigmas_type": "zero", **_ZERO_SNR, "sigma_min": None, "sigma_max": None,
         "shift_terminal": None},
    ),
    "EDMEulerScheduler": _Class(_edm_euler, _EDM, _CHURN, ("num_train_timesteps",)),
    "EDMDPMSolverMultistepScheduler": _Class(
        _edm_dpm,
        {**_EDM, "solver_order": 2, **_DYNAMIC, "algorithm_type": "dpmsolver++",
         "solver_type": "midpoint", "lower_order_final": True, "euler_at_final": False},
        inert=("num_train_timesteps",),
    ),
    "LCMScheduler": _Class(_lcm, _DISTILLED, _DISTILLED_CALL, _DISTILLED_INERT),
    "TCDScheduler": _Class(
        _tcd,
        _DISTILLED,
        {**_DISTILLED_CALL, "eta": 0.3},
        (*_DISTILLED_INERT, "clip_sample_range", "dynamic_thresholding_ratio",
         "sample_max_value", "timestep_scaling"),
    ),
    "CMStochasticIterativeScheduler": _Class(
        _consistency,
        {"num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5,
         "s_noise": 1.0, "rho": 7.0, "clip_denoised": True},
    ),
    # The numbers that its pipelines make μ of, from the size of the image.
    "FlowMatchEulerDiscreteScheduler": _Class(
        _flow_euler,
        {"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False,
         "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
         "max_image_seq_len": 4096, "invert_sigmas": False, "shift_terminal": None, **_RESPACED,
         "time_shift_type": "exponential", "stochastic_sampling": False},
        inert=("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
    ),
    "FlowMatchHeunDiscreteScheduler": _Class(
        _flow_heun, {"num_train_timesteps": 1000, "shift": 1.0}
    ),
}  # fmt: skip


def _frozen(value: Any) -> Any:
    return tuple(_frozen(each) for each in value) if isinstance(value, list | tuple) else value


def _filled(what: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise ValueError(
            f"{what} has no {', '.join(unknown)}; it has {', '.join(sorted(defaults)) or 'none'}"
        )
    return {name: _frozen(given.get(name, default)) for name, default in defaults.items()}


def from_config(config: Mapping[str, Any], **call: Any) -> Scheduler:
    """The parts that a scheduler_config.json of diffusers describes.

    Args:
      config: the file's content. Options that it does not have stand at diffusers' defaults.
      call: arguments of diffusers' `step` and `set_timesteps` that change what is computed and are
        no numbers of steps, times or noise levels, such as eta, s_churn or jump_length;
        CLASSES[name].call lists them. UnCLIP's prev_timestep is "next" for the next time of the
        grid, as its pipelines pass it, or "previous" for t - 1, as `step` does without it.

    Raises:
      ValueError: if the class, an option or a value of one is not supported.
    """
    name = config.get("_class_name")
    if name not in CLASSES:
        raise ValueError(
            f"_class_name = {name!r} is not supported; expected one of {list(CLASSES)}"
        )
    given = {key: value for key, value in config.items() if key not in PRIVATE}
    kind = CLASSES[name]
    options = _filled(name, given, kind.defaults)
    arguments = _filled(f"a call of {name}", call, kind.call)
    reader = _Options(name, options, arguments)
    parts = kind.build(reader)
    for part in (parts["sampler"], parts.get("threshold")):
        if hasattr(part, "validate"):
            part.validate()
    left = reader.unread - set(kind.inert)
    if left:
        raise AssertionError(f"{name} reads nothing from {', '.join(sorted(left))}")
    changed = {k: v for k, v in arguments.items() if v != kind.call[k]}
    return Scheduler(name, tuple(options.items()), tuple(changed.items()), **parts)


def beta_schedule(scheduler: Scheduler) -> DiscreteSchedule:
    """The schedule of the β that a config names, also where its class takes a straight path.

    Raises:
      ValueError: if the class has none.
    """
    if isinstance(scheduler.schedule, DiscreteSchedule):
        return scheduler.schedule
    options = dict(scheduler.options)
    if "beta_schedule" not in options:
        raise ValueError(f"{scheduler.class_name} has no table of β")
    return _schedule(_Options(scheduler.class_name, options, {}))


def to_config(scheduler: Scheduler) -> dict[str, Any]:
    """The scheduler_config.json of a scheduler, with every option of its class.

    `from_config(to_config(s), **dict(s.call))` is s again.

    Raises:
      ValueError: if a part was replaced since `from_config`, so that no config describes it.
    """

    def thawed(value):
        return [thawed(each) for each in value] if isinstance(value, tuple) else value

    options = {name: thawed(value) for name, value in scheduler.options}
    config = {"_class_name": scheduler.class_name, **options}
    if from_config(config, **dict(scheduler.call)) != scheduler:
        raise ValueError(
            f"parts of this scheduler are not those of its {scheduler.class_name} options; build "
            "it with from_config, and pass what diffusers passes to step as arguments there"
        )
    return config
