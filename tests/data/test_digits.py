"""The real digits: exact values, a fair split, and an oracle that knows them."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from diffusion_jax.data import digits


@pytest.fixture(scope="module")
def splits():
    return {split: digits.load_arrays(split) for split in digits.SPLITS}


@pytest.fixture(scope="module")
def oracle():
    return digits.fit_oracle()


def _rows(image):
    return sorted(map(tuple, image.reshape(len(image), -1).tolist()))


def test_the_splits_are_the_whole_set_once(splits):
    real = load_digits().data / 8 - 1
    assert len(splits["train"]["image"]) == 1437 and len(splits["test"]["image"]) == 360
    both = np.concatenate([splits["train"]["image"], splits["test"]["image"]])
    assert _rows(both) == _rows(real)
    assert both.dtype == np.float32 and both.min() == -1.0 and both.max() == 1.0


def test_the_split_is_stratified_and_fixed(splits):
    counts = np.bincount(load_digits().target)
    test = np.bincount(splits["test"]["label"])
    assert np.abs(test - counts / 5).max() <= 1
    order = digits.split_indices(load_digits().target, "test")
    np.testing.assert_array_equal(order, digits.split_indices(load_digits().target, "test"))
    assert not set(order) & set(digits.split_indices(load_digits().target, "train"))


def test_labels_belong_to_their_images(splits):
    whole = load_digits()
    label_of = {
        tuple(row): label for row, label in zip(whole.data.tolist(), whole.target, strict=True)
    }
    for arrays in splits.values():
        pixels = ((arrays["image"] + 1) * 8).reshape(len(arrays["image"]), -1)
        assert [label_of[tuple(row)] for row in pixels.tolist()] == arrays["label"].tolist()


def test_grey_levels_survive_a_picture_file():
    values = np.arange(17, dtype=np.uint8)
    stored = digits.pixels_to_uint8(values)
    assert stored[0] == 0 and stored[-1] == 255 and len(set(stored.tolist())) == 17
    np.testing.assert_array_equal(digits.uint8_to_pixels(stored), values)
    with pytest.raises(ValueError, match="the value 7"):
        digits.uint8_to_pixels(np.array([0, 7], np.uint8))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'validation'"):
        digits.load_arrays("validation")


def test_the_oracle_knows_held_out_digits(oracle, splits):
    """99 % on real held-out digits; a tenth on labels that belong to other images."""
    test = splits["test"]
    assert oracle.accuracy(test["image"], test["label"]) >= 0.99
    shuffled = np.random.default_rng(0).permutation(test["label"])
    assert oracle.accuracy(test["image"], shuffled) <= 0.2


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (np.zeros((2, 64)), np.zeros(2, int), r"\(2, 64\)"),
        (np.zeros((2, 8, 8, 1)), np.zeros(3, int), r"\(3,\)"),
    ],
)
def test_the_oracle_refuses_other_shapes(oracle, images, labels, message):
    with pytest.raises(ValueError, match=message):
        oracle.accuracy(images, labels)


def test_the_oracle_is_sure_of_digits_and_not_of_gaussian_noise_with_their_moments(oracle, splits):
    """Images that have the mean and covariance of digits, and so a Fréchet distance near 0."""
    train, test = splits["train"]["image"], splits["test"]["image"]
    flat = train.reshape(len(train), -1)
    rng = np.random.default_rng(0)
    fit = rng.multivariate_normal(flat.mean(0), np.cov(flat.T), 500).reshape(-1, 8, 8, 1)
    assert np.mean(oracle.confidence(test) >= 0.8) >= 0.95
    assert np.mean(oracle.confidence(fit) >= 0.8) <= 0.7


def test_the_oracle_is_calibrated(oracle, splits):
    """A probability of p between two digits is right in about a share p of held-out digits."""
    test = splits["test"]
    sure = oracle.confidence(test["image"]) >= 0.9
    right = oracle.predict(test["image"]) == test["label"]
    assert right[sure].mean() >= 0.9 and right[sure].mean() > right[~sure].mean()
