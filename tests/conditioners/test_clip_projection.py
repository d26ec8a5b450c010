"""The projection of CLIP embeddings: its equations, its null, its mask, its refusals."""

import jax
import numpy as np
import pytest

from diffusion_jax.conditioners.clip_projection import CLIPProjectionConfig, clip_projection

CONFIG = CLIPProjectionConfig(num_extra_tokens=2, embedding_dim=3, vector_dim=4, token_dim=5)
PROJECTION = clip_projection(CONFIG)


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


PARAMS = jax.tree.map(
    lambda leaf: normal(*leaf.shape), jax.eval_shape(PROJECTION.init, jax.random.key(0))
)
BATCH = {
    "image_embedding": normal(2, 3),
    "text_embedding": normal(2, 3) + 1,
    "text_tokens": normal(2, 6, 3),
    "text_mask": np.array([[1, 1, 0, 0, 0, 0], [1] * 6], bool),
    "null_text_embedding": normal(1, 3),
    "null_text_tokens": normal(1, 6, 3),
    "null_text_mask": np.array([[1, 0, 0, 0, 0, 0]], bool),
}


def dense(name, x):
    return x @ PARAMS[name]["kernel"] + PARAMS[name]["bias"]


def expected(image, text, hidden):
    """Token k of the image holds the numbers k, k + 2, k + 4 … of its projection."""
    extra = dense("image_to_tokens", image).reshape(2, 5, 2).transpose(0, 2, 1)
    h = dense("text_to_tokens", hidden)
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    h = h * PARAMS["token_norm"]["scale"] + PARAMS["token_norm"]["bias"]
    vector = dense("image_to_vector", image) + dense("text_to_vector", text)
    return vector, np.concatenate([extra, h], axis=1)


def check(cond, vector, tokens):
    np.testing.assert_allclose(cond.vector, vector, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cond.tokens, tokens, rtol=1e-4, atol=1e-4)


def test_image_and_text_become_a_vector_and_tokens():
    cond = PROJECTION.apply(PARAMS, BATCH, None)
    inputs = [BATCH[name] for name in ("image_embedding", "text_embedding", "text_tokens")]
    check(cond, *expected(*inputs))
    np.testing.assert_array_equal(cond.token_mask[0], [1, 1, 1, 1, 0, 0, 0, 0])
    assert cond.token_mask[1].all()


def test_the_null_is_the_learned_embedding_with_the_empty_text():
    cond = PROJECTION.null(PARAMS, BATCH)
    image = np.tile(PARAMS["null_image"], (2, 1))
    text = np.tile(BATCH["null_text_embedding"], (2, 1))
    check(cond, *expected(image, text, np.tile(BATCH["null_text_tokens"], (2, 1, 1))))
    np.testing.assert_array_equal(cond.token_mask, [[1, 1, 1, 0, 0, 0, 0, 0]] * 2)


def test_without_a_mask_there_is_none_and_bfloat16_is_the_dtype_of_what_comes():
    batch = {name: value for name, value in BATCH.items() if not name.endswith("mask")}
    half = clip_projection(CONFIG, dtype="bfloat16").apply(PARAMS, batch, None)
    assert half.token_mask is None
    assert str(half.tokens.dtype) == str(half.vector.dtype) == "bfloat16"
    exact = PROJECTION.apply(PARAMS, batch, None)
    np.testing.assert_allclose(half.vector.astype(np.float32), exact.vector, rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_embedding": normal(2, 4)}, r"image_embedding must have shape \[B, D\]"),
        ({"text_tokens": normal(2, 3)}, r"text_tokens must have shape \[B, L, D\]"),
        ({"text_mask": np.ones((2, 5), bool)}, "got bool of shape"),
        ({"text_mask": np.ones((2, 6), np.float32)}, "got float32"),
        ({"text_embedding": normal(3, 3)}, "of 2 examples"),
    ],
)
def test_entries_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PROJECTION.apply(PARAMS, BATCH | change, None)


def test_missing_entries_and_sizes_are_refused():
    batch = {name: value for name, value in BATCH.items() if name != "null_text_embedding"}
    with pytest.raises(ValueError, match="no 'null_text_embedding'"):
        PROJECTION.null(PARAMS, batch)
    with pytest.raises(ValueError, match="token_dim must be at least 1, got 0"):
        CLIPProjectionConfig(token_dim=0)
