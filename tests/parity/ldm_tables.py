"""Runs the cases of latent diffusion's tables: betas, sampling times, averages, learning rates."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax.core.forward import posterior_std
from diffusion_jax.core.schedules import DiscreteSchedule
from diffusion_jax.core.timesteps import latent_diffusion_times
from diffusion_jax.core.types import NoiseLevel
from diffusion_jax.pretrained.latent_diffusion import (
    BETA_SCHEDULES,
    average,
    learning_rate_cycles,
    noise_schedule,
)
from diffusion_jax.training.rates import factor_at

# The noise of the sampling tables is said in the cases' words only.
ETA = re.compile(r"eta=([0-9.]+)")
# Outputs of learning rates by the class that they are of.
RATES = {
    "cosine": "LambdaWarmUpCosineScheduler",
    "cosine2": "LambdaWarmUpCosineScheduler2",
    "linear": "LambdaLinearScheduler",
}


def run(case: Mapping[str, Any], folder: Path) -> dict[str, np.ndarray] | None:
    """Outputs of a table, an average or a learning rate, or None where the case is another one."""
    runs = {
        "ldm.modules.ema.LitEma": _average,
        "ldm.lr_scheduler": _rates,
        "ldm.modules.diffusionmodules.util": _tables,
    }
    if case.get("class") not in runs:
        return None
    with np.load(folder / case["inputs_file"]) as file:
        inputs = dict(file)
    with jax.enable_x64(True):
        return runs[case["class"]](case, inputs)


def _average(case: Mapping[str, Any], inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    ema = average(**case["init_kwargs"])
    names = [name.removeprefix("init.") for name in inputs if name.startswith("init.")]
    mean, outputs, step = {name: inputs[f"init.{name}"] for name in names}, {}, 0
    while f"step{step}.{names[0]}" in inputs:
        params = {name: inputs[f"step{step}.{name}"] for name in names}
        mean = ema.update(mean, params, step + 1)
        outputs |= {f"ema{step}.{name}": np.asarray(value) for name, value in mean.items()}
        step += 1
    return outputs


def _rates(case: Mapping[str, Any], inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    steps = inputs["n"]
    return {
        output: np.asarray(factor_at(learning_rate_cycles(name, case["init_kwargs"][name]), steps))
        for output, name in RATES.items()
        if name in case["init_kwargs"]
    }


def _tables(
    case: Mapping[str, Any], inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray] | None:
    del inputs
    start, end = case["init_kwargs"]["linear_start_end"]
    (total,) = case["outputs"]["beta_linear"]["shape"]
    schedules = {
        name: noise_schedule(name, total, linear_start=start, linear_end=end)
        for name in BETA_SCHEDULES
    }
    found = ETA.search(case["call"])
    if found is None:
        return None
    eta = float(found[1])
    outputs = {f"beta_{name}": schedule.betas() for name, schedule in schedules.items()}
    for name in case["outputs"]:
        kind, _, rest = name.removeprefix("ddim_").partition("_")
        if name.startswith("ddim_") and kind == "ts":
            outputs |= _sampling(schedules["linear"], eta, *rest.split("_"))
    return outputs


def _sampling(
    schedule: DiscreteSchedule, eta: float, spacing: str, count: str
) -> dict[str, np.ndarray]:
    """Times of a sampler with the signal before and after each step, and the noise it adds."""
    times = np.asarray(latent_diffusion_times(schedule.num_timesteps, int(count), spacing))
    levels = schedule(times)
    # The last step ends at the schedule's least noisy level, not at clean data.
    ends = schedule(np.concatenate([[0], times[:-1]]))
    std = posterior_std(NoiseLevel(*levels), NoiseLevel(*ends))
    suffix = f"{spacing}_{count}"
    return {
        f"ddim_ts_{suffix}": times,
        f"ddim_alphas_{suffix}": levels.alpha**2,
        f"ddim_alphas_prev_{suffix}": ends.alpha**2,
        f"ddim_sigmas_{suffix}": eta * np.asarray(std),
    }
