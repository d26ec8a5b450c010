"""Trajectories of diffusers schedulers, run with this library's schedules, grids and samplers."""

import contextlib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.arrays import fold_in_each, image_keys
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.denoiser import make_denoiser
from diffusion_jax.core.forward import add_noise
from diffusion_jax.core.parameterization import PARAMETERIZATIONS
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
from diffusion_jax.core.timesteps import Grid, from_times, karras
from diffusion_jax.core.types import NoiseLevel
from diffusion_jax.guidance import DynamicThreshold, StaticThreshold, Unguided
from diffusion_jax.samplers import DDIM, DDPM, DPMSolverMultistep, Euler, Heun, sample

MAX_STEPS = 1000
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# What the second half of the channels means here, by what the case says about it.
LEARNED_VARIANCES = {False: None, True: "range", "positive": "log"}
BETA_SCHEDULES = {"linear": Linear, "scaled_linear": ScaledLinear, "sigmoid": SigmoidBeta}


class Unsupported(Exception):
    """The library has no counterpart of an option."""


class Plan(NamedTuple):
    """One scheduler in this library's words.

    Attributes:
      steps: the grids that are run one after the other; one, unless steps overlap.
      sampler: what runs on them.
      network_times: [N] times of the network.
      ratios: [N + 1] σ/α that the scheduler calls sigmas, or None where it has none.
      exploding: the scheduler's sample is x / α.
      init_noise_sigma: the scheduler's own factor of unit noise.
      threshold_cap: largest divisor of dynamic thresholding.
    """

    schedule: DiscreteSchedule
    table: np.ndarray
    steps: tuple[Grid, ...]
    sampler: Any
    network_times: np.ndarray
    ratios: np.ndarray | None = None
    exploding: bool = False
    init_noise_sigma: float = 1.0
    threshold: Any = Unguided()
    threshold_cap: float = np.inf


class Options:
    """Keyword arguments with the scheduler's defaults, each of which must be asked for."""

    def __init__(self, values: Mapping[str, Any]):
        self._left = dict(values)

    def take(self, name: str, default: Any) -> Any:
        return self._left.pop(name, default)

    def require(self, **expected: Any) -> None:
        """Options that exist here with one value only."""
        for name, value in expected.items():
            if self.take(name, value) != value:
                raise Unsupported(name)

    def finish(self) -> None:
        if self._left:
            raise Unsupported(", ".join(sorted(self._left)))


def _schedule(options: Options) -> DiscreteSchedule:
    total = options.take("num_train_timesteps", 1000)
    start, end = options.take("beta_start", 1e-4), options.take("beta_end", 0.02)
    name, trained = options.take("beta_schedule", "linear"), options.take("trained_betas", None)
    if trained is not None:
        schedule = Betas(len(trained), tuple(float(beta) for beta in trained))
    elif name == "squaredcos_cap_v2":
        schedule = Cosine(total)
    elif name == "laplace":
        schedule = LaplaceBeta(total)
    elif name in BETA_SCHEDULES:
        schedule = BETA_SCHEDULES[name](total, beta_start=start, beta_end=end)
    else:
        raise Unsupported(f"beta_schedule {name}")
    if options.take("rescale_betas_zero_snr", False):
        schedule = ZeroTerminalSNR(schedule.num_timesteps, schedule)
    return schedule


def _threshold(options: Options, clip: bool) -> tuple[Any, float]:
    clip, limit = options.take("clip_sample", clip), options.take("clip_sample_range", 1.0)
    ratio = options.take("dynamic_thresholding_ratio", 0.995)
    cap = options.take("sample_max_value", 1.0)
    if options.take("thresholding", False):
        if cap <= 1.0:
            return StaticThreshold(1.0), np.inf
        return DynamicThreshold(100.0 * ratio), cap
    return (StaticThreshold(limit) if clip else Unguided()), np.inf


