"""Parameter trees as sets of named leaves: select by glob, split in two, put together."""

import re
from typing import Any

from flax.traverse_util import empty_node, flatten_dict, unflatten_dict

from diffusion_jax.core.types import Params, PathPredicate


def _flat(params: Params) -> dict[tuple[str, ...], Any]:
    return flatten_dict(dict(params), keep_empty_nodes=True)


def _regex(pattern: str) -> re.Pattern:
    """`**` stands for any number of path segments, `*` and `?` stay within one."""
    segments = []
    for segment in pattern.split("/"):
        if segment == "**":
            segments.append("(?:[^/]+/)*")
        else:
            literal = re.escape(segment).replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
            segments.append(literal + "/")
    return re.compile("".join(segments))


def by_glob(params: Params, *patterns: str) -> PathPredicate:
    """A predicate that is true for leaves whose path matches one of the patterns.

    Paths are written with slashes: "**/fuser/**" selects every leaf below a module named
    fuser, "conditioner/*" the direct leaves of conditioner.

    Args:
      params: the tree that the patterns are meant for.
      patterns: globs; `**` matches any number of segments, `*` part of one.

    Raises:
      ValueError: if there is no pattern, or if one matches no leaf of `params`.

    Source: none; a convention of this library.
    """
    if not patterns:
        raise ValueError("by_glob needs at least one pattern, for example '**'")
    paths = ["/".join(path) + "/" for path in flatten_dict(dict(params))]
    compiled = [_regex(pattern) for pattern in patterns]
    for pattern, regex in zip(patterns, compiled, strict=True):
        if not any(regex.fullmatch(path) for path in paths):
            top = sorted({path.split("/")[0] for path in paths})
            raise ValueError(
                f"the pattern {pattern!r} matches no parameter. Top-level names are {top}; "
                f"a full path looks like {paths[0][:-1] if paths else '(the tree is empty)'!r}"
            )
    return lambda path: any(regex.fullmatch("/".join(path) + "/") for regex in compiled)


def partition(params: Params, is_trainable: PathPredicate) -> tuple[Params, Params]:
    """Splits a tree into (trainable, frozen) subtrees; empty nodes go with the frozen.

    merge(*partition(params, p)) is `params` again for every predicate p.

    Source: none; a convention of this library.
    """
    trainable, frozen = {}, {}
    for path, leaf in _flat(params).items():
        selected = leaf is not empty_node and is_trainable(path)
        (trainable if selected else frozen)[path] = leaf
    return unflatten_dict(trainable), unflatten_dict(frozen)


def merge(*trees: Params) -> Params:
    """Disjoint union of parameter trees; a node that is empty in one may be filled in another.

    Raises:
      ValueError: if a leaf is present in more than one tree, or is a subtree of another.

    Source: none; a convention of this library.
    """
    leaves: dict[tuple[str, ...], Any] = {}
    empty: dict[tuple[str, ...], Any] = {}
    for tree in trees:
        for path, leaf in _flat(tree).items():
            if leaf is empty_node:
                empty[path] = leaf
                continue
            if path in leaves:
                raise ValueError(f"the parameter {'/'.join(path)!r} is in more than one tree")
            leaves[path] = leaf
    inner = {path[:end] for path in leaves for end in range(len(path))}
    for path in leaves:
        if path in inner or any(node[: len(path)] == path for node in empty):
            raise ValueError(f"{'/'.join(path)!r} is a parameter in one tree, a module in another")
    # An empty node is a module without parameters here, which another tree may fill.
    merged = {path: node for path, node in empty.items() if path not in inner}
    return unflatten_dict({**merged, **leaves})
