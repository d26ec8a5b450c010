"""Trajectories of diffusers' schedulers, run step by step with what their configurations say."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.denoiser import make_denoiser
from diffusion_jax.core.forward import add_noise
from diffusion_jax.core.grid import Grid
from diffusion_jax.core.parameterization import V
from diffusion_jax.core.types import NoiseLevel
from diffusion_jax.pretrained.schedulers import Scheduler, beta_schedule, from_config
from diffusion_jax.samplers.ancestral import KDPM2Ancestral
from diffusion_jax.samplers.base import StepInfo
from diffusion_jax.samplers.consistency import LCM
from diffusion_jax.samplers.dpm_sde import DPMSolverSDE
from diffusion_jax.samplers.flow import FlowHeun
from diffusion_jax.samplers.inversion import DDIMInversion
from diffusion_jax.samplers.karras import Heun, ReferenceEulerChurn
from diffusion_jax.samplers.kdpm2 import KDPM2
from diffusion_jax.samplers.repaint import RePaint
from tests.noise import drawn_by

# What `set_timesteps` takes, and the name of it here; the rest belongs to `from_config`.
GRID_ARGUMENTS = {
    "num_inference_steps": "num_steps",
    "timesteps": "timesteps",
    "sigmas": "sigmas",
    "mu": "mu",
}
MAX_STEPS = 10_000


class Call(NamedTuple):
    """One call of the network: its input, level and time, and x̂0 after thresholding."""

    x: np.ndarray
    level: NoiseLevel
    t: float
    x0: np.ndarray


class Step(NamedTuple):
    """One step of a sampler: its calls, the sample after it, and the level that this is at."""

    calls: list[Call]
    x: np.ndarray
    end: NoiseLevel
    x0: np.ndarray | None = None


def _nhwc(x: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(x, np.float64), -3, -1)


def _nchw(x: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, -3)


def _network(params, x, t, cond, *, keys=None):
    """The formula that the references call a model, in the layout of this library."""
    del cond, keys
    bias = t[:, None, None, None] / 1000.0
    output = jnp.tanh(0.7 * x + (-1.3 * bias + 0.2))
    if params["channels"]:
        variance = 0.9 * jnp.tanh(-0.5 * x + (0.9 * bias + 0.1))
        variance = 0.05 * (1.0 + variance) if params["channels"] == "positive" else variance
        output = jnp.concatenate([output, variance], axis=-1)
    return output


def _scheduler(case: Mapping[str, Any]) -> tuple[Scheduler, dict[str, Any]]:
    """What the case's configuration says, and the arguments of its grid."""
    given = dict(case.get("set_timesteps_kwargs") or {"num_inference_steps": 10})
    grid = {GRID_ARGUMENTS[k]: given.pop(k) for k in list(given) if k in GRID_ARGUMENTS}
    call = {**given, **case.get("step_kwargs", {})}
    if "prev_timestep=None" in case.get("notes", ""):
        call["prev_timestep"] = "previous"
    config = {"_class_name": case["class"].rpartition(".")[2], **case["init_kwargs"]}
    return from_config(config, **call), grid


def _denoise(scheduler: Scheduler, channels: Any, calls: list[Call]):
    """The thresholded denoiser, which writes down how it is called."""
    make = make_denoiser(
        _network,
        scheduler.parameterization,
        time_input=scheduler.time_input,
        learned_variance=scheduler.learned_variance if channels else None,
    )
    thresholded = scheduler.threshold(make({"channels": channels}), Condition())

    def denoise(x, level):
        prediction = thresholded(x, level, Condition())
        told = float(np.asarray(scheduler.time_input(level)))
        calls.append(Call(np.asarray(x), level, told, np.asarray(prediction.x0)))
        return prediction

    return denoise


def _walk(sampler, grid: Grid, x, denoise, calls: list[Call], draw) -> Iterator[Step]:
    """Runs the sampler step by step; `draw` gives what it draws in a step, by the step's index."""
    keys, state = image_keys(0, range(len(x))), sampler.init(x)
    for i in range(int(grid.stop)):
        calls.clear()
        level, end = grid.level(i), grid.next_level(i)
        info = StepInfo(i, 0, int(grid.stop), grid.middle_level(i))
        before, drawn = state, {}

        def noise(keys, x, i=i, drawn=drawn):
            # Equal keys are one draw.
            return drawn.setdefault(jax.random.key_data(keys).tobytes(), draw(i, len(drawn), x))

        with drawn_by(noise):
            state = sampler.step(keys, denoise, before, level, end, info)
            # From clean data an inversion asks several times for what one call says elsewhere.
            counted = calls[-1:] if isinstance(sampler, DDIMInversion) else calls
            step = Step(list(counted), np.asarray(state.x), end)
            if isinstance(sampler, ReferenceEulerChurn):
                # Its x̂0 is not what the network was asked for: a step to clean data shows it.
                clean = end._replace(alpha=jnp.ones(()), sigma=jnp.zeros(()))
                x0 = sampler.step(keys, denoise, before, level, clean, info).x
                step = step._replace(x0=np.asarray(x0))
        yield step


def _recorded(inputs: Mapping[str, np.ndarray], counts: list[int]):
    """The noise of a step: that of the peer's steps that it stands for, then zeros."""
    after = np.cumsum(counts)
    noise, steps = inputs["noise"], inputs["noise_step"]

    def draw(i, k, x):
        mine = noise[(steps >= after[i] - counts[i]) & (steps < after[i])]
        return jnp.asarray(_nhwc(mine[k])) if k < len(mine) else jnp.zeros_like(x)

    return draw


def _zeros(i, k, x):
    return jnp.zeros_like(x)


