"""Embeddings of labels, levels, sizes, texts and images: their formulas, slots and branches."""

import jax
import numpy as np
import pytest

from diffusion_jax.conditioners import CONDITIONERS, combine, given_tokens, where_given
from diffusion_jax.models.embeddings import sinusoidal_embedding

RANDOM = np.random.default_rng(0)


def normal(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


TEXT, IMAGE, TOKENS, HINT = normal(2, 5), normal(2, 7), normal(2, 3, 6), normal(2, 16, 8, 3)
MASK = np.asarray([[True, True, True], [True, False, False]])
BATCH = {
    "vector": TEXT,
    "noise_level": np.asarray([3, 40]),
    "text_embedding": TEXT,
    "image_embedding": IMAGE,
    "sizes": np.asarray([[64, 32], [16, 8]], np.float32),
    "guidance": TEXT,
    "hint": HINT,
    "tokens": TOKENS,
    "token_mask": MASK,
}
# Kind -> options, and the filled slots with their shapes.
KINDS = {
    "given_vector": ({"dim": 5}, {"vector": (2, 5)}),
    "projected_vector": ({"features": 5, "dim": 4}, {"vector": (2, 4)}),
    "linear_vector": ({"features": 5, "dim": 4}, {"vector": (2, 4)}),
    "noise_level": ({"channels": 6, "dim": 4}, {"vector": (2, 4)}),
    "pooled_tokens": ({"features": 6, "dim": 4, "num_heads": 2}, {"vector": (2, 4)}),
    "text_image_vector": ({"text_dim": 5, "image_dim": 7, "dim": 4}, {"vector": (2, 4)}),
    "image_vector": ({"image_dim": 7, "dim": 4}, {"vector": (2, 4)}),
    "image_hint": ({"image_dim": 7, "dim": 4}, {"vector": (2, 4), "image": (2, 2, 1, 4)}),
    "text_and_sizes": ({"features": 13, "channels": 4, "dim": 4}, {"vector": (2, 4)}),
    "guidance_scale": ({"features": 5, "channels": 8}, {"time": (2, 8)}),
    "given_tokens": ({"dim": 6}, {"tokens": (2, 3, 6), "token_mask": (2, 3)}),
    "projected_tokens": (
        {"features": 6, "dim": 4},
        {"tokens": (2, 3, 4), "token_mask": (2, 3)},
    ),
    "text_image_tokens": (
        {"text_dim": 6, "image_dim": 7, "dim": 4, "num_tokens": 2},
        {"tokens": (2, 5, 4), "token_mask": (2, 5)},
    ),
    "image_tokens": ({"image_dim": 7, "dim": 4, "num_tokens": 3}, {"tokens": (2, 3, 4)}),
}


def made(kind, **options):
    """The conditioner with normal parameters; without compiling its initializer."""
    conditioner = CONDITIONERS[kind](**(options or KINDS[kind][0]))
    shapes = jax.eval_shape(conditioner.init, jax.random.key(0))
    return conditioner, jax.tree.map(lambda leaf: normal(*leaf.shape), shapes)


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0.0)


def silu(x):
    return x / (1.0 + np.exp(-x))


def layer_norm(x, p):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * p["scale"] + p["bias"]


@pytest.mark.parametrize("kind", KINDS)
def test_slots_and_the_unconditional_branch(kind):
    """The other branch reads its own inputs, except for what has no negative."""
    conditioner, params = made(kind)
    cond = conditioner.apply(params, BATCH, None)
    found = {slot: getattr(cond, slot).shape for slot in cond.slots()}
    assert found == KINDS[kind][1]
    other = {f"null_{name}": value for name, value in BATCH.items()} | {
        name: BATCH[name] for name in ("noise_level", "sizes", "hint", "guidance")
    }
    null = conditioner.null(params, other)
    jax.tree.map(np.testing.assert_array_equal, null, cond)
    if kind not in ("noise_level", "guidance_scale"):
        with pytest.raises(ValueError, match="the batch has no null_"):
            conditioner.null(params, BATCH)
    if kind != "guidance_scale":
        with pytest.raises(ValueError, match="the batch has no"):
            conditioner.apply(params, {}, None)


