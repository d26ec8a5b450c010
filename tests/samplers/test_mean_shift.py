"""Mean-shifted ancestral sampling: ADM's step by its formula, and what it draws on a mixture."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import as_arrays, image_keys, per_image_normal
from diffusion_jax.core.schedules import Cosine, Linear
from diffusion_jax.core.timesteps import trailing
from diffusion_jax.core.types import NoiseLevel, Prediction
from diffusion_jax.guidance import ClassifierGuidance
from diffusion_jax.samplers import DDIM, DDPM, StepInfo, initial_noise, sample
from diffusion_jax.samplers.mean_shift import MeanShift
from tests.analytic import MIXTURE

KEYS = image_keys(0, range(4))
INFO = StepInfo(0, 0, 1)
CLEAN = NoiseLevel(jnp.float32(0.0), jnp.float32(1.0), jnp.float32(0.0))
X = np.linspace(-1.0, 1.0, 8).reshape(4, 2)
X0 = np.asarray([[0.3, -0.7]])
FRACTION = np.linspace(0.1, 0.8, 8).reshape(4, 2)


def level_at(t):
    return NoiseLevel(*(jnp.float32(field) for field in Linear()(np.asarray(float(t)))))


def denoise(x, level):
    return Prediction(jnp.broadcast_to(jnp.float32(X0), x.shape), jnp.float32(FRACTION))


def gradient(x, level):
    return 3.0 * jnp.sin(x) + level.sigma


def step(sampler, level, next_level, keys=KEYS, denoise=denoise):
    state = sampler.init(jnp.float32(X))
    return sampler.step(keys, denoise, state, level, next_level, INFO).x


@pytest.mark.parametrize("variance", ["small", "large", "learned_range"])
@pytest.mark.parametrize("t, s", [(999, 998), (600, 250), (30, 0)])
def test_step_is_algorithm_1(t, s, variance):
    """x_s = μ + Σ g(x_t, t) + √Σ z in ᾱ and β, with the sampler's own noise."""
    at, as_ = Linear().alphas_cumprod()[[t, s]]
    beta = 1 - at / as_
    small = (1 - as_) / (1 - at) * beta
    mean = np.sqrt(as_) * beta / (1 - at) * X0 + np.sqrt(at / as_) * (1 - as_) / (1 - at) * X
    covariance = {
        "small": small,
        "large": beta,
        "learned_range": np.exp(FRACTION * np.log(beta) + (1 - FRACTION) * np.log(small)),
    }[variance]
    g = 3.0 * np.sin(X) + np.sqrt(1 - at)
    noise = np.asarray(per_image_normal(KEYS, jnp.zeros((4, 2))))
    out = step(MeanShift(DDPM(variance), gradient), level_at(t), level_at(s))
    expected = mean + covariance * g + np.sqrt(covariance) * noise
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", [DDPM("small"), DDPM("large"), DDPM("learned_range")])
def test_no_gradient_is_no_shift_bit_by_bit(sampler):
    here, there = level_at(600), level_at(250)
    shifted = step(MeanShift(sampler, lambda x, level: jnp.zeros_like(x)), here, there)
    np.testing.assert_array_equal(shifted, step(sampler, here, there))


