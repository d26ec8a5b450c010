"""Resizing: numbers that PyTorch printed, and the formula pixel by pixel."""

import jax
import numpy as np
import pytest

from diffusion_jax.core.resize import (
    bicubic_resize,
    bilinear_resize,
    cubic_kernel,
    nearest_resize,
)

RESIZES = (bicubic_resize, bilinear_resize, nearest_resize)
ROW = np.asarray([0.0, 1.0, 4.0, 2.0, -3.0], np.float32).reshape(1, 1, 5, 1)
# torch 2.13: interpolate(tensor(row)[None, None, None], (1, n), mode="bicubic").
PYTORCH = {
    3: [0.1481, 4.0000, -1.5370],
    7: [-0.0787, 0.2653, 1.9883, 4.0000, 3.2055, -0.3090, -3.3936],
}
# torch 2.13: interpolate(arange(26.)[None, None, None], (1, 22)), where 13 is rounded down to 12.
NEAREST_26_TO_22 = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 14, 15, 16, 17, 18, 20, 21, 22, 23, 24]


@pytest.mark.parametrize("width", PYTORCH)
def test_bicubic_gives_pytorchs_numbers(width):
    ours = bicubic_resize(ROW, 1, width)
    np.testing.assert_allclose(ours[0, 0, :, 0], PYTORCH[width], atol=5e-5)


def test_bicubic_is_the_formula_in_two_dimensions():
    """Pixel by pixel in float64, with another size in every direction, up and down."""
    x = np.random.default_rng(0).normal(size=(2, 5, 8, 3)).astype(np.float32)
    ours = np.asarray(bicubic_resize(x, 7, 3))
    expected = np.zeros((2, 7, 3, 3))
    for i in range(7):
        for j in range(3):
            p, q = (i + 0.5) * 5 / 7 - 0.5, (j + 0.5) * 8 / 3 - 0.5
            for k in range(int(np.floor(p)) - 1, int(np.floor(p)) + 3):
                for m in range(int(np.floor(q)) - 1, int(np.floor(q)) + 3):
                    weight = cubic_kernel(p - k) * cubic_kernel(q - m)
                    expected[:, i, j] += weight * x[:, np.clip(k, 0, 4), np.clip(m, 0, 7)]
    np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_cubic_kernel_interpolates_and_sums_to_one():
    np.testing.assert_array_equal(cubic_kernel(np.asarray([0, 1, -1, 2, 3])), [1, 0, 0, 0, 0])
    for offset in (0.1, 0.5, 0.9):
        weights = cubic_kernel(offset - np.arange(-1, 3))
        np.testing.assert_allclose(weights.sum(), 1.0, atol=1e-12)
    # The slope at distance 1 is a.
    np.testing.assert_allclose(cubic_kernel(1 + 1e-6) / 1e-6, -0.75, atol=1e-4)


@pytest.mark.parametrize("width", PYTORCH)
def test_bilinear_interpolates_between_centres_and_repeats_the_border(width):
    centres = (np.arange(width) + 0.5) * 5 / width - 0.5
    expected = np.interp(centres, np.arange(5), ROW.ravel())
    np.testing.assert_allclose(bilinear_resize(ROW, 1, width).ravel(), expected, atol=1e-6)


def test_nearest_gives_pytorchs_numbers_where_rounding_decides():
    x = np.arange(26, dtype=np.float32).reshape(1, 1, 26, 1)
    ours = nearest_resize(x, 2, 22)
    np.testing.assert_array_equal(ours[0, 1, :, 0], NEAREST_26_TO_22)


def test_nearest_repeats_by_whole_factors_without_a_gather():
    """A gather is slow on accelerators, and so is the scatter that is its gradient."""
    x = np.random.default_rng(2).normal(size=(2, 2, 3, 2)).astype(np.float32)
    np.testing.assert_array_equal(nearest_resize(x, 4, 9), x.repeat(2, axis=1).repeat(3, axis=2))
    assert "gather" not in str(jax.make_jaxpr(lambda x: nearest_resize(x, 4, 9))(x))
    assert "gather" in str(jax.make_jaxpr(lambda x: nearest_resize(x, 4, 8))(x))


def test_the_same_size_is_the_identity_and_the_dtype_stays():
    x = np.random.default_rng(1).normal(size=(1, 4, 6, 2)).astype(np.float16)
    for resize in RESIZES:
        same = resize(x, 4, 6)
        assert same.dtype == x.dtype
        np.testing.assert_array_equal(same, x)


@pytest.mark.parametrize("resize", RESIZES)
def test_what_is_no_image_or_no_size_is_refused(resize):
    with pytest.raises(ValueError, match=r"\[B, H, W, C\], got \(1, 5\)"):
        resize(ROW[0, 0, :, :].T, 2, 2)
    with pytest.raises(ValueError, match="at least 1, got 0 and 2"):
        resize(ROW, 0, 2)
