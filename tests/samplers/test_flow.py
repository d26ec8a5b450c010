"""Samplers along the straight path: what Euler is there, Heun by hand, order, fresh noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.schedules import EDM, FlowMatching
from diffusion_jax.core.timesteps import from_times, karras
from diffusion_jax.core.types import NoiseLevel, Prediction
from diffusion_jax.samplers import (
    LCM,
    ConsistencyMultistep,
    Euler,
    EulerAncestral,
    FlowHeun,
    Heun,
    Renoise,
    StepInfo,
    sample,
)
from tests import analytic
from tests.noise import drawn_by
from tests.samplers.test_convergence import SIGMA_MAX, SIGMA_MIN, reference, rms, solve

KEYS = image_keys(0, range(4))
X = np.asarray([[0.8], [-0.4], [0.1], [1.5]])
NOISE = np.asarray([[0.3], [-1.1], [0.7], [0.2]])
GAUSSIAN = analytic.gaussian(0.3, 0.5)


def straight(tau):
    """The level of flow matching at noise rate τ."""
    return NoiseLevel(*(jnp.asarray(float(v)) for v in (tau, 1 - tau, tau)))


def bent(x, level):
    return Prediction(jnp.tanh(x + 0.1 * level.t))


def velocity(x, tau):
    """dx/dτ = ε̂ - x̂0 of `bent` on the path x = (1 - τ) x0 + τ ε."""
    x0 = np.tanh(x + 0.1 * tau)
    return (x - (1 - tau) * x0) / tau - x0


@functools.partial(jax.jit, static_argnames="denoise")
def one_step(sampler, level, next_level, x, *, denoise=bent):
    with drawn_by(lambda keys, x: jnp.asarray(NOISE, x.dtype)):
        info = StepInfo(0, 0, 1)
        return sampler.step(KEYS, denoise, sampler.init(x), level, next_level, info).x


@pytest.mark.parametrize("tau, next_tau", [(1.0, 0.8), (0.7, 0.3), (0.2, 0.0)])
def test_euler_follows_the_velocity(tau, next_tau, x64):
    """x + (τ_s - τ_t) u: on the straight path that is Euler's method in any coordinates."""
    out = one_step(Euler(), straight(tau), straight(next_tau), jnp.asarray(X))
    np.testing.assert_allclose(out, X + (next_tau - tau) * velocity(X, tau), rtol=0, atol=1e-14)


@pytest.mark.parametrize("tau, next_tau", [(1.0, 0.8), (0.7, 0.3), (0.2, 0.0)])
def test_flow_heun_averages_two_velocities(tau, next_tau, x64):
    """From pure noise on; a step to clean data is Euler's."""
    first = velocity(X, tau)
    expected = X + (next_tau - tau) * first
    if next_tau > 0:
        expected = X + (next_tau - tau) * (first + velocity(expected, next_tau)) / 2
    out = one_step(FlowHeun(), straight(tau), straight(next_tau), jnp.asarray(X))
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-13)
    heun = one_step(Heun(), straight(tau), straight(next_tau), jnp.asarray(X))
    assert (np.abs(heun - expected).max() > 1e-3) == (next_tau > 0)


def test_flow_heun_calls_the_network_2n_minus_1_times():
    calls = []

    def denoise(x, level):
        jax.debug.callback(lambda t: calls.append(float(t)), level.t, ordered=True)
        return Prediction(0.5 * x)

    grid = from_times(FlowMatching(), [1.0, 0.6, 0.3], max_steps=4)
    sample(FlowHeun(), denoise, grid, jnp.ones((4, 1)), KEYS)
    jax.effects_barrier()
    np.testing.assert_allclose(calls, [1.0, 0.6, 0.6, 0.3, 0.3], rtol=1e-6)


# Order, on other paths and from pure noise.


def edm_grid(num_steps):
    grid = karras(EDM(SIGMA_MIN, SIGMA_MAX), num_steps + 1, max_steps=257)
    return grid._replace(stop=jnp.asarray(num_steps, jnp.int32))


def test_order_of_flow_heun(x64):
    """Against the exact flow of a mixture, at alpha = 1."""
    x, exact = reference()
    errors = [rms(solve(FlowHeun(), edm_grid(n), x), exact) for n in (32, 64, 128)]
    assert errors[0] < 3e-3
    slopes = np.log2(errors[:-1]) - np.log2(errors[1:])
    assert np.all((1.9 < slopes) & (slopes < 2.1)), slopes


