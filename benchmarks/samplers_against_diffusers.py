"""Runs this library's samplers beside diffusers' schedulers, on the same problem.

python benchmarks/samplers_against_diffusers.py            # needs torch, diffusers, tqdm
python benchmarks/samplers_against_diffusers.py --only "DPM++ 2M" --steps 97 107 117
python benchmarks/samplers_against_diffusers.py speed

The first form solves a mixture of Gaussians, whose denoiser and probability flow are exact, from
the same noise with both, and prints for every scheduler and number of steps: the largest
difference between diffusers and the variant that `from_config` gives, then the RMS error to the
exact flow of diffusers, of that variant and of the default form: the same sampler on the same
spacing, with its own default options and unrounded times. All make the same calls of the network.
The sample is taken before the last step, whose jump to sigma = 0 has an error that no number of
steps makes smaller.

"speed" times 20 steps around a tiny network.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

from diffusion_jax.core.arrays import as_arrays, image_keys
from diffusion_jax.core.denoiser import make_denoiser
from diffusion_jax.core.forward import log_snr
from diffusion_jax.core.grid import Grid, from_times
from diffusion_jax.core.mixture import MIXTURE, exact_flow
from diffusion_jax.core.schedules import NoiseSchedule
from diffusion_jax.core.types import NoiseLevel
from diffusion_jax.pretrained import Scheduler, from_config
from diffusion_jax.samplers import fit_grid, sample

POINTS, MAX_STEPS = 512, 256
# One more than multiples of 6, so that blocks of 2 and of 3 steps end before the last step.
STEPS = (7, 13, 19, 31, 67, 127, 253)
# Stable Diffusion's schedule, on Karras levels where the class has them: there the error falls
# smoothly with the number of steps.
TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
KARRAS = {**TABLE, "use_karras_sigmas": True}
CONFIGS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {**TABLE, "clip_sample": False}),
    "PLMS": ("PNDMScheduler", {**TABLE, "skip_prk_steps": True}),
    "Euler": ("EulerDiscreteScheduler", KARRAS),
    "Heun": ("HeunDiscreteScheduler", KARRAS),
    "KDPM2": ("KDPM2DiscreteScheduler", KARRAS),
    "LMS 4": ("LMSDiscreteScheduler", KARRAS),
    "DEIS 2": ("DEISMultistepScheduler", {**KARRAS, "solver_order": 2}),
    "DEIS 3": ("DEISMultistepScheduler", {**KARRAS, "solver_order": 3}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", KARRAS),
    "DPM++ 3M": ("DPMSolverMultistepScheduler", {**KARRAS, "solver_order": 3}),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", KARRAS),
    "DPM++ 3S": ("DPMSolverSinglestepScheduler", {**KARRAS, "solver_order": 3}),
    "UniPC 2": ("UniPCMultistepScheduler", KARRAS),
    "UniPC 3": ("UniPCMultistepScheduler", {**KARRAS, "solver_order": 3}),
}


def eps_of(schedule: NoiseSchedule, x: np.ndarray, t: float) -> np.ndarray:
    """The exact ε̂ at a time, between two times of the table as the schedule has it."""
    level = schedule(np.asarray(t, np.float64))
    return (x - level.alpha * MIXTURE.x0(x, level)) / level.sigma


def run_diffusers(config: Mapping[str, Any], schedule, num_steps: int, unit: np.ndarray):
    """The scheduler's samples after every call of the network, in its float32."""
    options = {key: value for key, value in config.items() if key != "_class_name"}
    scheduler = getattr(diffusers, config["_class_name"])(**options)
    scheduler.set_timesteps(num_steps)
    x = torch.from_numpy(unit.astype(np.float32))[:, :, None, None] * scheduler.init_noise_sigma
    samples = []
    for t in scheduler.timesteps:
        shown = scheduler.scale_model_input(x, t).numpy()[:, :, 0, 0]
        eps = eps_of(schedule, shown.astype(np.float64), float(t)).astype(np.float32)
        x = scheduler.step(torch.from_numpy(eps)[:, :, None, None], t, x).prev_sample
        samples.append(x.numpy()[:, :, 0, 0])
    return samples


def network(params, x, t, cond, *, keys=None):
    """The same ε̂ for a denoiser."""
    del cond, keys
    alpha, sigma = params["schedule"](t)[1:]
    level = NoiseLevel(t, alpha, sigma)
    return (x - alpha[:, None] * MIXTURE.x0(x, level)) / sigma[:, None]


def run(scheduler: Scheduler, grid: Grid, x: jax.Array) -> tuple[np.ndarray, int]:
    """This library's sample before the last step, in the scheduler's units, and all calls."""
    calls = 0

    def counted(params, x, t, cond, *, keys=None):
        def count(_):
            nonlocal calls
            calls += 1

        jax.debug.callback(count, t[0])
        return network(params, x, t, cond, keys=keys)

    @jax.jit
    def draw(sampler, grid, x, keys):
        make = make_denoiser(counted, scheduler.parameterization, time_input=scheduler.time_input)
        denoise = make({"schedule": scheduler.schedule})
        return sample(sampler, denoise, grid, x, keys, trace=lambda state: state.x)[1]

    xs = draw(*as_arrays((scheduler.sampler, grid)), x, image_keys(0, jnp.arange(len(x))))
    jax.effects_barrier()
    last = int(grid.stop) - 1
    return np.asarray(scheduler.to_reference(xs[last - 1], grid.level(last))), calls


