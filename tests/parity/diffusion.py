"""Every term of guided-diffusion's GaussianDiffusion, computed with this library's functions."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.arrays import fold_in_each, image_keys
from diffusion_jax.core.chain import PreviousX, following_level, previous_level
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.denoiser import make_denoiser
from diffusion_jax.core.forward import add_noise, posterior_mean, posterior_std
from diffusion_jax.core.parameterization import X0, Eps, Parameterization
from diffusion_jax.core.schedules import Betas, Cosine, DiscreteSchedule, adm_linear
from diffusion_jax.core.timesteps import from_times, space_timesteps
from diffusion_jax.core.types import NoiseLevel
from diffusion_jax.core.variance import posterior_log_variance, reverse_log_variance
from diffusion_jax.guidance import StaticThreshold, Unguided
from diffusion_jax.guidance.classifier import ClassifierGuidance
from diffusion_jax.losses.hybrid import VLB, Hybrid
from diffusion_jax.losses.simple import Simple
from diffusion_jax.losses.vlb import bits_per_dim
from diffusion_jax.models.embeddings import sinusoidal_embedding
from diffusion_jax.samplers import DDIM, DDPM, StepInfo, sample
from diffusion_jax.samplers.mean_shift import MeanShift

SCHEDULES = {"linear": adm_linear, "cosine": Cosine}
# Type of variance -> kind of variance, and what the second half of the channels means.
VARIANCES = {
    "FIXED_SMALL": ("small", None),
    "FIXED_LARGE": ("large", None),
    "LEARNED_RANGE": ("learned_range", "range"),
    "LEARNED": ("learned", "log"),
}
MEANS = {"EPSILON": Eps, "START_X": X0, "PREVIOUS_X": PreviousX}
LOSSES = ("MSE", "RESCALED_MSE", "KL", "RESCALED_KL")
CONDITION = Condition()


class Unsupported(Exception):
    """The library has no counterpart of an option."""


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


class Process(NamedTuple):
    """One GaussianDiffusion in this library's words.

    Attributes:
      schedule: of the steps that respacing left.
      timestep_map: [T] times of the schedule that was respaced.
      network_times: [T] what the network is told.
    """

    schedule: DiscreteSchedule
    timestep_map: np.ndarray
    network_times: np.ndarray
    parameterization: Parameterization
    variance: str
    learned_variance: str | None
    loss_type: str

    def time_input(self, level: NoiseLevel) -> jax.Array:
        """The network's time at a level of the respaced schedule."""
        return jnp.asarray(self.network_times, jnp.float32)[jnp.asarray(level.t, jnp.int32)]

    def denoiser(self, clip: bool) -> Callable:
        """(x, level, cond) -> Prediction, with x̂0 clipped to [-1, 1] or not."""
        make = make_denoiser(
            _network(self.learned_variance is not None),
            self.parameterization,
            time_input=self.time_input,
            learned_variance=self.learned_variance,
        )
        return (StaticThreshold(1.0) if clip else Unguided())(make({}), CONDITION)

    def for_the_mean(self, clip: bool) -> Callable:
        """The denoiser behind the mean of p; clipping never reaches a mean that is predicted."""
        return self.denoiser(clip and not isinstance(self.parameterization, PreviousX))

    def log_prob(self, x, level, cond):
        """Its gradient is -0.1 (x - 0.3) (1 + t / 1000), the reference's cond_fn."""
        del cond
        slope = 1.0 + self.time_input(level) / 1000.0
        return -0.05 * slope * jnp.sum((x - 0.3) ** 2, axis=tuple(range(1, x.ndim)))


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


def _network(learned: bool) -> Callable:
    def network(params, x, t, cond, *, keys=None):
        del params, cond, keys
        time = t[:, None, None, None] / 1000.0
        output = jnp.tanh(0.7 * x + (-1.3 * time + 0.2))
        if not learned:
            return output
        variance = 0.9 * jnp.tanh(-0.5 * x + (0.9 * time + 0.1))
        return jnp.concatenate([output, variance], axis=-1)

    return network


def _choose(table: Mapping[str, Any], options: Options, name: str) -> Any:
    value = options.take(name, None)
    if value not in table:
        raise Unsupported(f"{name} {value}")
    return table[value]


