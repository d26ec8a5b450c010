"""Norm, dropout, resampling and residual block against numpy and their definitions."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.blocks import (
    Downsample,
    Dropout,
    GroupNorm,
    ResBlock,
    Upsample,
    average_pool,
    doubled_conv,
    nearest_upsample,
)
from tests.models.trees import random_params


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def silu(h):
    return h / (1 + np.exp(-h))


def group_norm(x, groups, scale, bias, eps):
    """In float64, group by group."""
    x = x.astype(np.float64)
    out = np.empty_like(x)
    for example in range(x.shape[0]):
        for part in np.split(np.arange(x.shape[-1]), groups):
            group = x[example][..., part]
            out[example][..., part] = (group - group.mean()) / np.sqrt(group.var() + eps)
    return out * scale + bias


@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (2, 6)])
def test_group_norm_is_its_formula(shape):
    # A mean far from zero is where single-pass variances lose their digits.
    x = normal(0, *shape) + 300.0
    scale, bias = normal(1, 6), normal(2, 6)
    params = {"scale": scale, "bias": bias}
    ours = GroupNorm(2, eps=1e-3).apply({"params": params}, x)
    np.testing.assert_allclose(ours, group_norm(x, 2, scale, bias, 1e-3), atol=2e-3)


def test_group_norm_computes_in_float32_whatever_comes_out():
    x = (normal(0, 2, 4, 4, 4) + 20.0).astype(jnp.bfloat16)
    params = {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}
    ours = GroupNorm(2, dtype=jnp.bfloat16).apply({"params": params}, x)
    expected = group_norm(np.asarray(x, np.float32), 2, 1.0, 0.0, 1e-5)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(np.float32), expected, atol=0.02)


def test_group_norm_names_the_channels_that_do_not_fit():
    with pytest.raises(ValueError, match="multiple of the 4 groups.*got 6"):
        GroupNorm(4).init(jax.random.key(0), np.zeros((1, 6), np.float32))


def test_dropout_of_an_example_depends_on_its_key_alone():
    x, per_example = np.ones((4, 50), np.float32), keys(4)
    drop = Dropout(0.5)
    whole = drop.apply({}, x, per_example)
    halves = [drop.apply({}, x[i : i + 2], per_example[i : i + 2]) for i in (0, 2)]
    np.testing.assert_array_equal(whole, np.concatenate(halves))
    assert not np.array_equal(whole[0], whole[1])


def test_dropout_keeps_the_mean_and_its_rate():
    x = np.full((2, 20000), 3.0, np.float32)
    y = np.asarray(Dropout(0.25).apply({}, x, keys(2)))
    # Five standard deviations of a mean of 20000 Bernoulli variables.
    np.testing.assert_allclose((y == 0).mean(1), 0.25, atol=5 * np.sqrt(0.25 * 0.75 / 20000))
    np.testing.assert_allclose(y[y != 0], 4.0, rtol=1e-6)


class TwoDropouts(nn.Module):
    @nn.compact
    def __call__(self, x, keys):
        return Dropout(0.5, name="a")(x, keys), Dropout(0.5, name="b")(x, keys)


def test_two_dropouts_of_a_network_lose_different_units():
    first, second = TwoDropouts().apply({}, np.ones((1, 50), np.float32), keys(1))
    assert not np.array_equal(first, second)


def test_dropout_is_the_identity_outside_of_training_and_at_rate_zero():
    x = normal(0, 2, 3)
    np.testing.assert_array_equal(Dropout(0.5).apply({}, x, None), x)
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, keys(2)), x)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_dropout_refuses_a_rate_outside_of_its_range(rate):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        Dropout(rate).apply({}, np.ones((1, 2), np.float32), None)


def test_pooling_averages_and_upsampling_repeats():
    x = normal(0, 2, 4, 6, 3)
    pooled = average_pool(x)
    np.testing.assert_allclose(pooled[1, 1, 2], x[1, 2:4, 4:6].mean((0, 1)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(nearest_upsample(x), x.repeat(2, axis=1).repeat(2, axis=2))


@pytest.mark.parametrize("padding, first", [("symmetric", 0), ("asymmetric", 1)])
def test_downsample_reads_the_pixels_that_its_padding_says(padding, first):
    """A kernel that copies its centre shows where the window sits."""
    x = normal(0, 1, 4, 4, 2)
    kernel = np.zeros((3, 3, 2, 2), np.float32)
    kernel[1, 1] = np.eye(2)
    params = {"conv": {"kernel": kernel, "bias": np.zeros(2, np.float32)}}
    ours = Downsample(padding).apply({"params": params}, x)
    np.testing.assert_array_equal(ours, x[:, first::2, first::2])


def test_upsample_repeats_pixels_before_its_convolution():
    x = normal(0, 1, 2, 3, 2)
    kernel = np.zeros((3, 3, 2, 2), np.float32)
    kernel[1, 1] = np.eye(2)
    params = {"conv": {"kernel": kernel, "bias": np.zeros(2, np.float32)}}
    np.testing.assert_array_equal(Upsample().apply({"params": params}, x), nearest_upsample(x))


def convolved(x, kernel):
    """In numpy, with padding 1."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)
    )


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("size", [None, (4, 6), (5, 7)])
def test_upsample_convolves_the_repeated_pixels(size, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x, kernel, bias = normal(0, 2, 2, 3, 4), normal(1, 3, 3, 4, 4), normal(2, 4)
    params = {"conv": {"kernel": kernel, "bias": bias}}
    rows, columns = (np.arange(n) * old // n for n, old in zip(size or (4, 6), (2, 3), strict=True))
    expected = convolved(x[:, rows][:, :, columns], kernel) + bias
    ours = jax.jit(Upsample().apply, static_argnums=2)({"params": params}, x, size)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_a_doubled_convolution_are_those_of_repeating_and_convolving():
    def repeated(x, kernel):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            nearest_upsample(x), kernel, (1, 1), "SAME", dimension_numbers=dimensions
        )

    def gradients(function):
        loss = lambda x, kernel: (function(x, kernel) * normal(2, 2, 6, 4, 5)).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1)))(normal(0, 2, 3, 2, 4), normal(1, 3, 3, 4, 5))

    doubled = functools.partial(doubled_conv, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    for ours, expected in zip(gradients(doubled), gradients(repeated), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_doubled_convolution_repeats_nothing_and_takes_four_ninths_of_the_products():
    def flops(function):
        args = jax.ShapeDtypeStruct((1, 32, 32, 16), jnp.float32), jnp.zeros((3, 3, 16, 16))
        cost = jax.jit(function).lower(*args).compile().cost_analysis()
        return (cost[0] if isinstance(cost, list) else cost)["flops"]

    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    products = 2 * 64 * 64 * 9 * 16 * 16
    assert flops(functools.partial(doubled_conv, **options)) < 0.5 * products


@pytest.mark.parametrize(
    "resample, change", [(None, lambda a: a), ("down", average_pool), ("up", nearest_upsample)]
)
def test_a_new_residual_block_is_its_shortcut(resample, change):
    x, emb = normal(0, 1, 4, 4, 4), normal(1, 1, 6)
    block = ResBlock(4, norm_groups=2, resample=resample)
    out, _ = jax.jit(block.init_with_output)(jax.random.key(0, impl="rbg"), x, emb)
    np.testing.assert_allclose(out, change(x), rtol=1e-6)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_residual_block_is_its_formula(scale_shift):
    """On a single pixel a 3x3 convolution is the matrix at its centre."""
    x, emb = normal(0, 2, 1, 1, 4), normal(1, 2, 6)
    block = ResBlock(2, norm_groups=2, norm_eps=1e-3, scale_shift=scale_shift)
    p = random_params(block, x, emb)

    def dense(name, h):
        kernel = p[name]["kernel"]
        kernel = kernel[kernel.shape[0] // 2, kernel.shape[1] // 2] if kernel.ndim == 4 else kernel
        return h @ kernel.astype(np.float64) + p[name]["bias"]

    h = x[:, 0, 0].astype(np.float64)
    first = silu(group_norm(h, 2, p["norm_1"]["scale"], p["norm_1"]["bias"], 1e-3))
    first, time = dense("conv_1", first), dense("time", silu(emb.astype(np.float64)))
    if scale_shift:
        second = group_norm(first, 2, p["norm_2"]["scale"], p["norm_2"]["bias"], 1e-3)
        second = second * (1 + time[:, :2]) + time[:, 2:]
    else:
        second = group_norm(first + time, 2, p["norm_2"]["scale"], p["norm_2"]["bias"], 1e-3)
    expected = dense("shortcut", h) + dense("conv_2", silu(second))
    ours = jax.jit(block.apply)({"params": p}, x, emb)
    np.testing.assert_allclose(ours[:, 0, 0], expected, atol=1e-4)


@pytest.mark.parametrize("resample, change", [("down", average_pool), ("up", nearest_upsample)])
def test_resolution_changes_between_the_first_silu_and_the_first_convolution(resample, change):
    """Kernels with a centre alone are matrices, whatever the size of the image."""
    x, emb = normal(0, 2, 2, 4, 4), normal(1, 2, 6)
    block = ResBlock(2, norm_groups=2, scale_shift=True, resample=resample)
    p = random_params(block, x, emb)
    for name in ("conv_1", "conv_2"):
        centre = np.zeros_like(p[name]["kernel"])
        centre[1, 1] = p[name]["kernel"][1, 1]
        p[name]["kernel"] = centre

    def dense(name, h):
        kernel = p[name]["kernel"]
        kernel = kernel[kernel.shape[0] // 2, kernel.shape[1] // 2] if kernel.ndim == 4 else kernel
        return h @ kernel.astype(np.float64) + p[name]["bias"]

    h = silu(group_norm(x, 2, p["norm_1"]["scale"], p["norm_1"]["bias"], 1e-5))
    h = dense("conv_1", np.asarray(change(h.astype(np.float32)), np.float64))
    time = dense("time", silu(emb.astype(np.float64)))[:, None, None]
    h = group_norm(h, 2, p["norm_2"]["scale"], p["norm_2"]["bias"], 1e-5)
    h = dense("conv_2", silu(h * (1 + time[..., :2]) + time[..., 2:]))
    expected = dense("shortcut", np.asarray(change(x), np.float64)) + h
    ours = jax.jit(block.apply)({"params": p}, x, emb)
    np.testing.assert_allclose(ours, expected, atol=2e-4)