@pytest.mark.parametrize("variance", ["small", "large", "learned_range"])
def test_the_last_step_has_no_noise(variance):
    """It ends where ancestral sampling ends, for any keys."""
    sampler = MeanShift(DDPM(variance), lambda x, level: jnp.zeros_like(x))
    for seed in (0, 1):
        out = step(sampler, level_at(0), CLEAN, image_keys(seed, range(4)))
        np.testing.assert_allclose(out, np.broadcast_to(X0, (4, 2)), rtol=0, atol=1e-6)
    outs = [
        step(MeanShift(DDPM(variance), gradient), level_at(0), CLEAN, image_keys(seed, range(4)))
        for seed in (0, 1)
    ]
    np.testing.assert_array_equal(*outs)
    if variance == "large":
        # σ²_{t|s} = σ_t² where s is clean.
        g = 3.0 * np.sin(X) + float(level_at(0).sigma)
        expected = X0 + float(level_at(0).sigma) ** 2 * g
        np.testing.assert_allclose(outs[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("t", [0, 30])
def test_noise_at_the_end_is_that_of_the_sampler(t):
    """With noise_at_end the last step is noisy unless it starts at t = 0."""
    sampler = DDPM("large", noise_at_end=True)
    shifted = MeanShift(sampler, lambda x, level: jnp.zeros_like(x))
    out, other = (step(shifted, level_at(t), CLEAN, image_keys(seed, range(4))) for seed in (0, 1))
    np.testing.assert_array_equal(out, step(sampler, level_at(t), CLEAN))
    assert np.array_equal(out, other) == (t == 0)


def test_the_gradient_is_taken_where_the_step_begins():
    """At x_t and its level, not at the mean or the next level."""
    seen, here = [], level_at(600)

    def spy(x, level):
        seen.append((x, level))
        return jnp.zeros_like(x)

    step(MeanShift(DDPM(), spy), here, level_at(250))
    (x, level), *others = seen
    np.testing.assert_array_equal(x, np.float32(X))
    assert level is here and not others


def test_shift_against_that_of_the_score(x64):
    """With Σ = σ²_{t|s} the mean moves α_{t|s} times as far as by guidance of the score."""
    here, there = (
        NoiseLevel(*(jnp.asarray(field) for field in Linear()(np.asarray(t))))
        for t in (600.0, 250.0)
    )
    x = jnp.asarray(X)
    guidance = ClassifierGuidance(2.0)

    def log_prob(x, level, cond):
        return MIXTURE.log_class(x, level, np.asarray([0, 1, 2, 0]))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def out(sampler, denoise):
        return sampler.step(KEYS, denoise, sampler.init(x), here, there, INFO).x

    plain = out(DDPM("large"), MIXTURE.denoise)
    guided = guidance(lambda x, level, cond: MIXTURE.denoise(x, level), log_prob)
    score = out(DDPM("large"), lambda x, level: guided(x, level, None))
    given = guidance.gradient(log_prob)
    shifted = MeanShift(DDPM("large"), lambda x, level: given(x, level, None))
    mean = out(shifted, MIXTURE.denoise)
    ratio = float(here.alpha / there.alpha)
    np.testing.assert_allclose(mean - plain, ratio * (score - plain), rtol=1e-9, atol=1e-12)
    assert np.abs(score - plain).max() > 0.1 and ratio < 0.9


def test_what_cannot_be_wrapped_is_refused():
    for other in (DDIM(eta=1.0), MeanShift(DDPM(), gradient)):
        with pytest.raises(ValueError, match="expected the sampler DDPM, got"):
            MeanShift(other, gradient)
    with pytest.raises(ValueError, match=r"shape \(4,\) for x of shape \(4, 2\)"):
        step(MeanShift(DDPM(), lambda x, level: x[:, 0]), level_at(600), level_at(250))
    with pytest.raises(ValueError, match="fraction must lie"):
        MeanShift(DDPM("interpolated", fraction=1.5), gradient).validate()
    assert MeanShift(DDPM("learned_range"), gradient).variance == "learned_range"


# What is drawn. One Gaussian per class: with exact guidance at scale 1, samples have its moments.

COUNT, MAX_STEPS = 1500, 512
TRACES = []


@functools.partial(jax.jit, static_argnames="label")
def draw(guidance, sampler, grid, x, keys, *, label=0):
    TRACES.append(1)
    labels, cond = np.full(x.shape[0], label), MIXTURE.any_class(x.shape[0])

    def log_prob(x, level, cond):
        return MIXTURE.log_class(x, level, labels)

    def unguided(x, level, cond):
        return MIXTURE.denoise(x, level, cond)

    guided = unguided
    if guidance.form == "score":
        guided = guidance(unguided, log_prob)
    else:
        given = guidance.gradient(log_prob)
        sampler = MeanShift(sampler, lambda x, level: given(x, level, cond))
    return sample(sampler, lambda x, level: guided(x, level, cond), grid, x, keys)[0]


def drawn(sampler, *, form="score", scale=1.0, num_steps=256):
    keys = image_keys(0, range(COUNT))
    knobs = as_arrays(
        (
            ClassifierGuidance(scale, form=form),
            sampler,
            trailing(Cosine(), num_steps, max_steps=MAX_STEPS),
        )
    )
    return np.asarray(draw(*knobs, initial_noise(keys, (2,)), keys))


def standard_errors(x):
    """How far mean and variance are from those of class 0, in standard errors, and their
    covariance as a correlation."""
    mean, std = np.asarray(MIXTURE.means[0]), np.asarray(MIXTURE.stds[0])
    off_mean = (x.mean(0) - mean) / (std / np.sqrt(COUNT))
    off_variance = (x.var(0) / std**2 - 1.0) / np.sqrt(2.0 / COUNT)
    correlation = np.corrcoef(x.T)[0, 1] * np.sqrt(COUNT)
    return off_mean, off_variance, correlation


SAMPLERS = {
    "ddim": (DDIM(), "score"),
    "ancestral score": (DDPM("large"), "score"),
    "ancestral mean": (DDPM("large"), "mean"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_guided_samples_are_those_of_the_class(name):
    sampler, form = SAMPLERS[name]
    for value in standard_errors(drawn(sampler, form=form)):
        assert np.all(np.abs(value) < 4.0), (name, value)


@pytest.mark.slow
def test_the_two_forms_agree_as_steps_become_many():
    """With the same noise, to first order in the size of the step."""
    error = {}
    for num_steps in (32, 128, 512):
        score, mean = (
            drawn(DDPM("large"), form=form, num_steps=num_steps) for form in ("score", "mean")
        )
        error[num_steps] = np.sqrt(np.mean((score - mean) ** 2))
    assert error[32] < 0.03
    assert all(3.5 < error[n] / error[4 * n] < 5.0 for n in (32, 128)), error


@pytest.mark.slow
def test_a_flipped_sign_leaves_the_class():
    """What the right sign makes certain becomes rare."""
    x = drawn(DDPM("large"), form="mean", scale=-1.0)
    of_class_0 = MIXTURE.class_probability(x, NoiseLevel(0.0, 1.0, 0.05))[:, 0]
    assert of_class_0.mean() < 0.06


def test_scale_and_steps_share_one_compilation():
    drawn(DDPM("large"), form="mean")
    before = len(TRACES)
    out = drawn(DDPM("large"), form="mean", scale=0.3, num_steps=4)
    assert len(TRACES) == before and np.all(np.isfinite(out))
