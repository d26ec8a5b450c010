"""3x3 convolutions of large layers, in forms that take a CPU less time than XLA's."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.core.types import Array

# Compiling the transforms of a shape takes some tenths of a second. At that many products for one
# image and one element of the kernel, a dozen calls save as much.
WINOGRAD_FROM = 2**28
# Of kernels with that many channels in times out, XLA's convolution of a small image takes twice as
# long as their product with the nine pixels around each.
SINGLE_PRODUCT_FROM = 2**19
# With few channels the transforms take what the products save.
CHANNELS_FROM = 64
# What does not fit is transformed in bands of rows, of a quarter of it at most.
BAND_BYTES = 32 * 2**20


def _xla_conv(x: Array, kernel: Array) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


def _derivative_of_xla(conv: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """conv, but differentiated as XLA's: its own derivative keeps what it makes of the image."""
    conv = jax.custom_jvp(jax.jit(conv))
    conv.defjvp(lambda primals, tangents: jax.jvp(_xla_conv, primals, tangents))
    return conv


def _transformed_image(d: Sequence[Array]) -> Sequence[Array]:
    """Bᵀ d of four rows or columns."""
    return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]


def _transformed_kernel(g: Sequence[Array]) -> Sequence[Array]:
    """G g of three rows or columns."""
    return g[0], 0.5 * (g[0] + g[1] + g[2]), 0.5 * (g[0] - g[1] + g[2]), g[2]


def _result(m: Sequence[Array]) -> Sequence[Array]:
    """Aᵀ m of four rows or columns."""
    return m[0] + m[1] + m[2], m[1] - m[2] - m[3]


def zero_after(number: Array) -> Array:
    """±0, once the number is there.

    A CPU makes what waits for nothing at the start of a network, and keeps it until it is used.
    """
    return jnp.where(number > 0, 0.0, -0.0).astype(number.dtype)


def _convolve_tiles(x: Array, kernel: Array) -> Array:
    """[B, 2h + 2, 2w + 2, C] and [3, 3, C, D] to [B, 2h, 2w, D], the convolution without padding.

    The transforms along the height are taken one row of Bᵀ and G at a time.
    """
    batch, height, width, channels = x.shape
    h, w = height // 2 - 1, width // 2 - 1
    x = x.reshape(batch, h + 1, 2, w + 1, 2, channels)
    # Rows or columns 0 to 3 of every tile of 4x4 pixels.
    tiles = [(slice(None, -1), 0), (slice(None, -1), 1), (slice(1, None), 0), (slice(1, None), 1)]
    sums, last = [], x[0, 0, 0, 0, 0, 0]
    for row in range(4):
        zero = zero_after(last)
        image = _transformed_image([x[:, tile, parity] for tile, parity in tiles])[row] + zero
        image = _transformed_image([image[:, :, tile, parity] for tile, parity in tiles])
        weights = _transformed_kernel([weights + zero for weights in kernel])[row]
        products = jnp.einsum(
            "jnc,jcd->jnd",
            jnp.stack(image).reshape(4, -1, channels),
            jnp.stack(_transformed_kernel(weights)),
        )
        sums.append(jnp.stack(_result(products), axis=1))
        last = sums[-1][0, 0, 0]
    rows = [part.reshape(batch, h, 2 * w, -1) for part in _result(sums)]
    return jnp.stack(rows, axis=2).reshape(batch, 2 * h, 2 * w, -1)


