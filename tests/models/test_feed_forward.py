"""Hidden units and gated feed-forward networks against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models import feed_forward
from diffusion_jax.models.feed_forward import GEGLU, HIDDEN_UNITS
from tests.models.trees import random_params

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


# Bytes that 12 tokens of two examples take, [2, 12, 2 · 4 · 3] float32.
HIDDEN_BYTES = 4 * 2 * 12 * 2 * 4 * 3


def geglu(x, params):
    h, gate = np.split(x @ params["in"]["kernel"] + params["in"]["bias"], 2, axis=-1)
    return (h * gelu(gate)) @ params["out"]["kernel"] + params["out"]["bias"]


# One, two, six (five do not divide twelve) and twelve parts; one for a length that is prime.
@pytest.mark.parametrize("length, parts", [(12, 1), (12, 2), (12, 5), (12, 12), (11, 2)])
def test_tokens_in_parts_are_the_formula_and_so_are_the_gradients(length, parts, monkeypatch):
    x = np.random.default_rng(0).normal(size=(2, length, 3)).astype(np.float32)
    params = random_params(GEGLU(), x)

    def loss(params, x):
        out = GEGLU().apply({"params": params}, x)
        return jnp.sum(out * np.cos(np.arange(out.size).reshape(out.shape))), out

    def computed():
        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)

    whole, _ = computed()
    monkeypatch.setattr(feed_forward, "TILE_BYTES", HIDDEN_BYTES // parts)
    gradients, out = computed()
    np.testing.assert_allclose(out, geglu(x.astype(np.float64), params), rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), whole, gradients
    )


def test_parts_of_the_tokens_need_less_memory_and_have_the_same_parameters(monkeypatch):
    x, net = jax.ShapeDtypeStruct((1, 1024, 8), jnp.float32), GEGLU()
    init = lambda: jax.eval_shape(net.init, jax.random.key(0), x)  # noqa: E731
    params = init()

    def memory():
        compiled = jax.jit(lambda params, x: net.apply(params, x)).lower(params, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    hidden = 4 * 1024 * 2 * 4 * 8
    assert memory() >= hidden
    monkeypatch.setattr(feed_forward, "TILE_BYTES", hidden // 16)
    assert memory() < hidden / 4
    assert init() == params
