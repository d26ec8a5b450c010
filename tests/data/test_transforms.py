"""Ranges, sizes, flips, contact sheets and the checks of batches."""

import numpy as np
import pytest

from diffusion_jax.data import transforms


def test_all_bytes_survive_the_round_trip_and_the_ends_are_exact():
    values = np.arange(256, dtype=np.uint8)
    floats = transforms.to_float(values)
    assert floats.dtype == np.float32 and floats[0] == -1.0 and floats[-1] == 1.0
    np.testing.assert_array_equal(transforms.to_uint8(floats), values)


def test_to_uint8_rounds_and_clips():
    # Bytes are 127.5 (x + 1): 0.6 and 0.4 above zero, and two values outside.
    x = np.array([0.6 / 127.5 - 1, 0.4 / 127.5 - 1, 1.5, -7.0])
    np.testing.assert_array_equal(transforms.to_uint8(x), [1, 0, 255, 0])


@pytest.mark.parametrize(
    "function, argument, message",
    [
        (transforms.to_float, np.zeros(2, np.float32), "float32"),
        (transforms.to_uint8, np.zeros(2, np.uint8), "uint8"),
        (transforms.to_uint8, np.array([0.0, np.nan]), "1 values"),
    ],
)
def test_conversions_refuse_the_other_kind(function, argument, message):
    with pytest.raises(ValueError, match=message):
        function(argument)


def test_center_crop_takes_the_middle():
    image = np.arange(5 * 6).reshape(5, 6, 1)
    np.testing.assert_array_equal(
        transforms.center_crop(image, 3, 2)[..., 0], [[8, 9], [14, 15], [20, 21]]
    )
    with pytest.raises(ValueError, match="5x6"):
        transforms.center_crop(image, 6, 6)


@pytest.mark.parametrize("shape", [(12, 36, 3), (36, 12, 1), (12, 12, 3)])
def test_resize_keeps_the_aspect_ratio(shape):
    """A linear ramp stays linear: scaled to the shorter side, the middle is cut out."""
    height, width, channels = shape
    ramp = np.linspace(0, 240, max(shape), dtype=np.float64)
    image = ramp[None, :] if width == max(shape) else ramp[:, None]
    image = np.broadcast_to(image[..., None], shape).astype(np.uint8)
    small = transforms.resize_and_crop(image, 6)
    assert small.shape == (6, 6, channels) and small.dtype == np.uint8
    along = small[3, :, 0] if width == max(shape) else small[:, 3, 0]
    step = 240 / (max(shape) - 1) * min(height, width) / 6
    # The ends are bent by the kernel where it meets the border.
    np.testing.assert_allclose(np.diff(along[1:-1].astype(float)), step, atol=2)
    assert abs(along.astype(float).mean() - 120) < 2


def test_an_image_of_the_right_size_is_not_touched():
    image = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(transforms.resize_and_crop(image, 9), image)
    for size, message in ((0, "at least 1"), (3, "float")):
        with pytest.raises(ValueError, match=message):
            transforms.resize_and_crop(image if size == 0 else image.astype(float), size)


def test_image_grid_places_images_row_by_row():
    images = np.stack([np.full((2, 3, 1), i * 10, np.uint8) for i in range(1, 6)])
    grid = transforms.image_grid(images, 3)
    assert grid.shape == (4, 9, 1)
    np.testing.assert_array_equal(grid[::2, ::3, 0], [[10, 20, 30], [40, 50, 0]])
    assert transforms.image_grid(np.ones((1, 2, 2, 3), np.float32), 1).max() == 255
    with pytest.raises(ValueError, match="0 columns"):
        transforms.image_grid(images, 0)


GOOD = np.zeros((2, 8, 8, 3), np.float32)


def _with(value):
    images = GOOD.copy()
    images[1, 3, 4, 2] = value
    return images


@pytest.mark.parametrize(
    "images, message",
    [
        (GOOD[0], r"\(8, 8, 3\)"),
        (GOOD[:0], "no pixels"),
        (GOOD.transpose(0, 3, 1, 2), "NCHW"),
        (GOOD.astype(np.uint8), "to_float"),
        (GOOD.astype(np.float64), "float64"),
        (GOOD + np.float32(np.nan), "384 of 384"),
        (_with(-np.inf), "1 of 384 values"),
        (_with(np.nan), "1 of 384 values"),
        (_with(-1.01), "-1.01"),
        (GOOD + np.float32(1.01), "1.01"),
        (np.linspace(0, 255, 384, dtype=np.float32).reshape(2, 8, 8, 3), "divide by 127.5"),
    ],
)
def test_check_images_says_what_is_wrong(images, message):
    with pytest.raises(ValueError, match=message):
        transforms.check_images(images)


def test_check_images_accepts_the_whole_range():
    transforms.check_images(np.linspace(-1, 1, 384, dtype=np.float32).reshape(2, 8, 8, 3))


def test_check_labels():
    transforms.check_labels(np.array([0, 9]), 10)
    for labels, message in (
        (np.array([10]), "10 … 10"),
        (np.array([-1, 0]), "-1 … 0"),
        (np.array([0.0]), "float64"),
        (np.zeros((2, 1), int), r"\(2, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            transforms.check_labels(labels, 10)
