"""Mistakes made on purpose: each goes into a copy of a module, and a closed form must notice."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.schedules import EDM
from diffusion_jax.core.timesteps import karras
from diffusion_jax.core.types import NoiseLevel, Prediction
from diffusion_jax.guidance import StaticThreshold
from diffusion_jax.samplers import ancestral, base, ddim, ddpm, dpm_solver, exponential
from tests.analytic import MIXTURE, gaussian, gaussian_flow, ode_solution
from tests.noise import drawn_by

LEVEL = NoiseLevel(*(np.float64(field) for field in (0.0, 0.6, 0.8)))
NEXT = NoiseLevel(*(np.float64(field) for field in (0.0, 0.8, 0.6)))
INFO = base.StepInfo(0, 0, 1)


def close(produced, expected, tolerance: float) -> bool:
    return bool(np.all(np.abs(np.asarray(produced) - np.asarray(expected)) <= tolerance))


def solved(sampler, num_steps: int, x: np.ndarray, sample=base.sample) -> np.ndarray:
    schedule = EDM(0.1, 10.0)
    grid = karras(schedule, num_steps + 1, max_steps=129)
    grid = grid._replace(stop=jnp.asarray(num_steps, jnp.int32))
    return sample(
        sampler, MIXTURE.denoise, grid, jnp.asarray(x), image_keys(0, jnp.arange(len(x)))
    )[0]


def second_order_falls_as_it_should(module: ModuleType) -> bool:
    """2M on the mixture against the exact flow: four times less error in twice the steps."""
    x = 10.0 * np.random.default_rng(0).standard_normal((32, 2))
    exact = ode_solution(MIXTURE, x, 10.0, 0.1)
    errors = [
        np.sqrt(np.mean((solved(module.DPMSolverMultistep(2), n, x) - exact) ** 2))
        for n in (64, 128)
    ]
    return 1.85 < np.log2(errors[0] / errors[1]) < 2.15


def second_order_is_exact_for_a_line(module: ModuleType) -> bool:
    """x̂0 linear in λ is integrated exactly, also where the steps have different lengths."""
    lambdas = np.asarray([-1.0, -0.2, 1.9])
    levels = [NoiseLevel(*(jnp.asarray(v) for v in (0.0, 1.0, np.exp(-at)))) for at in lambdas]

    def denoise(x, level):
        return Prediction(jnp.full_like(x, 2.0 - 3.0 * jnp.log(level.sigma)))

    sampler = module.DPMSolverMultistep(2, solver_type="heun", lower_order_below=0)
    state = sampler.init(jnp.full((1, 1), 0.3))
    keys = image_keys(0, range(1))
    state = sampler.step(keys, denoise, state, levels[0], levels[1], base.StepInfo(0, 0, 2))
    before = float(state.x[0, 0])
    state = sampler.step(keys, denoise, state, levels[1], levels[2], base.StepInfo(1, 0, 2))
    # x e^λ grows by ∫ e^λ (2 + 3λ) dλ at alpha = 1.
    start, end = lambdas[1:]
    integral = np.exp(end) * (3.0 * end - 1.0) - np.exp(start) * (3.0 * start - 1.0)
    return close(state.x, (np.exp(start) * before + integral) * np.exp(-end), 1e-10)


def ancestral_step_keeps_the_level(module: ModuleType) -> bool:
    """down² + up² = σ_s², whatever eta is."""
    rates = [module.ancestral_rates(LEVEL, NEXT, eta) for eta in (0.0, 0.5, 1.0, 3.0)]
    return all(close(down**2 + up**2, NEXT.sigma**2, 1e-12) for down, up in rates)


def one_step(sampler, denoise, noise: float):
    with drawn_by(lambda keys, x: jnp.full_like(x, noise)):
        x = jnp.asarray([[0.7, -2.0]])
        return sampler.step(image_keys(0, range(1)), denoise, sampler.init(x), LEVEL, NEXT, INFO).x


def ddim_is_ancestral_at_eta_1(module: ModuleType) -> bool:
    def denoise(x, level):
        return Prediction(jnp.tanh(x))

    with mock.patch.object(module, "per_image_normal", lambda keys, x: jnp.full_like(x, 0.9)):
        own = one_step(module.DDIM(1.0), denoise, 0.9)
    return close(own, one_step(ddpm.DDPM("small"), denoise, 0.9), 1e-12)


def noise_follows_from_the_clipped_x0(module: ModuleType) -> bool:
    clipped = StaticThreshold(1.0)(lambda x, level, cond: Prediction(3.0 * x), Condition())
    out = one_step(module.DDIM(0.0), lambda x, level: clipped(x, level, Condition()), 0.0)
    x, x0 = np.asarray([[0.7, -2.0]]), np.asarray([[1.0, -1.0]])
    return close(out, 0.8 * x0 + 0.6 * (x - 0.6 * x0) / 0.8, 1e-12)


def the_loop_ends_where_the_grid_does(module: ModuleType) -> bool:
    """The exact flow of one Gaussian, to the error of 128 steps of second order."""
    data, schedule = gaussian(0.3, 0.5), EDM(0.1, 10.0)
    grid = karras(schedule, 129, max_steps=129)
    grid = grid._replace(stop=jnp.asarray(128, jnp.int32))
    x = jnp.asarray([[8.0], [-3.0]])
    sampler = dpm_solver.DPMSolverMultistep(2)
    out = module.sample(sampler, data.denoise, grid, x, image_keys(0, range(2)))[0]
    start, end = (NoiseLevel(0.0, 1.0, sigma) for sigma in (10.0, 0.1))
    return close(out, gaussian_flow(np.asarray(x), start, end, mean=0.3, std=0.5), 1e-3)


class Mistake(NamedTuple):
    """A change of one line in a module, and the check that must notice it.

    `victim` is the module whose functions the check uses, where the changed one is a helper.
    """

    module: ModuleType
    old: str
    new: str
    check: Callable[[ModuleType], bool]
    victim: ModuleType | None = None


MISTAKES = {
    "the sign of lambda": Mistake(
        exponential,
        "return jnp.log(level.alpha) - jnp.log(level.sigma)",
        "return jnp.log(level.sigma) - jnp.log(level.alpha)",
        second_order_falls_as_it_should,
        dpm_solver,
    ),
    "the last prediction twice": Mistake(
        dpm_solver,
        "weight * (earlier - output)",
        "weight * (output - output)",
        second_order_falls_as_it_should,
    ),
    "this step and the last one exchanged": Mistake(
        dpm_solver,
        "jnp.where(known[0] & (allowed >= 2), slope / nodes[0], 0.0)",
        "jnp.where(known[0] & (allowed >= 2), slope * nodes[0], 0.0)",
        second_order_is_exact_for_a_line,
    ),
    "noise beyond the level": Mistake(
        ancestral,
        "new = jnp.minimum(eta * root((1.0 - q) * (1.0 + q)), 1.0)",
        "new = eta * root((1.0 - q) * (1.0 + q))",
        ancestral_step_keeps_the_level,
    ),
    "a variance for a standard deviation": Mistake(
        ancestral,
        "next_level.sigma * new",
        "next_level.sigma * new**2",
        ancestral_step_keeps_the_level,
    ),
    "the noise that is kept and that is added exchanged": Mistake(
        ddim,
        "towards_x_t, std = ancestral_rates(",
        "std, towards_x_t = ancestral_rates(",
        ddim_is_ancestral_at_eta_1,
    ),
    "noise of the x0 before clipping": Mistake(
        ddim,
        'default="x0"',
        'default="raw_x0"',
        noise_follows_from_the_clipped_x0,
    ),
    "a level off by one": Mistake(
        base,
        "grid.next_level(index),",
        "grid.next_level(index + 1),",
        the_loop_ends_where_the_grid_does,
    ),
}


def changed(mistake: Mistake, folder: Path) -> ModuleType:
    """A copy of the module with the mistake in it."""
    source = Path(mistake.module.__file__).read_text(encoding="utf-8")
    assert source.count(mistake.old) == 1, (
        f"not one line of {mistake.module.__name__}: {mistake.old}"
    )
    path = folder / "changed.py"
    path.write_text(source.replace(mistake.old, mistake.new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("changed", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(name, tmp_path, x64):
    mistake = MISTAKES[name]
    assert mistake.check(mistake.victim or mistake.module)
    module = changed(mistake, tmp_path)
    if mistake.victim is None:
        assert not mistake.check(module)
        return
    name = mistake.old.split("(")[0]
    helpers = {n: f for n, f in vars(module).items() if callable(f) and n in vars(mistake.module)}
    with mock.patch.multiple(mistake.module, **helpers):
        assert not mistake.check(mistake.victim)