def _times(total: int, count: int, spacing: str, offset: int) -> np.ndarray:
    if spacing == "linspace":
        return np.linspace(0, total - 1, count)[::-1]
    if spacing == "leading":
        return np.arange(count)[::-1] * (total // count) + float(offset)
    if spacing == "trailing":
        return np.round(np.arange(total, 0, -total / count)) - 1.0
    raise Unsupported(f"timestep_spacing {spacing}")


def _pairs(levels: NoiseLevel, next_levels: NoiseLevel) -> tuple[Grid, ...]:
    """A grid of one step for each pair, where a step does not start where the last one ended."""
    grids = []
    for i in range(len(levels.t)):
        both = (
            jnp.asarray([here[i], there[i]], jnp.float32)
            for here, there in zip(levels, next_levels, strict=True)
        )
        grids.append(Grid(NoiseLevel(*both), jnp.int32(0), jnp.int32(1)))
    return tuple(grids)


def _ancestral_times(options: Options, schedule: DiscreteSchedule, steps: Options, spacing: str):
    total = schedule.num_timesteps
    spacing, offset = options.take("timestep_spacing", spacing), options.take("steps_offset", 0)
    custom, count = steps.take("timesteps", None), steps.take("num_inference_steps", None)
    steps.finish()
    if custom is not None:
        return np.asarray(custom, np.float64)
    return np.round(_times(total, count, spacing, offset))


def _ddpm(options: Options, steps: Options, step: Options, schedule: DiscreteSchedule) -> Plan:
    threshold, cap = _threshold(options, clip=True)
    times = _ancestral_times(options, schedule, steps, "leading")
    variance = options.take("variance_type", "fixed_small")
    names = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large"}
    variance = {**names, "learned_range": "learned_range", "learned": "learned"}.get(variance)
    if variance is None:
        raise Unsupported("variance_type")
    # The scheduler adds noise in its last step unless that one starts at t = 0.
    if variance != "small" and times[-1] != 0:
        raise Unsupported("noise in the step to clean data")
    grid = from_times(schedule, times, max_steps=MAX_STEPS)
    table = schedule.alphas_cumprod()
    return Plan(
        schedule, table, (grid,), DDPM(variance), times, threshold=threshold, threshold_cap=cap
    )


def _ddim(options: Options, steps: Options, step: Options, schedule: DiscreteSchedule) -> Plan:
    threshold, cap = _threshold(options, clip=True)
    times = _ancestral_times(options, schedule, steps, "leading")
    eta, rederived = step.take("eta", 0.0), step.take("use_clipped_model_output", False)
    if not isinstance(threshold, Unguided) and not rederived:
        raise Unsupported("eps of the unclipped x0")
    clean_end = options.take("set_alpha_to_one", True)
    earlier = times - schedule.num_timesteps // len(times)
    levels, next_levels = schedule(times), schedule(np.maximum(earlier, 0.0))
    if clean_end:
        ends = earlier < 0
        next_levels = NoiseLevel(
            next_levels.t,
            np.where(ends, 1.0, next_levels.alpha),
            np.where(ends, 0.0, next_levels.sigma),
        )
    grids = _pairs(levels, next_levels)
    if np.array_equal(earlier[:-1], times[1:]) and earlier[-1] < 0:
        final = "clean" if clean_end else "t_min"
        grids = (from_times(schedule, times, final=final, max_steps=MAX_STEPS),)
    table = schedule.alphas_cumprod()
    return Plan(schedule, table, grids, DDIM(eta), times, threshold=threshold, threshold_cap=cap)


def _ratio_grid(times, ratios: np.ndarray) -> Grid:
    """A variance-preserving grid with given σ/α [N + 1], the last of which is its end."""
    alpha = 1.0 / np.sqrt(1.0 + ratios**2)
    levels = NoiseLevel(np.append(times, times[-1]), alpha, alpha * ratios)
    padding = MAX_STEPS + 1 - len(ratios)
    levels = NoiseLevel(
        *(jnp.asarray(np.pad(f, (0, padding), "edge"), jnp.float32) for f in levels)
    )
    return Grid(levels, jnp.int32(0), jnp.int32(len(times)))


def _table_for_ratios(schedule: DiscreteSchedule) -> np.ndarray:
    table = schedule.alphas_cumprod().copy()
    # These schedulers keep σ/α finite: a table that ends at 0 ends at 2^-24 instead.
    table[-1] = max(table[-1], 2.0**-24)
    return table


def _karras(schedule: DiscreteSchedule, count: int, **options) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(schedule, ZeroTerminalSNR):
        raise Unsupported("Karras levels up to infinite σ/α")
    levels = karras(schedule, count, max_steps=count, **options).levels
    t, alpha, sigma = (np.asarray(field[:-1], np.float64) for field in levels)
    return t, sigma / alpha


def _final_ratio(options: Options, ratios: np.ndarray) -> float:
    final = options.take("final_sigmas_type", "zero")
    if final not in ("zero", "sigma_min"):
        raise Unsupported(f"final_sigmas_type {final}")
    return 0.0 if final == "zero" else ratios[0]


def _exploding(
    options: Options, steps: Options, schedule: DiscreteSchedule, sampler, **more
) -> Plan:
    """Euler's and Heun's common part: float times, σ/α interpolated between table entries."""
    total, count = schedule.num_timesteps, steps.take("num_inference_steps", None)
    steps.finish()
    spacing, offset = options.take("timestep_spacing", "linspace"), options.take("steps_offset", 0)
    table = _table_for_ratios(schedule)
    all_ratios = np.sqrt((1 - table) / table)
    times = _times(total, count, spacing, offset)
    ratios = np.interp(times, np.arange(total), all_ratios)
    if options.take("use_karras_sigmas", False):
        ends = {"sigma_min": ratios[-1], "sigma_max": ratios[0]}
        times, ratios = _karras(schedule, count, **ends)
    options.require(use_exponential_sigmas=False, use_beta_sigmas=False)
    top = ratios.max()
    ratios = np.append(ratios, _final_ratio(options, all_ratios))
    return Plan(
        schedule,
        table,
        (_ratio_grid(times, ratios),),
        sampler,
        times,
        ratios=ratios,
        exploding=True,
        init_noise_sigma=top if spacing in ("linspace", "trailing") else np.sqrt(top**2 + 1),
        **more,
    )


def _euler(options: Options, steps: Options, step: Options, schedule: DiscreteSchedule) -> Plan:
    options.require(
        interpolation_type="linear", timestep_type="discrete", sigma_min=None, sigma_max=None
    )
    step.require(s_churn=0.0)
    return _exploding(options, steps, schedule, Euler())


def _heun(options: Options, steps: Options, step: Options, schedule: DiscreteSchedule) -> Plan:
    clip, limit = options.take("clip_sample", False), options.take("clip_sample_range", 1.0)
    threshold = StaticThreshold(limit) if clip else Unguided()
    return _exploding(options, steps, schedule, Heun(), threshold=threshold)


def _dpm_times(options: Options, steps: Options, table: np.ndarray) -> np.ndarray:
    total, count = len(table), steps.take("num_inference_steps", None)
    steps.finish()
    spacing, offset = options.take("timestep_spacing", "linspace"), options.take("steps_offset", 0)
    half_log_snr = 0.5 * (np.log(table) - np.log1p(-table))
    floor = options.take("lambda_min_clipped", -np.inf)
    last = int(np.sum(half_log_snr >= floor))
    if spacing == "trailing":
        return np.round(np.arange(last, 0, -total / count)) - 1.0
    return np.round(_times(last, count + 1, spacing, offset))[:-1]


def _dpm(options: Options, steps: Options, step: Options, schedule: DiscreteSchedule) -> Plan:
    options.require(
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        use_exponential_sigmas=False,
        use_beta_sigmas=False,
        use_lu_lambdas=False,
        use_flow_sigmas=False,
    )
    threshold, cap = _threshold(options, clip=False)
    order, at_final = options.take("solver_order", 2), options.take("euler_at_final", False)
    lower = options.take("lower_order_final", True)
    if order not in (1, 2) or options.take("variance_type", None) not in (None, "learned_range"):
        raise Unsupported("solver_order or variance_type")
    table = _table_for_ratios(schedule)
    all_ratios = np.sqrt((1 - table) / table)
    times = _dpm_times(options, steps, table)
    ratios = all_ratios[times.astype(int)]
    if options.take("use_karras_sigmas", False):
        if isinstance(schedule, Cosine):
            raise Unsupported("times that are cut instead of rounded")
        times, ratios = _karras(schedule, len(times), round_t=True)
    final = _final_ratio(options, all_ratios)
    if order == 2 and final > 0 and (at_final or (lower and len(times) < 15)):
        raise Unsupported("a first-order step at the end")
    ratios = np.append(ratios, final)
    return Plan(
        schedule,
        table,
        (_ratio_grid(times, ratios),),
        DPMSolverMultistep(order),
        times,
        ratios=ratios,
        threshold=threshold,
        threshold_cap=cap,
    )


PLANS = {
    "DDPMScheduler": _ddpm,
    "DDIMScheduler": _ddim,
    "EulerDiscreteScheduler": _euler,
    "HeunDiscreteScheduler": _heun,
    "DPMSolverMultistepScheduler": _dpm,
}


def _network(params, x, t, cond, *, keys=None):
    """The formula that the references call a model, in the layout of this library."""
    del cond, keys
    bias = t[:, None, None, None] / 1000.0
    output = jnp.tanh(0.7 * x + (-1.3 * bias + 0.2))
    if params["learned_variance"] is not None:
        variance = 0.9 * jnp.tanh(-0.5 * x + (0.9 * bias + 0.1))
        if params["learned_variance"] == "log":
            # The scheduler takes the variance itself from the network, not its logarithm.
            variance = jnp.log(0.05 * (1.0 + variance))
        output = jnp.concatenate([output, variance], axis=-1)
    return output


def _denoiser(parameterization: str, learned: str | None, threshold: Any):
    make = make_denoiser(_network, PARAMETERIZATIONS[parameterization](), learned_variance=learned)
    denoise = threshold(make({"learned_variance": learned}), Condition())
    return lambda x, level: denoise(x, level, Condition())


@contextlib.contextmanager
def recorded_noise(keys, noise, num_steps, modules=("samplers.ddpm", "samplers.ddim")):
    """Step i of a loop in the modules draws noise[i]; its keys say which step it is."""
    steps = jnp.arange(num_steps, dtype=jnp.int32)
    table = jax.vmap(lambda i: jax.random.key_data(fold_in_each(keys, i))[0])(steps)

    def draw(step_keys, x):
        del x
        mine = jax.random.key_data(step_keys)[0]
        return noise[jnp.argmax(jnp.all(table == mine[None], axis=1))]

    with contextlib.ExitStack() as stack:
        for module in modules:
            name = f"diffusion_jax.{module}.per_image_normal"
            stack.enter_context(mock.patch(name, draw))
        yield


@functools.partial(jax.jit, static_argnames=("parameterization", "learned"))
def _trajectory(sampler, grid, x, noise, threshold, *, parameterization, learned):
    keys = image_keys(0, jnp.arange(x.shape[0]))
    denoise = _denoiser(parameterization, learned, threshold)
    with recorded_noise(keys, noise, noise.shape[0]):
        _, xs = sample(sampler, denoise, grid, x, keys, trace=lambda state: state.x)
    return xs


@functools.partial(jax.jit, static_argnames=("parameterization", "learned"))
def _predictions(x, levels, threshold, *, parameterization, learned):
    """x̂0 after thresholding and before, at every call of the network, [N, B, ...] each."""

    def at(x, level):
        after = _denoiser(parameterization, learned, threshold)(x, level)
        return after.x0, _denoiser(parameterization, learned, Unguided())(x, level).x0

    return jax.vmap(at)(x, levels)


def _nhwc(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -3, -1)


def _nchw(x: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, -3)


def _levels(plan: Plan) -> NoiseLevel:
    """Start of every step and the end of the last one, [N + 1]."""
    if len(plan.steps) == 1:
        count = int(plan.steps[0].stop)
        return NoiseLevel(*(np.asarray(f)[: count + 1] for f in plan.steps[0].levels))
    fields = zip(*(grid.levels for grid in plan.steps), strict=True)
    return NoiseLevel(*(np.asarray([*(f[0] for f in each), each[-1][1]]) for each in fields))


def _states(plan: Plan, x: np.ndarray, noise: np.ndarray, **network) -> np.ndarray:
    """The sample after every step, [N, B, ...]."""
    if len(plan.steps) == 1:
        padded = np.zeros((MAX_STEPS, *x.shape), np.float32)
        padded[: len(noise)] = noise
        xs = _trajectory(plan.sampler, plan.steps[0], x, padded, plan.threshold, **network)
        return np.asarray(xs)[: int(plan.steps[0].stop)]
    xs = []
    for i, grid in enumerate(plan.steps):
        xs.append(
            _trajectory(plan.sampler, grid, x, noise[i : i + 1], plan.threshold, **network)[0]
        )
        x = xs[-1]
    return np.asarray(xs)


def _with_euler_states(plan: Plan, before, xs, levels: NoiseLevel, **network):
    """Heun's scheduler counts calls of the network: each step but the last shows Euler's state."""
    calls_x, calls_t, out = [], [], []
    for i in range(len(xs)):
        fields = (jnp.asarray([f[i], f[i + 1]], jnp.float32) for f in levels)
        grid = Grid(NoiseLevel(*fields), jnp.int32(0), jnp.int32(1))
        noise = np.zeros((1, *before[i].shape), np.float32)
        euler = _trajectory(Euler(), grid, before[i], noise, plan.threshold, **network)[0]
        calls_x += [before[i], np.asarray(euler)]
        calls_t += [i, i + 1]
        out += [np.asarray(euler), xs[i]]
    calls_x, calls_t, out = calls_x[:-1], calls_t[:-1], out[:-2] + out[-1:]
    after = [t + 1 for t in calls_t[0::2] for _ in (0, 1)][:-1]
    return np.asarray(calls_x), np.asarray(calls_t), np.asarray(out), np.asarray(after)


def _plan(case: Mapping[str, Any]) -> tuple[Plan, dict[str, Any]]:
    name = case["class"].rpartition(".")[2]
    if name not in PLANS:
        raise Unsupported(name)
    options, step = Options(case["init_kwargs"]), Options(case.get("step_kwargs", {}))
    steps = Options(case.get("set_timesteps_kwargs", {}))
    prediction = options.take("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise Unsupported(f"prediction_type {prediction}")
    plan = PLANS[name](options, steps, step, _schedule(options))
    for given in (options, steps, step):
        given.finish()
    channels = case.get("learned_variance_channels", False)
    if channels not in LEARNED_VARIANCES:
        raise Unsupported("learned_variance_channels")
    learned = LEARNED_VARIANCES[channels]
    return plan, {"parameterization": PREDICTIONS[prediction], "learned": learned}


def _run_trajectory(case: Mapping[str, Any], inputs: Mapping[str, np.ndarray]):
    plan, network = _plan(case)
    levels = _levels(plan)
    x = _nhwc(inputs["x_T"]).astype(np.float32)
    if plan.exploding:
        x = x * np.float32(levels.alpha[0])
    noise = np.zeros((len(plan.network_times), *x.shape), np.float32)
    if "noise" in inputs:
        noise[inputs["noise_step"]] = _nhwc(inputs["noise"])
    xs = _states(plan, x, noise, **network)
    calls_x, calls = np.concatenate([x[None], xs[:-1]]), np.arange(len(xs))
    after, times, ratios = calls + 1, plan.network_times, plan.ratios
    if isinstance(plan.sampler, Heun):
        calls_x, calls, xs, after = _with_euler_states(plan, calls_x, xs, levels, **network)
        times, ratios = times[calls], np.concatenate([ratios[calls], ratios[-1:]])
    at = NoiseLevel(*(jnp.asarray(f[calls], jnp.float32) for f in levels))
    x0, raw = _predictions(calls_x, at, plan.threshold, **network)
    if np.isfinite(plan.threshold_cap):
        magnitude = np.abs(np.asarray(raw)).reshape(*raw.shape[:2], -1)
        divisor = np.percentile(magnitude, plan.threshold.percentile, axis=-1)
        if divisor.max() > plan.threshold_cap:
            raise Unsupported("sample_max_value was reached")
    scale = levels.alpha[after] if plan.exploding else np.ones(len(after))
    outputs = {
        "timesteps": times,
        "xs": _nchw(xs) / scale[:, None, None, None, None],
        "pred_x0": _nchw(x0),
        "scaled_model_input_0": _nchw(x),
        "init_noise_sigma": np.asarray([plan.init_noise_sigma]),
        "alphas_cumprod": plan.table,
    }
    return outputs if ratios is None else {**outputs, "sigmas": ratios}


def _run_table(case: Mapping[str, Any]):
    options = Options(case["init_kwargs"])
    schedule = _schedule(options)
    options.finish()
    return {"betas": schedule.betas(), "alphas_cumprod": schedule.alphas_cumprod()}


def _run_add_noise(case: Mapping[str, Any], inputs: Mapping[str, np.ndarray]):
    """Noise added at training times, and at times of a grid of 10 steps."""
    plan, _ = _plan({**case, "set_timesteps_kwargs": {"num_inference_steps": 10}})
    x0, eps = inputs["x0"], inputs["noise"]
    levels = _levels(plan)
    # Heun's scheduler lists every time but the first twice, once for each call of the network.
    index = inputs["infer_idx"]
    index = (index + 1) // 2 if isinstance(plan.sampler, Heun) else index
    at = NoiseLevel(*(jnp.asarray(f[index], jnp.float32) for f in levels))
    noisy = add_noise(x0, eps, at)
    if plan.exploding:
        noisy = noisy / np.asarray(at.alpha)[:, None, None, None]
    outputs = {"out_infer_t": np.asarray(noisy)}
    if "train_t" in inputs:
        level = plan.schedule(jnp.asarray(inputs["train_t"], jnp.float32))
        outputs["out_train_t"] = add_noise(x0, eps, level)
        outputs["velocity"] = PARAMETERIZATIONS["v"]().target(x0, eps, level)
    return outputs


def run(case: Mapping[str, Any], folder: Path) -> dict[str, np.ndarray] | None:
    """Outputs of a scheduler's case, or None where the library cannot express it."""
    if "init_kwargs" not in case or "Scheduler" not in case.get("class", ""):
        return None
    try:
        with np.load(folder / case["inputs_file"]) as file:
            inputs = dict(file)
        if case["call"] == "trajectory":
            return _run_trajectory(case, inputs)
        if "betas" in case["outputs"]:
            return _run_table(case)
        if "add_noise" in case["call"]:
            return _run_add_noise(case, inputs)
    except Unsupported:
        return None
    return None
