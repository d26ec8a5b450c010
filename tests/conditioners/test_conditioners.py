"""Conditioners fill their slots, drop per example, and combine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.conditioners import UNCONDITIONAL, Conditioner, combine, label, with_dropout
from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.condition import Condition, Grounding

LABELS = {"label": jnp.asarray([0, 2, 1, 2], jnp.int32)}


def constant(**slots):
    """A conditioner without parameters whose null is zero in the same slots."""
    cond = Condition(**slots)
    return Conditioner(
        init=lambda key: {},
        apply=lambda params, batch, keys: cond,
        null=lambda params, batch: jax.tree.map(jnp.zeros_like, cond),
    )


def test_label_looks_rows_up_and_the_last_row_is_null():
    conditioner = label(3, 5)
    params = {"embedding": jnp.arange(20.0).reshape(4, 5)}
    vector = conditioner.apply(params, LABELS, None).vector
    np.testing.assert_array_equal(vector, np.arange(20.0).reshape(4, 5)[[0, 2, 1, 2]])
    null = conditioner.null(params, LABELS).vector
    np.testing.assert_array_equal(null, np.tile(np.arange(15.0, 20.0), (4, 1)))
    assert conditioner.init(jax.random.key(0))["embedding"].shape == (4, 5)


def test_label_looks_rows_up_in_every_table():
    conditioner = label(3, 2, tables=2)
    tables = np.arange(16.0).reshape(2, 4, 2)
    params = {"embedding_0": tables[0], "embedding_1": tables[1]}
    vector = conditioner.apply(params, LABELS, None).vector
    np.testing.assert_array_equal(vector[1], [4.0, 5.0, 12.0, 13.0])
    null = conditioner.null(params, LABELS).vector
    np.testing.assert_array_equal(null, np.tile([6.0, 7.0, 14.0, 15.0], (4, 1)))
    drawn = conditioner.init(jax.random.key(0))
    assert {name: leaf.shape for name, leaf in drawn.items()} == {
        "embedding_0": (4, 2),
        "embedding_1": (4, 2),
    }
    with pytest.raises(ValueError, match="tables must be at least 1 or None, got 0"):
        label(3, 2, tables=0)


@pytest.mark.parametrize(
    "batch, message",
    [
        ({"image": jnp.zeros(2)}, "no 'label'"),
        ({"label": jnp.zeros(2)}, "integers"),
        ({"label": jnp.zeros((2, 1), jnp.int32)}, r"\(2, 1\)"),
    ],
)
def test_label_refuses_what_is_no_label(batch, message):
    conditioner = label(3, 5)
    with pytest.raises(ValueError, match=message):
        conditioner.apply(conditioner.init(jax.random.key(0)), batch, None)


@pytest.mark.slow
def test_dropout_needs_keys_and_has_its_rate():
    """4,000 examples at rate 0.3: the share of nulls is within 4 standard errors."""
    conditioner = with_dropout(label(3, 5), 0.3)
    params = conditioner.init(jax.random.key(0))
    batch = {"label": jnp.zeros(4000, jnp.int32)}
    kept = conditioner.apply(params, batch, None).vector
    np.testing.assert_array_equal(kept, label(3, 5).apply(params, batch, None).vector)
    dropped = conditioner.apply(params, batch, image_keys(0, np.arange(4000))).vector
    share = np.all(dropped == params["embedding"][-1][None], axis=1).mean()
    assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 4000)


def test_nested_dropouts_drop_independently():
    """Rates 0.5 and 0.5 keep a quarter; from shared keys they would keep a half."""
    once = with_dropout(constant(vector=jnp.ones((4000, 1))), 0.5)
    twice = with_dropout(once, 0.5)
    kept = twice.apply({}, {}, image_keys(0, np.arange(4000))).vector.mean()
    assert abs(kept - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)


def test_dropout_refuses_a_rate_outside_of_0_to_1():
    with pytest.raises(ValueError, match="1.5"):
        with_dropout(UNCONDITIONAL, 1.5)


def test_combine_adds_vectors_and_joins_tokens_images_and_objects():
    gate = jnp.ones(2)
    parts = combine(
        a=constant(
            vector=jnp.ones((2, 3)),
            tokens=jnp.ones((2, 1, 4)),
            image=jnp.ones((2, 4, 4, 1)),
            grounding=Grounding(jnp.ones((2, 1, 6)), gate),
        ),
        b=constant(
            vector=2 * jnp.ones((2, 3)),
            tokens=2 * jnp.ones((2, 2, 4)),
            token_mask=jnp.asarray([[True, False], [True, True]]),
            image=2 * jnp.ones((2, 4, 4, 2)),
            grounding=Grounding(2 * jnp.ones((2, 2, 6)), gate),
        ),
    )
    params = parts.init(jax.random.key(0))
    cond = parts.apply(params, {}, None)
    np.testing.assert_array_equal(cond.vector, 3 * np.ones((2, 3)))
    np.testing.assert_array_equal(cond.tokens[0, :, 0], [1, 2, 2])
    np.testing.assert_array_equal(cond.token_mask, [[True, True, False], [True, True, True]])
    np.testing.assert_array_equal(cond.image[0, 0, 0], [1, 2, 2])
    np.testing.assert_array_equal(cond.grounding.objects[0, :, 0], [1, 2, 2])
    assert parts.null(params, {}).slots() == cond.slots()


def test_combine_gives_every_part_its_own_parameters_and_keys():
    part = with_dropout(label(3, 5), 0.5)
    both = combine(a=part, b=part)
    params = both.init(jax.random.key(0))
    assert set(params) == {"a", "b"}
    assert not np.array_equal(params["a"]["embedding"], params["b"]["embedding"])
    batch = {"label": jnp.zeros(200, jnp.int32)}
    # With one-hot parameters the sum tells which of the two parts were dropped.
    params = {
        "a": {"embedding": jnp.zeros((4, 5)).at[-1].set(1.0)},
        "b": {"embedding": jnp.zeros((4, 5)).at[-1].set(2.0)},
    }
    sums = both.apply(params, batch, image_keys(0, np.arange(200))).vector[:, 0]
    assert set(np.asarray(sums).tolist()) == {0.0, 1.0, 2.0, 3.0}


def test_combine_refuses_nothing_and_a_null_of_other_slots():
    with pytest.raises(ValueError, match="at least one"):
        combine()
    crooked = constant(vector=jnp.ones((2, 3)))._replace(null=lambda params, batch: Condition())
    with pytest.raises(ValueError, match="vector"):
        combine(a=crooked).null({"a": {}}, {})


def test_without_a_null_label_the_table_has_the_classes_alone():
    """ADM's table, so that its weights fit."""
    conditioner = label(3, 4, null=False)
    params = conditioner.init(jax.random.key(0))
    assert params["embedding"].shape == (3, 4)
    batch = {"label": jnp.asarray([2, 0])}
    np.testing.assert_array_equal(
        conditioner.apply(params, batch, None).vector, params["embedding"][jnp.asarray([2, 0])]
    )
    assert not conditioner.null(params, batch).vector.any()
