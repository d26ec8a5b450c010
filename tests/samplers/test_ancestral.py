"""Ancestral samplers and DPM-Solver++ SDE: identities, one step by hand, weak orders."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.commands.moments import variance_error
from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.schedules import EDM, Linear
from diffusion_jax.core.timesteps import from_times, karras
from diffusion_jax.core.types import NoiseLevel, Prediction
from diffusion_jax.samplers import (
    DDIM,
    DDPM,
    DPMSolverSDE,
    Euler,
    EulerAncestral,
    KDPM2Ancestral,
    StepInfo,
    fit_grid,
    initial_noise,
    sample,
)
from diffusion_jax.samplers.ancestral import ancestral_rates
from tests import analytic
from tests.analytic import MIXTURE
from tests.noise import drawn_by
from tests.samplers.grids import grid_for

KEYS = image_keys(0, range(4))
X = np.asarray([[0.8], [-0.4], [0.1], [1.5]])
NOISES = np.asarray([[[0.3], [-1.1], [0.7], [0.2]], [[-0.6], [0.5], [1.2], [-0.1]]])
GAUSSIAN = analytic.gaussian(0.0, 0.25)
SAMPLERS = [EulerAncestral(), KDPM2Ancestral(), KDPM2Ancestral(variant="reference"), DPMSolverSDE()]
every_sampler = pytest.mark.parametrize(
    "sampler", SAMPLERS, ids=["euler", "kdpm2", "kdpm2_reference", "sde"]
)


def bent(x, level):
    """A denoiser that is not linear and depends on what it is told."""
    return Prediction(jnp.tanh(x / level.alpha + 0.01 * level.t))


def pulled(x, level):
    """A denoiser that is defined without signal too."""
    del level
    return Prediction(0.3 * jnp.tanh(x))


def constant(x, level):
    del level
    return Prediction(jnp.full_like(x, 0.3))


@functools.partial(jax.jit, static_argnames="denoise")
def one_step(sampler, level, next_level, middle, noises, *, denoise=bent):
    """Every noise that the step draws is the next one of `noises`."""
    draws = iter(noises)
    with drawn_by(lambda keys, x: next(draws)):
        x = jnp.asarray(X, noises.dtype)
        info = StepInfo(0, 0, 1, middle)
        return sampler.step(KEYS, denoise, sampler.init(x), level, next_level, info).x


def levels(sigma, next_sigma, *, vp=False):
    """Two levels of given σ/α and the one between them, told σ/α as time."""

    def at(ratio):
        alpha = 1 / np.sqrt(1 + ratio**2) if vp else 1.0
        return NoiseLevel(*(jnp.asarray(float(v)) for v in (ratio, alpha, alpha * ratio)))

    return at(sigma), at(next_sigma), at(np.sqrt(sigma * next_sigma))


def with_middle_of(sampler, here, there, middle):
    return there if isinstance(sampler, KDPM2Ancestral) else middle


# Rates.


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0, 1.2, 3.0])
def test_ancestral_rates_are_those_of_k_diffusion(eta, x64):
    """In σ/α, with the min that keeps the noise below the next level's."""
    for sigma, next_sigma in ((14.6, 9.0), (1.3, 0.4), (0.4, 0.0)):
        up = eta * np.sqrt(next_sigma**2 * (sigma**2 - next_sigma**2) / sigma**2)
        up = min(next_sigma, up)
        down = np.sqrt(next_sigma**2 - up**2)
        for vp in (False, True):
            here, there, _ = levels(sigma, next_sigma, vp=vp)
            rates = np.asarray(ancestral_rates(here, there, eta)) / float(there.alpha)
            np.testing.assert_allclose(rates, [down, up], rtol=1e-7, atol=1e-7)


def test_rates_keep_their_digits_when_little_is_kept():
    """From σ/α = 4096 to 22 in float32, where σ_s² - up² would keep four digits."""
    here, there, _ = levels(4096.0, 22.5)
    down, _ = ancestral_rates(*(NoiseLevel(*map(jnp.float32, level)) for level in (here, there)))
    np.testing.assert_allclose(down, 22.5**2 / 4096, rtol=1e-6)


def test_the_last_step_adds_no_noise_and_a_step_upwards_neither():
    here, there, _ = levels(0.4, 0.0)
    np.testing.assert_array_equal(ancestral_rates(here, there), [0.0, 0.0])
    there, here, _ = levels(2.0, 0.5)
    np.testing.assert_array_equal(ancestral_rates(here, there), [2.0, 0.0])


# Identities.


@functools.partial(jax.jit, static_argnames="sampler")
def sampled(sampler, grid, x):
    return sample(sampler, MIXTURE.denoise, grid, x, KEYS)[0]


