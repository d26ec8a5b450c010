"""Attention to text and pixels in one softmax: against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.text_attention import TextAttention, TextAttentionBlock
from tests.models.trees import random_params

GROUPS, HEADS = 2, 2


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, TOKENS = normal(0, 2, 2, 3, 8), normal(1, 2, 4, 16)
MASK = np.asarray([[True, True, False, True], [True, False, False, False]])


def dense(params, x):
    return x @ params["kernel"].astype(np.float64) + params["bias"]


def group_norm(params, x, groups):
    """[B, N, C]: over all tokens and the channels of a group."""
    split = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    mean, std = split.mean((1, 3), keepdims=True), split.var((1, 3), keepdims=True) + 1e-5
    return ((split - mean) / np.sqrt(std)).reshape(x.shape) * params["scale"] + params["bias"]


def layer_norm(params, x):
    h = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return h * params["scale"] + params["bias"]


def formula(params, spec, mask):
    x, text = X.reshape(2, 6, 8).astype(np.float64), TOKENS.astype(np.float64)
    h = group_norm(params["norm"], x, GROUPS)
    if spec.text_norm == "group":
        text = group_norm(params["text_norm"], text, spec.text_norm_groups)
    if spec.text_norm == "layer":
        text = layer_norm(params["text_norm"], text)
    p = params["attention"]
    q, k, v = dense(p["query"], h), dense(p["text_key"], text), dense(p["text_value"], text)
    allowed = np.ones((2, 4), bool) if mask is None else mask
    if not spec.text_only:
        k, v = (np.concatenate([a, dense(p[n], h)], 1) for a, n in ((k, "key"), (v, "value")))
        allowed = np.concatenate([allowed, np.ones((2, 6), bool)], 1)
    out = np.empty_like(q)
    width = 8 // HEADS
    for b in range(2):
        for i in range(HEADS):
            part = slice(i * width, (i + 1) * width)
            weights = np.exp(q[b, :, part] @ k[b, :, part].T / np.sqrt(width)) * allowed[b]
            out[b, :, part] = weights / weights.sum(1, keepdims=True) @ v[b, :, part]
    return (x + dense(p["out"], out)).reshape(X.shape)


SPECS = {
    "plain": TextAttention(num_heads=HEADS),
    "layer": TextAttention(head_dim=8 // HEADS, text_norm="layer"),
    "group": TextAttention(num_heads=HEADS, text_norm="group", text_norm_groups=4),
    "text only": TextAttention(num_heads=HEADS, text_only=True),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_block_is_the_formula(spec):
    block = TextAttentionBlock(spec, num_heads=4, norm_groups=GROUPS)
    params = random_params(block, X, TOKENS, scale=0.5)
    apply = jax.jit(block.apply)
    for mask in (None, MASK):
        ours = apply({"params": params}, X, TOKENS, mask)
        np.testing.assert_allclose(ours, formula(params, spec, mask), atol=2e-5)
    assert ("key" in params["attention"]) == (not spec.text_only)


def test_a_new_block_is_the_identity_and_bfloat16_stays_finite():
    block = TextAttentionBlock(TextAttention(), num_heads=2, norm_groups=2, dtype=jnp.bfloat16)
    params = block.init(jax.random.key(0), X, TOKENS)["params"]
    out = block.apply({"params": params}, X, 1e4 * TOKENS, MASK)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, X.astype(jnp.bfloat16))


@pytest.mark.parametrize("spec, expected", [
    ({}, 3), ({"num_heads": 6}, 6), ({"head_dim": 4}, 6),
])  # fmt: skip
def test_heads_are_those_of_the_specification_or_of_the_network(spec, expected):
    assert TextAttention(**spec).heads(24, 3) == expected


@pytest.mark.parametrize("spec, words", [
    ({"num_heads": 2, "head_dim": 4}, "num_heads = 2 and head_dim = 4"),
    ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
    ({"text_norm": "batch"}, "got 'batch'"),
    ({"text_norm_groups": 4}, "belongs to text_norm='group', got 4 with None"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(spec, words):
    with pytest.raises(ValueError, match=words):
        TextAttention(**spec)
    with pytest.raises(ValueError, match=r"channels = 8 .* num_heads = 3"):
        TextAttention(num_heads=3).heads(8, 1)
    with pytest.raises(ValueError, match=r"channels = 8 .* head_dim = 3"):
        TextAttention(head_dim=3).heads(8, 1)
