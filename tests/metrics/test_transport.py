"""Sliced Wasserstein and energy distance against sorting, brute force and closed forms."""

import math

import numpy as np
import pytest

from diffusion_jax.metrics import (
    EnergyDistance,
    SlicedWasserstein,
    energy_distance,
    sliced_wasserstein,
)
from diffusion_jax.metrics.sliced import directions


def draws(count, dim=2, seed=0, scale=1.0, shift=0.0):
    return shift + scale * np.random.default_rng(seed).standard_normal((count, dim))


# Sliced Wasserstein.


def test_in_one_dimension_it_is_the_distance_of_the_sorted_points():
    a, b = draws(100, 1), draws(100, 1, seed=1, shift=0.5)
    by_sorting = math.sqrt(
        sum((x - y) ** 2 for x, y in zip(sorted(a[:, 0]), sorted(b[:, 0]), strict=True)) / 100
    )
    assert abs(sliced_wasserstein(a, b, num_directions=3) - by_sorting) < 1e-12


def test_no_matching_is_cheaper_than_the_sorted_one():
    """Optimal transport in one dimension, by trying every matching of five points."""
    from itertools import permutations

    a, b = draws(5, 1), draws(5, 1, seed=1)
    best = min(np.mean((a[:, 0] - b[list(p), 0]) ** 2) for p in permutations(range(5)))
    assert abs(sliced_wasserstein(a, b) - math.sqrt(best)) < 1e-12


def test_of_shifted_points_it_is_the_mean_shift_along_the_lines():
    """W2² along θ of a set and the same set moved by m is (θᵀm)²."""
    a, m = draws(50, 3), np.asarray([1.0, -2.0, 0.5])
    lines = directions(7, 3, seed=5)
    expected = math.sqrt(np.mean((lines @ m) ** 2))
    assert abs(sliced_wasserstein(a + m, a, num_directions=7, seed=5) - expected) < 1e-12


def test_of_two_gaussians_it_is_the_closed_form():
    """W2² of N(0, 1) and N(m, s²) is m² + (1 - s)² along every line of an isotropic pair."""
    a, b = draws(200_000), draws(200_000, seed=1, scale=1.5)
    assert abs(sliced_wasserstein(a, b) - 0.5) < 0.01


def test_the_order_of_points_and_sets_does_not_matter():
    a, b = draws(64), draws(64, seed=1, shift=1.0)
    assert sliced_wasserstein(a, b) == pytest.approx(
        sliced_wasserstein(b[::-1], a[::-1]), rel=1e-12
    )
    assert sliced_wasserstein(a, a[::-1]) < 1e-15


def test_directions_are_unit_vectors_without_a_preference():
    lines = directions(20_000, 3)
    np.testing.assert_allclose(np.linalg.norm(lines, axis=1), 1.0, rtol=0, atol=1e-12)
    np.testing.assert_allclose(lines.T @ lines / len(lines), np.eye(3) / 3, rtol=0, atol=0.01)


# Energy distance.


def brute_force(a, b):
    def mean(first, second, pairs):
        total = sum(math.dist(first[i], second[j]) for i, j in pairs)
        return total / len(pairs)

    every = [(i, j) for i in range(len(a)) for j in range(len(b))]
    different = [[(i, j) for i in range(len(s)) for j in range(len(s)) if i != j] for s in (a, b)]
    return 2 * mean(a, b, every) - mean(a, a, different[0]) - mean(b, b, different[1])


def test_energy_distance_is_the_sum_over_all_pairs():
    a, b = draws(11, 3), draws(7, 3, seed=1, shift=0.4)
    assert abs(energy_distance(a, b) - brute_force(a, b)) < 1e-7


def mean_absolute(mean, std):
    """E|Z| of Z ~ N(mean, std²), the folded normal."""
    ratio = mean / std
    density = math.exp(-0.5 * ratio**2) / math.sqrt(2 * math.pi)
    return 2 * std * density + mean * math.erf(ratio / math.sqrt(2))


@pytest.mark.parametrize("shift, scale", [(1.0, 1.0), (0.0, 2.0), (0.7, 0.5)])
def test_of_two_gaussians_on_the_line_it_is_the_closed_form(shift, scale):
    """Differences of N(0, 1) and N(m, s²) are normal, and E|Z| is the folded normal's mean."""
    across = mean_absolute(shift, math.hypot(1.0, scale))
    expected = (
        2 * across - mean_absolute(0.0, math.sqrt(2)) - mean_absolute(0.0, math.sqrt(2) * scale)
    )
    values = [
        energy_distance(
            draws(1500, 1, seed=2 * i), draws(1500, 1, seed=2 * i + 1, scale=scale, shift=shift)
        )
        for i in range(6)
    ]
    error = np.std(values, ddof=1) / math.sqrt(6)
    assert abs(np.mean(values) - expected) < 4 * error and error < 0.06 * expected


def test_it_is_zero_on_average_for_one_distribution():
    """Unbiased: the mean over many small sets is 0 within its standard error."""
    values = [energy_distance(draws(20, seed=2 * i), draws(30, seed=2 * i + 1)) for i in range(400)]
    error = np.std(values) / 20
    assert abs(np.mean(values)) < 4 * error and min(values) < 0


def test_far_from_the_origin_it_keeps_its_digits():
    a, b = draws(40), draws(40, seed=1, shift=1.0)
    assert energy_distance(a + 1e6, b + 1e6) == pytest.approx(energy_distance(a, b), abs=1e-7)


def test_blocks_do_not_change_the_sum(monkeypatch):
    a, b = draws(33), draws(21, seed=1)
    at_once = energy_distance(a, b)
    monkeypatch.setattr("diffusion_jax.metrics.energy._BLOCK", 40)
    assert energy_distance(a, b) == pytest.approx(at_once, abs=1e-7)


@pytest.mark.parametrize("metric", [sliced_wasserstein, energy_distance])
def test_what_cannot_be_compared_is_refused_and_divergence_is_infinite(metric):
    a = draws(8)
    with pytest.raises(ValueError, match="shape|points"):
        metric(a, draws(8, 3))
    with pytest.raises(ValueError, match="finite"):
        metric(a, np.full((8, 2), np.nan))
    assert metric(np.where(np.arange(8)[:, None] == 3, np.nan, a), a) == math.inf
    with pytest.raises(ValueError, match="expected"):
        metric(np.zeros((0, 2)), np.zeros((0, 2)))


def test_one_true_set_serves_many():
    a, b = draws(32), draws(32, seed=1)
    assert SlicedWasserstein(b)(a) == sliced_wasserstein(a, b)
    assert EnergyDistance(b)(a) == energy_distance(a, b)
