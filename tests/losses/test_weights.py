"""Loss weights: closed forms for each parameterization, one loss whatever the network predicts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.forward import add_noise
from diffusion_jax.core.parameterization import PARAMETERIZATIONS, EDMPreconditioning
from diffusion_jax.core.types import NoiseLevel
from diffusion_jax.losses.weights import P2, WEIGHTS, EDMWeight, MinSNR, SigmoidWeight, Uniform

SIGNAL = np.asarray([1e-4, 1e-2, 0.3, 5 / 6, 0.99, 1 - 1e-4])
SNR = SIGNAL / (1 - SIGNAL)
CONVERTED = [name for name in WEIGHTS if name != "uniform"]


def preserving():
    """Levels with α² + σ² = 1 and ᾱ = SIGNAL."""
    fields = (np.zeros_like(SIGNAL), np.sqrt(SIGNAL), np.sqrt(1 - SIGNAL))
    return NoiseLevel(*(jnp.asarray(field, jnp.float32) for field in fields))


def straight():
    """Levels of a path with α + σ = 1."""
    t = jnp.asarray([0.001, 0.1, 0.5, 0.9, 0.999], jnp.float32)
    return NoiseLevel(t, 1 - t, t)


def exploding():
    """Levels with α = 1."""
    sigma = jnp.asarray([0.002, 0.1, 1.0, 10.0, 80.0], jnp.float32)
    return NoiseLevel(sigma, jnp.ones_like(sigma), sigma)


def of(weight, name, level):
    return np.asarray(weight(level, PARAMETERIZATIONS[name]()))


@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.parametrize("path", [preserving, straight, exploding])
def test_the_loss_of_one_x0_error_does_not_depend_on_the_parameterization(name, path, x64):
    """A network of each kind that is wrong about x0 by the same amount has the same loss."""
    level = NoiseLevel(*(jnp.asarray(field, jnp.float64) for field in path()))
    x0, eps, error = np.random.default_rng(0).standard_normal((3, len(level.t), 3))
    x = add_noise(x0, eps, level)
    wrong = x0 + error
    alpha, sigma = level.alpha[:, None], level.sigma[:, None]
    # The noise that x would consist of, were that x0 the true one: ε - (α / σ) · error.
    wrong_eps = (x - alpha * wrong) / sigma
    losses = {}
    for kind, make in PARAMETERIZATIONS.items():
        parameterization = make()
        difference = parameterization.target(wrong, wrong_eps, level)
        difference = difference - parameterization.target(x0, eps, level)
        weight = WEIGHTS[name]()(level, parameterization)
        assert weight.shape == level.t.shape
        losses[kind] = np.asarray(weight * jnp.mean(difference**2, axis=1))
    for kind, loss in losses.items():
        np.testing.assert_allclose(loss, losses["x0"], rtol=1e-6, err_msg=kind)


def test_min_snr_is_the_papers_closed_form():
    """Hang et al. 2023: min(SNR, γ) for x0, divided by SNR for eps and by SNR + 1 for v."""
    clipped = np.minimum(SNR, 5.0)
    for name, expected in {"x0": clipped, "eps": clipped / SNR, "v": clipped / (SNR + 1)}.items():
        np.testing.assert_allclose(of(MinSNR(), name, preserving()), expected, rtol=1e-3)
    np.testing.assert_allclose(of(MinSNR(1e9), "x0", preserving()), SNR, rtol=1e-3)


def test_p2_is_the_papers_closed_form():
    """Choi et al. 2022: 1 / (k + SNR)^γ for eps, (α/σ)² times as much for x0."""
    expected = (2.0 + SNR) ** -0.5
    np.testing.assert_allclose(of(P2(0.5, 2.0), "eps", preserving()), expected, rtol=1e-3)
    np.testing.assert_allclose(of(P2(0.5, 2.0), "x0", preserving()), expected * SNR, rtol=1e-3)
    np.testing.assert_allclose(of(P2(0.0), "eps", preserving()), 1.0, rtol=1e-6)


def test_sigmoid_is_the_papers_closed_form():
    """sigmoid(b - λ) for eps and e^b sigmoid(λ - b) for x0; b = 0: 1 - ᾱ for eps."""
    bias = -3.0
    log_snr = np.log(SNR)
    of_eps = 1 / (1 + np.exp(log_snr - bias))
    of_x0 = np.exp(bias) / (1 + np.exp(bias - log_snr))
    weight = SigmoidWeight(bias)
    np.testing.assert_allclose(of(weight, "eps", preserving()), of_eps, rtol=1e-3)
    np.testing.assert_allclose(of(weight, "x0", preserving()), of_x0, rtol=1e-3)
    np.testing.assert_allclose(of(SigmoidWeight(), "eps", preserving()), 1 - SIGNAL, rtol=1e-3)


@pytest.mark.parametrize("path", [preserving, exploding])
def test_edm_weight_undoes_c_out(path):
    """λ(σ) c_out² = 1, so that the preconditioned network is trained uniformly."""
    level = path()
    weight = EDMWeight(0.7)(level, EDMPreconditioning(0.7))
    np.testing.assert_allclose(weight, 1.0, rtol=1e-4)
    ratio = np.asarray(level.sigma / level.alpha, np.float64)
    expected = (ratio**2 + 0.49) / (0.7 * ratio) ** 2
    np.testing.assert_allclose(of(EDMWeight(0.7), "x0", level), expected, rtol=1e-4)


def test_uniform_weight_is_one_for_every_target():
    for name in PARAMETERIZATIONS:
        np.testing.assert_array_equal(of(Uniform(), name, preserving()), 1.0)


# The limits of each weight for eps at pure noise and at clean data.
LIMITS = {"uniform": (1, 1), "min_snr": (1, 0), "p2": (1, 0), "sigmoid": (1, 0), "edm": (np.inf, 1)}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_take_their_limits_at_the_ends(name):
    """α = 0 and σ = 0 make no NaN, and no infinity where the limit is finite."""
    level = NoiseLevel(jnp.zeros(2), jnp.asarray([0.0, 1.0]), jnp.asarray([1.0, 0.0]))
    for kind in PARAMETERIZATIONS:
        assert not np.any(np.isnan(of(WEIGHTS[name](), kind, level))), kind
    for value, limit in zip(of(WEIGHTS[name](), "eps", level), LIMITS[name], strict=True):
        if np.isinf(limit):
            assert value > 1e12
        else:
            np.testing.assert_allclose(value, limit, atol=1e-6)


def test_weights_of_flow_velocity_and_score():
    """∂x0/∂u = -σ / (α + σ) and ∂x0/∂s = σ² / α, with min(SNR, γ) = SNR at α = σ = 0.5."""
    level = NoiseLevel(jnp.zeros(1), jnp.full(1, 0.5), jnp.full(1, 0.5))
    np.testing.assert_allclose(of(MinSNR(), "flow", level), 0.25, rtol=1e-6)
    np.testing.assert_allclose(of(MinSNR(), "score", level), 0.25, rtol=1e-6)
    other = NoiseLevel(jnp.zeros(1), jnp.full(1, 0.6), jnp.full(1, 0.8))
    np.testing.assert_allclose(of(MinSNR(), "score", other), 0.64, rtol=1e-6)
    np.testing.assert_allclose(of(MinSNR(), "flow", other), 0.36 / 1.96, rtol=1e-6)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_hashable_values_and_trace(name):
    weight = WEIGHTS[name]()
    assert weight == WEIGHTS[name]() and hash(weight) == hash(WEIGHTS[name]())
    shape = jax.ShapeDtypeStruct((4,), jnp.float32)
    out = jax.eval_shape(
        lambda level: weight(level, PARAMETERIZATIONS["v"]()), NoiseLevel(*3 * [shape])
    )
    assert out.shape == (4,) and out.dtype == jnp.float32


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MinSNR(0.0), "gamma must be positive, got 0.0"),
        (lambda: MinSNR(float("nan")), "gamma must be positive, got nan"),
        (lambda: P2(-1.0), "got -1.0 and 1.0"),
        (lambda: P2(1.0, 0.0), "got 1.0 and 0.0"),
        (lambda: EDMWeight(0.0), "sigma_data must be positive, got 0.0"),
    ],
)
def test_bad_weights_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