def _trajectory(case: Mapping[str, Any], inputs: Mapping[str, np.ndarray]):
    scheduler, arguments = _scheduler(case)
    grid = scheduler.grid(**arguments, max_steps=MAX_STEPS)
    sampler = scheduler.sampler
    if isinstance(sampler, DPMSolverSDE):
        # The references draw both noises of a step afresh, the scheduler takes them from one path.
        sampler = sampler.replace(noise="independent")
    if "mask" in inputs:
        known, mask = _nhwc(inputs["original_image"]), _nhwc(inputs["mask"]) > 0.5
        sampler = RePaint(sampler, jnp.asarray(known), jnp.asarray(mask), share_noise=True)
    calls: list[Call] = []
    denoise = _denoise(scheduler, case["learned_variance_channels"], calls)
    x = scheduler.from_reference(jnp.asarray(_nhwc(inputs["x_T"])), grid.level(0))
    with jax.disable_jit():
        draw = _zeros
        if "mask" in inputs:
            # Every step draws once, and several of them are one of the peer's steps up.
            def draw(i, k, x):
                return jnp.asarray(_nhwc(inputs["noise"][i]))
        elif "noise" in inputs:
            steps = _walk(sampler, grid, x, denoise, calls, _zeros)
            draw = _recorded(inputs, [len(step.calls) for step in steps])
        steps = list(_walk(sampler, grid, x, denoise, calls, draw))
    if "mask" in inputs:
        rows = np.flatnonzero(np.diff(inputs["noise_step"], append=np.inf))
        steps = [steps[i] for i in rows]
    return _outputs(case, scheduler, grid, arguments, steps)


def _outputs(case, scheduler: Scheduler, grid: Grid, arguments, steps: list[Step]):
    published = scheduler.steps.published(scheduler.schedule, **arguments)
    called = [call for step in steps for call in step.calls]
    xs, x0s = [], []
    for step in steps:
        xs += [scheduler.to_reference(call.x, call.level) for call in step.calls[1:]]
        xs.append(scheduler.to_reference(step.x, step.end))
        x0s += [step.x0 if step.x0 is not None else call.x0 for call in step.calls]
        x0s += [np.zeros_like(step.x)] * (not step.calls)
    if isinstance(scheduler.sampler, LCM):
        x0s = [scheduler.sampler.consistency(c.x, c.x0, c.level) for c in called]
    times = [call.t for call in called]
    first = called[0]
    outputs = {
        "timesteps": published.timesteps if len(times) < len(xs) else times,
        "xs": _nchw(np.asarray(xs)),
        "pred_x0": _nchw(np.asarray(x0s)),
        "scaled_model_input_0": _nchw(scheduler.parameterization.scale_input(first.x, first.level)),
        "init_noise_sigma": np.asarray([scheduler.init_noise_sigma(grid)]),
    }
    if "alphas_cumprod" in case["outputs"]:
        outputs["alphas_cumprod"] = beta_schedule(scheduler).alphas_cumprod()
    if "sigmas" in case["outputs"]:
        count = case["outputs"]["sigmas"]["shape"][0]
        outputs["sigmas"] = _interleaved(published.sigmas, len(steps), count)
    return outputs


def _interleaved(sigmas: np.ndarray, num_steps: int, count: int) -> np.ndarray:
    """The ratios as schedulers with two calls a step list them."""
    if count == 2 * num_steps:
        return np.concatenate([sigmas[:1], np.repeat(sigmas[1:-1], 2), sigmas[-1:]])
    if count == 2 * num_steps + 2:
        return np.concatenate([sigmas[:1], np.repeat(sigmas[1:], 2), sigmas[-1:]])
    return sigmas


def _add_noise(case: Mapping[str, Any], inputs: Mapping[str, np.ndarray]):
    """Noise added at training times, and at times of a grid of 10 steps."""
    scheduler, arguments = _scheduler(case)
    x0, eps = inputs["x0"], inputs["noise"]
    if scheduler.steps.published(scheduler.schedule, **arguments).sigmas is None:
        at = scheduler.schedule(jnp.asarray(inputs["infer_t"]))
    else:
        # Schedulers with two calls a step list every time but the first twice.
        twice = isinstance(
            scheduler.sampler, Heun | FlowHeun | KDPM2 | KDPM2Ancestral | DPMSolverSDE
        )
        index = (inputs["infer_idx"] + 1) // 2 if twice else inputs["infer_idx"]
        grid = scheduler.grid(**arguments)
        at = NoiseLevel(*(f[index] for f in grid.levels))
    outputs = {"out_infer_t": scheduler.to_reference(add_noise(x0, eps, at), at)}
    if "train_t" in inputs:
        level = scheduler.schedule(jnp.asarray(inputs["train_t"]))
        outputs["out_train_t"] = add_noise(x0, eps, level)
        outputs["velocity"] = V().target(x0, eps, level)
    return outputs


def run(case: Mapping[str, Any], folder: Path) -> dict[str, np.ndarray] | None:
    """Outputs of a scheduler's case, or None where the library cannot express it."""
    if "init_kwargs" not in case or "Scheduler" not in case.get("class", ""):
        return None
    with np.load(folder / case["inputs_file"]) as file:
        inputs = dict(file)
    try:
        _scheduler(case)
    except ValueError:
        return None
    # The references are rounded to float32 in every step: rounding ours too would double that.
    with jax.enable_x64(True):
        if case["call"] == "trajectory":
            return _trajectory(case, inputs)
        if "betas" in case["outputs"]:
            schedule = beta_schedule(_scheduler(case)[0])
            return {"betas": schedule.betas(), "alphas_cumprod": schedule.alphas_cumprod()}
        if "add_noise" in case["call"]:
            return _add_noise(case, inputs)
    return None
