"""8 bits and resizing, as PyTorch and TensorFlow 1 do them (recorded in data/)."""

from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_jax.metrics.preprocess import resize_matrix, to_byte_range

RECORDED = np.load(Path(__file__).parent / "data" / "inception.npz", allow_pickle=False)


@pytest.mark.parametrize("method", ["bilinear", "bilinear-corner"])
@pytest.mark.parametrize("case, size", [(0, (17, 11)), (1, (4, 3)), (2, (7, 5)), (3, (1, 2))])
def test_resizing_is_that_of_the_peers(method, case, size):
    image = RECORDED["resize_input"]
    rows = resize_matrix(image.shape[0], size[0], method=method)
    columns = resize_matrix(image.shape[1], size[1], method=method)
    expected = RECORDED[f"resize_{method}_{case}"]
    # The peer that imitates TensorFlow computes its weights in float32, as TensorFlow does.
    np.testing.assert_allclose(rows @ image @ columns.T, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("method", ["bilinear", "bilinear-corner"])
def test_an_image_of_the_right_size_stays(method):
    np.testing.assert_array_equal(resize_matrix(6, 6, method=method), np.eye(6))
    np.testing.assert_array_equal(resize_matrix(1, 3, method=method), np.ones((3, 1)))


def test_every_byte_comes_back():
    """Real pictures are bytes; x = b / 127.5 - 1 is inexact, and rounding must undo that."""
    byte = np.arange(256)
    x = (byte / 127.5 - 1).astype(np.float32)
    np.testing.assert_array_equal(to_byte_range(x, "nearest"), byte)
    np.testing.assert_array_equal(jax.jit(lambda x: to_byte_range(x, "nearest"))(x), byte)


def test_roundings_by_hand():
    # (x + 1) 127.5 = 127.5, 63.75, 191.25, below 0, above 255
    x = np.array([0.0, -0.5, 0.5, -1.2, 1.2], np.float32)
    np.testing.assert_array_equal(to_byte_range(x, "nearest"), [128, 64, 191, 0, 255])
    np.testing.assert_array_equal(to_byte_range(x, "truncate"), [127, 63, 191, 0, 255])
    np.testing.assert_array_equal(to_byte_range(x, "none"), [127.5, 63.75, 191.25, 0, 255])


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="'floor'"):
        to_byte_range(np.zeros(2, np.float32), "floor")
    with pytest.raises(ValueError, match="uint8"):
        to_byte_range(np.zeros(2, np.uint8), "nearest")
    with pytest.raises(ValueError, match="0 and 3"):
        resize_matrix(0, 3, method="bilinear")
    with pytest.raises(ValueError, match="'bicubic'"):
        resize_matrix(2, 3, method="bicubic")
