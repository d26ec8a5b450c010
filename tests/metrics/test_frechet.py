"""Fréchet distance: closed forms, another formula for the same number, streaming."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from diffusion_jax.metrics.frechet import GaussianStats, frechet_distance

RNG = np.random.default_rng(0)


def _stats(mean, covariance, count=10):
    return GaussianStats(count, np.asarray(mean), np.asarray(covariance) * (count - 1))


def test_isotropic_gaussians_have_a_closed_form():
    """FD(N(0, I), N(m, s² I)) = ‖m‖² + d (1 - s)²."""
    m, s, d = RNG.normal(size=7), 1.7, 7
    got = frechet_distance(_stats(np.zeros(d), np.eye(d)), _stats(m, s**2 * np.eye(d)))
    assert got == pytest.approx(m @ m + d * (1 - s) ** 2, rel=1e-12)


def _covariance(d, rank=None):
    a = RNG.normal(size=(d, rank or d))
    return a @ a.T


@pytest.mark.parametrize("d", [1, 5, 20])
def test_general_covariances_agree_with_a_matrix_square_root(d):
    a, b = _covariance(d), _covariance(d)
    mean = RNG.normal(size=d)
    expected = mean @ mean + np.trace(a + b - 2 * sqrtm(a @ b).real)
    got = frechet_distance(_stats(np.zeros(d), a), _stats(mean, b))
    assert got == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(_stats(mean, b), _stats(np.zeros(d), a)) == pytest.approx(got)


def test_singular_covariances_are_fine():
    """Two lines at an angle: Tr (Σa^½ Σb Σa^½)^½ = |u·v| for unit vectors."""
    u, v = np.array([1.0, 0.0]), np.array([np.cos(0.4), np.sin(0.4)])
    got = frechet_distance(_stats(np.zeros(2), np.outer(u, u)), _stats(u, np.outer(v, v)))
    assert got == pytest.approx(1 + 2 - 2 * np.cos(0.4))
    low = _stats(np.zeros(6), _covariance(6, rank=2))
    assert frechet_distance(low, low) == pytest.approx(0.0, abs=1e-6)


def test_a_stream_gives_the_statistics_of_the_whole():
    x = RNG.normal(size=(50, 2, 2, 1)) * 3 + 100
    stream = GaussianStats.empty(4)
    for part in np.split(x, [1, 17, 40]):
        stream = stream.update(part)
    halves = GaussianStats.of(x[:20]).merge(GaussianStats.of(x[20:]))
    flat = x.reshape(50, 4)
    for stats in (stream, halves):
        assert stats.count == 50
        np.testing.assert_allclose(stats.mean, flat.mean(axis=0), rtol=1e-13)
        np.testing.assert_allclose(stats.covariance, np.cov(flat.T), rtol=1e-10)


def test_bad_input_is_refused():
    good = GaussianStats.of(RNG.normal(size=(5, 3)))
    with pytest.raises(ValueError, match="3 and 2"):
        frechet_distance(good, GaussianStats.of(RNG.normal(size=(5, 2))))
    with pytest.raises(ValueError, match="3 and 2"):
        good.update(RNG.normal(size=(5, 2)))
    with pytest.raises(ValueError, match="at least 2 feature vectors, got 1"):
        frechet_distance(good, GaussianStats.of(np.ones((1, 3))))
    with pytest.raises(ValueError, match="1 feature values"):
        GaussianStats.of(np.array([[0.0, np.nan]]))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        GaussianStats.of(np.ones(3))
    with pytest.raises(ValueError, match="got 0"):
        GaussianStats.empty(0)
