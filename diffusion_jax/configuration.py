"""Configurations to JSON and back: strict, typed, and no string becomes code."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from diffusion_jax.data import DATASETS
from diffusion_jax.features import FEATURES
from diffusion_jax.systems import SYSTEMS
from diffusion_jax.systems.parts import PARTS

TABLES: Mapping[str, Mapping[str, type]] = {
    **PARTS,
    "system": SYSTEMS,
    "data": DATASETS,
    "features": FEATURES,
}


def kind_of(field: str, value: Any) -> str:
    """The name under which the table of a field lists the class of a value.

    Raises:
      ValueError: if the table does not list it.
    """
    for kind, cls in TABLES[field].items():
        if type(value) is cls:
            return kind
    raise ValueError(f"{type(value).__name__} is not in the table of {field!r}")


def to_dict(value: Any) -> Any:
    """A configuration as JSON values; parts out of a table carry their name as "kind"."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = {}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            encoded = to_dict(item)
            if field.name in TABLES and dataclasses.is_dataclass(item):
                encoded = {"kind": kind_of(field.name, item), **encoded}
            result[field.name] = encoded
        return result
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_dict(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} has no place in a configuration: {value!r}")


def from_dict(cls: type, values: Any, path: str = "config") -> Any:
    """The configuration that `to_dict` wrote.

    Args:
      cls: the dataclass to be built.
      values: JSON values.
      path: where we are, for messages.

    Raises:
      ValueError: naming the path, for an unknown or missing key, an unknown kind, a value of
        the wrong type, or a value that the class refuses.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: expected an object for {cls.__name__}, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{path}: unknown key {key!r}{hint} Known keys: {sorted(fields)}")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        where = f"{path}.{name}"
        if name in TABLES and isinstance(value, Mapping):
            arguments[name] = _from_kind(name, value, where)
        else:
            arguments[name] = _decode(hints[name], value, where)
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _from_kind(field: str, values: Mapping, path: str) -> Any:
    table = TABLES[field]
    kind = values.get("kind")
    if kind not in table:
        raise ValueError(f"{path}: 'kind' must be one of {sorted(table)}, got {kind!r}")
    rest = {key: value for key, value in values.items() if key != "kind"}
    return from_dict(table[kind], rest, path)


def _decode(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _decode(args[0], value, path)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(args, value, path)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, path)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{path}: expected one of {list(args)}, got {value!r}")
        return value
    if origin is tuple and isinstance(value, list):
        inner = args[0] if len(args) == 2 and args[1] is Ellipsis else None
        if inner is None and len(args) != len(value):
            raise ValueError(f"{path}: expected {len(args)} values, got {len(value)}")
        return tuple(
            _decode(inner or args[i], item, f"{path}[{i}]") for i, item in enumerate(value)
        )
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {key: _decode(args[1], item, f"{path}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise ValueError(f"{path}: expected {hint}, got {value!r}")


def _decode_union(options: tuple, value: Any, path: str) -> Any:
    errors = []
    for option in options:
        if option is types.NoneType:
            if value is None:
                return None
            continue
        try:
            return _decode(option, value, path)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError("; ".join(errors) or f"{path}: got {value!r}")
