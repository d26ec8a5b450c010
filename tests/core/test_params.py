"""Parameter trees: partition and merge undo each other, globs select what they say."""

import fnmatch

import jax
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_jax.core.params import by_glob, merge, partition

TREE = {
    "unet": {"fuser": {"attn": {"kernel": 1, "bias": 2}}, "conv": {"kernel": 3}, "empty": {}},
    "conditioner": {"grounding": {"w": 4}, "scale": 5},
    "top": 6,
}

names = st.sampled_from(["a", "b", "conv_1", "fuser"])
trees = st.dictionaries(
    names,
    st.recursive(
        st.integers(), lambda inner: st.dictionaries(names, inner, max_size=3), max_leaves=6
    ),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(trees, st.sets(names))
def test_merge_undoes_partition(tree, chosen):
    """For every tree, empty nodes included, and every predicate."""
    trainable, frozen = partition(tree, lambda path: path[-1] in chosen)
    assert merge(trainable, frozen) == tree
    assert merge(frozen, trainable) == tree
    assert all(path[-1] in chosen for path in flatten_dict(trainable))
    assert not any(path[-1] in chosen for path in flatten_dict(frozen))


@pytest.mark.parametrize(
    "pattern, leaves",
    [
        ("**", {1, 2, 3, 4, 5, 6}),
        ("**/fuser/**", {1, 2}),
        ("unet/**", {1, 2, 3}),
        ("conditioner/*", {5}),
        ("**/kernel", {1, 3}),
        ("unet/con?/kernel", {3}),
        ("**/b*s", {2}),
        ("top", {6}),
        ("conditioner/grounding/**", {4}),
    ],
)
def test_globs(pattern, leaves):
    trainable, frozen = partition(TREE, by_glob(TREE, pattern))
    assert set(jax.tree.leaves(trainable)) == leaves
    assert merge(trainable, frozen) == TREE


def test_patterns_add_up():
    trainable, _ = partition(TREE, by_glob(TREE, "top", "**/w"))
    assert trainable == {"top": 6, "conditioner": {"grounding": {"w": 4}}}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("ab.*?[+", min_size=1, max_size=3).filter(lambda s: s != "**"), min_size=1,
             max_size=3),
    st.lists(st.text("ab.[+", min_size=1, max_size=3), min_size=1, max_size=3),
)  # fmt: skip
def test_segments_match_as_fnmatch_does(pattern, path):
    """Without `**` a glob is fnmatch segment by segment; no other character is special."""
    tree = leaf = {}
    for segment in path[:-1]:
        leaf = leaf.setdefault(segment, {})
    leaf[path[-1]] = 1
    expected = len(pattern) == len(path) and all(
        fnmatch.fnmatchcase(segment, part.replace("[", "[[]"))
        for segment, part in zip(path, pattern, strict=True)
    )
    try:
        found = by_glob(tree, "/".join(pattern))(tuple(path))
    except ValueError:
        found = False
    assert found == expected


def test_refusals():
    with pytest.raises(ValueError, match=r"'\*\*/fusser/\*\*' matches no parameter.*conditioner"):
        by_glob(TREE, "top", "**/fusser/**")
    with pytest.raises(ValueError, match="at least one pattern"):
        by_glob(TREE)
    with pytest.raises(ValueError, match="tree is empty"):
        by_glob({}, "**")
    with pytest.raises(ValueError, match="'unet/conv/kernel' is in more than one tree"):
        merge(TREE, {"unet": {"conv": {"kernel": 9}}})


def test_merge_refuses_a_leaf_where_another_tree_has_a_module():
    for module in ({"b": 2}, {"b": {"c": 2}}, {}, {"b": {}}):
        for trees in (({"a": 1}, {"a": module}), ({"a": module}, {"a": 1})):
            with pytest.raises(ValueError, match="'a' is a parameter in one tree"):
                merge(*trees)


def test_merge_of_an_empty_node_and_a_filled_one():
    """A module without parameters in one tree may have some in another."""
    assert merge({"a": {}}, {"a": {"b": 1}}) == {"a": {"b": 1}}
    assert merge({"a": {"b": 1}}, {"a": {}}) == {"a": {"b": 1}}
    assert merge({"a": {}}, {"a": {}}) == {"a": {}}
