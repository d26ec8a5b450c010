"""Condition: paired batches, dropping, padding of tokens, and slots that do not match."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.condition import Condition, Grounding, check_same_slots, drop, together


def tokens(length, value, batch=2, mask=None):
    return Condition(tokens=jnp.full((batch, length, 3), float(value)), token_mask=mask)


def test_together_interleaves_every_slot():
    def filled(value):
        return Condition(
            vector=jnp.full((2, 4), value),
            tokens=jnp.full((2, 5, 3), value),
            token_mask=jnp.full((2, 5), value > 0),
            image=jnp.full((2, 2, 2, 1), value),
            grounding=Grounding(jnp.full((2, 6, 3), value), jnp.full((2,), value)),
        )

    both = together(filled(1.0), filled(0.0))
    assert both.slots() == ("vector", "tokens", "token_mask", "image", "grounding")
    for leaf in jax.tree.leaves(both):
        means = np.asarray(leaf, np.float32).reshape(4, -1).mean(axis=1)
        np.testing.assert_array_equal(means, [1, 0, 1, 0])


def test_together_pads_and_masks_the_shorter_prompt():
    both = together(tokens(2, 1.0), tokens(4, 7.0))
    assert both.tokens.shape == (4, 4, 3)
    np.testing.assert_array_equal(both.tokens[0, :, 0], [1, 1, 0, 0])
    np.testing.assert_array_equal(both.token_mask[0], [True, True, False, False])
    np.testing.assert_array_equal(both.token_mask[1], [True] * 4)
    other_way = together(tokens(4, 7.0), tokens(2, 1.0, mask=jnp.ones((2, 2), bool)))
    np.testing.assert_array_equal(other_way.token_mask[1], [True, True, False, False])


def test_masks_survive_padding():
    mask = jnp.asarray([[True, False], [True, True]])
    both = together(tokens(2, 1.0, mask=mask), tokens(3, 0.0))
    np.testing.assert_array_equal(both.token_mask[0], [True, False, False])
    np.testing.assert_array_equal(both.token_mask[2], [True, True, False])


def test_equal_lengths_get_no_mask():
    assert together(tokens(3, 1.0), tokens(3, 0.0)).token_mask is None


@pytest.mark.parametrize(
    "a, b, first, second",
    [
        (Condition(vector=jnp.ones((2, 1))), Condition(), r"\['vector'\]", r"\[\]"),
        (Condition(), Condition(image=jnp.ones((2, 1, 1, 1))), r"\[\]", r"\['image'\]"),
        (tokens(3, 1.0, mask=jnp.ones((2, 3), bool)), tokens(3, 0.0), r"\['token_mask'\]", r"\[\]"),
    ],
)
def test_different_slots_are_refused_by_name(a, b, first, second):
    message = f"first only: {first}, in the second only: {second}"
    keys = jax.random.split(jax.random.key(0), 2)
    for act in (check_same_slots, together, lambda a, b: drop(keys, a, b, 0.5)):
        with pytest.raises(ValueError, match=message):
            act(a, b)


def test_drop_takes_whole_examples_at_the_given_rate():
    keys = jax.random.split(jax.random.key(0), 4000)

    def filled(value):
        return Condition(vector=jnp.full((4000, 1), value), tokens=jnp.full((4000, 2, 1), value))

    out = drop(keys, filled(1.0), filled(0.0), 0.25)
    kept = np.asarray(out.vector[:, 0])
    # Standard error √(.25 · .75 / 4000) = 0.007.
    assert abs(kept.mean() - 0.75) < 0.03
    np.testing.assert_array_equal(np.asarray(out.tokens).reshape(4000, 2), np.stack([kept] * 2, 1))
    backwards = drop(keys[::-1], filled(1.0), filled(0.0), 0.25)
    np.testing.assert_array_equal(backwards.vector[::-1, 0], kept)


@pytest.mark.parametrize("rate, expected", [(0.0, 1.0), (1.0, 0.0)])
def test_drop_at_the_ends(rate, expected):
    keys = jax.random.split(jax.random.key(0), 3)
    out = drop(keys, tokens(2, 1.0, batch=3), tokens(2, 0.0, batch=3), rate)
    np.testing.assert_array_equal(out.tokens, expected)


def test_drop_pads_tokens_and_their_masks_alike():
    keys = jax.random.split(jax.random.key(0), 2)
    out = drop(keys, tokens(4, 1.0), tokens(1, 0.0), 1.0)
    assert out.tokens.shape == (2, 4, 3)
    np.testing.assert_array_equal(out.token_mask, [[True, False, False, False]] * 2)
