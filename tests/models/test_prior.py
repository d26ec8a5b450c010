"""The diffusion prior: what stands where, who attends to whom, and published sizes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.condition import Condition
from diffusion_jax.models import PriorConfig
from diffusion_jax.models.embeddings import sinusoidal_embedding
from diffusion_jax.models.prior import causal_mask, restore_embedding, standardize_embedding
from diffusion_jax.models.unclip import kandinsky_prior, karlo_prior, shap_e_prior
from tests.models.trees import random_params

TEXT = PriorConfig(data_dim=6, num_text_tokens=3, num_other_tokens=4, width=8, depth=1, num_heads=2)
LATENTS = PriorConfig(
    data_dim=6,
    vector_dim=5,
    out_dim=7,
    num_text_tokens=4,
    num_other_tokens=0,
    width=8,
    depth=1,
    num_heads=2,
    token_projection=False,
    vector_norm=True,
    norm_in=True,
    query=False,
)
T = np.array([3.0, 700.0], np.float32)


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


X, XS = normal(2, 6), normal(2, 4, 6)
COND = Condition(vector=normal(2, 6) + 1, tokens=normal(2, 3, 6))
ONES = np.ones((2, 3), bool)


def without_blocks(config, x, cond):
    """(params, output) of a network whose blocks add nothing to the sequence."""
    params = random_params(config.build(), x, T, cond)
    for i in range(config.depth):
        for name in ("attn", "mlp_2"):
            layer = params[f"block_{i}"][name]
            layer = layer["out"] if name == "attn" else layer
            for leaf in layer.values():
                leaf[...] = 0.0
    return params, np.asarray(jax.jit(config.build().apply)({"params": params}, x, T, cond))


def dense(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def norm(layer, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * layer["scale"] + layer["bias"]


def test_the_prediction_stands_in_the_place_of_the_query():
    params, out = without_blocks(TEXT, X, COND)
    last = params["query"][:, 0] + params["positions"][:, -1]
    expected = dense(params["out"], norm(params["norm_out"], last))
    np.testing.assert_allclose(out, np.tile(expected, (2, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("extra", [0, 2], ids=["positions of x", "positions of all"])
def test_without_a_query_it_stands_in_the_places_of_x(extra):
    """Learned positions are those of x alone, or of the vector and the time before it too."""
    config = dataclasses.replace(LATENTS, num_other_tokens=extra, norm_in=False)
    cond = Condition(vector=normal(2, 5))
    params, out = without_blocks(config, XS, cond)
    h = dense(params["x_in"], XS) + params["positions"][:, extra:]
    np.testing.assert_allclose(
        out, dense(params["out"], norm(params["norm_out"], h)), rtol=1e-5, atol=1e-4
    )


def test_the_sequence_is_text_vector_time_x_and_query():
    """One block whose attention is uniform: the query receives the mean of all values."""
    config = dataclasses.replace(TEXT, time_activation="gelu", time_hidden=5)
    params = random_params(config.build(), X, T, COND, scale=0.5)
    block = params["block_0"]
    block["attn"]["query"]["kernel"][...] = block["attn"]["query"]["bias"][...] = 0.0
    block["mlp_2"]["kernel"][...] = block["mlp_2"]["bias"][...] = 0.0
    out = jax.jit(config.build().apply)({"params": params}, X, T, COND)

    h = dense(params["time_1"], np.asarray(sinusoidal_embedding(T, 8)))
    time = dense(params["time_2"], h * 0.5 * (1 + np.vectorize(math.erf)(h / 2**0.5)))
    text = dense(params["token_in"], COND.tokens)
    vector = dense(params["vector_in"], COND.vector)
    query = np.tile(params["query"], (2, 1, 1))
    one = [vector[:, None], time[:, None], dense(params["x_in"], X)[:, None], query]
    h = np.concatenate([text, *one], axis=1) + params["positions"]
    values = dense(block["attn"]["value"], norm(block["norm_1"], h))
    h = h[:, -1] + dense(block["attn"]["out"], values.mean(1))
    expected = dense(params["out"], norm(params["norm_out"], h))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_the_mask_is_what_finite_penalties_give():
    """softmax(logits - 10000 · (padding + later)), whatever is padding."""
    masks = np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 1]], bool)
    padding = np.pad(~masks, ((0, 0), (0, 2))).astype(float)
    later = np.triu(np.ones((5, 5)), 1)
    logits = normal(4, 5, 5) - 1e4 * (padding[:, None] + later)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    ours = np.asarray(causal_mask(jnp.asarray(masks), 5))[:, 0]
    np.testing.assert_array_equal(ours, weights > 0)


def test_a_mask_hides_padding():
    network = jax.jit(TEXT.build().apply)
    params = {"params": random_params(TEXT.build(), X, T, COND, scale=0.4)}
    mask = ONES.copy()
    mask[:, 2] = False
    both = COND.tokens, COND.tokens + np.float32([[[0], [0], [1]]])

    def change(token_mask):
        cond = COND.replace(token_mask=token_mask)
        before, after = (network(params, X, T, cond.replace(tokens=tokens)) for tokens in both)
        return np.abs(after - before).max()

    assert change(mask) == 0.0
    assert change(ONES) > 1e-3 and change(None) > 1e-3


def test_a_later_token_of_x_is_seen_without_a_mask_only():
    config = dataclasses.replace(LATENTS, num_other_tokens=2)
    cond = Condition(vector=normal(2, 5))
    network = jax.jit(config.build().apply)
    params = {"params": random_params(config.build(), XS, T, cond, scale=0.4)}
    changed = XS.copy()
    changed[:, 3] += 1.0
    masked = cond.replace(token_mask=np.ones((2, 4), bool))
    for told, seen in ((cond, True), (masked, False)):
        change = np.abs(network(params, changed, T, told) - network(params, XS, T, told))
        assert change[:, 3].max() > 1e-3
        assert (change[:, :3].max() > 1e-3) == seen


def test_a_new_prior_says_zero_and_shapes_are_the_promised_ones():
    network = TEXT.build(dtype="bfloat16")
    out, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), X, T, COND)
    assert (out.shape, out.dtype) == ((2, 6), jnp.bfloat16)
    last = jax.jit(lambda key: network.init(key, X, T, COND)["params"]["out"])(jax.random.key(0))
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(last))
    cond = Condition(vector=normal(2, 3, 5), tokens=normal(2, 2, 8))
    config = dataclasses.replace(LATENTS, num_text_tokens=10)
    init = config.build(param_dtype="bfloat16").init_with_output
    out, variables = jax.eval_shape(init, jax.random.key(0), XS, T, cond)
    assert (out.shape, out.dtype) == ((2, 4, 7), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("bfloat16")}


def test_bfloat16_follows_float32():
    params = {"params": random_params(TEXT.build(), X, T, COND, scale=0.4)}
    cond = COND.replace(token_mask=np.array([[1, 1, 0], [0, 0, 0]], bool))
    exact, ours = (
        np.asarray(jax.jit(TEXT.build(dtype=dtype).apply)(params, X, T, cond), np.float32)
        for dtype in ("float32", "bfloat16")
    )
    # 8 bits, and a dozen roundings in a row.
    assert 0.0 < np.abs(ours - exact).max() < 0.1 * np.abs(exact).max()


def test_dropout_follows_the_keys():
    config = dataclasses.replace(TEXT, dropout=0.5)
    params = {"params": random_params(config.build(), X, T, COND, scale=0.4)}
    keys = jax.random.split(jax.random.key(1), 2)
    x, t, vector, tokens = (np.stack([a[0], a[0]]) for a in (X, T, COND.vector, COND.tokens))
    network = jax.jit(config.build().apply)
    cond = Condition(vector=vector, tokens=tokens)
    out = network(params, x, t, cond, keys=keys)
    assert np.abs(out[0] - out[1]).max() > 1e-3
    np.testing.assert_allclose(
        network(params, x, t, cond, keys=keys[::-1]), out[::-1], rtol=1e-4, atol=1e-5
    )


def test_remat_recomputes():
    remat = dataclasses.replace(TEXT, remat=True)
    params = {"params": random_params(TEXT.build(), X, T, COND)}
    assert "remat" in str(jax.make_jaxpr(remat.build().apply)(params, X, T, COND))


def test_embeddings_are_scaled_by_their_statistics_and_back():
    statistics = {"mean": normal(1, 6), "std": 0.5 + np.abs(normal(1, 6))}
    x0 = standardize_embedding(statistics, X)
    np.testing.assert_allclose(x0, (X - statistics["mean"]) / statistics["std"], rtol=1e-6)
    np.testing.assert_allclose(restore_embedding(statistics, x0), X, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        restore_embedding(statistics, XS)[1, 2],
        XS[1, 2] * statistics["std"][0] + statistics["mean"][0],
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    "config, x, cond, message",
    [
        (TEXT, X[:, :4], COND, r"\[B, 6\] or \[B, N, 6\], got \(2, 4\)"),
        (TEXT, X, COND.replace(vector=None), "text's embedding, got None"),
        (TEXT, X, COND.replace(vector=normal(2, 3)), r"\[2, M, 6\], got \(2, 3\)"),
        (TEXT, X, COND.replace(tokens=None), "token_projection=False"),
        (TEXT, X, COND.replace(tokens=normal(2, 3, 8)), r"\[2, L, 6\], got \(2, 3, 8\)"),
        (TEXT, X, COND.replace(token_mask=np.ones((2, 4), bool)), r"got bool of shape \(2, 4\)"),
        (TEXT, X, COND.replace(token_mask=np.ones((2, 3), np.float32)), "got float32"),
        (TEXT, X, COND.replace(tokens=normal(2, 4, 6)), "a sequence of 8 tokens"),
        (TEXT, X, COND.replace(image=normal(2, 6)), "'image'"),
        (LATENTS, XS, Condition(vector=normal(2, 5), tokens=XS), r"\[2, L, 8\]"),
        (LATENTS, XS, Condition(vector=normal(2, 5), token_mask=np.ones((2, 4), bool)), "6 tokens"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(config, x, cond, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(config.build().init, jax.random.key(0), x, T, cond)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": 9}, "num_heads = 2, got 9"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"out_dim": 0}, "out_dim must be at least 1, got"),
        ({"num_other_tokens": -1}, "num_other_tokens"),
        ({"time_activation": "tanh"}, "got 'tanh'"),
        ({"dropout": 1.0}, "got 1.0"),
    ],
)
def test_bad_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TEXT, **change)


@pytest.mark.parametrize(
    "make, argument, message",
    [(kandinsky_prior, "3", "got '3'"), (shap_e_prior, "sound", "got 'sound'")],
)
def test_priors_that_were_not_published_are_refused(make, argument, message):
    with pytest.raises(ValueError, match=message):
        make(argument)
    assert karlo_prior() == kandinsky_prior("2.1")
