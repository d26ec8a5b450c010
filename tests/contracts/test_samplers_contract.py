"""What every row of SAMPLERS must keep: pure, compiled once, per-image noise, differentiable."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diffusion_jax.core.arrays import as_arrays, fold_in_each, image_keys
from diffusion_jax.core.mixture import exact_flow
from diffusion_jax.core.parameterization import V
from diffusion_jax.core.schedules import Cosine, ZeroTerminalSNR
from diffusion_jax.core.timesteps import from_times, leading, trailing
from diffusion_jax.core.types import NoiseLevel, Prediction
from diffusion_jax.guidance import ClassifierFree
from diffusion_jax.samplers import StepInfo, fit_grid, initial_noise, sample
from tests.analytic import MIXTURE
from tests.noise import drawn_by
from tests.sampler_rows import ROWS, STOCHASTIC

SCHEDULE = ZeroTerminalSNR(1000, Cosine())
MAX_STEPS = 8
SHAPE = (2,)
every_row = pytest.mark.parametrize("name", ROWS)


def v_denoiser(x, level, cond):
    """The exact denoiser through the v parameterization, which the last level needs."""
    x0, alpha, sigma = MIXTURE.denoise(x, level, cond).x0, level.alpha, level.sigma
    alpha, sigma = (jnp.broadcast_to(rate, x.shape[:1])[:, None] for rate in (alpha, sigma))
    v = (alpha * x - (alpha**2 + sigma**2) * x0) / jnp.where(sigma > 0, sigma, 1.0)
    return Prediction(V().to_x0(v, x, level), jnp.full(x.shape, 0.3))


class Runner:
    """A jitted sampling call, and how often it was traced."""

    def __init__(self):
        self.traces = 0
        self.call = jax.jit(self._run)

    def _run(self, sampler, guidance, grid, x, keys, cond, uncond):
        self.traces += 1
        guided = guidance(v_denoiser, uncond)
        return sample(sampler, lambda x, level: guided(x, level, cond), grid, x, keys)[0]


@functools.cache
def runner_of(structure):
    return Runner()


def runner(name):
    """One for all rows that differ in knobs alone, ddim with and without noise for instance."""
    return runner_of(jax.tree.structure(ROWS[name]))


def inputs(count=4, seed=0, start=0):
    keys = image_keys(seed, range(start, start + count))
    return initial_noise(keys, SHAPE), keys


def conditions(labels):
    return MIXTURE.classes(labels), MIXTURE.any_class(len(labels))


def knobs_of(sampler, scale, grid):
    return as_arrays((sampler, ClassifierFree(scale), fit_grid(sampler, grid, SCHEDULE)))


def run(name, *, num_steps=4, seed=0, scale=2.0, labels=(0, 1, 2, 1), grid=None, sampler=None):
    x, keys = inputs(seed=seed)
    grid = trailing(SCHEDULE, num_steps, max_steps=MAX_STEPS) if grid is None else grid
    sampler = ROWS[name] if sampler is None else sampler
    knobs = knobs_of(sampler, scale, grid)
    return np.asarray(runner(name).call(*knobs, x, keys, *conditions(list(labels))))


@pytest.mark.slow
@every_row
def test_same_key_same_result_and_other_key_other_result(name):
    first = run(name)
    np.testing.assert_array_equal(first, run(name))
    assert first.dtype == np.float32 and np.all(np.isfinite(first))
    assert np.all(np.abs(first - run(name, seed=1)) > 1e-4)


@every_row
def test_only_stochastic_samplers_use_their_keys(name):
    """The same x_T with other keys."""
    x, _ = inputs()
    knobs = knobs_of(ROWS[name], 1.0, trailing(SCHEDULE, 4, max_steps=MAX_STEPS))
    outs = [
        np.asarray(runner(name).call(*knobs, x, image_keys(seed, range(4)), *conditions([0] * 4)))
        for seed in (0, 1)
    ]
    assert np.array_equal(*outs) == (name not in STOCHASTIC)


def float_knobs(sampler):
    values = {field.name: getattr(sampler, field.name) for field in dataclasses.fields(sampler)}
    return [name for name, value in values.items() if isinstance(value, float)]


@every_row
def test_every_knob_shares_one_compilation(name):
    """Scale, seed, prompt, start, number and spacing of steps, eta, churn: data, not code."""
    run(name)
    before = runner(name).traces
    results = [
        run(name),
        run(name, num_steps=8),
        run(name, scale=7),
        run(name, seed=5),
        run(name, labels=(2, 2, 0, 0)),
        run(name, grid=trailing(SCHEDULE, 6, max_steps=MAX_STEPS).starting_at(3)),
        run(name, grid=leading(SCHEDULE, 5, max_steps=MAX_STEPS, final="t_min")),
    ]
    for knob in float_knobs(ROWS[name]):
        run(name, sampler=ROWS[name].replace(**{knob: 0.35}))
    assert runner(name).traces == before
    for i, result in enumerate(results):
        assert all(not np.array_equal(result, other) for other in results[:i]), i


@pytest.mark.slow
@every_row
def test_the_loop_is_the_steps_one_by_one(name):
    """Compiled loop = steps driven by hand from Python, uncompiled."""
    grid = fit_grid(ROWS[name], trailing(SCHEDULE, 3, max_steps=MAX_STEPS), SCHEDULE)
    x, keys = inputs()
    cond, uncond = conditions([0, 1, 2, 1])
    guided = ClassifierFree(2.0)(v_denoiser, uncond)
    sampler, state = ROWS[name], ROWS[name].init(x)
    for i in range(3):
        state = sampler.step(
            fold_in_each(keys, i),
            lambda x, level: guided(x, level, cond),
            state,
            grid.level(i),
            grid.next_level(i),
            StepInfo(i, 0, 3, grid.middle_level(i)),
        )
    np.testing.assert_allclose(state.x, run(name, num_steps=3), rtol=1e-4, atol=1e-5)


@every_row
def test_start_runs_the_tail(name):
    """start = k is a grid that begins with level k."""
    grid = trailing(SCHEDULE, 6, max_steps=MAX_STEPS)
    tail = jax.tree.map(lambda f: jnp.concatenate([f[2:], f[-1:], f[-1:]]), grid.levels)
    # Same indices, hence the same noise, for the steps that are left.
    other_head = jax.tree.map(lambda f: jnp.concatenate([f[:1], f[:1], f[:-2]]), tail)
    shifted = grid._replace(levels=other_head)
    once = run(name, grid=grid.starting_at(2))
    np.testing.assert_array_equal(once, run(name, grid=shifted.starting_at(2)))
    if name not in STOCHASTIC:
        moved = grid._replace(levels=tail, stop=grid.stop - 2)
        np.testing.assert_array_equal(once, run(name, grid=moved))


@every_row
def test_both_ends_of_every_path_are_finite(name):
    """From zero signal to sigma = 0, and in one step from one to the other."""
    for num_steps in (1, 2, 8):
        result = run(name, num_steps=num_steps)
        assert np.all(np.isfinite(result)) and np.abs(result).max() < 20
    assert np.all(np.isfinite(run(name, grid=leading(SCHEDULE, 1, max_steps=MAX_STEPS))))


@functools.cache
def exact_end(count=64):
    """Where the flow takes 64 starting points from pure noise to data."""
    x, _ = inputs(count)
    start, end = (NoiseLevel(0.0, alpha, sigma) for alpha, sigma in ((0.0, 1.0), (1.0, 0.0)))
    return x, exact_flow(MIXTURE, np.asarray(x), start, end, num_steps=1024)


def error_from_zero_snr(name):
    """RMS error of 48 steps that start without signal, the network predicting v."""
    x, exact = exact_end()
    knobs = knobs_of(ROWS[name], 1.0, trailing(SCHEDULE, 48, max_steps=48))
    out = runner(name).call(*knobs, x, image_keys(0, range(64)), *[MIXTURE.any_class(64)] * 2)
    return np.sqrt(np.mean(np.sum((np.asarray(out) - exact) ** 2, axis=1)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ROWS if name not in STOCHASTIC])
def test_zero_terminal_snr_leads_where_the_flow_does(name):
    """No deterministic sampler is worse than Euler's method, which knows no history."""
    assert error_from_zero_snr(name) <= 1.1 * error_from_zero_snr("euler") < 0.05


