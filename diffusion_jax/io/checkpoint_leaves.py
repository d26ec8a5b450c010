"""Leaves: what a checkpoint makes of a tree of arrays, and how two of them differ."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import empty_node, flatten_dict

from diffusion_jax.io import digests
from diffusion_jax.io.checkpoint_errors import CheckpointMismatchError

# What parameters are called, and the part of a TrainState that holds them.
KINDS = {"ema": "ema", "raw": "trainable"}

Leaves = dict[tuple[str, ...], Any]


def _name(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    raise ValueError(f"cannot name the tree entry {entry!r}; use dicts, dataclasses or tuples")


def leaves_of(tree: Any) -> Leaves:
    """Leaves by path, whatever the containers; orbax would turn tuples into lists."""
    with_paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {tuple(_name(entry) for entry in path): leaf for path, leaf in with_paths}


def empty_nodes(tree: Any) -> list[list[str]]:
    """Paths of the empty dicts in the parameter subtrees, which have no leaf to be saved by."""
    paths = []
    for part in ("trainable", "frozen"):
        flat = flatten_dict(dict(getattr(tree, part, {})), keep_empty_nodes=True)
        paths += [[part, *path] for path, leaf in flat.items() if leaf is empty_node]
    return paths


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of a leaf, on the first own device where it has none."""
    sharding = getattr(leaf, "sharding", None)
    # What metadata calls a sharding is a description of the devices of the writer.
    if not isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def describe(leaf: Any) -> str:
    """Dtype and shape in words; None is nothing."""
    return "nothing" if leaf is None else f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def check_fit(where: str, saved: Leaves, wanted: Leaves) -> None:
    """Checks that two have the same paths, shapes and dtypes.

    Raises:
      CheckpointMismatchError: listing every leaf that differs.
    """
    differences = []
    for path in sorted(saved.keys() | wanted.keys()):
        old, new = describe(saved.get(path)), describe(wanted.get(path))
        if old != new:
            differences.append(f"{'/'.join(path)}: saved {old}, wanted {new}")
    if differences:
        raise CheckpointMismatchError(where, differences)


def digests_of(leaves: Leaves) -> dict[str, str]:
    """Shape, dtype and digest of every leaf by its path."""
    sums = jax.device_get({path: digests.digest(leaf) for path, leaf in leaves.items()})
    return {
        "/".join(path): f"{describe(leaf)} {digests.text(sums[path])}"
        for path, leaf in leaves.items()
    }


def non_finite(leaves: Leaves) -> list[str]:
    """Paths of the parameters and averages that hold NaN or infinity."""
    finite = {
        "/".join(path): digests.is_finite(leaf)
        for path, leaf in leaves.items()
        if path[0] in KINDS.values() and jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    return [path for path, is_finite in jax.device_get(finite).items() if not is_finite]
