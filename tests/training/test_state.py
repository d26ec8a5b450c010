"""TrainState: what is trained, what is not, and who owns which buffer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.training.state import TrainState
from tests.training import toy


def test_moments_and_average_exist_for_the_trainable_leaves_only():
    state = TrainState.create(toy.params(), optax.adam(0.1), trainable=("adapter/**",))
    assert state.trainable.keys() == state.ema.keys() == {"adapter"}
    assert state.frozen.keys() == {"base", "label"}
    assert jax.tree.structure(state.opt_state[0].mu) == jax.tree.structure(state.trainable)
    assert int(state.step) == 0


def test_params_are_the_whole_tree_with_its_empty_nodes():
    state = TrainState.create(toy.params(), optax.sgd(0.1), trainable=("adapter/**",))
    toy.assert_bit_equal(state.params, toy.params())
    toy.assert_bit_equal(state.ema_params, toy.params())


def test_ema_params_hold_the_average():
    state = TrainState.create(toy.params(), optax.sgd(0.1), trainable=("adapter/**",))
    state = state.replace(ema={"adapter": {"w": jnp.full((3, 2), 7.0)}})
    np.testing.assert_array_equal(state.ema_params["adapter"]["w"], np.full((3, 2), 7.0))
    toy.assert_bit_equal(state.params, toy.params())


def test_no_buffer_appears_twice_so_that_the_state_can_be_donated():
    state = TrainState.create(toy.params(), optax.adam(0.1), trainable=("**",))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)


def test_numpy_parameters_become_jax_arrays_and_are_not_written_into():
    given = jax.tree.map(np.array, toy.params())
    state = TrainState.create(given, optax.sgd(0.1))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    donate = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    jax.block_until_ready(donate(state))
    toy.assert_bit_equal(given, jax.tree.map(np.array, toy.params()))


def test_a_pattern_without_leaf_is_refused():
    with pytest.raises(ValueError, match="matches no parameter"):
        TrainState.create(toy.params(), optax.sgd(0.1), trainable=("nothing/**",))
