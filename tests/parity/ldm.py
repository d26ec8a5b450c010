"""Trajectories of latent diffusion's own samplers: DDIM and PLMS, with guidance."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.denoiser import make_denoiser
from diffusion_jax.core.forward import posterior_std
from diffusion_jax.core.parameterization import Eps
from diffusion_jax.core.schedules import ScaledLinear
from diffusion_jax.core.timesteps import sections
from diffusion_jax.guidance import ClassifierFree
from diffusion_jax.samplers.base import StepInfo
from diffusion_jax.samplers.ddim import DDIM
from diffusion_jax.samplers.pndm import PNDM
from tests.noise import drawn_by

NUM_TIMESTEPS = 1000
OPTIONS = {"S", "betas_linear", "eta", "unconditional_guidance_scale"}


def _network(params, x, t, cond, *, keys=None):
    """eps = tanh(0.7 x + (-1.3 t / 1000 + c)) with a condition c for each example."""
    del params, keys
    return jnp.tanh(0.7 * x + (-1.3 * t / 1000.0 + cond.vector[:, 0])[:, None, None, None])


def _grid(options: Mapping[str, Any]):
    """Latent diffusion's times, down to the schedule's first level and not to clean data."""
    schedule = ScaledLinear(NUM_TIMESTEPS, *options["betas_linear"])
    grid = sections(schedule, f"uniform{options['S']}", final="t_min")
    return grid, int(grid.stop)


def _denoise(options: Mapping[str, Any], inputs: Mapping[str, np.ndarray]):
    cond, uncond = (Condition(vector=jnp.asarray(inputs[n])[:, None]) for n in ("cond", "uncond"))
    guided = make_denoiser(_network, Eps())({})
    if "unconditional_guidance_scale" in options:
        guided = ClassifierFree(options["unconditional_guidance_scale"])(guided, uncond)
    return lambda x, level: guided(x, level, cond)


def _trajectory(sampler, grid, denoise, x_T, noise):
    """x and x̂0 after every step; x̂0 that of the noise that the step used, whatever its order."""
    keys, state, xs, x0s = image_keys(0, range(len(x_T))), sampler.init(x_T), [x_T], [x_T]
    for i in range(int(grid.stop)):
        level, end, x = grid.level(i), grid.next_level(i), state.x
        with drawn_by(lambda keys, x, i=i: jnp.asarray(noise[i])):
            state = sampler.step(keys, denoise, state, level, end, StepInfo(i, 0, int(grid.stop)))
        x0 = denoise(x, level).x0
        if isinstance(sampler, PNDM):
            ratio = end.alpha / level.alpha
            eps = (state.x - ratio * x) / (end.sigma - ratio * level.sigma)
            x0 = (x - level.sigma * eps) / level.alpha
        xs.append(state.x)
        x0s.append(x0)
    return np.asarray(xs), np.asarray(x0s)


def run(case: Mapping[str, Any], folder: Path) -> dict[str, np.ndarray] | None:
    """Outputs of a sampler of latent diffusion, or None where the case is another one."""
    module, _, name = case.get("class", "").rpartition(".")
    if module != "ldm.models.diffusion" or name not in ("DDIMSampler", "PLMSSampler"):
        return None
    options = case["init_kwargs"]
    if set(options) - OPTIONS or (name == "PLMSSampler" and options["eta"] != 0.0):
        return None
    with np.load(folder / case["inputs_file"]) as file:
        inputs = {key: np.asarray(value, np.float64) for key, value in file.items()}
    with jax.enable_x64(True), jax.disable_jit():
        grid, count = _grid(options)
        sampler = DDIM(options["eta"]) if name == "DDIMSampler" else PNDM(runge_kutta_start=False)
        x_T, noise = (np.moveaxis(inputs[key], -3, -1) for key in ("x_T", "noise"))
        denoise = _denoise(options, inputs)
        xs, x0s = (np.moveaxis(x, -1, -3) for x in _trajectory(sampler, grid, denoise, x_T, noise))
        here, there = (
            [np.asarray(level(i)) for i in range(count)]
            for level in (lambda i: grid.level(i).alpha, lambda i: grid.next_level(i).alpha)
        )
        stds = [posterior_std(grid.level(i), grid.next_level(i)) for i in range(count)]
    return {
        "sample": xs[-1],
        "x_inter": xs,
        "pred_x0": x0s,
        "ddim_timesteps": np.round(np.asarray(grid.levels.t[:count])[::-1]),
        "ddim_alphas": np.asarray(here)[::-1] ** 2,
        "ddim_alphas_prev": np.asarray(there)[::-1] ** 2,
        "ddim_sigmas": options["eta"] * np.asarray(stds)[::-1],
    }