def test_vectors_are_their_formulas():
    _, p = made("projected_vector")
    conditioner = CONDITIONERS["projected_vector"](features=5, dim=4)
    expected = dense(silu(dense(TEXT, p["dense_1"])), p["dense_2"])
    np.testing.assert_allclose(conditioner.apply(p, BATCH, None).vector, expected, atol=1e-4)

    conditioner, p = made(
        "noise_level", channels=6, dim=4, cos_first=False, freq_shift=1, act="relu"
    )
    features = np.asarray(
        sinusoidal_embedding(BATCH["noise_level"], 6, cos_first=False, freq_shift=1)
    )
    expected = dense(np.maximum(dense(features, p["dense_1"]), 0.0), p["dense_2"])
    np.testing.assert_allclose(conditioner.apply(p, BATCH, None).vector, expected, atol=1e-4)

    conditioner, p = made("text_and_sizes")
    sizes = np.asarray(sinusoidal_embedding(BATCH["sizes"].reshape(-1), 4)).reshape(2, 8)
    h = np.concatenate([TEXT, sizes], axis=1)
    expected = dense(silu(dense(h, p["dense_1"])), p["dense_2"])
    np.testing.assert_allclose(conditioner.apply(p, BATCH, None).vector, expected, atol=1e-4)

    conditioner, p = made("text_image_vector")
    expected = layer_norm(dense(TEXT, p["text_proj"]), p["norm"]) + dense(IMAGE, p["image_proj"])
    np.testing.assert_allclose(conditioner.apply(p, BATCH, None).vector, expected, atol=1e-4)


def test_tokens_are_pooled_by_their_mean():
    conditioner, p = made("pooled_tokens")
    tokens = layer_norm(TOKENS, p["norm_in"])
    first = tokens.mean(1, keepdims=True) + p["position"][None]
    tokens = np.concatenate([first, tokens], axis=1)

    def heads(x, name):
        return dense(x, p[name]).reshape(*x.shape[:2], 2, 3).swapaxes(1, 2)

    logits = heads(first, "query") @ heads(tokens, "key").swapaxes(2, 3) / np.sqrt(3.0)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    pooled = weights / weights.sum(-1, keepdims=True) @ heads(tokens, "value")
    expected = layer_norm(dense(pooled.swapaxes(1, 2).reshape(2, 6), p["proj"]), p["norm_out"])
    np.testing.assert_allclose(conditioner.apply(p, BATCH, None).vector, expected, atol=1e-4)


def test_tokens_of_images_come_first_and_are_never_masked():
    conditioner, p = made("text_image_tokens")
    cond = conditioner.apply(p, BATCH, None)
    seen = dense(IMAGE, p["image_proj"]).reshape(2, 2, 4)
    expected = np.concatenate([seen, dense(TOKENS, p["text_proj"])], axis=1)
    np.testing.assert_allclose(cond.tokens, expected, atol=1e-4)
    np.testing.assert_array_equal(cond.token_mask, np.concatenate([np.ones((2, 2), bool), MASK], 1))
    unmasked = {name: value for name, value in BATCH.items() if name != "token_mask"}
    assert conditioner.apply(p, unmasked, None).token_mask is None
    conditioner, p = made("image_tokens")
    expected = layer_norm(dense(IMAGE, p["image_proj"]).reshape(2, 3, 4), p["norm"])
    np.testing.assert_allclose(conditioner.apply(p, BATCH, None).tokens, expected, atol=1e-4)


def test_vectors_and_times_of_several_parts_add_up():
    """A part without parameters needs none; what a batch lacks is not filled where it may."""
    both = combine(
        a=CONDITIONERS["given_vector"](5),
        b=CONDITIONERS["given_vector"](5, name="guidance"),
        c=CONDITIONERS["guidance_scale"](5, 8),
        d=where_given("boxes", given_tokens(6)),
    )
    weight = {"c": {"dense": {"kernel": normal(5, 8)}}}
    cond = both.apply(weight, BATCH, None)
    np.testing.assert_allclose(cond.vector, 2.0 * TEXT, rtol=1e-6)
    np.testing.assert_allclose(cond.time, TEXT @ weight["c"]["dense"]["kernel"], atol=1e-5)
    assert cond.slots() == ("vector", "time")
    without = {"vector": TEXT, "guidance": TEXT, "boxes": TOKENS, "tokens": TOKENS}
    assert "tokens" in both.apply(weight, without, None).slots()


@pytest.mark.parametrize(
    "kind, change, words",
    [
        ("given_vector", {"vector": IMAGE}, r"vector must have shape \[B, 5\], got \(2, 7\)"),
        ("given_tokens", {"tokens": TEXT}, r"tokens must have shape \[B, L, 6\], got \(2, 5\)"),
        ("text_and_sizes", {"text_embedding": IMAGE}, "must be 13 wide together"),
    ],
)
def test_other_widths_are_refused(kind, change, words):
    conditioner, params = made(kind)
    with pytest.raises(ValueError, match=words):
        conditioner.apply(params, BATCH | change, None)


def test_heads_must_divide_the_tokens():
    with pytest.raises(ValueError, match="must be a multiple of num_heads = 4, got 6"):
        made("pooled_tokens", features=6, dim=4, num_heads=4)