def two_devices():
    if len(jax.devices()) < 2:
        pytest.fail("conftest.py must provide two devices")
    return jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])


@pytest.mark.slow
@every_row
def test_a_mesh_of_two_devices_gives_the_same_pictures(name):
    """The batch sharded over the mesh, the noise still per image."""
    whole = run(name, num_steps=3)
    x, keys = inputs()
    cond, uncond = conditions([0, 1, 2, 1])
    knobs = knobs_of(ROWS[name], 2.0, trailing(SCHEDULE, 3, max_steps=MAX_STEPS))
    data = (x, keys, cond, uncond)

    sharding = NamedSharding(two_devices(), PartitionSpec("data"))
    sharded = runner(name).call(*knobs, *jax.device_put(data, sharding))
    assert len(sharded.sharding.device_set) == 2
    np.testing.assert_allclose(sharded, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpm_learned", "heun", "dpm_solver_multistep"])
def test_pmap_and_a_smaller_batch_give_the_same_pictures(name):
    """2 + 2 images on two devices by pmap, for each kind of state and step."""
    whole = run(name, num_steps=3)
    x, keys = inputs()
    knobs = knobs_of(ROWS[name], 2.0, trailing(SCHEDULE, 3, max_steps=MAX_STEPS))
    data = (x, keys, *conditions([0, 1, 2, 1]))
    split = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), data)
    mapped = jax.pmap(Runner()._run, in_axes=(None,) * 3 + (0,) * 4)(*knobs, *split)
    np.testing.assert_allclose(mapped.reshape(whole.shape), whole, rtol=1e-5, atol=1e-5)


