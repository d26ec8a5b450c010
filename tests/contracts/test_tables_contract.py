"""What every row of SCHEDULES, TIMESTEPS, PARAMETERIZATIONS, GUIDANCE and THRESHOLDS must keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import as_arrays, image_keys
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.denoiser import make_denoiser
from diffusion_jax.core.parameterization import PARAMETERIZATIONS
from diffusion_jax.core.schedules import SCHEDULES
from diffusion_jax.core.timesteps import TIMESTEPS
from diffusion_jax.core.types import NoiseLevel
from diffusion_jax.guidance import GUIDANCE, THRESHOLDS
from diffusion_jax.samplers import SAMPLERS, fit_grid, sample
from tests.analytic import MIXTURE
from tests.sampler_rows import ROWS

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_spacing = pytest.mark.parametrize("spacing", TIMESTEPS)


@functools.cache
def grid_of(make, spacing, num_steps=2, **options):
    """A grid of the row, with an end for ratios where there is no finite one."""
    schedule = make()
    if (
        spacing in ("karras", "exponential")
        and float(schedule(np.asarray(schedule.t_max)).alpha) == 0.0
    ):
        options["sigma_max"] = 50.0
    return TIMESTEPS[spacing](schedule, num_steps, max_steps=8, **options)


@every_schedule
def test_schedule_goes_from_clean_to_noisy(schedule):
    schedule = schedule()
    t = np.linspace(schedule.t_min, schedule.t_max, 33)
    level = schedule(t)
    with np.errstate(divide="ignore"):
        ratio = level.sigma / level.alpha
    assert np.all(np.diff(ratio) > 0) or len(set(ratio)) < 33
    assert np.all((level.alpha >= 0) & (level.alpha <= 1) & (level.sigma > 0))
    np.testing.assert_array_equal(level.t, t)
    assert schedule.prior_std(schedule(np.asarray(schedule.t_max))) > 0 and hash(schedule) == hash(
        SCHEDULES[name_of(schedule)]()
    )


def name_of(schedule):
    return next(name for name, make in SCHEDULES.items() if type(schedule) is make)


@pytest.mark.slow
@every_schedule
def test_schedule_compiles_and_keeps_its_type_and_shape(schedule):
    schedule = schedule()
    t = jnp.full((3,), 0.5 * (schedule.t_min + schedule.t_max), jnp.float32)
    level, back = jax.jit(lambda t: (schedule(t), schedule.inverse(jnp.zeros_like(t))))(t)
    assert all(field.shape == (3,) and field.dtype == jnp.float32 for field in level)
    assert back.shape == (3,) and np.all(np.isfinite(back))
    scalar = jax.eval_shape(schedule, jax.ShapeDtypeStruct((), jnp.float32))
    assert all(field.shape == () and field.dtype == jnp.float32 for field in scalar)


@every_schedule
def test_training_times_belong_to_their_keys(schedule):
    keys = image_keys(0, range(6))
    times = np.asarray(schedule().sample_t(keys))
    np.testing.assert_array_equal(times[::-1], schedule().sample_t(keys[::-1]))
    assert times.shape == (6,) and times.dtype == np.float32 and len(set(times)) > 1


@every_spacing
@every_schedule
def test_grids_go_from_noisy_to_clean(schedule, spacing):
    for num_steps in (1, 2):
        grid = grid_of(schedule, spacing, num_steps)
        t, alpha, sigma = (np.asarray(field) for field in grid.levels)
        assert t.shape == (9,) and t.dtype == np.float32
        for field in (t, alpha, sigma):
            assert np.all(np.isfinite(field)) and np.all(field[num_steps:] == field[num_steps])
        assert np.all(np.diff(sigma[: num_steps + 1]) < 0) and sigma[-1] == 0 and alpha[-1] == 1
        assert int(grid.start) == 0 and int(grid.stop) == num_steps
        assert t[0] <= schedule().t_max * (1 + 1e-6)


def bfloat16_network(params, x, t, cond, *, keys=None):
    """v of the mixture at the level that x was scaled for, in the precision of accelerators."""
    del t, keys
    level = params
    alpha, sigma = (jnp.broadcast_to(rate, x.shape[:1])[:, None] for rate in level[1:])
    v = (alpha * x - (alpha**2 + sigma**2) * MIXTURE.x0(x, level)) / jnp.maximum(sigma, 1e-6)
    return v.astype(jnp.bfloat16)


@jax.jit
def sampled(sampler, grid, x, keys):
    make = make_denoiser(bfloat16_network, PARAMETERIZATIONS["v"]())
    # Networks say fractions outside of [0, 1] too.
    fractions = jnp.broadcast_to(jnp.asarray([[-0.1], [0.0], [1.0]]), x.shape)

    def denoise(x, level):
        return make(level)(x, level)._replace(var_frac=fractions)

    return sample(sampler, denoise, grid, x, keys)[0]


@pytest.mark.parametrize(
    "row", [pytest.param(n, marks=() if n in SAMPLERS else pytest.mark.slow) for n in ROWS]
)
def test_every_sampler_is_finite_on_every_grid(row):
    """Schedules × spacings × final levels, a network in bfloat16; one compilation."""
    before, sampler = sampled._cache_size(), ROWS[row]
    keys = image_keys(0, range(3))
    start = jnp.asarray([[0.3, -1.0], [2.0, 0.1], [-0.5, -0.2]], jnp.float32)
    for name, schedule in SCHEDULES.items():
        for spacing in TIMESTEPS:
            for final in ("clean", "t_min"):
                grid = grid_of(schedule, spacing, final=final)
                grid = as_arrays(fit_grid(sampler, grid, schedule()))
                out = np.asarray(sampled(sampler, grid, grid.levels.sigma[0] * start, keys))
                assert np.all(np.isfinite(out)), (name, spacing, final)
                assert out.dtype == np.float32
    assert sampled._cache_size() <= before + 1


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_parameterization_compiles_and_agrees_with_itself(name):
    """jit = no jit, float32 in and out, batch of levels = level by level."""
    parameterization = PARAMETERIZATIONS[name]()
    level = NoiseLevel(jnp.zeros(2), jnp.asarray([0.8, 0.3]), jnp.asarray([0.6, 0.9]))
    x, output = jnp.asarray([[0.3, -1.0], [2.0, 0.1]]), jnp.asarray([[0.1, 0.2], [-0.4, 0.9]])
    for function in (parameterization.to_x0, parameterization.target):
        eager, compiled = function(output, x, level), jax.jit(function)(output, x, level)
        assert eager.dtype == compiled.dtype == jnp.float32
        np.testing.assert_allclose(eager, compiled, rtol=1e-5, atol=1e-6)
        one = function(output[1:], x[1:], NoiseLevel(*(field[1] for field in level)))
        np.testing.assert_allclose(one, eager[1:], rtol=1e-6)
    assert parameterization.scale_input(x, level).shape == x.shape
    hash(parameterization)


def network(params, x, t, cond, *, keys=None):
    """Its answer depends on everything it is given."""
    return jnp.tanh(params * x + cond.vector[:, :2]) + 0.01 * t[:, None]


LEVEL = NoiseLevel(jnp.float32(5.0), jnp.float32(0.6), jnp.float32(0.8))


@pytest.mark.slow
@pytest.mark.parametrize("table, name", [("guide", n) for n in GUIDANCE]
                         + [("threshold", n) for n in THRESHOLDS])  # fmt: skip
def test_guidance_is_denoiser_to_denoiser(table, name):
    """jit = no jit; a knob is data; images do not see each other; float32 stays."""
    make = (GUIDANCE if table == "guide" else THRESHOLDS)[name]
    traces = []

    def run(guidance, x, cond, uncond):
        traces.append(x.shape)
        denoise = make_denoiser(network, PARAMETERIZATIONS["x0"]())(2.0)
        return guidance(denoise, uncond)(x, LEVEL, cond).x0

    compiled = jax.jit(run)
    x = jnp.asarray([[0.3, -1.0], [2.0, 0.1]])
    cond, uncond = (Condition(vector=jnp.full((2, 3), value)) for value in (3.0, -0.5))
    guidance = as_arrays(make())
    out = np.asarray(compiled(guidance, x, cond, uncond))
    assert out.dtype == np.float32 and out.shape == x.shape
    np.testing.assert_allclose(out, run(guidance, x, cond, uncond), rtol=1e-5, atol=1e-6)
    one = run(guidance, x[1:], *(jax.tree.map(lambda v: v[1:], c) for c in (cond, uncond)))
    np.testing.assert_allclose(one, out[1:], rtol=1e-5, atol=1e-6)
    before = len(traces)
    changed = jax.tree.map(lambda leaf: leaf * 0.25, guidance)
    other = compiled(changed, x, cond, uncond)
    assert len(traces) == before
    if jax.tree.leaves(guidance):
        assert not np.allclose(other, out)