def _convolve_bands(x: Array, kernel: Array, rows: int) -> Array:
    """The convolution with padding 1, of an even number of rows of an image at a time."""
    batch, height, width, _ = x.shape
    bands = -(-height // rows)

    def rows_of(index, start, size):
        return jax.lax.dynamic_slice(x, (index, start, 0, 0), (1, size, *x.shape[2:]))

    def convolve_band(i, y):
        # The last band repeats rows of the one before where the height has a remainder.
        index, start = i // bands, jnp.minimum(rows * (i % bands), height - rows)
        above = jnp.where(start > 0, rows_of(index, start - 1, 1), 0.0)
        below = jnp.where(start + rows < height, rows_of(index, start + rows, 1), 0.0)
        band = jnp.concatenate([above, rows_of(index, start, rows), below], axis=1)
        band = jnp.pad(band, ((0, 0), (0, 0), (1, 1 + width % 2), (0, 0)))
        convolved = _convolve_tiles(band, kernel)[:, :, :width]
        return jax.lax.dynamic_update_slice(y, convolved, (index, start, 0, 0))

    y = jnp.full((batch, height, width, kernel.shape[3]), zero_after(x[0, 0, 0, 0]))
    return jax.lax.fori_loop(0, batch * bands, convolve_band, y)


@_derivative_of_xla
def winograd_conv(x: Array, kernel: Array) -> Array:
    """The 3x3 convolution of stride 1 and padding 1, in 4/9 of the products.

    With 4x4 pixels d of the image and a kernel g, 2x2 pixels of the result are

      Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A,

    where ⊙ multiplies element by element and sums over the channels: 16 products for what takes 36
    as it is defined. Both agree to rounding.

    Args:
      x: [B, H, W, C].
      kernel: [3, 3, C, D].

    Returns:
      [B, H, W, D].

    Source: Lavin & Gray 2016 (arXiv:1509.09308), section 4.1, F(2x2, 3x3).
    """
    batch, height, width, _ = x.shape
    image_bytes = x.dtype.itemsize * math.prod(x.shape)
    if image_bytes > BAND_BYTES and height > 1:
        rows = batch * height * BAND_BYTES // (4 * image_bytes)
        return _convolve_bands(x, kernel, max(2, min(rows, height) // 2 * 2))
    padded = jnp.pad(x, ((0, 0), (1, 1 + height % 2), (1, 1 + width % 2), (0, 0)))
    return _convolve_tiles(padded, kernel)[:, :height, :width]


@_derivative_of_xla
def single_product_conv(x: Array, kernel: Array) -> Array:
    """The 3x3 convolution of stride 1 and padding 1, as one product of matrices.

    Args:
      x: [B, H, W, C]; its nine shifted copies are held in memory.
      kernel: [3, 3, C, D].

    Returns:
      [B, H, W, D].

    Source: Chellapilla et al. 2006, High performance convolutional neural networks for document
    processing, section 2.
    """
    batch, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    pixels = jnp.concatenate(shifted, axis=-1).reshape(-1, 9 * channels)
    return (pixels @ kernel.reshape(9 * channels, -1)).reshape(batch, height, width, -1)


def conv_general_dilated(
    x: Array, kernel: Array, window_strides: Sequence[int], padding: Any, **options: Any
) -> Array:
    """jax.lax's; on a CPU, one of the above where it takes less time.

    For float32 images of H x W pixels and 3x3 kernels, stride 1 and padding 1, from C to D
    channels, both 64 at least: `winograd_conv` where H · W · C · D is 2²⁸ or more, as in Stable
    Diffusion and the decoders of latents, else `single_product_conv` where C · D is 2¹⁹ or more.
    The choice does not depend on the batch.
    """
    *size, channels, features = kernel.shape
    others = {name: option for name, option in options.items() if option not in (None, 1, (1, 1))}
    if (
        jax.default_backend() == "cpu"
        and x.dtype == kernel.dtype == jnp.float32
        and size == [3, 3]
        and tuple(window_strides) == (1, 1)
        and padding == [(1, 1), (1, 1)]
        and others.keys() == {"dimension_numbers"}
        and min(channels, features) >= CHANNELS_FROM
    ):
        if math.prod(x.shape[1:]) * features >= WINOGRAD_FROM:
            return winograd_conv(x, kernel)
        if channels * features >= SINGLE_PRODUCT_FROM:
            return single_product_conv(x, kernel)
    return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, **options)
