"""Feature streams: batches, interruption, two processes, and what is kept."""

import numpy as np
import pytest

from diffusion_jax.metrics.arrays import read_arrays, write_arrays
from diffusion_jax.metrics.features import Feature
from diffusion_jax.metrics.frechet import GaussianStats, frechet_distance
from diffusion_jax.metrics.reference import save_reference
from diffusion_jax.metrics.stream import FeatureStream

RNG = np.random.default_rng(0)
PIXELS = Feature("pixels")
X = RNG.normal(size=(30, 6)).astype(np.float32)


def _stream(parts, keep=0):
    stream = FeatureStream(PIXELS, (2, 3), keep=keep)
    for part in parts:
        stream = stream.update(part)
    return stream


@pytest.mark.parametrize("keep", [0, 1, 13, 100])
@pytest.mark.parametrize("cuts", [[], [13], [1, 12, 20]])
def test_all_are_counted_and_the_first_are_kept(keep, cuts):
    stream = _stream(np.split(X, cuts), keep)
    assert stream.count == 30
    np.testing.assert_allclose(stream.stats.covariance, np.cov(X.T), rtol=1e-6, atol=1e-6)
    if keep:
        np.testing.assert_array_equal(stream.features, X[:keep])
        assert stream.features.dtype == np.float32
    else:
        with pytest.raises(ValueError, match="keep is 0, count 30"):
            _ = stream.features


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_an_interrupted_stream_ends_bit_by_bit_like_a_whole_one(tmp_path, stop):
    parts = np.split(X, [7, 11])
    whole = _stream(parts, keep=10)
    write_arrays(tmp_path / "state.npz", _stream(parts[:stop], keep=10).to_dict())
    resumed = FeatureStream(PIXELS, (2, 3), keep=10).resumed(read_arrays(tmp_path / "state.npz"))
    assert resumed.count == sum(map(len, parts[:stop]))
    for part in parts[stop:]:
        resumed = resumed.update(part)
    np.testing.assert_array_equal(resumed.stats.scatter, whole.stats.scatter)
    np.testing.assert_array_equal(resumed.stats.mean, whole.stats.mean)
    np.testing.assert_array_equal(resumed.features, whole.features)


def test_a_stream_that_was_declared_otherwise_is_not_taken_up():
    stored = _stream([X], keep=10).to_dict()
    for other, words in (
        (FeatureStream(PIXELS, (2, 3), keep=11), "keep 10, this one 11"),
        (FeatureStream(PIXELS, (3, 2), keep=10), r"image_size \[2 3\]"),
        (FeatureStream(Feature("pixels", "v2"), (2, 3), keep=10), "feature"),
    ):
        with pytest.raises(ValueError, match=words):
            other.resumed(stored)
    ours = FeatureStream(PIXELS, (2, 3), keep=10)
    with pytest.raises(ValueError, match="keep nothing"):
        ours.resumed({k: v for k, v in stored.items() if k != "keep"})
    with pytest.raises(ValueError, match=r"features \(10, 6\), got none"):
        ours.resumed({k: v for k, v in stored.items() if k != "kept"})
    with pytest.raises(ValueError, match="scatter"):
        ours.resumed({k: v for k, v in stored.items() if k != "scatter"})


@pytest.mark.parametrize("cut", [0, 4, 25, 30])
def test_two_processes_merge(cut):
    a, b = (_stream([part] if len(part) else [], keep=12) for part in (X[:cut], X[cut:]))
    merged = a.merge(b)
    assert merged.count == 30
    np.testing.assert_array_equal(merged.features, X[:12])
    np.testing.assert_allclose(merged.stats.covariance, np.cov(X.T), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="different keep do not merge: 12, 5"):
        a.merge(FeatureStream(PIXELS, (2, 3), keep=5))


def test_a_stream_is_scored_under_its_name(tmp_path):
    real = GaussianStats.of(RNG.normal(size=(40, 6)))
    reference = save_reference(
        tmp_path / "r.npz", real, feature=PIXELS, image_size=(2, 3), source="noise"
    )
    stream = _stream([X])
    score = stream.frechet(reference)
    assert score.label == "Fréchet distance over pixels" and score.num_samples == 30
    assert score.value == frechet_distance(GaussianStats.of(X), real)
    with pytest.raises(ValueError, match="do not compare: image_size"):
        FeatureStream(PIXELS, (3, 2)).frechet(reference)
    with pytest.raises(ValueError, match="at least 2 feature vectors, got 0"):
        FeatureStream(PIXELS, (2, 3)).frechet(reference)


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match="6 and 5"):
        _stream([X, X[:, :5]])
    with pytest.raises(ValueError, match="NaN"):
        _stream([np.full((2, 6), np.nan)])
    with pytest.raises(ValueError, match="got -1"):
        FeatureStream(PIXELS, (2, 3), keep=-1)
