"""EMA against its recursion, unrolled by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.training.ema import EMA


def test_average_equals_the_unrolled_sum():
    """Without warm-up: ema_n = d^n p_0 + (1 - d) Σ d^(n-k) p_k."""
    decay, values = 0.75, [2.0, -1.0, 4.0, 3.0]
    ema = {"w": jnp.array([10.0])}
    for n, value in enumerate(values, start=1):
        ema = EMA(decay, warmup=False).update(ema, {"w": jnp.array([value])}, n)
    expected = decay**4 * 10.0 + 0.25 * sum(decay ** (4 - k) * v for k, v in enumerate(values, 1))
    np.testing.assert_allclose(ema["w"], [expected], rtol=1e-6)


def test_warmup_starts_at_two_elevenths_and_ends_at_decay():
    ema = EMA(decay=0.9)
    np.testing.assert_allclose([ema.decay_at(n) for n in (1, 2)], [2 / 11, 3 / 12], rtol=1e-6)
    # (1 + n) / (10 + n) passes 0.9 at n = 80.
    np.testing.assert_allclose([ema.decay_at(n) for n in (79, 81)], [80 / 89, 0.9], rtol=1e-6)


@pytest.mark.parametrize("warmup", [False, True])
def test_decay_zero_is_the_parameters(warmup):
    params = {"w": jnp.array([0.1, 1e-8, 3e7])}
    ema = EMA(decay=0.0, warmup=warmup).update({"w": jnp.array([5.0, 1e9, -1.0])}, params, 1)
    np.testing.assert_array_equal(ema["w"], params["w"])


def test_equal_average_and_parameters_stay_and_keep_their_dtype():
    params = {"w": jnp.array([1.0, -3.0], jnp.bfloat16), "v": jnp.array([0.7])}
    ema = EMA(0.5, warmup=False).update(params, params, 1)
    assert ema["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(ema["w"], params["w"])
    np.testing.assert_array_equal(ema["v"], params["v"])


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"\[0, 1\), got"):
        EMA(decay=decay)
