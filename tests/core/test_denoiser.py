"""make_denoiser: what the network is shown and told, and what is made of its answer."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.condition import Condition
from diffusion_jax.core.denoiser import TIME_INPUTS, RescaledTime, make_denoiser
from diffusion_jax.core.parameterization import X0, EDMPreconditioning, Eps
from diffusion_jax.core.schedules import Cosine
from diffusion_jax.core.types import NoiseLevel
from tests.analytic import MIXTURE

LEVEL = NoiseLevel(jnp.float32(0.25), jnp.float32(0.6), jnp.float32(0.8))
X = jnp.asarray([[0.5, -1.0], [2.0, 0.1]])


def exact_eps(params, x, t, cond, *, keys=None):
    del params, t, keys
    return (x - LEVEL.alpha * MIXTURE.x0(x, LEVEL, cond.vector)) / LEVEL.sigma


@pytest.mark.slow
def test_exact_eps_network_becomes_the_exact_denoiser():
    cond = MIXTURE.classes([0, 2])
    prediction = make_denoiser(exact_eps, Eps())({})(X, LEVEL, cond)
    np.testing.assert_allclose(prediction.x0, MIXTURE.denoise(X, LEVEL, cond).x0, atol=1e-5)
    assert prediction.var_frac is None


def test_parameters_reach_the_network():
    denoise = make_denoiser(lambda params, x, t, cond, *, keys=None: params["w"] * x, X0())
    np.testing.assert_allclose(denoise({"w": 3.0})(X, LEVEL).x0, 3.0 * X)


@pytest.mark.parametrize(
    "name, expected", [("t", 0.25), ("scaled_t", 250.0), ("edm", np.log(0.8 / 0.6) / 4)]
)
def test_time_inputs(name, expected):
    seen = []

    def network(params, x, t, cond, *, keys=None):
        seen.append(t)
        return x

    make_denoiser(network, X0(), time_input=TIME_INPUTS[name])({})(X, LEVEL)
    assert seen[0].shape == (2,)
    np.testing.assert_allclose(seen[0], expected, rtol=1e-5)


def test_edm_network_sees_unit_variance_input():
    seen = []

    def network(params, x, t, cond, *, keys=None):
        seen.append(x)
        return jnp.zeros_like(x)

    make_denoiser(network, EDMPreconditioning(0.5))({})(X, LEVEL)
    np.testing.assert_allclose(seen[0], X / np.sqrt(0.8**2 + 0.3**2), rtol=1e-5)


def two_halves(params, x, t, cond, *, keys=None):
    return jnp.concatenate([x, jnp.broadcast_to(jnp.asarray([[-1.0, 1.5]]), x.shape)], axis=-1)


def test_learned_range_is_the_second_half_mapped_to_a_fraction():
    """From [-1, 1] to [0, 1], and beyond: what the network says is not cut."""
    x0, var_frac, log_var, _ = make_denoiser(two_halves, X0(), learned_variance="range")({})(
        X, LEVEL
    )
    np.testing.assert_array_equal(x0, X)
    np.testing.assert_allclose(var_frac, [[0.0, 1.25], [0.0, 1.25]])
    assert log_var is None


def test_learned_variance_is_the_exponential_of_its_logarithm():
    def positive(params, x, t, cond, *, keys=None):
        return jnp.abs(two_halves(params, x, t, cond, keys=keys))

    prediction = make_denoiser(positive, X0(), learned_variance="variance")({})(X, LEVEL)
    np.testing.assert_allclose(jnp.exp(prediction.log_var), [[1.0, 1.5], [1.0, 1.5]], rtol=1e-6)


def test_learned_log_variance_is_the_second_half_itself():
    prediction = make_denoiser(two_halves, X0(), learned_variance="log")({})(X, LEVEL)
    np.testing.assert_array_equal(prediction.x0, X)
    np.testing.assert_allclose(prediction.log_var, [[-1.0, 1.5], [-1.0, 1.5]])
    assert prediction.var_frac is None


@pytest.mark.parametrize("learned", [True, False, "learned_range"])
def test_unknown_meaning_of_the_second_half_is_refused(learned):
    with pytest.raises(ValueError, match=f"None or one of .'range', 'log', 'variance'.*{learned}"):
        make_denoiser(two_halves, X0(), learned_variance=learned)


def test_bfloat16_networks_answer_in_float32():
    def network(params, x, t, cond, *, keys=None):
        return x.astype(jnp.bfloat16)

    assert make_denoiser(network, X0())({})(X, LEVEL).x0.dtype == jnp.float32


@pytest.mark.parametrize("learned, channels", [(None, 4), ("range", 2), ("log", 3), (None, 3)])
def test_wrong_number_of_channels_is_refused(learned, channels):
    def network(params, x, t, cond, *, keys=None):
        return jnp.zeros((2, channels))

    with pytest.raises(ValueError, match=rf"\(2, {channels}\).*learned_variance is {learned!r}"):
        make_denoiser(network, X0(), learned_variance=learned)({})(X, LEVEL, Condition())


def test_rescaled_time_runs_over_the_range_of_a_thousand_steps():
    """The last of 4000 steps is told 999.75, the first 0."""
    level = Cosine(4000)(np.asarray([0.0, 3999.0]))
    np.testing.assert_allclose(RescaledTime(4000)(level), [0.0, 999.75])
