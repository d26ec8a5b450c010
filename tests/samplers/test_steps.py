"""Single steps and the loop: identities between samplers, the ends of the path, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import fold_in_each, image_keys, per_image_normal
from diffusion_jax.core.schedules import Cosine, Linear
from diffusion_jax.core.timesteps import from_times, trailing
from diffusion_jax.core.types import NoiseLevel, Prediction
from diffusion_jax.samplers import (
    DDIM,
    DDPM,
    DPMSolverMultistep,
    Euler,
    Heun,
    StepInfo,
    initial_noise,
    sample,
)
from tests.analytic import MIXTURE, gaussian
from tests.noise import drawn_by

KEYS = image_keys(0, range(4))
INFO = StepInfo(0, 0, 1)
CLEAN = NoiseLevel(jnp.float32(0.0), jnp.float32(1.0), jnp.float32(0.0))


def level_at(t, schedule=Linear()):
    return NoiseLevel(*(jnp.float32(field) for field in schedule(np.asarray(float(t)))))


def constant(x0, var_frac=None, log_var=None):
    """A denoiser that always says the same."""
    return lambda x, level: Prediction(jnp.broadcast_to(x0, x.shape), var_frac, log_var)


def both_ancestral(data, x):
    grid = trailing(Cosine(), 20, max_steps=20)
    ddim, _ = sample(DDIM(eta=1.0), data.denoise, grid, x, KEYS)
    ddpm, _ = sample(DDPM("small"), data.denoise, grid, x, KEYS)
    assert np.std(ddim) > 0.1
    return np.asarray(ddim), np.asarray(ddpm)


def test_ddim_at_eta_one_is_ddpm_with_small_variance():
    """The same keys give the same pictures, although the two compute quite differently."""
    ddim, ddpm = both_ancestral(gaussian(0.3, 0.5), initial_noise(KEYS, (1,)))
    np.testing.assert_allclose(ddim, ddpm, rtol=0, atol=2e-6)


def test_ddim_at_eta_one_keeps_its_digits_where_little_noise_is_kept():
    """q = r_s/r_t of the next level's noise, with r = σ/α, which σ_s² - std² would round away."""
    here, there = (NoiseLevel(*map(jnp.float32, (0.0, a, s))) for a, s in ((1e-3, 1.0), (0.6, 0.8)))
    with drawn_by(lambda keys, x: jnp.zeros_like(x)):
        x = jnp.full((1, 1), 1.0)
        sampler = DDIM(eta=1.0)
        out = sampler.step(KEYS[:1], constant(0.0), sampler.init(x), here, there, INFO).x
    np.testing.assert_allclose(out, [[0.8 * (1e-3 * 0.8 / 0.6)]], rtol=1e-6)


@pytest.mark.slow
def test_ddim_at_eta_one_is_ddpm_with_small_variance_in_float64(x64):
    ddim, ddpm = both_ancestral(MIXTURE, jnp.asarray(initial_noise(KEYS, (2,)), jnp.float64))
    np.testing.assert_allclose(ddim, ddpm, rtol=0, atol=1e-12)