def _process(init_kwargs: Mapping[str, Any]) -> Process:
    options = Options(init_kwargs)
    total = options.take("diffusion_steps", None)
    base = _choose(SCHEDULES, options, "noise_schedule")(total)
    variance, learned = _choose(VARIANCES, options, "model_var_type")
    mean = _choose(MEANS, options, "model_mean_type")
    loss_type = _choose({name: name for name in LOSSES}, options, "loss_type")
    spacing = options.take("timestep_respacing", "")
    rescale = options.take("rescale_timesteps", False)
    options.finish()
    kept = np.asarray(space_timesteps(total, spacing) if spacing else range(total))
    alphas_cumprod = base.alphas_cumprod()[kept]
    betas = 1.0 - alphas_cumprod / np.concatenate([[1.0], alphas_cumprod[:-1]])
    schedule = Betas(len(kept), tuple(float(beta) for beta in betas))
    return Process(
        schedule,
        kept,
        kept * (1000.0 / total) if rescale else kept,
        mean(schedule) if mean is PreviousX else mean(),
        variance,
        learned,
        loss_type,
    )


def _tables(process: Process) -> dict[str, np.ndarray]:
    schedule = process.schedule
    t = np.arange(schedule.num_timesteps, dtype=np.float64)
    here, before = schedule(t), previous_level(schedule, t)
    zeros, ones = np.zeros((len(t), 1)), np.ones((len(t), 1))
    return {
        "timestep_map": process.timestep_map,
        "table.betas": schedule.betas(),
        "table.alphas_cumprod": schedule.alphas_cumprod(),
        "table.posterior_variance": posterior_std(here, before) ** 2,
        "table.posterior_log_variance_clipped": posterior_log_variance(
            here, before, noisier=following_level(schedule, t)
        ),
        "table.posterior_mean_coef1": posterior_mean(zeros, ones, here, before)[:, 0],
        "table.posterior_mean_coef2": posterior_mean(ones, zeros, here, before)[:, 0],
    }


def _forward(process: Process, x0, x, noise, t) -> dict[str, np.ndarray]:
    schedule = process.schedule
    level, before = schedule(t), previous_level(schedule, t)

    def full(value):
        return jnp.broadcast_to(value[:, None, None, None], x0.shape)

    log_variance = posterior_log_variance(level, before, noisier=following_level(schedule, t))
    return {
        "model_timesteps_seen": process.time_input(level),
        "q_mean": add_noise(x0, jnp.zeros_like(x0), level),
        "q_variance": full(level.sigma**2),
        "q_log_variance": full(2.0 * jnp.log(level.sigma)),
        "q_sample": add_noise(x0, noise, level),
        "q_posterior_mean": posterior_mean(x, x0, level, before),
        "q_posterior_variance": full(posterior_std(level, before) ** 2),
        "q_posterior_log_variance": full(log_variance),
    }


def _reverse(process: Process, x, t, clip: bool) -> dict[str, np.ndarray]:
    """p_mean_variance."""
    schedule = process.schedule
    level, before = schedule(t), previous_level(schedule, t)
    prediction = process.for_the_mean(clip)(x, level, CONDITION)
    log_variance = reverse_log_variance(
        prediction,
        level,
        before,
        variance=process.variance,
        noisier=following_level(schedule, t),
    )
    variance = jnp.exp(log_variance)
    if process.variance == "small":
        # Only the logarithm is clipped.
        variance = (posterior_std(level, before) ** 2)[:, None, None, None]
    return {
        "mean": posterior_mean(x, prediction.x0, level, before),
        "variance": jnp.broadcast_to(variance, x.shape),
        "log_variance": jnp.broadcast_to(log_variance, x.shape),
        "pred_xstart": process.denoiser(clip)(x, level, CONDITION).x0,
    }


def _drawing(noise, *modules: str) -> contextlib.ExitStack:
    """Within it the modules draw the given noise."""
    stack = contextlib.ExitStack()
    for module in modules:
        name = f"diffusion_jax.{module}.per_image_normal"
        stack.enter_context(mock.patch(name, lambda keys, x: noise))
    return stack


