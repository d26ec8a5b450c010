"""Keys per image, broadcasting per example, interleaved pairs, one type per knob."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import (
    as_arrays,
    fold_in_each,
    halves,
    image_keys,
    per_example,
    per_image_normal,
    twice,
)
from diffusion_jax.core.schedules import Linear
from diffusion_jax.core.timesteps import trailing


def test_per_example():
    x = jnp.ones((2, 3, 3, 1))
    out = per_example(jnp.asarray([1.0, 5.0]), x) * x
    np.testing.assert_array_equal(out[1], 5.0 * x[1])
    assert per_example(2.0, x).shape == ()
    for wrong in (jnp.ones(3), jnp.ones((2, 1))):
        with pytest.raises(ValueError, match=r"\(2,\)"):
            per_example(wrong, x)


def test_image_keys_depend_on_seed_and_index_only():
    data = [jax.random.key_data(image_keys(5, i)) for i in (range(4), [2, 3], [3])]
    np.testing.assert_array_equal(data[0][2:], data[1])
    np.testing.assert_array_equal(data[0][3:], data[2])
    np.testing.assert_array_equal(
        data[0], jax.random.key_data(image_keys(jax.random.key(5), range(4)))
    )
    assert len(np.unique(data[0], axis=0)) == 4
    assert np.any(data[0] != jax.random.key_data(image_keys(6, range(4))))


def test_noise_of_an_image_is_its_own():
    keys = image_keys(0, range(3))
    noise = per_image_normal(keys, jnp.zeros((3, 2, 2, 1)))
    alone = per_image_normal(keys[1:2], jnp.zeros((1, 2, 2, 1)))
    np.testing.assert_array_equal(noise[1:2], alone)
    folded = per_image_normal(fold_in_each(keys, 1), jnp.zeros((3, 2, 2, 1)))
    assert np.all(noise != folded) and np.all(noise[0] != noise[1])


def test_pairs_are_interleaved():
    x = jnp.asarray([[1.0], [2.0]])
    doubled = twice({"x": x, "t": jnp.float32(3.0)})
    np.testing.assert_array_equal(doubled["x"][:, 0], [1, 1, 2, 2])
    assert doubled["t"].shape == ()
    first, second = halves(jnp.asarray([[1.0], [10.0], [2.0], [20.0]]))
    np.testing.assert_array_equal(first, x)
    np.testing.assert_array_equal(second, 10 * x)


def test_as_arrays_gives_every_spelling_of_a_number_one_type():
    leaves = jax.tree.leaves(as_arrays((1, 1.0, np.float64(1), jnp.float32(1), jnp.ones(()))))
    assert all(leaf.dtype == jnp.float32 and not leaf.weak_type for leaf in leaves)
    grid = as_arrays(trailing(Linear(), 3, max_steps=4))
    assert grid.stop.dtype == jnp.int32 and grid.levels.t.dtype == jnp.float32


def test_as_arrays_counts_the_steps_of_a_grid_with_python_bounds():
    """Beside knobs, whose integers are numbers; and the loop over such a grid compiles."""
    eta, grid = as_arrays((1, trailing(Linear(), 3, max_steps=4).starting_at(1).fixed()))
    assert eta.dtype == jnp.float32
    assert [(b.dtype, int(b)) for b in grid[1:3]] == [(jnp.int32, 1), (jnp.int32, 3)]
    run = jax.jit(lambda grid: jax.lax.fori_loop(*grid[1:3], lambda i, x: x + i, 0))
    assert int(run(grid)) == 3


def test_as_arrays_leaves_masks_alone():
    """A float mask would be no mask any more."""
    mask = as_arrays({"token_mask": np.ones(2, bool)})["token_mask"]
    assert mask.dtype == jnp.bool_