@pytest.mark.parametrize(
    "one, other",
    [
        (EulerAncestral(), DDPM("small")),
        (EulerAncestral(), DDIM(eta=1.0)),
        (EulerAncestral(eta=0.4), DDIM(eta=0.4)),
        (EulerAncestral(eta=0.0), Euler()),
    ],
    ids=["ddpm", "ddim", "ddim_eta", "euler"],
)
def test_euler_ancestral_is(one, other, x64):
    """The same keys give the same pictures, from VP noise to clean data."""
    grid = from_times(Linear(), np.linspace(999.0, 0.0, 12), max_steps=12)
    x = jnp.asarray(initial_noise(KEYS, (2,)), jnp.float64)
    out = np.asarray(sampled(one, grid, x))
    np.testing.assert_allclose(out, sampled(other, grid, x), rtol=0, atol=1e-12)
    assert np.std(out) > 0.1


def test_fixed_small_is_ddim_is_euler_ancestral_in_variance(x64):
    errors = [
        variance_error(sampler, GAUSSIAN, grid_for(sampler, 64))
        for sampler in (DDPM("small"), DDIM(eta=1.0), EulerAncestral())
    ]
    np.testing.assert_allclose(errors, errors[0], rtol=0, atol=1e-12)
    assert -0.127 < errors[0] < -0.120


@pytest.mark.parametrize("vp", [False, True])
def test_the_two_stages_share_one_path(vp, x64):
    """Where the prediction is constant, a step is exactly two of half its length, same noises."""
    here, there, middle = levels(2.0, 0.7, vp=vp)
    z = jnp.asarray(NOISES)
    whole = one_step(DPMSolverSDE(), here, there, middle, z, denoise=constant)
    x = one_step(EulerAncestral(), here, middle, None, z[:1], denoise=constant)
    down, up = ancestral_rates(middle, there)
    eps = (x - middle.alpha * 0.3) / middle.sigma
    halves = there.alpha * 0.3 + down * eps + up * z[1]
    np.testing.assert_allclose(whole, halves, rtol=1e-12, atol=1e-12)
    apart = one_step(DPMSolverSDE(noise="independent"), here, there, middle, z, denoise=constant)
    assert np.abs(apart - halves).max() > 0.1


# One step.


def test_a_step_of_kdpm2_ancestral_is_that_of_k_diffusion(x64):
    """dpm_2_ancestral in x / α, its middle between σ and σ_down computed as such."""
    sigma, next_sigma = 2.0, 0.7
    here, there, _ = levels(sigma, next_sigma)
    up = np.sqrt(next_sigma**2 * (sigma**2 - next_sigma**2) / sigma**2)
    down = np.sqrt(next_sigma**2 - up**2)
    middle = np.exp((np.log(sigma) + np.log(down)) / 2)

    def slope(x, sigma):
        return (x - np.tanh(x + 0.01 * sigma)) / sigma

    x = X + (middle - sigma) * slope(X, sigma)
    expected = X + (down - sigma) * slope(x, middle) + 1.1 * up * NOISES[0]
    for sampler in (KDPM2Ancestral(s_noise=1.1), KDPM2Ancestral(1.1, variant="reference")):
        out = one_step(sampler, here, there, there, jnp.asarray(NOISES))
        np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("noise", ["path", "independent"])
def test_a_step_of_dpm_solver_sde_is_that_of_k_diffusion(noise, x64):
    """dpmpp_sde with r = 1/2 in t = -log(σ/α), where the first stage only finds the middle."""
    sigma, next_sigma, s_noise = 2.0, 0.7, 0.9
    here, there, middle = levels(sigma, next_sigma)
    mid = np.sqrt(sigma * next_sigma)

    def towards(end, x0, noise):
        up = min(end, np.sqrt(end**2 * (sigma**2 - end**2) / sigma**2))
        down = np.sqrt(end**2 - up**2)
        return down / sigma * X - np.expm1(np.log(down / sigma)) * x0 + s_noise * up * noise

    x = towards(mid, np.tanh(X + 0.01 * sigma), NOISES[0])
    last = NOISES[1]
    if noise == "path":
        share = (mid**-2 - sigma**-2) / (next_sigma**-2 - sigma**-2)
        last = np.sqrt(share) * NOISES[0] + np.sqrt(1 - share) * NOISES[1]
    expected = towards(next_sigma, np.tanh(x + 0.01 * mid), last)
    out = one_step(DPMSolverSDE(s_noise, noise=noise), here, there, middle, jnp.asarray(NOISES))
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)


@every_sampler
def test_the_path_does_not_matter(sampler, x64):
    """A VP step is the step at alpha = 1, x divided by α; the times told are the same."""
    results = []
    for vp in (False, True):
        here, there, middle = levels(2.0, 0.7, vp=vp)
        scale = here.alpha

        def denoise(x, level, scale=scale):
            return Prediction(jnp.sin(x / level.alpha))

        middle = with_middle_of(sampler, here, there, middle)
        draws = iter(NOISES)
        with drawn_by(lambda keys, x, draws=draws: jnp.asarray(next(draws))):
            state = sampler.init(scale * jnp.asarray(X))
            info = StepInfo(0, 0, 1, middle)
            out = sampler.step(KEYS, denoise, state, here, there, info).x
        results.append(np.asarray(out / there.alpha))
    np.testing.assert_allclose(*results, rtol=1e-12, atol=1e-12)


