"""Pixel metrics of image pairs: PSNR and SSIM."""

import numpy as np

_WINDOW = 11
_WINDOW_STD = 1.5
_K1, _K2 = 0.01, 0.03


def _pair(a: np.ndarray, b: np.ndarray, data_range: float) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.ndim != 4 or not a.size:
        raise ValueError(f"two equal batches [B, H, W, C] are needed, got {a.shape} and {b.shape}")
    if data_range <= 0.0:
        raise ValueError(f"data_range must be above 0, got {data_range}")
    for name, images in (("first", a), ("second", b)):
        # uint8 with the default range of 2 would give a plausible but wrong number.
        if not np.issubdtype(images.dtype, np.floating) or not np.isfinite(images).all():
            raise ValueError(f"the {name} batch must be finite floats, got {images.dtype}")
    return a.astype(np.float64), b.astype(np.float64)


def psnr(a: np.ndarray, b: np.ndarray, *, data_range: float = 2.0) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair in dB, infinite for equal images.

    10 log₁₀(data_range² / mean (a - b)²).

    Args:
      a, b: [B, H, W, C] floats.
      data_range: difference of the largest and the smallest possible value; 2 for [-1, 1].

    Returns:
      [B] float64.

    Raises:
      ValueError: if the shapes differ or the values are no finite floats.
    """
    a, b = _pair(a, b, data_range)
    error = ((a - b) ** 2).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(data_range**2 / error)


def _blur(images: np.ndarray) -> np.ndarray:
    """Gaussian mean around each pixel whose window lies inside the image."""
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(offsets**2) / (2.0 * _WINDOW_STD**2))
    weights /= weights.sum()
    for axis in (1, 2):
        windows = np.lib.stride_tricks.sliding_window_view(images, _WINDOW, axis=axis)
        images = windows @ weights
    return images


def ssim(a: np.ndarray, b: np.ndarray, *, data_range: float = 2.0) -> np.ndarray:
    """Structural similarity of each pair, at most 1.

    Mean over pixels and channels of
    (2 μ_a μ_b + C₁)(2 σ_ab + C₂) / ((μ_a² + μ_b² + C₁)(σ_a² + σ_b² + C₂)),
    C₁ = (0.01 L)², C₂ = (0.03 L)², L = data_range; the moments are weighted by a Gaussian
    window of 11x11 pixels with standard deviation 1.5 that lies inside the image.

    Args:
      a, b: [B, H, W, C] floats with H and W at least 11.
      data_range: L, difference of the largest and the smallest possible value; 2 for [-1, 1].

    Returns:
      [B] float64.

    Raises:
      ValueError: if the shapes differ, the images are smaller than the window or the values
        are no finite floats.

    Source: Wang et al. 2004 (doi:10.1109/TIP.2003.819861), eq. 13-17.
    """
    a, b = _pair(a, b, data_range)
    if min(a.shape[1:3]) < _WINDOW:
        raise ValueError(f"SSIM needs images of at least 11x11 pixels, got {a.shape[1:3]}")
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    luminance = (2.0 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2.0 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean(axis=(1, 2, 3))
