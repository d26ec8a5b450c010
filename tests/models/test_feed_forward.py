"""Hidden units against their formulas."""

import math

import numpy as np
import pytest

from diffusion_jax.models.feed_forward import HIDDEN_UNITS

X = np.linspace(-4.0, 4.0, 12, dtype=np.float32).reshape(2, 6)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def gelu(x):
    return x * 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def tanh_gelu(x):
    return x * 0.5 * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("gelu", gelu(X)),
        ("gelu_tanh", tanh_gelu(X)),
        ("quick_gelu", X * sigmoid(1.702 * X)),
        ("silu", X * sigmoid(X)),
        ("geglu", X[:, :3] * gelu(X[:, 3:])),
        ("swiglu", X[:, :3] * X[:, 3:] * sigmoid(X[:, 3:])),
    ],
)
def test_hidden_units_are_their_formula(name, expected):
    units = HIDDEN_UNITS[name]
    np.testing.assert_allclose(units.apply(X), expected, rtol=1e-5, atol=1e-6)
    assert units.inputs * expected.shape[1] == X.shape[1]