def test_the_path_does_not_matter(x64):
    x, _ = reference()
    grid = edm_grid(64)
    vp = analytic.in_vp(grid)
    exploding = np.asarray(solve(FlowHeun(), grid, x))
    preserving = solve(FlowHeun(), vp, x * float(vp.levels.alpha[0]))
    np.testing.assert_allclose(preserving / vp.levels.alpha[64], exploding, rtol=0, atol=1e-11)


def test_flow_heun_is_of_second_order_from_pure_noise_on(x64):
    """From τ = 1, where `Heun` must begin with a step of Euler's, to τ = 0.1."""
    x = jnp.linspace(-2.0, 2.0, 5)[:, None]
    run = jax.jit(
        lambda sampler, grid: sample(sampler, GAUSSIAN.denoise, grid, x, image_keys(0, range(5)))[0]
    )

    def error(sampler, num_steps):
        times = np.linspace(1.0, 0.1, num_steps + 1)
        grid = from_times(FlowMatching(), times, max_steps=65)
        grid = grid._replace(stop=jnp.asarray(num_steps, jnp.int32))
        start, end = grid.level(0), grid.level(num_steps)
        exact = analytic.gaussian_flow(x, start, end, mean=0.3, std=0.5)
        return float(np.abs(run(sampler, grid) - exact).max())

    coarse, fine = error(FlowHeun(), 32), error(FlowHeun(), 64)
    assert 1.9 < np.log2(coarse / fine) < 2.1
    assert fine < 0.3 * error(Heun(), 64)


# Fresh noise.


@pytest.mark.parametrize("tau, next_tau", [(1.0, 0.8), (0.7, 0.3), (0.2, 0.0)])
def test_renoise_adds_noise_to_the_prediction(tau, next_tau, x64):
    out = one_step(Renoise(), straight(tau), straight(next_tau), jnp.asarray(X))
    expected = (1 - next_tau) * np.tanh(X + 0.1 * tau) + next_tau * NOISE
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-14)


def test_renoise_is_euler_ancestral_with_all_noise_new(x64):
    here, there = straight(0.7), straight(0.3)
    out = one_step(Renoise(), here, there, jnp.asarray(X))
    ancestral = one_step(EulerAncestral(eta=1e3), here, there, jnp.asarray(X))
    np.testing.assert_allclose(out, ancestral, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "other", [ConsistencyMultistep(0.0, 1.0), LCM(sigma_data=0.0)], ids=["consistency", "lcm"]
)
def test_renoise_is_multistep_consistency_sampling_to_clean_data(other, x64):
    for here, there in ((0.7, 0.3), (0.2, 0.0)):
        outs = [
            one_step(s, straight(here), straight(there), jnp.asarray(X)) for s in (Renoise(), other)
        ]
        np.testing.assert_allclose(*outs, rtol=0, atol=1e-14)


def test_renoise_is_exact_where_the_prediction_is_a_sample(x64):
    """With the flow to clean data instead of the mean of x0, the law at every level is right."""
    here, there = straight(0.7), straight(0.3)

    def to_data(x, level):
        ratio = 0.5 / jnp.sqrt(level.alpha**2 * 0.25 + level.sigma**2)
        return Prediction(0.3 + ratio * (x - level.alpha * 0.3))

    def moments(denoise):
        probes = jnp.asarray([[0.0], [1.0], [0.0], [0.0]])
        with drawn_by(lambda keys, x: jnp.asarray([[0.0], [0.0], [1.0], [0.0]])):
            state = Renoise().init(probes)
            out = Renoise().step(KEYS, denoise, state, here, there, StepInfo(0, 0, 1)).x[:, 0]
        variance = here.alpha**2 * 0.25 + here.sigma**2
        mean = out[0] + (out[1] - out[0]) * here.alpha * 0.3
        return float(mean), float((out[1] - out[0]) ** 2 * variance + (out[2] - out[0]) ** 2)

    exact = there.alpha * 0.3, there.alpha**2 * 0.25 + there.sigma**2
    np.testing.assert_allclose(moments(to_data), exact, rtol=1e-12)
    mean, variance = moments(GAUSSIAN.denoise)
    np.testing.assert_allclose(mean, exact[0], rtol=1e-12)
    assert variance < 0.8 * exact[1]