def _step(process: Process, sampler, denoise, inputs, noise, *, forwards: bool = False):
    """One step of each example from its own time, as a batch of one: samplers take one level."""

    def one(x, t, noise):
        level = process.schedule(t)
        next_level = previous_level(process.schedule, t)
        if forwards:
            # Beyond the last time the reference's table goes on with pure noise.
            last = t == process.schedule.num_timesteps - 1
            after = following_level(process.schedule, t)
            next_level = NoiseLevel(
                after.t, jnp.where(last, 0.0, after.alpha), jnp.where(last, 1.0, after.sigma)
            )
        keys = image_keys(0, jnp.arange(1))
        with _drawing(noise, "samplers.ddpm", "samplers.ddim", "samplers.mean_shift"):
            info = StepInfo(0, 0, 1)
            bound = _bound(denoise)
            return sampler.step(keys, bound, sampler.init(x), level, next_level, info).x

    times = jnp.asarray(inputs["t"], jnp.float32)
    return jax.jit(jax.vmap(one))(inputs["x"][:, None], times, noise[:, None])[:, 0]


def _bound(denoise: Callable) -> Callable:
    return lambda x, level: denoise(x, level, CONDITION)


def _steps(process: Process, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    clipped, mean = process.denoiser(True), process.for_the_mean(True)
    guidance = ClassifierGuidance(1.0)
    gradient = guidance.gradient(process.log_prob)
    ancestral, silent = DDPM(process.variance), np.zeros_like(inputs["x"])
    shifted = MeanShift(ancestral, lambda x, level: gradient(x, level, CONDITION))
    guided = guidance(clipped, process.log_prob)

    def step(sampler, denoise, noise, **options):
        return _step(process, sampler, denoise, inputs, noise, **options)

    outputs = {
        "p_sample": step(ancestral, mean, inputs["p_sample.noise"]),
        "p_sample_cond": step(shifted, mean, inputs["p_sample_cond.noise"]),
        "ddim_sample_cond": step(DDIM(0.0), guided, silent),
        "ddim_reverse_sample": step(DDIM(0.0), clipped, silent, forwards=True),
    }
    level = process.schedule(jnp.asarray(inputs["t"], jnp.float32))
    for name in inputs:
        if name.startswith("ddim_eta"):
            eta = float(name.removeprefix("ddim_eta").removesuffix(".noise"))
            prefix = name.removesuffix(".noise")
            outputs[f"{prefix}.sample"] = step(DDIM(eta), clipped, inputs[name])
            outputs[f"{prefix}.pred_xstart"] = clipped(inputs["x"], level, CONDITION).x0
    return outputs


def _losses(process: Process, x0, noise, t) -> dict[str, np.ndarray]:
    rescaling = "steps" if process.loss_type.startswith("RESCALED") else "none"
    if process.loss_type.endswith("KL"):
        loss = VLB(process.variance, rescaling, cdf="tanh")
    elif process.learned_variance is not None:
        loss = Hybrid(process.variance, rescaling=rescaling, cdf="tanh")
    else:
        loss = Simple()
    values = loss.per_example(
        _network(process.learned_variance is not None),
        process.schedule,
        process.parameterization,
        time_input=process.time_input,
    )
    keys = jax.random.split(jax.random.key(0), (x0.shape[0], 2))
    with _drawing(noise, "losses.hybrid", "losses.simple"):
        total, metrics = values({}, x0, t, CONDITION, keys)
    outputs = {"loss": total, "mse": metrics.get("mse", total)}
    if "vb" in metrics:
        # What the reference calls vb has its factor already.
        factor = process.schedule.num_timesteps / 1000.0 if rescaling == "steps" else 1.0
        outputs["vb"] = factor * metrics["vb"]
    return {f"training_losses.{name}": value for name, value in outputs.items()}


def _bits(process: Process, x0, noise) -> dict[str, np.ndarray]:
    """The bound of the clipped denoiser, as evaluated by default."""
    grid, keys = _grid(process), image_keys(0, jnp.arange(x0.shape[0]))

    @jax.jit
    def run(x0, noise):
        def bits(denoise):
            modules = ("losses.vlb",)
            with recorded_noise(keys, noise, noise.shape[0], modules):
                return bits_per_dim(
                    _bound(denoise), grid, x0, keys=keys, variance=process.variance, cdf="tanh"
                )

        errors = bits(process.denoiser(True))
        predicts_mean = isinstance(process.parameterization, PreviousX)
        return bits(process.for_the_mean(True)) if predicts_mean else errors, errors

    bound, errors = run(x0, noise)
    return {
        "bpd.total_bpd": bound.total,
        "bpd.prior_bpd": bound.prior,
        "bpd.vb": bound.vlb,
        "bpd.xstart_mse": errors.x0_mse,
        "bpd.mse": errors.eps_mse,
    }


def _grid(process: Process):
    times = np.arange(process.schedule.num_timesteps)[::-1]
    return from_times(process.schedule, times, max_steps=len(times))


def _loop(process: Process, sampler, denoise, x_T, noise) -> np.ndarray:
    keys = image_keys(0, jnp.arange(x_T.shape[0]))

    @jax.jit
    def run(x_T, noise):
        with recorded_noise(keys, noise, noise.shape[0]):
            _, xs = sample(
                sampler, _bound(denoise), _grid(process), x_T, keys, trace=lambda state: state.x
            )
        return xs

    return run(x_T, noise)


def _nhwc(value: np.ndarray) -> np.ndarray:
    return np.moveaxis(value, -3, -1) if value.ndim >= 4 else value


def _nchw(value: Any) -> np.ndarray:
    value = np.asarray(value)
    return np.moveaxis(value, -1, -3) if value.ndim >= 4 else value


def _gaussian_diffusion(case: Mapping[str, Any], inputs: Mapping[str, np.ndarray]):
    process = _process(case["init_kwargs"])
    inputs = {name: _nhwc(value) for name, value in inputs.items()}
    x, x0, noise = inputs["x"], inputs["x_start"], inputs["noise"]
    t = jnp.asarray(inputs["t"], jnp.float32)
    outputs = {**_tables(process), **_steps(process, inputs)}
    outputs |= _forward(process, x0, x, noise, t)
    outputs |= _losses(process, x0, noise, t)
    for clip in (True, False):
        for name, value in _reverse(process, x, t, clip).items():
            outputs[f"p_mean_variance.clip{int(clip)}.{name}"] = value
    outputs |= _bits(process, x0, inputs["bpd.noise"])
    x_T, drawn = inputs["loop.x_T"], inputs["p_loop.noise"]
    ancestral = (DDPM(process.variance), process.for_the_mean(True))
    outputs["p_loop.xs"] = _loop(process, *ancestral, x_T, drawn)
    deterministic = (DDIM(0.0), process.denoiser(True))
    outputs["ddim_loop.xs"] = _loop(process, *deterministic, x_T, np.zeros_like(drawn))
    return {name: _nchw(value) for name, value in outputs.items()}


def _functions(case: Mapping[str, Any], inputs: Mapping[str, np.ndarray]):
    """Functions of few arguments, which the names of the outputs spell out."""
    outputs = {}
    for name in case["outputs"]:
        kind, _, arguments = name.partition("_")
        if kind == "space":
            total, _, spec = arguments.partition("_")
            outputs[name] = np.asarray(space_timesteps(int(total), spec))
        elif kind == "betas":
            schedule, _, total = arguments.partition("_")
            make = _choose(SCHEDULES, Options({"name": schedule}), "name")
            outputs[name] = make(int(total)).betas()
        elif name.startswith("timestep_embedding_"):
            width = int(name.removeprefix("timestep_embedding_"))
            outputs[name] = np.asarray(sinusoidal_embedding(inputs["t"], width))
        else:
            raise Unsupported(name)
    return outputs


def run(case: Mapping[str, Any], folder: Path) -> dict[str, np.ndarray] | None:
    """Outputs of a case of GaussianDiffusion, or None where the library cannot express it."""
    name = case.get("class", "")
    if name == "guided_diffusion.respace.SpacedDiffusion":
        function = _gaussian_diffusion
    elif "respace.space_timesteps" in name:
        function = _functions
    else:
        return None
    try:
        with np.load(folder / case["inputs_file"]) as file:
            return function(case, dict(file))
    except Unsupported:
        return None
