"""Frozen dataclasses that are pytrees, and whose structure says of which class they are."""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax
from flax.struct import field

T = TypeVar("T")

__all__ = ["dataclass", "field"]


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def dataclass(cls: type[T]) -> type[T]:
    """A frozen dataclass that is a pytree, with a method `replace(**changes)`.

    What flax.struct.dataclass is, but that the class is part of the tree's structure. jax 0.10 to
    0.12 compare the structures of dataclasses that it registers by their fields alone, so that a
    jitted function may be given a `Heun` and run what was compiled for an `Euler`.

    Args:
      cls: fields declared by `field(pytree_node=False)` are static and compared by ==, the others
        are children.

    Source: none; a convention of this library.
    """
    made: Any = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(made)
    children = [each.name for each in fields if each.metadata.get("pytree_node", True)]
    static = [each.name for each in fields if each.name not in children]
    keys = [jax.tree_util.GetAttrKey(name) for name in children]

    def structure(node: Any) -> tuple:
        return (made, *(getattr(node, name) for name in static))

    def flatten(node: Any) -> tuple[list, tuple]:
        return [getattr(node, name) for name in children], structure(node)

    def flatten_with_keys(node: Any) -> tuple[list, tuple]:
        values = [(key, getattr(node, key.name)) for key in keys]
        return values, structure(node)

    def unflatten(aux: tuple, values: Any) -> Any:
        return made(
            **dict(zip(static, aux[1:], strict=True)), **dict(zip(children, values, strict=True))
        )

    made.replace = _replace
    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
    return made


def _replace(self: T, **changes: Any) -> T:
    """The same with other values of these fields."""
    return dataclasses.replace(self, **changes)
