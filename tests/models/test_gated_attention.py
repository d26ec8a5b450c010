"""GLIGEN's adapters: the formula, the identity at the start, what the first gradients reach."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import erf

from diffusion_jax.core.resize import bicubic_resize
from diffusion_jax.models.gated_attention import FUSERS
from tests.models.trees import random_params

B, N, M, C, D, HEADS, HEAD_DIM = 2, 4, 9, 6, 5, 2, 4


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, OBJECTS, GATE = normal(0, B, N, C), normal(1, B, M, D), np.asarray([0.5, 1.0], np.float32)


@lru_cache
def adapter(kind, **types):
    """An adapter, compiled, and its parameters as random numbers."""
    module = FUSERS[kind](HEADS, HEAD_DIM, **types)
    params = random_params(module, X, OBJECTS, GATE)

    def apply(params, gate):
        return module.apply({"params": params}, X, OBJECTS, gate)

    return module, params, jax.jit(apply)


@lru_cache
def new_params(kind):
    module, _, _ = adapter(kind)
    return jax.jit(module.init)(jax.random.key(0), X, OBJECTS, GATE)["params"]


def norm(x, params):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * params["scale"] + params["bias"]


def dense(x, params):
    return x @ params["kernel"] + params.get("bias", 0.0)


def attend(x, context, params):
    """One head and one query after the other."""
    q, k, v = (
        dense(a, params[name]).reshape(*a.shape[:2], HEADS, HEAD_DIM)
        for a, name in ((x, "query"), (context, "key"), (context, "value"))
    )
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(q.shape[:3]):
        weights = np.exp(k[b, :, h] @ q[b, i, h] / np.sqrt(HEAD_DIM))
        out[b, i, h] = weights @ v[b, :, h] / weights.sum()
    return dense(out.reshape(*x.shape[:2], -1), params["out"])


def formula(kind, params):
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x, objects, gate = X.astype(np.float64), OBJECTS.astype(np.float64), GATE[:, None, None]
    if kind == "cross":
        h = attend(norm(x, p["norm_attn"]), objects, p["attn"])
    else:
        h = norm(np.concatenate([x, dense(objects, p["object_proj"])], axis=1), p["norm_attn"])
        h = attend(h, h, p["attn"])
        if kind == "self":
            h = h[:, :N]
        else:
            square = h[:, N:].reshape(B, 3, 3, C).astype(np.float32)
            h = np.asarray(bicubic_resize(square, 2, 2), np.float64).reshape(B, N, C)
    x = x + gate * np.tanh(p["alpha_attn"]) * h
    h, g = np.split(dense(norm(x, p["norm_ff"]), p["ff"]["in"]), 2, axis=-1)
    h = h * g * 0.5 * (1 + np.asarray(erf(g / np.sqrt(2.0))))
    return x + gate * np.tanh(p["alpha_ff"]) * dense(h, p["ff"]["out"])


@pytest.mark.parametrize("kind", FUSERS)
def test_an_adapter_is_its_formula(kind):
    """In float64, with heads that are wider than the tokens divided by their number."""
    _, params, apply = adapter(kind)
    assert "bias" not in params["attn"]["query"]
    ours = apply(params, GATE)
    np.testing.assert_allclose(ours, formula(kind, params), atol=2e-5)


@pytest.mark.parametrize("kind", FUSERS)
def test_a_new_adapter_and_a_closed_gate_are_the_identity_to_the_bit(kind):
    _, params, apply = adapter(kind)
    np.testing.assert_array_equal(apply(new_params(kind), GATE), X)
    half_closed = apply(params, np.asarray([0.0, 1.0], np.float32))
    np.testing.assert_array_equal(half_closed[0], X[0])
    assert np.abs(half_closed[1] - X[1]).max() > 0.1


@pytest.mark.parametrize("kind", FUSERS)
def test_first_gradients_reach_the_gates_alone(kind):
    """d/dw of tanh(0) · branch(w) is 0, d/dα of tanh(α) · branch is the branch."""
    _, _, apply = adapter(kind)
    target = normal(2, B, N, C)

    def loss(params):
        return jnp.square(apply(params, GATE) - target).mean()

    gradients = dict(jax.jit(jax.grad(loss))(new_params(kind)))
    gates = [gradients.pop("alpha_attn"), gradients.pop("alpha_ff")]
    assert all(abs(gate) > 1e-4 for gate in gates), gates
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("kind", FUSERS)
def test_bfloat16_is_near_float32(kind):
    _, params, apply = adapter(kind, dtype=jnp.bfloat16)
    ours = apply(params, GATE)
    assert ours.dtype == jnp.bfloat16
    expected = formula(kind, params)
    np.testing.assert_allclose(
        ours.astype(np.float32), expected, atol=0.05 * np.abs(expected).max()
    )


@pytest.mark.parametrize(
    "kind, x, objects, gate, message",
    [
        ("self", X, OBJECTS[:1], GATE, r"objects \(1, 9, 5\)"),
        ("cross", X, OBJECTS, GATE[:, None], r"gate \(2, 1\)"),
        ("self_resized", X[:, :3], OBJECTS, GATE, "visual tokens must make a square map, got 3"),
        ("self_resized", X, OBJECTS[:, :8], GATE, "grounding tokens must make a square map, got 8"),
    ],
)
def test_shapes_that_do_not_fit_are_named(kind, x, objects, gate, message):
    module, params, _ = adapter(kind)
    with pytest.raises(ValueError, match=message):
        module.apply({"params": params}, x, objects, gate)
