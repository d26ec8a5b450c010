"""The variance of a reverse step, against the tables of the released diffusion code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.chain import following_level, previous_level
from diffusion_jax.core.schedules import Linear
from diffusion_jax.core.types import Prediction
from diffusion_jax.core.variance import (
    VARIANCES,
    check_variance,
    posterior_log_variance,
    reverse_log_variance,
)

SCHEDULE = Linear(20, 1e-3, 0.2)
TIMES = jnp.arange(20.0)
LEVELS = SCHEDULE(TIMES), previous_level(SCHEDULE, TIMES)
NOISIER = following_level(SCHEDULE, TIMES)
FRACTION = np.linspace(-0.1, 1.1, 60).reshape(20, 3)
PREDICTION = Prediction(
    jnp.zeros((20, 3)), jnp.float32(FRACTION), jnp.full((20, 3), -2.5, jnp.float32)
)


def tables():
    """log β and log β̃ of the chain in float64; β̃_0 = 0 gives way to β̃_1."""
    beta, after = SCHEDULE.betas(), SCHEDULE.alphas_cumprod()
    before = np.concatenate([[1.0], after[:-1]])
    small = (1 - before) / (1 - after) * beta
    small[0] = small[1]
    return np.log(beta)[:, None], np.log(small)[:, None]


def log_variance(variance, *, noisier=NOISIER, **options):
    value = reverse_log_variance(PREDICTION, *LEVELS, variance=variance, noisier=noisier, **options)
    return np.broadcast_to(value, (20, 3))


def test_every_kind_on_the_whole_chain():
    log_beta, log_small = tables()
    large = np.concatenate([log_small[:1], log_beta[1:]])
    expected = {
        "small": log_small + np.zeros(3),
        "large": large + np.zeros(3),
        "learned_range": FRACTION * log_beta + (1 - FRACTION) * log_small,
        "interpolated": 0.3 * log_beta + 0.7 * log_small + np.zeros(3),
        "learned": np.full((20, 3), -2.5),
    }
    assert set(expected) == set(VARIANCES)
    for variance, value in expected.items():
        fraction = {"fraction": 0.3} if variance == "interpolated" else {}
        np.testing.assert_allclose(log_variance(variance, **fraction), value, atol=2e-4)


def test_without_a_noisier_level_the_forward_variance_stands_in():
    log_beta, log_small = tables()
    ours = posterior_log_variance(*LEVELS)
    np.testing.assert_allclose(ours[0], log_beta[0, 0], atol=2e-4)
    np.testing.assert_allclose(ours[1:], log_small[1:, 0], atol=2e-4)
    # A step before that did not move stands for none.
    here = posterior_log_variance(*LEVELS, noisier=LEVELS[0])
    np.testing.assert_array_equal(here, ours)
    for variance in ("small", "large", "learned_range"):
        ours = log_variance(variance, noisier=None)
        np.testing.assert_allclose(ours[0], log_beta[0, 0], atol=2e-4)


def test_single_levels_give_what_broadcasts_to_the_batch():
    here, there = SCHEDULE(jnp.float32(7.0)), previous_level(SCHEDULE, jnp.float32(7.0))
    for variance, shape in (("small", ()), ("large", ()), ("learned_range", (20, 3))):
        value = reverse_log_variance(PREDICTION, here, there, variance=variance)
        assert value.shape == shape
        seventh = np.broadcast_to(value, (20, 3))[7]
        np.testing.assert_allclose(seventh, log_variance(variance)[7], rtol=1e-5)


@pytest.mark.parametrize(
    "variance, message",
    [
        ("medium", "small.*learned.*'medium'"),
        ("interpolated", "needs a fraction"),
        ("learned_range", "predicts var_frac.*learned_variance='range'"),
        ("learned", "predicts log_var.*learned_variance='log'"),
    ],
)
def test_what_is_missing_is_named(variance, message):
    with pytest.raises(ValueError, match=message):
        reverse_log_variance(Prediction(jnp.zeros((20, 3))), *LEVELS, variance=variance)


@pytest.mark.parametrize("variance", [v for v in VARIANCES if v != "learned"])
def test_a_step_of_no_length_has_no_variance(variance):
    """Grids that end at t_min may take one: std = 0, also for fractions outside of [0, 1]."""
    here = SCHEDULE(jnp.float32(7.0))

    def std(fraction):
        options = {"fraction": fraction} if variance == "interpolated" else {}
        prediction = Prediction(jnp.zeros((20, 3)), fraction)
        value = reverse_log_variance(prediction, here, here, variance=variance, **options)
        return jnp.exp(0.5 * value) + jnp.zeros((20, 3))

    fractions = jnp.broadcast_to(jnp.asarray([[-0.1, 0.0, 1.0]]), (20, 3))
    value, back = jax.vjp(std, fractions)
    np.testing.assert_array_equal(value, 0.0)
    np.testing.assert_array_equal(back(value + 1.0)[0], 0.0)


def test_check_variance():
    for variance in VARIANCES:
        check_variance(variance)
    with pytest.raises(ValueError, match="got None"):
        check_variance(None)
