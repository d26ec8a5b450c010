"""Precision, recall and the memorisation ratio against cases small enough to count."""

import numpy as np
import pytest

from diffusion_jax.metrics import manifold
from diffusion_jax.metrics.manifold import (
    density_coverage,
    nearest_distances,
    nearest_ratio,
    precision_recall,
)

RNG = np.random.default_rng(0)


def _brute_share(queries, centres, k):
    """Share of queries within the k-th neighbour's distance of some centre, by definition."""
    inside = 0
    for query in queries:
        for i, centre in enumerate(centres):
            others = np.delete(centres, i, axis=0)
            radius = sorted(np.linalg.norm(others - centre, axis=1))[k - 1]
            if np.linalg.norm(query - centre) <= radius:
                inside += 1
                break
    return inside / len(queries)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_agree_with_the_definition(k, monkeypatch):
    monkeypatch.setattr(manifold, "_ROWS", 7)  # several blocks of rows
    real, fake = RNG.normal(size=(25, 2)), RNG.normal(size=(19, 2)) + 1.5
    got = precision_recall(real, fake, k=k)
    assert got.precision == _brute_share(fake, real, k)
    assert got.recall == _brute_share(real, fake, k)
    assert 0 < got.precision < 1 and 0 < got.recall < 1 and got.precision != got.recall


def test_points_on_a_line_by_hand():
    """Real at 0, 1, 2, 3; k = 1, so every ball has radius 1 and they cover [-1, 4]."""
    real = np.arange(4.0)[:, None]
    fake = np.array([[-1.0], [4.5], [3.9], [10.0]])
    got = precision_recall(real, fake, k=1)
    # Balls of the fakes: [-5.9, 3.9], [3.9, 5.1], [3.3, 4.5], [4.5, 15.5].
    assert got == (0.5, 1.0)


def test_a_collapsed_generator_has_precision_without_recall():
    real = RNG.normal(size=(60, 2, 2, 1))
    collapsed = real[:1] + 1e-3 * RNG.normal(size=(60, 2, 2, 1))
    got = precision_recall(real, collapsed)
    assert got.precision == 1.0 and got.recall < 0.1
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)


def test_the_nearest_ratio_tells_copies_from_new_data():
    train, held_out, fresh = (RNG.normal(size=(400, 5)) for _ in range(3))
    assert nearest_ratio(train[:50], train, held_out) == 0.0
    assert nearest_ratio(fresh, train, held_out) == pytest.approx(1.0, abs=0.15)
    samples = np.array([[3.0], [6.0], [100.0]])
    assert nearest_ratio(samples, np.zeros((1, 1)), np.array([[2.0]])) == 3.0


def test_nearest_distances_by_hand():
    got = nearest_distances(np.array([[0.0, 0.0], [5.0, 5.0]]), np.array([[3.0, 4.0], [9, 9]]))
    np.testing.assert_allclose(got, [5.0, np.sqrt(5.0)])


def test_many_dimensions_agree_with_the_definition_too(monkeypatch):
    """From 256 dimensions on, distances come from a matrix product."""
    monkeypatch.setattr(manifold, "_ROWS", 7)
    scales = 1 + 0.1 * RNG.normal(size=(45, 1))
    points = RNG.normal(size=(45, 300)) * scales + 50
    real, fake = points[:25], points[25:] + 0.1
    got = precision_recall(real, fake)
    assert got == (_brute_share(fake, real, 3), _brute_share(real, fake, 3))
    assert 0 < got.precision < 1 and 0 < got.recall < 1
    direct = np.linalg.norm(fake[:, None] - real[None], axis=-1).min(axis=1)
    np.testing.assert_allclose(nearest_distances(fake, real), direct, rtol=1e-12)
    assert nearest_ratio(real[:9], real, fake) == 0.0


def test_density_and_coverage_by_hand():
    """Real at 0, 1, 2, 3 with balls of radius 1: 1.5 lies in two of them, 10 in none."""
    got = density_coverage(np.arange(4.0)[:, None], np.array([[1.5], [1.5], [10.0]]), k=1)
    assert got == (4 / 3, 0.5)


def test_density_and_coverage_of_equal_distributions():
    """Expected coverage is 1 - Π_i (N - i) / (2N - i), i = 1 … k; expected density is 1."""
    n, k = 40, 3
    draws = [density_coverage(*RNG.normal(size=(2, n, 2)), k=k) for _ in range(300)]
    density, coverage = np.mean(draws, axis=0)
    i = np.arange(1, k + 1)
    assert coverage == pytest.approx(1 - np.prod((n - i) / (2 * n - i)), abs=0.01)
    assert density == pytest.approx(1.0, abs=0.03)


def test_an_outlier_inflates_precision_but_hardly_density():
    real = np.concatenate([RNG.normal(size=(50, 2)), [[1000.0, 0.0]]])
    fake = RNG.uniform(-300, 300, size=(50, 2)) + [400, 0]
    assert precision_recall(real, fake, k=5).precision > 0.95
    got = density_coverage(real, fake, k=5)
    assert got.density < 0.5 and got.coverage < 0.5


@pytest.mark.parametrize(
    "real, fake, k, message",
    [
        (np.ones((5, 2)), np.ones((5, 3)), 3, "'real': 2, 'fake': 3"),
        (np.ones((5, 2)), np.ones((3, 2)), 3, r"1 … 2, got 3"),
        (np.ones((5, 2)), np.ones((5, 2)), 0, "got 0"),
        (np.ones((5, 2)), np.full((5, 2), np.inf), 3, "fake"),
        (np.ones(5), np.ones((5, 2)), 3, r"real.*\(5,\)"),
    ],
)
def test_bad_input_is_refused(real, fake, k, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(real, fake, k=k)


def test_density_needs_enough_real_vectors():
    with pytest.raises(ValueError, match="1 … 4, got 5"):
        density_coverage(np.ones((5, 2)), np.ones((9, 2)))
    with pytest.raises(ValueError, match="'real': 2, 'fake': 3"):
        density_coverage(np.ones((9, 2)), np.ones((9, 3)))


def test_held_out_data_must_not_be_training_data():
    train = RNG.normal(size=(10, 2))
    with pytest.raises(ValueError, match="half of the held-out"):
        nearest_ratio(train, train, train)
