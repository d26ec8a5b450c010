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


def test_fewer_vectors_than_dimensions_have_a_closed_form():
    """FD between x and c x + m is ‖m + (c - 1) mean‖² + (1 - c)² Tr Σ, of whatever rank Σ is."""
    x, m, c = RNG.normal(size=(12, 80)) * 10, RNG.normal(size=80), 1.3
    a, b = GaussianStats.of(x), GaussianStats.of(c * x + m)
    shift = m + (c - 1) * x.mean(axis=0)
    expected = shift @ shift + (1 - c) ** 2 * np.trace(np.cov(x.T))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_only_a_mean_and_a_covariance_are_needed():
    class Known:
        mean, covariance = np.ones(3), 4.0 * np.eye(3)

    assert frechet_distance(_stats(np.zeros(3), np.eye(3)), Known()) == pytest.approx(3 + 3)


def test_order_and_batches_do_not_matter_but_for_rounding():
    x = RNG.normal(size=(60, 5)) + 1e4
    target = _stats(np.full(5, 1e4), np.eye(5))
    expected = frechet_distance(GaussianStats.of(x), target)
    for seed, cuts in enumerate(([7], [1, 2, 59], range(5, 60, 5))):
        stream = GaussianStats.empty(5)
        for part in np.split(np.random.default_rng(seed).permutation(x), cuts):
            stream = stream.update(part)
        assert frechet_distance(stream, target) == pytest.approx(expected, rel=1e-9)


def test_a_large_mean_does_not_drown_the_covariance():
    """Σ x xᵀ - N mean meanᵀ in one pass would lose all digits here."""
    x = RNG.normal(size=(40, 3))
    stream = GaussianStats.empty(3)
    for part in np.split(x + 1e8, 8):
        stream = stream.update(part)
    np.testing.assert_allclose(stream.covariance, np.cov(x.T), rtol=0, atol=1e-6)


def test_statistics_survive_as_arrays_bit_by_bit():
    stats = GaussianStats.of(RNG.normal(size=(9, 3)))
    back = GaussianStats.from_dict(stats.to_dict())
    assert back.count == 9
    np.testing.assert_array_equal(back.mean, stats.mean)
    np.testing.assert_array_equal(back.scatter, stats.scatter)
    with pytest.raises(ValueError, match=r"\['scatter'\] are missing"):
        GaussianStats.from_dict({"count": 1, "mean": np.zeros(2)})
    with pytest.raises(ValueError, match=r"got 1, \(2,\) and \(3, 3\)"):
        GaussianStats.from_dict({"count": 1, "mean": np.zeros(2), "scatter": np.eye(3)})


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
