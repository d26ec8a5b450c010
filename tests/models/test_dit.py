"""DiT: published sizes, patches, positions and the identity that a new block is."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from diffusion_jax.core.condition import Condition
from diffusion_jax.models import DiTConfig
from diffusion_jax.models.dit import (
    DiTBlock,
    PatchEmbed,
    patchify,
    sincos_positions,
    unpatchify,
)
from diffusion_jax.models.dit_sizes import latent_dit
from tests.models.trees import random_params


def count(config, *, size, channels):
    x = jax.ShapeDtypeStruct((1, size, size, channels), np.float32)
    t = jax.ShapeDtypeStruct((1,), np.float32)
    cond = Condition(vector=jax.ShapeDtypeStruct((1, config.embed_dim), np.float32))
    tree = jax.eval_shape(config.build().init, jax.random.key(0), x, t, cond)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("size, millions", [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_networks_have_their_published_sizes(size, millions):
    """Peebles & Xie 2023, table 4: patches of 2, with an embedding of 1001 labels."""
    config = latent_dit(size)
    assert round((count(config, size=32, channels=4) + 1001 * config.width) / 1e6) == millions


def test_sizes_that_were_not_published_are_refused():
    with pytest.raises(ValueError, match="got 'XXL' and 2"):
        latent_dit("XXL")


def test_patches_are_cut_row_by_row_and_put_back():
    x = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    patches = patchify(x, 2)
    assert patches.shape == (2, 6, 12)
    np.testing.assert_array_equal(patches[1, 4], x[1, 2:4, 2:4].reshape(-1))
    np.testing.assert_array_equal(unpatchify(patches, 2, height=4, width=6), x)


def test_a_patch_is_seen_as_the_convolution_that_it_is():
    """Token (i, j) = sum over the patch's pixels of pixel · kernel[pixel] + bias."""
    x = np.random.default_rng(0).normal(size=(1, 4, 6, 3)).astype(np.float32)
    module = PatchEmbed(patch_size=2, width=5)
    params = random_params(module, x)
    out = module.apply({"params": params}, x)
    expected = np.einsum("yxc,yxcd->d", x[0, 2:4, 4:6], params["kernel"]) + params["bias"]
    np.testing.assert_allclose(out[0, 5], expected, rtol=1e-5, atol=1e-5)


def test_positions_are_their_formula():
    ours = sincos_positions(2, 3, 8)
    for row in range(2):
        for column in range(3):
            expected = []
            for position in (column, row):
                angles = [position, position / 10000**0.5]
                expected += [*np.sin(angles), *np.cos(angles)]
            np.testing.assert_allclose(ours[row * 3 + column], expected, atol=1e-6)
    # Twice as many patches over the same range: every second one is where it was.
    finer = sincos_positions(4, 6, 8, base_size=3).reshape(4, 6, 8)
    coarse = sincos_positions(3, 3, 8).reshape(3, 3, 8)
    np.testing.assert_allclose(finer[0, ::2], coarse[0], atol=1e-6)
    np.testing.assert_allclose(finer[2, 0, 4:], [np.sin(1.5), np.sin(0.015), np.cos(1.5),
                                                 np.cos(0.015)], atol=1e-6)  # fmt: skip
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        sincos_positions(2, 2, 6)


def test_a_new_block_is_the_identity():
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    emb = np.random.default_rng(1).normal(size=(2, 8)).astype(np.float32)
    init = jax.jit(DiTBlock(num_heads=2).init_with_output)
    out, _ = init(jax.random.key(0, impl="rbg"), x, emb)
    np.testing.assert_array_equal(out, x)


X = np.random.default_rng(2).normal(size=(2, 4, 4, 3)).astype(np.float32)
T = np.array([1.0, 800.0], np.float32)


def test_embeddings_of_its_own_change_nothing_where_all_blocks_have_the_same():
    shared = DiTConfig(width=8, depth=2, num_heads=2, out_channels=2)
    own = dataclasses.replace(shared, shared_embedding=False)
    vector = np.random.default_rng(3).normal(size=(2, 8)).astype(np.float32)
    cond, twice = Condition(vector=vector), Condition(vector=np.tile(vector, 2))
    params = random_params(shared.build(), X, T, cond, scale=0.3)
    time = params.pop("time_embed")
    same = params | {"time_embed_0": time, "time_embed_1": time}
    network = jax.jit(own.build().apply)
    out = network({"params": same}, X, T, twice)
    expected = jax.jit(shared.build().apply)({"params": params | {"time_embed": time}}, X, T, cond)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    # The output layer is told what the first block is.
    silent = {**same, "block_1": jax.tree.map(np.zeros_like, same["block_1"])}
    other = np.concatenate([vector, vector + 1], axis=1)
    np.testing.assert_array_equal(
        network({"params": silent}, X, T, Condition(vector=other)),
        network({"params": silent}, X, T, twice),
    )


def test_a_block_has_the_parameters_of_its_options():
    def names(**options):
        tree = jax.eval_shape(DiTBlock(1, **options).init, jax.random.key(0), X[:, 0], X[:, 0, 0])
        return {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)}

    plain = names()
    assert names(mlp_norm_affine=True) - plain == {
        "['params']['norm_2']['bias']",
        "['params']['norm_2']['scale']",
    }
    assert plain - names(qkv_bias=False) == {
        f"['params']['attn']['{name}']['bias']" for name in ("query", "key", "value")
    }


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
