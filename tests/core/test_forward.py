"""The forward process: marginals compose, the posterior is Bayes' rule."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.forward import (
    add_noise,
    log_snr,
    posterior_mean,
    posterior_std,
    transition,
)
from diffusion_jax.core.schedules import EDM, Cosine, Linear
from diffusion_jax.core.types import NoiseLevel

LEVELS = [
    (Linear(), 700.0, 300.0),
    (Cosine(), 950.0, 20.0),
    (EDM(), 30.0, 0.5),
]
IDS = ["linear", "cosine", "edm"]


def pair(schedule, t, s):
    return schedule(np.asarray(t)), schedule(np.asarray(s))


@pytest.mark.parametrize("schedule, t, s", LEVELS, ids=IDS)
def test_transition_composes_to_the_marginal(schedule, t, s, x64):
    """q(x_t | x_0) = ∫ q(x_t | x_s) q(x_s | x_0): rates multiply, variances add."""
    level, next_level = pair(schedule, t, s)
    alpha, std = transition(level, next_level)
    np.testing.assert_allclose(alpha * next_level.alpha, level.alpha, rtol=1e-12)
    total = (alpha * next_level.sigma) ** 2 + std**2
    np.testing.assert_allclose(total, level.sigma**2, rtol=1e-12)


@pytest.mark.parametrize("schedule, t, s", LEVELS, ids=IDS)
def test_chapman_kolmogorov(schedule, t, s, x64):
    """From s to t is from s to the middle, then to t."""
    level, next_level = pair(schedule, t, s)
    middle = schedule(np.asarray((t + s) / 2))
    (a1, s1), (a2, s2) = transition(middle, next_level), transition(level, middle)
    alpha, std = transition(level, next_level)
    np.testing.assert_allclose(a1 * a2, alpha, rtol=1e-12)
    np.testing.assert_allclose((a2 * s1) ** 2 + s2**2, std**2, rtol=1e-10)


@pytest.mark.parametrize("schedule, t, s", LEVELS, ids=IDS)
def test_posterior_is_bayes_rule(schedule, t, s, x64):
    """q(x_s | x_t, x_0) ∝ q(x_t | x_s) q(x_s | x_0), product of two Gaussians in x_s."""
    level, next_level = pair(schedule, t, s)
    x, x0 = jnp.asarray([[0.7], [-2.0]]), jnp.asarray([[0.1], [0.9]])
    alpha = level.alpha / next_level.alpha
    likelihood = 1 / (level.sigma**2 - (alpha * next_level.sigma) ** 2)
    prior = 1 / next_level.sigma**2
    precision = alpha**2 * likelihood + prior
    mean = (alpha * likelihood * x + prior * next_level.alpha * x0) / precision
    np.testing.assert_allclose(posterior_std(level, next_level), precision**-0.5, rtol=1e-10)
    np.testing.assert_allclose(posterior_mean(x, x0, level, next_level), mean, rtol=1e-10)


def test_posterior_on_the_training_chain_is_the_table_of_ddpm(x64):
    """β̃_t = (1 - ᾱ_{t-1}) / (1 - ᾱ_t) β_t, and β_t itself, for all t."""
    schedule = Linear()
    betas, table = schedule.betas(), schedule.alphas_cumprod()
    t = np.arange(1, 1000)
    level, next_level = schedule(t), schedule(t - 1)
    _, std = transition(level, next_level)
    np.testing.assert_allclose(std**2, betas[1:], rtol=1e-9)
    tilde = (1 - table[:-1]) / (1 - table[1:]) * betas[1:]
    np.testing.assert_allclose(posterior_std(level, next_level) ** 2, tilde, rtol=1e-9)


def test_posterior_of_a_step_to_clean_data_is_x0():
    level = Linear()(np.asarray(10.0))
    clean = NoiseLevel(np.asarray(0.0), np.asarray(1.0), np.asarray(0.0))
    x, x0 = jnp.ones((1, 2)), jnp.asarray([[0.2, -0.3]])
    assert float(posterior_std(level, clean)) == 0.0
    np.testing.assert_allclose(posterior_mean(x, x0, level, clean), x0, rtol=1e-6)


def test_add_noise_per_example():
    x0, eps = jnp.ones((2, 3, 3, 1)), 2.0 * jnp.ones((2, 3, 3, 1))
    level = NoiseLevel(jnp.zeros(2), jnp.asarray([0.6, 1.0]), jnp.asarray([0.8, 0.0]))
    out = add_noise(x0, eps, level)
    np.testing.assert_allclose(out[0], 0.6 + 1.6, rtol=1e-6)
    np.testing.assert_array_equal(out[1], 1.0)
    scalar = NoiseLevel(jnp.float32(0.0), jnp.float32(0.6), jnp.float32(0.8))
    np.testing.assert_allclose(add_noise(x0, eps, scalar), 2.2, rtol=1e-6)
    with pytest.raises(ValueError, match=r"\(2, 3, 3, 1\) and \(3,\)"):
        add_noise(x0, jnp.ones(3), level)
    with pytest.raises(ValueError, match="coefficient"):
        add_noise(x0, eps, NoiseLevel(jnp.zeros(3), jnp.ones(3), jnp.ones(3)))


def test_log_snr_at_both_ends():
    value = log_snr(
        NoiseLevel(jnp.zeros(3), jnp.asarray([1.0, 0.6, 0.0]), jnp.asarray([0, 0.8, 1]))
    )
    np.testing.assert_allclose(value, [np.inf, 2 * np.log(0.75), -np.inf], rtol=1e-5)
