"""Resizing of images as PyTorch does it, which released weights were trained with."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.types import Array


def _check(x: Array, height: int, width: int) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must be images of shape [B, H, W, C], got {x.shape}")
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1, got {height} and {width}")


def cubic_kernel(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Weight of a sample at a distance, for interpolation by cubic convolution.

    W(d) = (a + 2) d³ - (a + 3) d² + 1 for d <= 1, a d³ - 5a d² + 8a d - 4a for 1 < d < 2,
    else 0, where d = |distance|.

    Args:
      distance: in samples, of any shape.
      a: slope at distance 1; -0.75 in PyTorch, -0.5 in Keys' paper and in `jax.image.resize`.

    Returns:
      Weights of the shape of `distance`, float64.

    Source: Keys 1981 (doi:10.1109/TASSP.1981.1163711), eq. 15 before a is fixed.
    """
    d = np.abs(np.asarray(distance, np.float64))
    near = ((a + 2.0) * d - (a + 3.0)) * d * d + 1.0
    far = ((a * d - 5.0 * a) * d + 8.0 * a) * d - 4.0 * a
    return np.where(d <= 1.0, near, np.where(d < 2.0, far, 0.0))


@lru_cache(maxsize=64)
def _cubic_matrix(old: int, new: int) -> np.ndarray:
    """[new, old] weights; samples beyond the border repeat the border's."""
    matrix = np.zeros((new, old))
    # In float32 as PyTorch computes it: hundreds of pixels leave few digits for the distance.
    half, scale = np.float32(0.5), np.float32(old) / np.float32(new)
    position = scale * (np.arange(new, dtype=np.float32) + half) - half
    first = np.floor(position).astype(int)
    for tap in range(-1, 3):
        source = first + tap
        weights = cubic_kernel(position.astype(np.float64) - source)
        np.add.at(matrix, (np.arange(new), np.clip(source, 0, old - 1)), weights)
    return matrix.astype(np.float32)


def bicubic_resize(x: Array, height: int, width: int) -> Array:
    """Resizes by cubic convolution with a = -0.75, pixel centres aligned, without antialiasing.

    y[i, j] = Σ_kl W(p_i - k) W(q_j - l) x[k, l] with p_i = (i + ½) H / H' - ½ and q_j likewise
    (`cubic_kernel`); beyond the border the border's pixels are repeated.

    Args:
      x: [B, H, W, C].
      height, width: H' and W' of the result, in pixels.

    Returns:
      [B, H', W', C] of x's dtype.

    Raises:
      ValueError: if x is no image or a size is below 1.

    Source: Keys 1981 (doi:10.1109/TASSP.1981.1163711), eq. 15 with a = -0.75.
    """
    _check(x, height, width)
    rows, columns = _cubic_matrix(x.shape[1], height), _cubic_matrix(x.shape[2], width)
    y = jnp.einsum(
        "ih,jw,bhwc->bijc",
        rows,
        columns,
        x.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return y.astype(x.dtype)


def bilinear_resize(x: Array, height: int, width: int) -> Array:
    """Resizes by linear interpolation, pixel centres aligned, without antialiasing.

    y[i, j] = Σ_kl W(p_i - k) W(q_j - l) x[k, l] with W(d) = max(0, 1 - |d|), p_i = (i + ½) H / H'
    - ½ and q_j likewise; beyond the border the border's pixels are repeated.

    Args:
      x: [B, H, W, C].
      height, width: H' and W' of the result, in pixels.

    Returns:
      [B, H', W', C] of x's dtype.

    Raises:
      ValueError: if x is no image or a size is below 1.

    Source: none; PyTorch's mode "bilinear" with align_corners=False.
    """
    _check(x, height, width)
    shape = (x.shape[0], height, width, x.shape[3])
    return jax.image.resize(x, shape, "linear", antialias=False)


@lru_cache(maxsize=64)
def _corner_matrix(old: int, new: int) -> np.ndarray:
    """[new, old] weights of linear interpolation that keeps the first and the last sample."""
    position = np.linspace(0.0, old - 1, new) if new > 1 else np.zeros(1)
    low = np.minimum(np.floor(position).astype(int), max(old - 2, 0))
    matrix, rows = np.zeros((new, old)), np.arange(new)
    np.add.at(matrix, (rows, low), 1.0 - (position - low))
    np.add.at(matrix, (rows, np.minimum(low + 1, old - 1)), position - low)
    return matrix.astype(np.float32)


def bilinear_resize_corners(x: Array, height: int, width: int) -> Array:
    """Resizes linearly so that the corners' pixels stay where they are.

    y[i, j] = x at (i (H - 1) / (H' - 1), j (W - 1) / (W' - 1)), linear between pixels.

    Args:
      x: [B, H, W, C].
      height, width: H' and W' of the result, in pixels.

    Returns:
      [B, H', W', C] float32.

    Raises:
      ValueError: if x is no image or a size is below 1.

    Source: none; PyTorch's mode "bilinear" with align_corners=True.
    """
    _check(x, height, width)
    rows, columns = _corner_matrix(x.shape[1], height), _corner_matrix(x.shape[2], width)
    options = {"precision": jax.lax.Precision.HIGHEST}
    x = jnp.einsum("yh,bhwc->bywc", rows, jnp.asarray(x, jnp.float32), **options)
    return jnp.einsum("xw,bywc->byxc", columns, x, **options)


def _nearest_index(old: int, new: int) -> np.ndarray:
    """[new] the sample that each one repeats."""
    # In float32, since rounding decides where a position falls exactly between two samples.
    position = np.arange(new, dtype=np.float32) * (np.float32(old) / np.float32(new))
    return np.minimum(np.floor(position).astype(int), old - 1)


def _nearest(x: Array, axis: int, new: int) -> Array:
    index, factor = _nearest_index(x.shape[axis], new), new // x.shape[axis]
    if np.array_equal(index, np.arange(x.shape[axis]).repeat(factor)):
        # As a broadcast, since a gather is slow on accelerators, and its gradient a scatter.
        return jnp.repeat(x, factor, axis)
    return jnp.take(x, index, axis, mode="clip")


def nearest_resize(x: Array, height: int, width: int) -> Array:
    """Resizes by repeating and leaving out pixels: y[i, j] = x[⌊i H / H'⌋, ⌊j W / W'⌋].

    Args:
      x: [B, H, W, C].
      height, width: H' and W' of the result, in pixels.

    Returns:
      [B, H', W', C] of x's dtype.

    Raises:
      ValueError: if x is no image or a size is below 1.

    Source: none; PyTorch's mode "nearest", which does not align the pixels' centres.
    """
    _check(x, height, width)
    return _nearest(_nearest(jnp.asarray(x), 1, height), 2, width)
