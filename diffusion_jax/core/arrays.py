"""Small array helpers: broadcasting per example, one key per image, paired halves."""

from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.core.grid import Grid
from diffusion_jax.core.types import Array, Key


def per_example(coefficient: Array, x: Array) -> Array:
    """Shapes a coefficient [] or [B] so that it multiplies x [B, ...] example by example.

    Raises:
      ValueError: if the coefficient is neither a scalar nor one value per example.

    Source: none; a convention of this library.
    """
    coefficient = jnp.asarray(coefficient)
    if coefficient.ndim == 0:
        return coefficient
    if coefficient.shape != x.shape[:1]:
        raise ValueError(
            f"a coefficient must have shape () or {x.shape[:1]} for x of shape {x.shape}, "
            f"got {coefficient.shape}"
        )
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - 1))


def image_keys(key: Key | int, indices: Array) -> Key:
    """One key per image, [B]: fold_in(key, global index of the image).

    Called outside of jit and pmap, so that an image's noise depends on (key, index) and
    never on the batch or the device that computes it. An int is taken as a seed.

    Source: none; a convention of this library.
    """
    key = jax.random.key(key) if isinstance(key, int) else key
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(indices, jnp.uint32))


def fold_in_each(keys: Key, data: Array | int) -> Key:
    """fold_in of the same number into every key, [B] -> [B].

    Source: none; a convention of this library.
    """
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def per_image_normal(keys: Key, x: Array) -> Array:
    """Standard normal noise like x [B, ...], image i drawn from keys[i] alone.

    Source: none; a convention of this library.
    """
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)


def twice(tree: Any) -> Any:
    """Repeats every example, [B, ...] -> [2B, ...] as a0 a0 a1 a1 …; scalars stay.

    Interleaved rather than stacked, so that a batch sharded over devices stays where it is.

    Source: none; a convention of this library.
    """
    return jax.tree.map(lambda x: x if jnp.ndim(x) == 0 else jnp.repeat(x, 2, axis=0), tree)


def halves(x: Array) -> tuple[Array, Array]:
    """Takes interleaved pairs apart, [2B, ...] -> two of [B, ...].

    Source: none; a convention of this library.
    """
    pairs = x.reshape((x.shape[0] // 2, 2) + x.shape[1:])
    return pairs[:, 0], pairs[:, 1]


def as_arrays(tree: Any) -> Any:
    """Every leaf of a sampler, guidance or grid as a strongly typed array.

    Integer arrays become int32, masks stay bool, everything else becomes float32. A Python int is
    a knob written without its point, eta=1, and becomes float32 too, but the bounds of a grid
    count steps and become int32 whoever wrote them.

    A Python float, an int and a float32 array would each compile the same function again;
    after this they are one.

    Source: none; a convention of this library.
    """

    def with_counts(node):
        if not isinstance(node, Grid):
            return node
        start, stop = (jnp.asarray(bound, jnp.int32) for bound in (node.start, node.stop))
        return node._replace(start=start, stop=stop)

    def convert(leaf):
        if jnp.result_type(leaf) == jnp.bool_ and not isinstance(leaf, bool):
            return jnp.asarray(leaf)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.integer) and not isinstance(leaf, int):
            return jnp.asarray(leaf, jnp.int32)
        return jnp.asarray(leaf, jnp.float32)

    tree = jax.tree.map(with_counts, tree, is_leaf=lambda node: isinstance(node, Grid))
    return jax.tree.map(convert, tree)
