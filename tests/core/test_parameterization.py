"""Parameterizations: the way from target to x0 and back, and EDM's unit variances."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.forward import add_noise
from diffusion_jax.core.parameterization import (
    PARAMETERIZATIONS,
    EDMPreconditioning,
    Eps,
    FlowVelocity,
    Score,
    V,
)
from diffusion_jax.core.types import NoiseLevel


def level_of(signal):
    """Levels [B] with ᾱ = signal."""
    signal = np.asarray(signal, np.float64)
    fields = (np.arange(len(signal)), np.sqrt(signal), np.sqrt(1 - signal))
    return NoiseLevel(*(jnp.float32(field) for field in fields))


SIGNAL = np.asarray([1e-4, 1e-2, 0.5, 0.99, 1 - 1e-4])


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_the_target_leads_back_to_x0(name):
    """to_x0(target(x0, eps), x_t) = x0 in float32; for eps and score the error grows as 1 / α."""
    rng = np.random.default_rng(0)
    x0 = jnp.float32(rng.uniform(-1, 1, (5, 4)))
    eps = jnp.float32(rng.standard_normal((5, 4)))
    level = level_of(SIGNAL)
    parameterization = PARAMETERIZATIONS[name]()
    x = add_noise(x0, eps, level)
    back = parameterization.to_x0(parameterization.target(x0, eps, level), x, level)
    error = np.abs(np.asarray(back - x0)).max(axis=1)
    growth = 1 / np.sqrt(SIGNAL) if name in ("eps", "score") else np.ones(5)
    assert np.all(error <= 1e-6 * growth), error


def test_v_is_the_rotation_of_x0_and_eps(x64):
    """At α = cos φ, σ = sin φ: v = dx_t/dφ, by a finite difference."""
    x0, eps = jnp.asarray([[0.3]]), jnp.asarray([[-1.1]])

    def at(phi):
        return NoiseLevel(jnp.asarray(0.0), jnp.cos(phi), jnp.sin(phi))

    phi, h = 0.7, 1e-5
    slope = (add_noise(x0, eps, at(phi + h)) - add_noise(x0, eps, at(phi - h))) / (2 * h)
    np.testing.assert_allclose(V().target(x0, eps, at(phi)), slope, rtol=1e-8)


def test_flow_velocity_is_the_slope_of_the_straight_path(x64):
    """At α = 1 - t, σ = t: u = dx_t/dt, by a finite difference."""
    x0, eps = jnp.asarray([[0.3]]), jnp.asarray([[-1.1]])

    def at(t):
        return NoiseLevel(jnp.asarray(t), jnp.asarray(1 - t), jnp.asarray(t))

    h = 1e-5
    slope = (add_noise(x0, eps, at(0.4 + h)) - add_noise(x0, eps, at(0.4 - h))) / (2 * h)
    np.testing.assert_allclose(FlowVelocity().target(x0, eps, at(0.4)), slope, rtol=1e-8)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_flow_velocity_is_defined_on_the_whole_straight_path(t):
    level = NoiseLevel(*(jnp.full(1, rate) for rate in (t, 1 - t, t)))
    x0, eps = jnp.asarray([[0.3]]), jnp.asarray([[-1.1]])
    velocity = FlowVelocity().target(x0, eps, level)
    back = FlowVelocity().to_x0(velocity, add_noise(x0, eps, level), level)
    np.testing.assert_allclose(back, x0, rtol=1e-6)


def test_score_is_the_gradient_of_the_log_density(x64):
    """For data N(0, s²) the exact score of p_t leads to the exact posterior mean of x0."""
    std, alpha, sigma = 0.5, 0.8, 0.7
    level = NoiseLevel(jnp.zeros(1), jnp.full(1, alpha), jnp.full(1, sigma))
    x = jnp.asarray([[0.9, -0.4]])
    variance = alpha**2 * std**2 + sigma**2
    score = -x / variance
    np.testing.assert_allclose(
        Score().to_x0(score, x, level), alpha * std**2 / variance * x, rtol=1e-12
    )
    # The target, whose mean given x_t is the score: the gradient of log N(x_t; α x0, σ²).
    x0, eps = jnp.asarray([[0.3, 0.2]]), jnp.asarray([[-1.1, 0.7]])
    expected = -(add_noise(x0, eps, level) - alpha * x0) / sigma**2
    np.testing.assert_allclose(Score().target(x0, eps, level), expected, rtol=1e-12)


def test_v_is_defined_where_there_is_no_signal():
    level = NoiseLevel(jnp.zeros(1), jnp.zeros(1), jnp.ones(1))
    x0, eps = jnp.asarray([[0.3]]), jnp.asarray([[-1.1]])
    np.testing.assert_array_equal(V().to_x0(V().target(x0, eps, level), eps, level), x0)


def test_v_on_a_path_that_does_not_preserve_variance(x64):
    level = NoiseLevel(jnp.zeros(1), jnp.ones(1), jnp.asarray([3.0]))
    x0, eps = jnp.asarray([[0.3]]), jnp.asarray([[-1.1]])
    back = V().to_x0(V().target(x0, eps, level), add_noise(x0, eps, level), level)
    np.testing.assert_allclose(back, x0, rtol=1e-12)


@pytest.mark.parametrize("sigma", [0.002, 0.1, 0.5, 4.0, 80.0])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_edm_preconditioning_has_unit_variances(sigma, alpha, x64):
    """Input and target are linear in x0 and eps; with Var(x0) = σ_d² both have variance 1."""
    sigma_data = 0.5
    edm = EDMPreconditioning(sigma_data)
    level = NoiseLevel(jnp.zeros(2), jnp.full(2, alpha), jnp.full(2, alpha * sigma))
    x0, eps = jnp.asarray([[1.0], [0.0]]), jnp.asarray([[0.0], [1.0]])
    scale = np.asarray([sigma_data, 1.0])
    shown = np.asarray(edm.scale_input(add_noise(x0, eps, level), level))[:, 0] * scale
    target = np.asarray(edm.target(x0, eps, level))[:, 0] * scale
    np.testing.assert_allclose(np.sum(shown**2), 1.0, rtol=1e-12)
    np.testing.assert_allclose(np.sum(target**2), 1.0, rtol=1e-9)


def test_edm_coefficients_are_table_1(x64):
    sigma, sigma_data = 2.0, 0.5
    total = sigma**2 + sigma_data**2
    level = NoiseLevel(jnp.zeros(1), jnp.ones(1), jnp.asarray([sigma]))
    x, output = jnp.asarray([[0.7]]), jnp.asarray([[-0.4]])
    expected = sigma_data**2 / total * x + sigma * sigma_data / np.sqrt(total) * output
    edm = EDMPreconditioning(sigma_data)
    np.testing.assert_allclose(edm.to_x0(output, x, level), expected, rtol=1e-12)
    np.testing.assert_allclose(edm.scale_input(x, level), x / np.sqrt(total), rtol=1e-12)


def test_input_is_scaled_by_edm_alone():
    x, level = jnp.ones((5, 2)), level_of(SIGNAL)
    for name in ("eps", "x0", "v", "score", "flow"):
        np.testing.assert_array_equal(PARAMETERIZATIONS[name]().scale_input(x, level), x)


def test_refusals():
    with pytest.raises(ValueError, match="got 0.0"):
        EDMPreconditioning(0.0)
    with pytest.raises(ValueError, match="coefficient"):
        Eps().to_x0(jnp.ones((2, 3)), jnp.ones((2, 3)), level_of([0.5, 0.5, 0.5]))


def test_networks_of_the_other_sign_say_the_same():
    """Velocities towards data, and EDM's negated F, which at σ_d = 1 is v."""
    rng = np.random.default_rng(1)
    x0, eps = (jnp.float32(rng.standard_normal((5, 4))) for _ in range(2))
    level = level_of(SIGNAL)
    x = add_noise(x0, eps, level)
    for plain, other in (
        (FlowVelocity(), FlowVelocity(towards_data=True)),
        (EDMPreconditioning(0.7), EDMPreconditioning(0.7, negated=True)),
    ):
        output = plain.target(x0, eps, level)
        np.testing.assert_allclose(other.target(x0, eps, level), -output, rtol=1e-6)
        np.testing.assert_array_equal(other.to_x0(-output, x, level), plain.to_x0(output, x, level))
    v = V().target(x0, eps, level)
    negated = EDMPreconditioning(1.0, negated=True).target(x0, eps, level)
    np.testing.assert_allclose(negated[1:4], v[1:4], rtol=1e-3, atol=1e-4)
