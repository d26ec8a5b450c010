"""Kernel distance: its definition by loops, its expectation by enumeration."""

import itertools

import numpy as np
import pytest

from diffusion_jax.metrics import kernel
from diffusion_jax.metrics.kernel import kernel_distance, squared_mmd

RNG = np.random.default_rng(0)


def _kernel(x, y):
    return (x @ y / len(x) + 1) ** 3


def _by_loops(a, b):
    def mean(pairs):
        return np.mean([_kernel(x, y) for x, y in pairs])

    return (
        mean(itertools.permutations(a, 2))
        + mean(itertools.permutations(b, 2))
        - 2 * mean(itertools.product(a, b))
    )


def test_all_pairs_agree_with_the_definition(monkeypatch):
    monkeypatch.setattr(kernel, "_ROWS", 4)  # several blocks of rows
    a, b = RNG.normal(size=(9, 3)), RNG.normal(size=(11, 3)) + 0.5
    assert squared_mmd(a, b) == pytest.approx(_by_loops(a, b), rel=1e-12)
    images = a.reshape(9, 1, 3, 1)
    assert squared_mmd(images, b) == squared_mmd(a, b)


def test_the_estimate_is_unbiased():
    """Its mean over every possible pair of samples is the MMD² of the distributions."""
    values = np.array([[0.0], [1.0], [3.0]])
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.25, 0.75])
    gram = (values @ values.T + 1) ** 3
    expected = (p - q) @ gram @ (p - q)

    total = 0.0
    for i, j, k, m in itertools.product(range(3), repeat=4):
        chance = p[i] * p[j] * q[k] * q[m]
        total += chance * squared_mmd(values[[i, j]], values[[k, m]])
    assert total == pytest.approx(expected, rel=1e-12)


def test_point_masses_have_a_closed_form_and_equal_sets_score_below_zero():
    x, y = np.array([1.0, 2.0]), np.array([0.0, 3.0])
    expected = _kernel(x, x) + _kernel(y, y) - 2 * _kernel(x, y)
    assert squared_mmd(np.stack([x] * 3), np.stack([y] * 4)) == pytest.approx(expected)
    same = RNG.normal(size=(20, 4))
    assert squared_mmd(same, same) < 0


def test_subsets_average_to_the_whole():
    a, b = RNG.normal(size=(60, 3)), RNG.normal(size=(50, 3)) + 1
    whole = squared_mmd(a, b)
    everything = kernel_distance(a, b[:60], subsets=3, subset_size=50, seed=1)
    assert everything.std > 0  # of a, 50 of 60 are drawn
    exact = kernel_distance(a[:50], b, subsets=3, subset_size=50)
    assert exact.mean == pytest.approx(squared_mmd(a[:50], b), rel=1e-12)
    assert exact.std == pytest.approx(0, abs=1e-9)
    many = kernel_distance(a, b, subsets=2000, subset_size=20)
    assert many.mean == pytest.approx(whole, abs=4 * many.std / np.sqrt(2000))


def test_the_seed_decides():
    a, b = RNG.normal(size=(30, 3)), RNG.normal(size=(30, 3))
    first = kernel_distance(a, b, subsets=4, subset_size=10, seed=3)
    assert first == kernel_distance(a, b, subsets=4, subset_size=10, seed=3)
    assert first == kernel_distance(a, b, subsets=4, subset_size=10, seed=np.random.default_rng(3))
    assert first != kernel_distance(a, b, subsets=4, subset_size=10, seed=4)


@pytest.mark.parametrize(
    "a, b, options, message",
    [
        (np.ones((9, 2)), np.ones((9, 3)), {}, "2 and 3 dimensions"),
        (np.ones((9, 2)), np.ones((1, 2)), {}, r"second.*\(1, 2\)"),
        (np.full((9, 2), np.nan), np.ones((9, 2)), {}, "first.*finite"),
        (np.ones((9, 2)), np.ones((7, 2)), {}, "2 … 7 for 9 and 7 vectors, got 1000"),
        (np.ones((9, 2)), np.ones((9, 2)), {"subset_size": 3, "subsets": 0}, "got 0"),
    ],
)
def test_bad_input_is_refused(a, b, options, message):
    with pytest.raises(ValueError, match=message):
        kernel_distance(a, b, **options)