@pytest.mark.parametrize("t, s", [(999, 998), (600, 250), (30, 0)])
def test_ddpm_draws_from_the_posterior(t, s):
    """Against the formulas of the DDPM paper in ᾱ and β, with the sampler's own noise."""
    alphas_cumprod = Linear().alphas_cumprod()
    at, as_ = alphas_cumprod[t], alphas_cumprod[s]
    beta = 1 - at / as_
    x = np.linspace(-1.0, 1.0, 8).reshape(4, 2)
    x0 = np.asarray([[0.3, -0.7]])
    mean = np.sqrt(as_) * beta / (1 - at) * x0 + np.sqrt(at / as_) * (1 - as_) / (1 - at) * x
    noise = np.asarray(per_image_normal(KEYS, jnp.zeros((4, 2))))
    small, large = (1 - as_) / (1 - at) * beta, beta
    frac = 0.3
    variances = {
        "small": small,
        "large": large,
        "learned_range": np.exp(frac * np.log(large) + (1 - frac) * np.log(small)),
        "learned": 0.04,
    }
    denoise = constant(jnp.float32(x0), jnp.full((4, 2), frac), jnp.full((4, 2), np.log(0.04)))
    for variance, expected in variances.items():
        sampler = DDPM(variance)
        state = sampler.init(jnp.float32(x))
        out = sampler.step(KEYS, denoise, state, level_at(t), level_at(s), INFO).x
        np.testing.assert_allclose(out, mean + np.sqrt(expected) * noise, atol=1e-4, rtol=1e-4)
        moments = sampler.moments(denoise(state.x, None), state.x, level_at(t), level_at(s))
        np.testing.assert_allclose(moments[0], mean, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(moments[1], np.sqrt(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variance", ["small", "large", "learned_range", "learned"])
def test_ddpm_ends_without_noise(variance):
    """The step to sigma = 0 returns x0 itself, whatever the variance."""
    x0 = jnp.asarray([[0.3, -0.7]])
    denoise = constant(x0, jnp.full((4, 2), 0.5), jnp.full((4, 2), -1.0))
    out = DDPM(variance).step(
        KEYS, denoise, DDPM().init(jnp.ones((4, 2))), level_at(0), CLEAN, INFO
    )
    np.testing.assert_allclose(out.x, np.broadcast_to(x0, (4, 2)), rtol=0, atol=1e-6)


def test_moments_of_the_last_step_are_finite():
    """Its variance is not drawn from, but guidance of the mean is scaled by it."""
    x, beta = jnp.ones((4, 2)), Linear().betas()[0]
    prediction = constant(jnp.zeros(()), jnp.full((4, 2), 0.5), jnp.full((4, 2), -1.0))(x, None)
    stds = {"small": 0.0, "large": beta**0.5, "learned_range": beta**0.5, "learned": np.exp(-0.5)}
    for variance, expected in stds.items():
        _, std = DDPM(variance).moments(prediction, x, level_at(0), CLEAN)
        np.testing.assert_allclose(std, expected, rtol=1e-4)


def test_ddim_eta_interpolates_the_noise():
    """std = eta times the posterior's, and the deterministic part makes room for it."""
    t, s, eta = 700, 400, 0.4
    at, as_ = Linear().alphas_cumprod()[[t, s]]
    std = eta * np.sqrt((1 - as_) / (1 - at)) * np.sqrt(1 - at / as_)
    x, x0 = 0.9, 0.25
    eps = (x - np.sqrt(at) * x0) / np.sqrt(1 - at)
    noise = np.asarray(per_image_normal(KEYS, jnp.zeros((4, 1))))
    expected = np.sqrt(as_) * x0 + np.sqrt(1 - as_ - std**2) * eps + std * noise
    state = DDIM().init(jnp.full((4, 1), x, jnp.float32))
    denoise = constant(jnp.float32([[x0]]))
    out = DDIM(eta).step(KEYS, denoise, state, level_at(t), level_at(s), INFO).x
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_heun_averages_two_slopes():
    """One step in u = x / α against the trapezoid written out, with a denoiser that bends."""
    here, there = level_at(600), level_at(300)
    x = np.asarray([[0.8], [-0.4], [0.1], [1.5]])

    def slope(u, level):
        ratio = float(level.sigma / level.alpha)
        return (u - np.tanh(u)) / ratio, ratio

    u = x / float(here.alpha)
    first, start = slope(u, here)
    end = float(there.sigma / there.alpha)
    second, _ = slope(u + (end - start) * first, there)
    expected = float(there.alpha) * (u + (end - start) * (first + second) / 2)

    def denoise(x, level):
        return Prediction(jnp.tanh(x / level.alpha))

    out = Heun().step(KEYS, denoise, Heun().init(jnp.float32(x)), here, there, INFO).x
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_heun_calls_the_network_2n_minus_1_times():
    calls = []

    def denoise(x, level):
        jax.debug.callback(lambda t: calls.append(float(t)), level.t)
        return Prediction(0.5 * x)

    sample(Heun(), denoise, trailing(Cosine(), 5, max_steps=8), jnp.ones((4, 1)), KEYS)
    jax.effects_barrier()
    assert len(calls) == 2 * 5 - 1


def test_second_order_multistep_is_the_papers_formula():
    """D = (1 + 1/2r) x̂0 - x̂0'/2r with r = h'/h, from a history that it was given."""
    levels = [level_at(t) for t in (900, 500, 300)]
    lam = [float(jnp.log(level.alpha / level.sigma)) for level in levels]
    h, h_last = lam[2] - lam[1], lam[1] - lam[0]
    r = h_last / h
    x, x0_last = 0.7, -0.2
    x0 = 0.4
    d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_last
    sigma, sigma_next = float(levels[1].sigma), float(levels[2].sigma)
    expected = sigma_next / sigma * x - float(levels[2].alpha) * np.expm1(-h) * d
    sampler = DPMSolverMultistep()
    state = sampler.init(jnp.full((4, 1), x, jnp.float32)).replace(
        outputs=(jnp.full((4, 1), x0_last),), half_log_snrs=(jnp.float32(lam[0]),)
    )
    out = sampler.step(
        KEYS, constant(jnp.float32([[x0]])), state, levels[1], levels[2], StepInfo(1, 0, 20)
    )
    np.testing.assert_allclose(out.x, np.full((4, 1), expected), rtol=1e-5)
    np.testing.assert_allclose(out.half_log_snrs[0], lam[1], rtol=1e-6)


@pytest.mark.parametrize(
    "sampler", [Euler(), Heun(), DDIM(), DPMSolverMultistep()], ids=lambda s: type(s).__name__
)
def test_one_step_to_clean_is_the_prediction(sampler):
    x0 = jnp.asarray([[0.3, -0.7]])
    out = sampler.step(
        KEYS, constant(x0), sampler.init(jnp.ones((4, 2))), level_at(999), CLEAN, INFO
    )
    np.testing.assert_allclose(out.x, np.broadcast_to(x0, (4, 2)), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_trace_holds_every_state():
    """Rows that were run hold the sample after each step, the last one the result; others zero."""
    grid = from_times(Linear(), [900.0, 500.0, 100.0], max_steps=5)
    x = initial_noise(KEYS, (2,))
    out, trace = sample(
        DDIM(eta=0.5),
        MIXTURE.denoise,
        grid,
        x,
        KEYS,
        trace=lambda s: {"x": s.x, "mean": s.x.mean()},
    )
    assert trace["x"].shape == (5, 4, 2) and trace["mean"].shape == (5,)
    state = DDIM().init(x)
    for i in range(3):
        keys = fold_in_each(KEYS, i)
        state = DDIM(0.5).step(keys, MIXTURE.denoise, state, grid.level(i), grid.level(i + 1), INFO)
        np.testing.assert_allclose(trace["x"][i], state.x, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(trace["x"][2], out)
    assert not trace["x"][3:].any() and not trace["mean"][3:].any()


def test_initial_noise_is_normal_and_one_per_key():
    keys = image_keys(3, range(2000))
    noise = np.asarray(initial_noise(keys, (5,), 2.0))
    assert noise.dtype == np.float32 and noise.shape == (2000, 5)
    # 10⁴ values: the mean's standard error is 0.02, that of the std 0.014.
    assert abs(noise.mean()) < 0.08 and abs(noise.std() - 2.0) < 0.06
    again = np.asarray(initial_noise(keys[::-1], (5,), 2.0))
    np.testing.assert_array_equal(again, noise[::-1])


def test_initial_noise_differs_from_that_of_every_step():
    steps = per_image_normal(fold_in_each(KEYS, 0), jnp.zeros((4, 3)))
    assert np.abs(np.asarray(initial_noise(KEYS, (3,)) - steps)).min() > 1e-6


@pytest.mark.parametrize(
    "x, keys, message",
    [
        (jnp.ones((4, 2), jnp.bfloat16), KEYS, "bfloat16.*astype"),
        (jnp.ones((4, 2), jnp.int32), KEYS, "int32"),
        (jnp.ones((4, 2)), KEYS[:3], r"shape \(4,\).*\(3,\)"),
        (jnp.ones((4, 2)), jax.random.key(0), "one key per image"),
        (jnp.ones((4,)), jnp.zeros((4,), jnp.uint32), "uint32"),
    ],
)
def test_sample_refuses(x, keys, message):
    grid = trailing(Linear(), 2, max_steps=2)
    with pytest.raises(ValueError, match=message):
        sample(Euler(), MIXTURE.denoise, grid, x, keys)


def test_samplers_refuse_bad_options():
    with pytest.raises(ValueError, match="'medium'"):
        DDPM("medium")
    with pytest.raises(ValueError, match="got 4"):
        DPMSolverMultistep(order=4)
    for eta in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="eta"):
            DDIM(eta).validate()
    DDIM(1.0).validate()
    with pytest.raises(ValueError, match="learned_variance='range'"):
        DDPM("learned_range").step(
            KEYS, constant(jnp.zeros(())), DDPM().init(jnp.ones((4, 2))), level_at(5), CLEAN, INFO
        )


def test_interpolated_variance_is_the_learned_one_with_a_given_fraction():
    level, next_level = NoiseLevel(5.0, 0.6, 0.8), NoiseLevel(4.0, 0.8, 0.6)
    x, keys = jnp.ones((3, 2)), image_keys(0, np.arange(3))

    def denoise(x, level):
        return Prediction(0.1 * x, jnp.full(x.shape, 0.3))

    def step(sampler):
        return sampler.step(keys, denoise, sampler.init(x), level, next_level, StepInfo(0, 0, 1)).x

    given = step(DDPM("interpolated", fraction=0.3))
    np.testing.assert_allclose(given, step(DDPM("learned_range")), rtol=1e-6)
    assert np.abs(given - step(DDPM("interpolated", fraction=0.6))).max() > 1e-3
    np.testing.assert_allclose(
        step(DDPM("interpolated", fraction=1.0)), step(DDPM("large")), rtol=1e-6
    )


@pytest.mark.parametrize("options", [{"variance": "interpolated"}, {"fraction": 0.3}])
def test_a_fraction_belongs_to_the_interpolated_variance(options):
    with pytest.raises(ValueError, match="fraction belongs to"):
        DDPM(**options)
