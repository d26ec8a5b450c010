"""GLIDE's text encoder: against its formula in float64, and what it must refuse."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.text_transformer import TextTransformerConfig
from tests.models.trees import random_params

TINY = TextTransformerConfig(
    vector_dim=6, vocab_size=10, length=4, width=8, num_layers=1, num_heads=2
)
IDS = np.asarray([[3, 1, 9, 9], [0, 2, 5, 7]])
MASK = np.asarray([[True, True, False, False], [True, True, True, True]])


def gelu(x):
    return x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0))) / 2.0


def dense(params, x):
    return x @ params["kernel"].astype(np.float64) + params["bias"]


def norm(params, x):
    h = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return h * params["scale"] + params["bias"]


def attention(params, x, heads):
    """Every position attends to every other: no causal mask, no mask of padding."""
    q, k, v = (dense(params[name], x) for name in ("query", "key", "value"))
    out, width = np.empty_like(q), x.shape[-1] // heads
    for b in range(len(x)):
        for i in range(heads):
            part = slice(i * width, (i + 1) * width)
            weights = np.exp(q[b, :, part] @ k[b, :, part].T / np.sqrt(width))
            out[b, :, part] = weights / weights.sum(1, keepdims=True) @ v[b, :, part]
    return dense(params["out"], out)


def formula(config, params, mask):
    h = params["token_embed"]["embedding"][IDS].astype(np.float64) + params["position"]
    if config.padding:
        h = np.where(mask[..., None], h, params["padding"])
    block = params["block_0"]
    h = h + attention(block["attention"], norm(block["norm_1"], h), config.num_heads)
    h = h + dense(block["dense_2"], gelu(dense(block["dense_1"], norm(block["norm_2"], h))))
    h = norm(params["norm_out"], h) if config.final_norm else h
    return h, dense(params["vector"], h[:, -1])


@pytest.mark.parametrize("padding", [True, False])
def test_tokens_and_vector_are_the_formula(padding):
    config = TextTransformerConfig(6, 10, 4, 8, 1, 2, final_norm=padding, padding=padding)
    module = config.build()
    params = random_params(module, IDS, MASK, scale=0.5)
    ours = jax.jit(module.apply)({"params": params}, IDS, MASK)
    for made, expected in zip(ours, formula(config, params, MASK), strict=True):
        np.testing.assert_allclose(made, expected, atol=2e-5)
    assert ("padding" in params) == ("norm_out" in params) == padding


def test_bfloat16_is_finite_and_close():
    params = random_params(TINY.build(), IDS, MASK, scale=0.5)
    tokens, vector = TINY.build(dtype="bfloat16").apply({"params": params}, IDS, MASK)
    assert tokens.dtype == vector.dtype == jnp.bfloat16
    expected = formula(TINY, params, MASK)
    for made, exact in zip((tokens, vector), expected, strict=True):
        np.testing.assert_allclose(np.asarray(made, np.float64), exact, atol=0.1)


@pytest.mark.parametrize("ids, mask, words", [
    (IDS[:, :3], None, r"\[B, 4\].*4 positions, got \(2, 3\)"),
    (IDS.astype(np.float32), None, "integers.*float32"),
    (IDS, MASK[:, :3], r"mask must be bool of shape \(2, 4\)"),
    (IDS, MASK.astype(np.int32), "mask must be bool.*int32"),
])  # fmt: skip
def test_wrong_texts_are_refused(ids, mask, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(TINY.build().init, jax.random.key(0), ids, mask)


@pytest.mark.parametrize("change, words", [
    ({"length": 0}, "length must be at least 1, got 0"),
    ({"num_heads": 3, "width": 8}, "multiple of num_heads = 3, got 8"),
])  # fmt: skip
def test_impossible_encoders_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        TextTransformerConfig(**change)
