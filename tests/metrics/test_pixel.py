"""PSNR and SSIM against closed forms and a direct evaluation of the definition."""

import numpy as np
import pytest

from diffusion_jax.metrics.pixel import psnr, ssim

RNG = np.random.default_rng(0)


def test_psnr_of_a_known_error():
    """An error of ±0.02 everywhere in [-1, 1]: 20 log10(2 / 0.02) = 40 dB."""
    a = RNG.uniform(-1, 1, (3, 4, 4, 2))
    signs = np.where(RNG.random(a.shape) < 0.5, -1, 1)
    np.testing.assert_allclose(psnr(a, a + 0.02 * signs), 40.0, rtol=1e-9)
    scaled = psnr(a / 2, a / 2 + 0.01 * signs, data_range=1.0)
    np.testing.assert_allclose(scaled, 40.0, rtol=1e-9)
    assert np.isposinf(psnr(a, a)).all()


def test_psnr_is_per_image():
    a = np.zeros((2, 4, 4, 1))
    b = a + np.array([0.2, 0.02]).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(psnr(a, b), [20.0, 40.0])


def _direct_ssim(a, b, data_range):
    """The definition at every pixel with a whole window, by loops over one channel."""
    y, x = np.mgrid[-5:6, -5:6]
    weights = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mp, mq = (weights * p).sum(), (weights * q).sum()
            vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
            cov = (weights * (p - mp) * (q - mq)).sum()
            values.append(
                (2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
            )
    return np.mean(values)


@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_ssim_agrees_with_the_definition(data_range):
    a = RNG.uniform(-1, 1, (2, 14, 13, 3))
    b = a + 0.3 * RNG.normal(size=a.shape)
    expected = [
        np.mean([_direct_ssim(p[..., c], q[..., c], data_range) for c in range(3)])
        for p, q in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(ssim(a, b, data_range=data_range), expected, rtol=1e-10)


def test_ssim_of_constant_images_has_a_closed_form():
    """Without structure only the luminance term is left: (2 p q + C1) / (p² + q² + C1)."""
    p, q, c1 = 0.5, 0.1, 0.02**2
    got = ssim(np.full((1, 12, 12, 1), p), np.full((1, 12, 12, 1), q))
    np.testing.assert_allclose(got, (2 * p * q + c1) / (p**2 + q**2 + c1), rtol=1e-9)


def test_ssim_of_equal_and_of_inverted_images():
    """A chequerboard has local mean 0 and variance 1: its negative has (C2 - 2) / (C2 + 2)."""
    board = np.where(np.indices((16, 16)).sum(axis=0) % 2, 1.0, -1.0)[None, :, :, None]
    np.testing.assert_allclose(ssim(board, board), 1.0)
    np.testing.assert_allclose(ssim(board, -board), (0.06**2 - 2) / (0.06**2 + 2), rtol=1e-4)


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    "a, b, message",
    [
        (np.zeros((1, 12, 12, 1)), np.zeros((1, 12, 11, 1)), r"\(1, 12, 11, 1\)"),
        (np.zeros((12, 12, 1)), np.zeros((12, 12, 1)), r"B, H, W, C"),
        (np.zeros((1, 12, 12, 1), np.uint8), np.zeros((1, 12, 12, 1), np.uint8), "first.*uint8"),
        (np.zeros((1, 12, 12, 1)), np.full((1, 12, 12, 1), np.nan), "second.*finite"),
    ],
)
def test_bad_input_is_refused(metric, a, b, message):
    with pytest.raises(ValueError, match=message):
        metric(a, b)


def test_ssim_needs_its_window_and_a_range():
    with pytest.raises(ValueError, match="11x11"):
        ssim(np.zeros((1, 8, 8, 1)), np.zeros((1, 8, 8, 1)))
    with pytest.raises(ValueError, match="got 0"):
        psnr(np.zeros((1, 8, 8, 1)), np.zeros((1, 8, 8, 1)), data_range=0.0)