def in_default_form(scheduler: Scheduler, num_steps: int) -> tuple[Scheduler, Grid]:
    """The same spacing with unrounded times, and the sampler's own default variant."""
    fields = getattr(scheduler.sampler, "__dataclass_fields__", {})
    sampler = scheduler.sampler
    if "variant" in fields:
        sampler = sampler.replace(variant=fields["variant"].default)
    grid = scheduler.grid(num_steps, max_steps=MAX_STEPS)
    levels = NoiseLevel(*(np.asarray(f, np.float64)[:num_steps] for f in grid.levels))
    times = levels.t
    if dict(scheduler.options).get("use_karras_sigmas"):
        # The levels are exact; what the network is told about them may have been rounded.
        times = scheduler.schedule.inverse(np.asarray(log_snr(levels), np.float64))
    plain = from_times(scheduler.schedule, times, max_steps=MAX_STEPS)
    return replace(scheduler, sampler=sampler), fit_grid(sampler, plain, scheduler.schedule)


def rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.sum((a - b) ** 2, axis=-1))))


def error_to_flow(scheduler, grid: Grid, x: jax.Array, produced: np.ndarray) -> float:
    start, end = (
        NoiseLevel(*(np.asarray(field, np.float64)[i] for field in grid.levels))
        for i in (0, int(grid.stop) - 1)
    )
    exact = exact_flow(MIXTURE, np.asarray(x, np.float64), start, end, num_steps=1024)
    return rms(produced, np.asarray(scheduler.to_reference(exact, end)))


def compare(names: Sequence[str], steps: Sequence[int]) -> None:
    unit = np.random.default_rng(0).standard_normal((POINTS, 2))
    print(f"diffusers {diffusers.__version__}, torch {torch.__version__}, jax {jax.__version__}")
    print(
        f"{'scheduler':10} {'N':>4} {'calls':>5} {'difference':>10} {'diffusers':>10} "
        f"{'reference':>10} {'default':>10} {'ratio':>6}"
    )
    for name in names:
        class_name, options = CONFIGS[name]
        config = {"_class_name": class_name, **options}
        for num_steps in steps:
            scheduler = from_config(config)
            grid = scheduler.grid(num_steps, max_steps=MAX_STEPS)
            x = scheduler.x_T(unit.astype(np.float32), grid)
            samples = run_diffusers(config, scheduler.schedule, num_steps, unit)
            theirs = samples[-2]
            ours, calls = run(scheduler, grid, x)
            default, default_grid = in_default_form(scheduler, num_steps)
            x_default = default.x_T(unit.astype(np.float32), default_grid)
            best, default_calls = run(default, default_grid, x_default)
            errors = [
                error_to_flow(scheduler, grid, x, theirs),
                error_to_flow(scheduler, grid, x, ours),
                error_to_flow(default, default_grid, x_default, best),
            ]
            if not calls == len(samples) == default_calls:
                print(f"calls differ: {len(samples)}, {calls}, {default_calls}")
            print(
                f"{name:10} {num_steps:4} {calls:5} {np.abs(theirs - ours).max():10.1e} "
                f"{errors[0]:10.2e} {errors[1]:10.2e} {errors[2]:10.2e} "
                f"{errors[2] / errors[0]:6.2f}",
                flush=True,
            )


def speed() -> None:
    """Medians over nine runs of 20 steps of DPM-Solver++ 2M around x -> tanh(w x)."""
    scheduler = diffusers.DPMSolverMultistepScheduler()
    weight = torch.tensor(0.7)

    @torch.no_grad()
    def with_diffusers(x):
        scheduler.set_timesteps(20)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(weight * x), t, x).prev_sample
        return x

    loaded = from_config({"_class_name": "DPMSolverMultistepScheduler"})

    @jax.jit
    def draw(params, sampler, grid, x, keys):
        def tiny(params, x, t, cond, *, keys=None):
            return jnp.tanh(params * x)

        denoise = make_denoiser(tiny, loaded.parameterization)(params)
        return sample(sampler, denoise, grid, x, keys)[0]

    grid = loaded.grid(20)
    x = np.random.default_rng(0).standard_normal((1, 4, 64, 64)).astype(np.float32)
    knobs = as_arrays((loaded.sampler, grid))
    arguments = (jnp.float32(0.7), *knobs, jnp.asarray(x), image_keys(0, range(1)))
    torch_x = torch.from_numpy(x)
    difference = np.abs(np.asarray(draw(*arguments)) - with_diffusers(torch_x).numpy()).max()

    def median(call) -> tuple[float, str]:
        times = []
        for _ in range(9):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times), ", ".join(f"{t:.2f}" for t in times)

    theirs, their_times = median(lambda: with_diffusers(torch_x))
    ours, our_times = median(lambda: jax.block_until_ready(draw(*arguments)))
    print(f"largest difference of the samples: {difference:.1e}")
    print(f"diffusers: median {theirs:.2f} ms of {their_times}")
    print(f"diffusion_jax: median {ours:.3f} ms of {our_times}")
    print(f"ratio {theirs / ours:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("compare", "speed"), default="compare")
    parser.add_argument("--only", nargs="+", choices=CONFIGS, default=tuple(CONFIGS))
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS, metavar="N")
    args = parser.parse_args()
    if max(args.steps) > MAX_STEPS:
        parser.error(f"--steps must be at most {MAX_STEPS}, got {max(args.steps)}")
    if args.what == "speed":
        speed()
    else:
        compare(args.only, args.steps)


if __name__ == "__main__":
    main()
