"""Inception score: closed forms, the definition by scipy, and streams."""

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from diffusion_jax.metrics.class_score import ClassStats, inception_score

RNG = np.random.default_rng(0)


def _by_definition(probs):
    return np.exp(np.mean([entropy(p, probs.mean(axis=0)) for p in probs]))


def test_certain_and_even_classes_score_their_number():
    """One-hot rows hold zeros, at which p log p is 0."""
    assert inception_score(np.eye(7), splits=1) == pytest.approx((7.0, 0.0))
    assert inception_score(np.tile(np.eye(4), (5, 1)), splits=5) == pytest.approx((4.0, 0.0))


def test_one_class_and_no_opinion_score_one():
    assert inception_score(np.tile(np.eye(3)[:1], (8, 1)), splits=2) == pytest.approx((1.0, 0.0))
    assert inception_score(np.full((8, 5), 0.2), splits=2) == pytest.approx((1.0, 0.0))


def test_two_opposite_opinions_have_a_closed_form():
    """(p, 1 - p) and (1 - p, p): exp(log 2 - H(p))."""
    p = 0.9
    expected = 2 * np.exp(p * np.log(p) + (1 - p) * np.log(1 - p))
    assert inception_score([[p, 1 - p], [1 - p, p]], splits=1).mean == pytest.approx(expected)


def test_splits_agree_with_the_definition():
    """53 images in 10 splits of 5 or 6: split i begins at image 53 i // 10."""
    probs = softmax(2 * RNG.normal(size=(53, 6)), axis=1)
    bounds = [53 * i // 10 for i in range(11)]
    parts = [_by_definition(probs[a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    got = inception_score(probs)
    assert got.mean == pytest.approx(np.mean(parts), rel=1e-12)
    assert got.std == pytest.approx(np.std(parts), rel=1e-12)


def _stream(probs, cuts, split_size=20):
    stats = ClassStats.empty(probs.shape[1], split_size=split_size)
    for part in np.split(probs, cuts):
        stats = stats.update(part)
    return stats


def test_a_stream_scores_like_the_whole():
    probs = softmax(2 * RNG.normal(size=(60, 6)), axis=1).astype(np.float32)
    for cuts in ([], [1, 25, 59], range(7, 60, 7)):
        assert _stream(probs, cuts).score() == pytest.approx(inception_score(probs, splits=3))
    # A last split of 10 counts like the two of 20.
    parts = [_by_definition(part) for part in np.split(probs[:50].astype(np.float64), [20, 40])]
    assert _stream(probs[:50], [33]).score().mean == pytest.approx(np.mean(parts), rel=1e-6)


def test_a_stream_can_be_left_and_taken_up():
    probs = softmax(RNG.normal(size=(45, 4)), axis=1)
    left = ClassStats.from_dict(_stream(probs[:33], [10]).to_dict())
    whole, resumed = _stream(probs, [10, 33]), left.update(probs[33:])
    assert resumed.count == 45 and resumed.score() == whole.score()
    empty = ClassStats.from_dict(ClassStats.empty(4).to_dict())
    assert empty.count == 0 and empty.split_size == 5000


@pytest.mark.parametrize(
    "probs, message",
    [
        (np.ones(3), r"\(3,\)"),
        (np.ones((2, 3)), "sum to 1"),
        (np.array([[1.5, -0.5]]), "sum to 1"),
        (np.array([[np.nan, 1.0]]), "sum to 1"),
    ],
)
def test_what_is_no_probability_is_refused(probs, message):
    with pytest.raises(ValueError, match=message):
        inception_score(probs, splits=1)
    with pytest.raises(ValueError, match=message):
        ClassStats.empty(3).update(probs)


def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match="1 … 2, got 10"):
        inception_score(np.eye(2))
    with pytest.raises(ValueError, match="expected 3 classes, got 2"):
        ClassStats.empty(3).update(np.eye(2))
    with pytest.raises(ValueError, match="got none"):
        ClassStats.empty(3).score()
    with pytest.raises(ValueError, match="got 3, 0"):
        ClassStats.empty(3, split_size=0)
    arrays = ClassStats.empty(2, split_size=2).update(np.eye(2)).to_dict()
    with pytest.raises(ValueError, match=r"lack \['totals'\]"):
        ClassStats.from_dict({k: v for k, v in arrays.items() if k != "totals"})
    with pytest.raises(ValueError, match="9 images in splits of 2"):
        ClassStats.from_dict({**arrays, "count": np.asarray(9)})
