"""Dataclasses that are pytrees: fields, structure, and the programs that jit keeps for them."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax import samplers
from diffusion_jax.core import struct
from diffusion_jax.guidance import GUIDANCE, THRESHOLDS


@struct.dataclass
class Step:
    size: float
    order: int = struct.field(pytree_node=False, default=1)


def test_children_are_named_and_static_fields_are_structure():
    [(path, leaf)] = jax.tree_util.tree_leaves_with_path(Step(0.5, order=2))
    assert (jax.tree_util.keystr(path), leaf) == (".size", 0.5)
    assert jax.tree.map(lambda x: 2 * x, Step(0.5, order=2)) == Step(1.0, order=2)
    assert jax.tree.structure(Step(0.5)) == jax.tree.structure(Step(0.7))
    assert jax.tree.structure(Step(0.5)) != jax.tree.structure(Step(0.5, order=2))


def test_it_is_frozen_and_replaced():
    step = Step(0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.size = 1.0
    assert step.replace(order=3) == Step(0.5, order=3) and step == Step(0.5)


def test_every_class_has_a_program_of_its_own():
    """Of so many classes of one form some share a slot of jit's table, whatever their hashes."""

    def numbered(number):
        return struct.dataclass(type("Numbered", (), {"call": lambda self, x: x + number}))

    run = jax.jit(lambda node, x: node.call(x))
    results = [int(run(numbered(i)(), jnp.int32(0))) for i in range(150)]
    assert results == list(range(150))


def test_no_two_parts_have_one_structure():
    parts = {**samplers.SAMPLERS, **GUIDANCE, **THRESHOLDS}
    structures = {part: jax.tree.structure(part()) for part in set(parts.values())}
    for a, b in itertools.combinations(structures, 2):
        assert structures[a] != structures[b], (a, b)