def test_noise_is_bit_equal_for_any_batch():
    x, keys = inputs()
    first, last = inputs(count=2), inputs(count=2, start=2)
    np.testing.assert_array_equal(x, np.concatenate([first[0], last[0]]))
    sharding = NamedSharding(two_devices(), PartitionSpec("data"))
    sharded = jax.jit(lambda keys: initial_noise(keys, SHAPE))(jax.device_put(keys, sharding))
    np.testing.assert_array_equal(sharded, x)


@pytest.mark.slow
@every_row
def test_gradients_pass_through_sampling(name, x64, monkeypatch):
    """∂ sample / ∂ x_T against central differences, in float64, with the noise held fixed."""
    monkeypatch.setattr("diffusion_jax.samplers.base.fold_in_each", lambda keys, index: keys)
    grid = from_times(SCHEDULE, [800.0, 500.0, 200.0], max_steps=3).fixed()
    grid = fit_grid(ROWS[name], grid, SCHEDULE)
    h = 1e-5
    offsets = h * jnp.asarray([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    x = jnp.asarray([[0.4, -0.9]]) + offsets
    cond, _ = conditions([1] * 5)

    def total(x):
        keys = image_keys(0, jnp.arange(5))
        out, _ = sample(ROWS[name], lambda x, level: v_denoiser(x, level, cond), grid, x, keys)
        return jnp.sum(out), jnp.sum(out, axis=1)

    with drawn_by(lambda keys, x: jnp.full_like(x, 0.7)):
        gradient, value = jax.jit(jax.grad(total, has_aux=True))(x)
    difference = jnp.asarray([value[1] - value[2], value[3] - value[4]]) / (2 * h)
    np.testing.assert_allclose(gradient[0], difference, rtol=1e-6, atol=1e-9)
    assert np.all(np.isfinite(gradient)) and np.all(gradient[0] != 0)


@pytest.mark.slow
@every_row
def test_float32_stays_where_float64_is_on(name, x64):
    grid = fit_grid(ROWS[name], trailing(SCHEDULE, 4, max_steps=4), SCHEDULE)
    x, keys = inputs(2)
    cond, _ = conditions([1, 1])
    denoise = jax.jit(lambda x, level: v_denoiser(x, level, cond))
    assert x.dtype == sample(ROWS[name], denoise, grid, x, keys)[0].dtype == jnp.float32


@every_row
def test_low_precision_states_are_refused(name):
    x, keys = inputs()
    with pytest.raises(ValueError, match="bfloat16"):
        sample(ROWS[name], v_denoiser, trailing(SCHEDULE, 2), x.astype(jnp.bfloat16), keys)
