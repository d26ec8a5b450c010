"""Building blocks of convolutional networks: norm, dropout, residual block, resampling."""

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.arrays import fold_in_each
from diffusion_jax.core.resize import nearest_resize
from diffusion_jax.core.types import Array, Key
from diffusion_jax.models.convolution import zero_after
from diffusion_jax.models.layers import Conv, Dense, Module

default_init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
zeros_init = nn.initializers.zeros_init()

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "relu": nn.relu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "mish": jax.nn.mish,
}


class Dropout(nn.Module):
    """Dropout whose mask for example i depends on keys[i] and the module's path alone.

    So an example loses the same units whatever the batch or the number of devices.

    Attributes:
      rate: probability of losing a unit, in [0, 1).
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, keys: Key | None) -> Array:
        """Drops units and scales the others by 1 / (1 - rate).

        Args:
          x: [B, ...].
          keys: [B], one per example; None outside of training, for the identity.

        Returns:
          [B, ...].

        Raises:
          ValueError: if `rate` is outside [0, 1).
        """
        if not 0.0 <= self.rate < 1.0:
            raise ValueError(f"the dropout rate must lie in [0, 1), got {self.rate}")
        if keys is None or self.rate == 0.0:
            return x
        salt = np.uint32(zlib.crc32("/".join(self.path).encode()))
        keep = 1.0 - self.rate
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x.shape[1:]))(
            fold_in_each(keys, salt)
        )
        return jnp.where(kept, x / keep, jnp.zeros_like(x))


class GroupNorm(Module):
    """Group normalization over space and the channels of a group, computed in float32.

    y = (x - mean) / √(var + eps) · scale + bias.

    Attributes:
      groups: number of groups; must divide the number of channels. None for a quarter of the
        channels, at most 32, as NCSN++ has.
      eps: added to the variance.
      dtype: dtype of the result.
      param_dtype: dtype of the parameters.

    Source: Wu & He 2018 (arXiv:1803.08494), eq. 1, 2 and 7.
    """

    groups: int | None
    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, ..., C] -> [B, ..., C] of `dtype`."""
        channels = x.shape[-1]
        groups = min(channels // 4, 32) if self.groups is None else self.groups
        if groups < 1 or channels % groups:
            raise ValueError(
                f"the number of channels must be a multiple of the {groups} groups of the "
                f"norm, got {channels}; change norm_groups or the channels"
            )
        scale = self.param("scale", nn.initializers.ones_init(), (channels,), self.param_dtype)
        bias = self.param("bias", zeros_init, (channels,), self.param_dtype)
        x = x.astype(jnp.float32)
        h = x.reshape(x.shape[0], -1, groups, channels // groups)
        # Two passes: E[x²] - E[x]² loses the small variance of a channel with a large mean.
        mean = h.mean((1, 3))
        gain = jax.lax.rsqrt(jnp.square(h - mean[:, None, :, None]).mean((1, 3)) + self.eps)
        # x - mean is computed again, per channel: XLA would store a difference that is used twice.
        mean, gain = (jnp.repeat(a, channels // groups, axis=1) for a in (mean, gain))
        mean, gain, scale, bias = (
            a.reshape(-1, *(1,) * (x.ndim - 2), channels) for a in (mean, gain, scale, bias)
        )
        return ((x - mean) * (gain * scale) + bias).astype(self.dtype)


def average_pool(x: Array) -> Array:
    """Mean of 2x2 pixels, [B, 2H, 2W, C] -> [B, H, W, C]."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def nearest_upsample(x: Array) -> Array:
    """Every pixel four times, [B, H, W, C] -> [B, 2H, 2W, C]."""
    return nearest_resize(x, 2 * x.shape[1], 2 * x.shape[2])


def _fir(x: Array, gain: float, **options) -> Array:
    """Every channel convolved with the outer product of (1, 3, 3, 1) / 8 with itself, · gain."""
    taps = np.outer((1, 3, 3, 1), (1, 3, 3, 1)) * (gain / 64.0)
    channels = x.shape[-1]
    kernel = jnp.broadcast_to(jnp.asarray(taps, x.dtype)[:, :, None, None], (4, 4, 1, channels))
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
        **options,
    )


def fir_downsample(x: Array) -> Array:
    """Every other pixel of the image smoothed by (1, 3, 3, 1), [B, 2H, 2W, C] -> [B, H, W, C].

    Source: Song et al. 2021 (arXiv:2011.13456), appendix H; Zhang 2019 (arXiv:1904.11486).
    """
    return _fir(x, 1.0, window_strides=(2, 2), padding=((1, 1), (1, 1)))


def fir_upsample(x: Array) -> Array:
    """Zeros between the pixels, smoothed by (1, 3, 3, 1), [B, H, W, C] -> [B, 2H, 2W, C].

    Source: Song et al. 2021 (arXiv:2011.13456), appendix H; Zhang 2019 (arXiv:1904.11486).
    """
    return _fir(x, 4.0, window_strides=(1, 1), padding=((2, 2), (2, 2)), lhs_dilation=(2, 2))


# Ways to change the resolution inside of a residual block.
CHANGES: Mapping[str | None, Callable[[Array], Array]] = {
    None: lambda x: x,
    "down": average_pool,
    "up": nearest_upsample,
    "fir_down": fir_downsample,
    "fir_up": fir_upsample,
}


class Downsample(nn.Module):
    """Halves the resolution by a 3x3 convolution of stride 2 that keeps the channels.

    Attributes:
      padding: "symmetric" pads one pixel on every side, "asymmetric" only below and to
        the right, as DDPM and the autoencoders of latent diffusion do.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.

    Source: Ho et al. 2020 (arXiv:2006.11239), appendix B.
    """

    padding: Literal["symmetric", "asymmetric"] = "symmetric"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, H, W, C] -> [B, H', W', C].

        H' is H / 2, of an odd H rounded up where the padding is symmetric, else down.
        """
        pad = (1, 1) if self.padding == "symmetric" else (0, 1)
        return Conv(
            x.shape[-1],
            (3, 3),
            strides=2,
            padding=(pad, pad),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=default_init,
            name="conv",
        )(x)


def doubled_conv(x: Array, kernel: Array, **options: Any) -> Array:
    """A 3x3 convolution of an image whose pixels are repeated twice, without repeating them.

    Pixel (2i + a, 2j + b) of the result, a, b ∈ {0, 1}, sees four pixels of x alone: each parity
    is a 2x2 convolution of x with sums of the kernel's rows and columns, and together they take
    4/9 of the products.

    Args:
      x: [B, H, W, C].
      kernel: [3, 3, C, D].
      options: of `jax.lax.conv_general_dilated`.

    Returns:
      [B, 2H, 2W, D], the convolution with padding 1.

    Source: Shi et al. 2016 (arXiv:1609.07009), figure 4.
    """
    kernel = kernel + zero_after(x[0, 0, 0, 0]).astype(kernel.dtype)

    def summed(kernel, parity, axis):
        first, middle, last = jnp.split(kernel, 3, axis)
        pair = (first + middle, last) if parity else (first, middle + last)
        return jnp.concatenate(pair, axis)

    def of_parity(a, b):
        sums, padding = summed(summed(kernel, a, 0), b, 1), ((1 - a, a), (1 - b, b))
        return jax.lax.conv_general_dilated(x, sums, (1, 1), padding, **options)

    rows = [jnp.stack([of_parity(a, b) for b in (0, 1)], axis=3) for a in (0, 1)]
    batch, height, width, _ = x.shape
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, -1)


def of_doubled(conv: Callable[..., nn.Module], x: Array) -> Array:
    """What conv() makes of the image with every pixel four times; a 3x3 convolution with padding 1.

    On a GPU or TPU the pixels are repeated; what `doubled_conv` gains was measured on a CPU.
    """
    if jax.default_backend() != "cpu":
        return conv()(nearest_upsample(x))

    def convolve(x, kernel, strides, padding, **options):
        del strides, padding
        return doubled_conv(x, kernel, **options)

    return conv(conv_general_dilated=convolve)(x)


class Upsample(nn.Module):
    """Raises the resolution by repeating pixels, followed by a 3x3 convolution.

    Attributes:
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.

    Source: Ho et al. 2020 (arXiv:2006.11239), appendix B.
    """

    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, size: tuple[int, int] | None = None) -> Array:
        """Upsamples.

        Args:
          x: [B, H, W, C].
          size: height H' and width W' of the result; None for twice those of x.

        Returns:
          [B, H', W', C].
        """
        twice = (2 * x.shape[1], 2 * x.shape[2])
        conv = functools.partial(
            Conv,
            x.shape[-1],
            (3, 3),
            padding=1,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=default_init,
            name="conv",
        )
        if size in (None, twice):
            return of_doubled(conv, x)
        return conv()(nearest_resize(x, *size))


class ResBlock(nn.Module):
    """Residual block: norm, activation, conv, twice.

    The time, where there is one, is added after the first convolution, or scales and shifts the
    second norm. `resample` changes the resolution inside the block, between the first activation
    and the first convolution. The last convolution starts at zero, so that a new block is its
    own shortcut.

    Attributes:
      channels: channels of the result; a 1x1 convolution adapts the shortcut to them.
      norm_groups: groups of both norms, see `GroupNorm`.
      norm_eps: epsilon of both norms.
      dropout: rate before the last convolution, in [0, 1).
      scale_shift: scale and shift the second norm instead of adding.
      resample: "down" or "up" to halve or double the resolution, None to keep it; "fir_down" and
        "fir_up" do it by a smoothing filter and put a convolution on the shortcut (NCSN++).
      act: a key of `ACTIVATIONS`, for the image and the time.
      time_act: apply `act` to the time before its projection.
      out_scale: what the sum with the shortcut is divided by; √2 keeps its variance (NCSN++).
      norm_groups_in: groups of the first norm where they are not those of the second.
      norm: class of both norms, which take the arguments of a `GroupNorm`.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.

    Source: Ho et al. 2020 (arXiv:2006.11239), appendix B; Dhariwal & Nichol 2021
    (arXiv:2105.05233), section 3 for `scale_shift` and `resample`; Song et al. 2021
    (arXiv:2011.13456), appendix H for `out_scale` and the filter.
    """

    channels: int
    norm_groups: int | None
    norm_eps: float = 1e-5
    dropout: float = 0.0
    scale_shift: bool = False
    resample: Literal["down", "up", "fir_down", "fir_up"] | None = None
    act: str = "silu"
    time_act: bool = True
    out_scale: float = 1.0
    norm_groups_in: int | None = None
    norm: Callable[..., nn.Module] = GroupNorm
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        emb: Array | None = None,
        keys: Key | None = None,
        *,
        latent: Array | None = None,
    ) -> Array:
        """Applies the block.

        Args:
          x: [B, H, W, C].
          emb: [B, E] embedding of the time; None for a block without time.
          keys: [B], given in training only.
          latent: what the norms are told besides the image; None for a `GroupNorm`.

        Returns:
          [B, H', W', channels]; H' is H, H/2 or 2H, as `resample` says.
        """
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = {"features": self.channels, "padding": 1, **types}
        act, change = ACTIVATIONS[self.act], CHANGES[self.resample]
        groups_in = self.norm_groups_in or self.norm_groups
        norm_1 = self.norm(groups_in, self.norm_eps, name="norm_1", **types)
        norm_2 = self.norm(self.norm_groups, self.norm_eps, name="norm_2", **types)
        told = () if latent is None else (latent,)

        conv_1 = functools.partial(
            Conv, kernel_size=(3, 3), kernel_init=default_init, name="conv_1", **conv
        )
        h = act(norm_1(x, *told))
        x, h = change(x), of_doubled(conv_1, h) if self.resample == "up" else conv_1()(change(h))

        if emb is not None:
            width = self.channels * (2 if self.scale_shift else 1)
            emb = emb.astype(self.dtype)
            emb = act(emb) if self.time_act else emb
            emb = Dense(width, kernel_init=default_init, name="time", **types)(emb)
            emb = emb[:, None, None, :]
        if emb is None:
            h = norm_2(h, *told)
        elif self.scale_shift:
            scale, shift = jnp.split(emb, 2, axis=-1)
            h = norm_2(h, *told) * (1.0 + scale) + shift
        else:
            h = norm_2(h + emb, *told)

        h = Dropout(self.dropout, name="dropout")(act(h), keys)
        h = Conv(kernel_size=(3, 3), kernel_init=zeros_init, name="conv_2", **conv)(h)
        if x.shape[-1] != self.channels or self.resample in ("fir_down", "fir_up"):
            x = Conv(self.channels, (1, 1), kernel_init=default_init, name="shortcut", **types)(x)
        h = x.astype(self.dtype) + h
        return h if self.out_scale == 1.0 else h / self.out_scale
