"""DiT: published sizes, patches, positions and the identity that a new block is."""

import math

import jax
import numpy as np
import pytest

from diffusion_jax.core.condition import Condition
from diffusion_jax.models import DiTConfig
from diffusion_jax.models.dit import DiTBlock, patchify, sincos_positions, unpatchify


def count(config, *, size, channels):
    x = jax.ShapeDtypeStruct((1, size, size, channels), np.float32)
    t = jax.ShapeDtypeStruct((1,), np.float32)
    tree = jax.eval_shape(config.build().init, jax.random.key(0), x, t, Condition())
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_the_largest_network_has_its_published_size():
    """Peebles & Xie 2023, table 1: DiT-XL/2, 675 million with an embedding of 1001 labels."""
    config = DiTConfig(width=1152, depth=28, num_heads=16, out_channels=8)
    assert round((count(config, size=32, channels=4) + 1001 * 1152) / 1e6) == 675


def test_patches_are_cut_row_by_row_and_put_back():
    x = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    patches = patchify(x, 2)
    assert patches.shape == (2, 6, 12)
    np.testing.assert_array_equal(patches[1, 4], x[1, 2:4, 2:4].reshape(-1))
    np.testing.assert_array_equal(unpatchify(patches, 2, height=4, width=6), x)


def test_positions_are_their_formula():
    ours = sincos_positions(2, 3, 8)
    for row in range(2):
        for column in range(3):
            expected = []
            for position in (column, row):
                angles = [position, position / 10000**0.5]
                expected += [*np.sin(angles), *np.cos(angles)]
            np.testing.assert_allclose(ours[row * 3 + column], expected, atol=1e-6)
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        sincos_positions(2, 2, 6)


def test_a_new_block_is_the_identity():
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    emb = np.random.default_rng(1).normal(size=(2, 8)).astype(np.float32)
    init = jax.jit(DiTBlock(num_heads=2).init_with_output)
    out, _ = init(jax.random.key(0, impl="rbg"), x, emb)
    np.testing.assert_array_equal(out, x)


def test_learned_positions_belong_to_one_size():
    config = DiTConfig(width=8, depth=1, num_heads=2, position="learned")
    x = jax.ShapeDtypeStruct((1, 4, 8, 3), np.float32)
    t = jax.ShapeDtypeStruct((1,), np.float32)
    tree = jax.eval_shape(config.build().init, jax.random.key(0), x, t, Condition())["params"]
    assert tree["positions"].shape == (1, 8, 8)


def test_sizes_that_patches_do_not_tile_are_refused():
    with pytest.raises(ValueError, match="patch_size = 2, got 5 x 4"):
        DiTConfig().build().init(
            jax.random.key(0), np.zeros((1, 5, 4, 3), np.float32), np.zeros(1), Condition()
        )
