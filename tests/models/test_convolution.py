"""3x3 convolutions: every form against the definition, in float64, and where each is chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models import convolution
from diffusion_jax.models.convolution import (
    conv_general_dilated,
    single_product_conv,
    winograd_conv,
)
from diffusion_jax.models.layers import Conv

PADDING = {"window_strides": (1, 1), "padding": [(1, 1), (1, 1)]}
LAYOUT = ("NHWC", "HWIO", "NHWC")
FORMS = {"winograd": winograd_conv, "single product": single_product_conv}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def xla(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, **PADDING, dimension_numbers=LAYOUT)


def definition(x, kernel):
    """y[b, i, j] = Σ over k, l of x[b, i + k - 1, j + l - 1] kernel[k, l], zero outside."""
    _, height, width, _ = x.shape
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(
        padded[:, k : k + height, m : m + width] @ kernel[k, m].astype(np.float64)
        for k in range(3)
        for m in range(3)
    )


@pytest.mark.parametrize("shape", [(2, 8, 6), (1, 7, 8), (1, 6, 5), (2, 1, 1), (1, 2, 9)], ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_is_the_definition(form, shape):
    x, kernel = normal(0, *shape, 5), normal(1, 3, 3, 5, 4)
    np.testing.assert_allclose(form(x, kernel), definition(x, kernel), atol=2e-5)


@pytest.mark.parametrize("shape", [(2, 16, 6), (1, 7, 5), (3, 10, 4)], ids=str)
@pytest.mark.parametrize("rows", [2, 4, 6])
def test_bands_of_rows_are_the_definition(rows, shape):
    x, kernel = normal(0, *shape, 5), normal(1, 3, 3, 5, 4)
    ours = convolution._convolve_bands(x, kernel, rows)
    np.testing.assert_allclose(ours, definition(x, kernel), atol=2e-5)


@pytest.mark.parametrize("size", [512, 255])
def test_large_images_are_transformed_in_bands(size):
    x, kernel = jnp.ones((2, size, size, 128)), jnp.ones((3, 3, 128, 4))
    compiled = jax.jit(winograd_conv).lower(x, kernel).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < x.nbytes / 2
    y = compiled(x, kernel)
    # Nine, six and four pixels of ones reach the inside, an edge and a corner.
    assert y[1, 1, 1, 0] == 9 * 128 and y[1, size - 1, 1, 0] == 6 * 128
    assert y[1, size - 1, size - 1, 0] == 4 * 128


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_derivatives_are_those_of_the_definition(form):
    x, kernel = normal(0, 2, 4, 6, 5), normal(1, 3, 3, 5, 4)
    x_dot, kernel_dot, weights = (
        normal(2, *x.shape),
        normal(3, *kernel.shape),
        normal(4, 2, 4, 6, 4),
    )
    _, forward = jax.jvp(form, (x, kernel), (x_dot, kernel_dot))
    bilinear = definition(x_dot, kernel) + definition(x, kernel_dot)
    np.testing.assert_allclose(forward, bilinear, atol=4e-5)
    _, backward = jax.vjp(form, x, kernel)
    x_bar, kernel_bar = backward(weights)
    along = (np.vdot(x_bar, x_dot), np.vdot(kernel_bar, kernel_dot))
    expected = (definition(x_dot, kernel), definition(x, kernel_dot))
    for ours, y_dot in zip(along, expected, strict=True):
        np.testing.assert_allclose(ours, np.vdot(y_dot, weights), rtol=1e-4)


def test_winograds_form_takes_four_ninths_of_the_products():
    x, kernel = jnp.ones((1, 16, 16, 128)), jnp.ones((3, 3, 128, 128))

    def flops(conv):
        return jax.jit(conv).lower(x, kernel).compile().cost_analysis()["flops"]

    products = 2 * 16**2 * 9 * 128**2
    assert flops(xla) > 0.8 * products
    assert 4 / 9 * products < flops(winograd_conv) < 0.6 * products


def chosen(size, channels, features, batch=1, dtype=jnp.float32, kernel=3, **options):
    x = jax.ShapeDtypeStruct((batch, size, size, channels), dtype)
    kernel = jax.ShapeDtypeStruct((kernel, kernel, channels, features), dtype)
    conv = functools.partial(
        conv_general_dilated, dimension_numbers=LAYOUT, **{**PADDING, **options}
    )
    text = str(jax.make_jaxpr(lambda x, kernel: conv(x, kernel))(x, kernel))
    names = {"winograd": "name=winograd_conv", "single product": "name=single_product_conv"}
    return next((form for form, name in names.items() if name in text), "xla")


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize(
    ("size", "channels", "features", "form"),
    [
        (64, 320, 320, "winograd"),
        (512, 128, 128, "winograd"),
        (16, 1024, 1024, "winograd"),
        (15, 1024, 1024, "single product"),
        (8, 1024, 512, "single product"),
        (8, 1024, 511, "xla"),
        (64, 128, 128, "xla"),
        (1024, 320, 4, "xla"),
        (1024, 63, 320, "xla"),
    ],
)
def test_the_choice_is_that_of_the_docstring(size, channels, features, form, batch):
    assert chosen(size, channels, features, batch) == form


@pytest.mark.parametrize(
    "other",
    [
        {"window_strides": (2, 2)},
        {"padding": [(0, 1), (0, 1)]},
        {"kernel": 1},
        {"dtype": jnp.bfloat16},
        {"rhs_dilation": (2, 2)},
    ],
    ids=str,
)
def test_what_the_forms_do_not_compute_is_left_to_xla(other):
    assert chosen(64, 320, 320) == "winograd"
    assert chosen(64, 320, 320, **other) == "xla"


def test_other_devices_keep_their_own(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert chosen(64, 320, 320) == "xla"


def test_the_layers_choose(monkeypatch):
    monkeypatch.setattr(convolution, "WINOGRAD_FROM", 1)
    x = jax.ShapeDtypeStruct((1, 8, 8, 64), jnp.float32)
    conv = Conv(64, (3, 3), padding=1)
    params = jax.eval_shape(conv.init, jax.random.key(0), x)
    assert "name=winograd_conv" in str(jax.make_jaxpr(conv.apply)(params, x))