@every_sampler
def test_the_last_step_is_the_prediction(sampler):
    here, there, _ = levels(0.4, 0.0)
    out = one_step(sampler, here, there, there, jnp.float32(NOISES), denoise=constant)
    np.testing.assert_allclose(out, np.full_like(X, 0.3), rtol=0, atol=1e-6)


@every_sampler
def test_a_step_from_pure_noise_draws_all_noise_anew(sampler):
    """Where alpha = 0 nothing of x is kept but what the network saw in it."""
    here = NoiseLevel(*(jnp.float32(v) for v in (999.0, 0.0, 1.0)))
    there = NoiseLevel(*(jnp.float32(v) for v in (700.0, 0.6, 0.8)))
    out = one_step(sampler, here, there, there, jnp.float32(NOISES), denoise=pulled)
    expected = 0.6 * 0.3 * np.tanh(X) + 0.8 * NOISES[0]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def calls_of(sampler, grid):
    calls = []

    def denoise(x, level):
        jax.debug.callback(lambda t: calls.append(float(t)), level.t, ordered=True)
        return Prediction(0.5 * x)

    sample(sampler, denoise, grid, jnp.ones((4, 1)), KEYS)
    jax.effects_barrier()
    return calls


def test_where_the_network_is_called():
    """2N - 1 times: DPM-Solver++ SDE in the middle, KDPM2 at the next level."""
    grid = karras(EDM(), 3, max_steps=4)
    a, b, c = (float(t) for t in grid.levels.t[:3])
    assert calls_of(KDPM2Ancestral(), grid) == [a, b, b, c, c]
    fitted = fit_grid(DPMSolverSDE(), grid, EDM())
    np.testing.assert_allclose(
        calls_of(DPMSolverSDE(), fitted), [a, np.sqrt(a * b), b, np.sqrt(b * c), c], rtol=1e-5
    )
    with pytest.raises(ValueError, match="DPMSolverSDE.*fit_grid"):
        calls_of(DPMSolverSDE(), grid)


def test_the_reference_is_told_times_that_are_not_rounded():
    schedule = Linear()
    grid = karras(schedule, 4, max_steps=4, round_t=True)
    exact = np.asarray(karras(schedule, 4, max_steps=4).levels.t)
    t = np.asarray(grid.levels.t)
    sampler = KDPM2Ancestral(variant="reference")
    calls = calls_of(sampler, fit_grid(sampler, grid, schedule))
    expected = [t[0], exact[1], t[1], exact[2], t[2], exact[3], t[3]]
    np.testing.assert_allclose(calls, expected, rtol=1e-4, atol=1e-2)
    assert np.abs(exact - t)[1:3].max() > 0.05
    assert fit_grid(KDPM2Ancestral(), grid, schedule).middle is None


def test_the_two_noises_of_a_step_have_keys_of_their_own():
    here, there, middle = levels(2.0, 0.7)
    drawn = []

    def draw(keys, x):
        drawn.append(np.asarray(jax.random.key_data(keys)))
        return jnp.zeros_like(x)

    with drawn_by(draw):
        state = DPMSolverSDE().init(jnp.float32(X))
        DPMSolverSDE().step(KEYS, pulled, state, here, there, StepInfo(0, 0, 1, middle))
    assert len(drawn) == 2 and np.all(np.any(drawn[0] != drawn[1], axis=-1))


# Weak orders.


@pytest.mark.parametrize(
    "sampler, low, high",
    [
        (EulerAncestral(), 0.9, 1.1),
        (KDPM2Ancestral(), 1.85, 2.15),
        (DPMSolverSDE(), 1.85, 2.15),
        (DPMSolverSDE(noise="independent"), 0.9, 1.1),
    ],
    ids=["euler", "kdpm2", "sde", "sde_independent"],
)
def test_weak_order(sampler, low, high, x64):
    """Slope of the variance's error; two noises that are not of one path cost an order."""
    errors = [variance_error(sampler, GAUSSIAN, grid_for(sampler, n)) for n in (128, 512)]
    slope = np.log2(errors[0] / errors[1]) / 2
    assert low < slope < high, slope
    assert abs(errors[0]) < (2.5e-3 if low > 1 else 7e-2)


# Options.


@pytest.mark.parametrize(
    "sampler, name",
    [
        (EulerAncestral(eta=-0.1), "eta"),
        (EulerAncestral(eta=np.inf), "eta"),
        (EulerAncestral(s_noise=np.nan), "s_noise"),
        (KDPM2Ancestral(s_noise=-1.0), "s_noise"),
        (DPMSolverSDE(s_noise=np.inf), "s_noise"),
    ],
)
def test_bad_knobs_are_refused(sampler, name):
    with pytest.raises(ValueError, match=f"{name} must"):
        sampler.validate()
    type(sampler)().validate()


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="'path', 'independent'.*'white'"):
        DPMSolverSDE(noise="white")
    with pytest.raises(ValueError, match="'next_level', 'reference'.*'other'"):
        KDPM2Ancestral(variant="other")
