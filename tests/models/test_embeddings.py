"""Time embeddings against the formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.embeddings import (
    Fourier,
    FourierFeatures,
    Learned,
    Sinusoidal,
    TimeEmbedding,
    sinusoidal_embedding,
)
from tests.models.trees import random_params

TIMES = np.array([0.0, 1.0, 37.0, 999.0], np.float32)


@pytest.mark.parametrize("cos_first", [True, False])
@pytest.mark.parametrize("freq_shift", [0, 1])
@pytest.mark.parametrize("dim", [8, 9])
def test_sinusoidal_is_its_formula(dim, freq_shift, cos_first):
    ours = sinusoidal_embedding(
        TIMES, dim, cos_first=cos_first, freq_shift=freq_shift, max_period=1e4, scale=0.5
    )
    expected = np.zeros((4, dim))
    half = dim // 2
    for i, t in enumerate(TIMES):
        for k in range(half):
            angle = 0.5 * float(t) * 1e4 ** (-k / (half - freq_shift))
            cos_at, sin_at = (k, half + k) if cos_first else (half + k, k)
            expected[i, cos_at], expected[i, sin_at] = np.cos(angle), np.sin(angle)
    assert ours.dtype == jnp.float32
    # Angles up to 500 are rounded to 3e-5 in float32.
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_the_last_frequency_with_shift_is_the_longest_period():
    ours = sinusoidal_embedding(np.array([100.0]), 6, freq_shift=1, max_period=50.0)
    np.testing.assert_allclose(ours[0, 2], np.cos(2.0), rtol=1e-5)


@pytest.mark.parametrize("log", [True, False])
def test_fourier_features_are_their_formula_and_not_trained(log):
    module = FourierFeatures(Fourier(num_frequencies=3, scale=2.0, log=log))
    weight = np.array([0.1, -0.7, 1.3], np.float32)
    times = np.array([0.5, 2.0], np.float32)

    def total(params):
        return module.apply({"params": params}, times).sum()

    argument = np.log(times) if log else times
    angles = 2 * np.pi * argument[:, None] * weight[None]
    ours = module.apply({"params": {"weight": weight}}, times)
    np.testing.assert_allclose(ours, np.concatenate([np.sin(angles), np.cos(angles)], 1), atol=1e-5)
    gradient = jax.grad(total)({"weight": jnp.asarray(weight)})["weight"]
    np.testing.assert_array_equal(gradient, np.zeros(3))


@pytest.mark.parametrize("features, width", [(Sinusoidal(), 6), (Fourier(5), 10)])
def test_time_embedding_is_a_silu_mlp(features, width):
    module = TimeEmbedding(features, channels=6, embed_dim=4)
    times = jnp.asarray([0.5, 2.0])
    params = random_params(module, times)
    assert params["dense_1"]["kernel"].shape == (width, 4)
    if isinstance(features, Fourier):
        weight = params["fourier"]
        h = FourierFeatures(features).apply({"params": weight}, times)
    else:
        h = sinusoidal_embedding(times, 6)
    h = np.asarray(h) @ params["dense_1"]["kernel"] + params["dense_1"]["bias"]
    h = h / (1 + np.exp(-h))
    h = h @ params["dense_2"]["kernel"] + params["dense_2"]["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, times), h, atol=1e-4)


def test_cosines_may_come_first():
    options, times = {"num_frequencies": 3, "log": False}, np.array([0.5, 2.0], np.float32)
    weight = {"params": {"weight": np.array([0.1, -0.7, 1.3], np.float32)}}
    sines = FourierFeatures(Fourier(**options)).apply(weight, times)
    cosines = FourierFeatures(Fourier(**options, cos_first=True)).apply(weight, times)
    np.testing.assert_array_equal(cosines, np.roll(sines, 3, axis=1))


def test_learned_features_are_rows_of_a_table_to_which_more_is_added():
    module = TimeEmbedding(Learned(5), channels=3, embed_dim=4, act="relu", act_last="relu")
    times, extra = jnp.asarray([4, 1]), np.asarray([[1.0, 2.0, 3.0]] * 2, np.float32)
    params = random_params(module, times)
    h = params["learned"]["embedding"][np.asarray(times)] + extra
    h = np.maximum(h @ params["dense_1"]["kernel"] + params["dense_1"]["bias"], 0.0)
    h = np.maximum(h @ params["dense_2"]["kernel"] + params["dense_2"]["bias"], 0.0)
    np.testing.assert_allclose(module.apply({"params": params}, times, extra), h, atol=1e-4)
    with pytest.raises(ValueError, match=r"must have shape \(2, 3\), got \(2, 2\)"):
        module.apply({"params": params}, times, extra[:, :2])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: sinusoidal_embedding(np.float32(3), 8), "t must have shape"),
        (lambda: sinusoidal_embedding(TIMES, 1), "dim must be at least 2"),
        (lambda: sinusoidal_embedding(TIMES, 2, freq_shift=1), "dim must be at least 4"),
        (lambda: Sinusoidal(freq_shift=2), "freq_shift must be 0 or 1, got 2"),
        (lambda: Sinusoidal(max_period=1.0), "max_period must be above 1"),
        (lambda: Fourier(num_frequencies=0), "num_frequencies must be at least 1"),
        (lambda: Fourier(scale=0.0), "scale must be positive"),
        (lambda: Learned(0), "num_timesteps must be at least 1"),
    ],
)
def test_bad_options_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
