"""Renames and reshapes weights between a file's tensors and a parameter tree, both ways."""

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion_jax.core.types import Params


class MappingError(ValueError):
    """Tensors and parameters do not fit; the message lists everything that is wrong."""


class Row(NamedTuple):
    """One line of a table: a module of the file, a module of the tree, how its leaves relate.

    `{i}` stands for a number; the same letter means the same number on both sides.

    Attributes:
      source: dotted name in the file, "down_blocks.{i}.resnets.{j}.conv1".
      target: path in the tree, "down_{i}/res_{j}/conv_1".
      kind: a key of `KINDS`.
    """

    source: str
    target: str
    kind: str


class Leaf(NamedTuple):
    """One leaf of a kind: its two names and the functions between its two layouts."""

    source: str
    target: str
    load: Callable[[np.ndarray], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]
    rank: int | None = None  # of the file's tensor, where only one rank makes sense


def _same(tensor: np.ndarray) -> np.ndarray:
    return tensor


def _transpose(tensor: np.ndarray) -> np.ndarray:
    return tensor.T


def _oihw_to_hwio(tensor: np.ndarray) -> np.ndarray:
    return tensor.transpose(2, 3, 1, 0)


def _hwio_to_oihw(tensor: np.ndarray) -> np.ndarray:
    return tensor.transpose(3, 2, 0, 1)


def _pointwise_to_linear(tensor: np.ndarray) -> np.ndarray:
    if tensor.shape[2:] != (1, 1):
        raise ValueError(f"a 1x1 convolution must have shape (O, I, 1, 1), got {tensor.shape}")
    return tensor[:, :, 0, 0].T


def _linear_to_pointwise(tensor: np.ndarray) -> np.ndarray:
    return tensor.T[:, :, None, None]


_BIAS = Leaf("bias", "bias", _same, _same, 1)

KINDS: Mapping[str, tuple[Leaf, ...]] = {
    "conv": (Leaf("weight", "kernel", _oihw_to_hwio, _hwio_to_oihw, 4), _BIAS),
    "linear": (Leaf("weight", "kernel", _transpose, _transpose, 2), _BIAS),
    "conv1x1_as_linear": (
        Leaf("weight", "kernel", _pointwise_to_linear, _linear_to_pointwise, 4),
        _BIAS,
    ),
    "norm": (Leaf("weight", "scale", _same, _same, 1), _BIAS),
    "embed": (Leaf("weight", "embedding", _same, _same, 2),),
    "param": (Leaf("", "", _same, _same),),
}


def prefixed(rows: Sequence[Row], *, source: str = "", target: str = "") -> tuple[Row, ...]:
    """The same table for a component that lies deeper in the file or in the tree.

    Args:
      rows: a table.
      source: what precedes the dotted names, with its final dot: "model.diffusion_model.".
      target: what precedes the paths, with its final slash: "unet/".
    """
    return tuple(Row(source + row.source, target + row.target, row.kind) for row in rows)


class _Rule(NamedTuple):
    pattern: re.Pattern
    source: str
    leaf: Leaf


def _pattern(target: str) -> re.Pattern:
    parts = re.split(r"\{(\w+)\}", target)
    seen: set[str] = set()
    regex = ""
    for index, part in enumerate(parts):
        if index % 2 == 0:
            regex += re.escape(part)
        else:
            regex += f"(?P={part})" if part in seen else f"(?P<{part}>[0-9]+)"
            seen.add(part)
    return re.compile(regex)


def _rules(rows: Sequence[Row]) -> list[_Rule]:
    rules = []
    for row in rows:
        if row.kind not in KINDS:
            raise ValueError(f"kind must be one of {sorted(KINDS)}, got {row.kind!r} in {row}")
        for leaf in KINDS[row.kind]:
            target = f"{row.target}/{leaf.target}" if leaf.target else row.target
            source = f"{row.source}.{leaf.source}" if leaf.source else row.source
            rules.append(_Rule(_pattern(target), source, leaf))
    return rules


def _plan(paths: Sequence[str], rows: Sequence[Row]) -> tuple[dict[str, tuple[str, Leaf]], list]:
    """(path -> (tensor name, leaf), problems): which tensor belongs to which parameter."""
    rules, plan, problems, taken = _rules(rows), {}, [], {}
    for path in paths:
        hits = [(rule, match) for rule in rules if (match := rule.pattern.fullmatch(path))]
        if len(hits) != 1:
            found = "no row" if not hits else f"{len(hits)} rows"
            problems.append(f"parameter {path}: {found} of the table for it")
            continue
        rule, match = hits[0]
        name = rule.source.format(**match.groupdict())
        if name in taken:
            problems.append(f"tensor {name}: wanted by {taken[name]} and {path}")
        taken[name] = path
        plan[path] = (name, rule.leaf)
    return plan, problems


def _flat(params: Params) -> dict[str, Any]:
    return {"/".join(path): leaf for path, leaf in flatten_dict(dict(params)).items()}


def _load(tensor: np.ndarray, leaf: Leaf, expected: Any) -> np.ndarray:
    """One tensor in our layout, C-contiguous; raises ValueError if it does not fit."""
    if leaf.rank is not None and tensor.ndim != leaf.rank:
        raise ValueError(f"has shape {tensor.shape}, expected {leaf.rank} dimensions")
    value = leaf.load(tensor)
    if value.shape != tuple(expected.shape):
        raise ValueError(
            f"has shape {tensor.shape}, which becomes {value.shape}, expected "
            f"{tuple(expected.shape)}"
        )
    dtype = np.dtype(expected.dtype)
    if not np.can_cast(value.dtype, dtype, "safe"):
        raise ValueError(
            f"has dtype {value.dtype}, which {dtype} cannot hold exactly; cast it on purpose "
            "before converting"
        )
    # Not ascontiguousarray, which makes a vector of a scalar.
    return np.asarray(value, dtype, order="C")


def convert(
    tensors: Mapping[str, np.ndarray],
    rows: Sequence[Row],
    expected: Params,
    *,
    ignore: Sequence[str] = (),
) -> Params:
    """Tensors of a file as a parameter tree; strict in both directions.

    Args:
      tensors: name -> tensor in the file's layout.
      rows: the table; rows that no parameter asks for are allowed.
      expected: the wanted tree, of arrays or `jax.ShapeDtypeStruct`s. A tensor may be
        widened to the wanted dtype (float16 to float32), never narrowed.
      ignore: globs of tensor names that may be left over, "*.position_ids".

    Returns:
      The tree of `expected`, with C-contiguous numpy leaves.

    Raises:
      MappingError: listing every missing, unexpected and ill-fitting tensor at once.
    """
    wanted = _flat(expected)
    plan, problems = _plan(list(wanted), rows)
    loaded = {}
    for path, (name, leaf) in plan.items():
        if name not in tensors:
            problems.append(f"missing: {name} (for {path})")
            continue
        try:
            loaded[path] = _load(np.asarray(tensors[name]), leaf, wanted[path])
        except ValueError as error:
            problems.append(f"{name} (for {path}): {error}")
    used = {name for name, _ in plan.values()}
    for name in sorted(set(tensors) - used):
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore):
            problems.append(f"unexpected: {name} {tuple(np.shape(tensors[name]))}")
    if problems:
        raise MappingError(_message("the tensors do not fit the parameters", problems))
    return unflatten_dict({tuple(path.split("/")): value for path, value in loaded.items()})


def export(params: Params, rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """A parameter tree as tensors of a file: `convert` backwards.

    Args:
      params: tree of arrays.
      rows: the table.

    Returns:
      name -> C-contiguous tensor in the file's layout.

    Raises:
      MappingError: if a parameter has no row or two rows, or two share a tensor.
    """
    flat = _flat(params)
    plan, problems = _plan(list(flat), rows)
    if problems:
        raise MappingError(_message("the table does not cover the parameters", problems))
    # safetensors writes the buffer of a transposed view as it lies, that is wrongly.
    return {
        name: np.asarray(leaf.save(np.asarray(flat[path])), order="C")
        for path, (name, leaf) in plan.items()
    }


def _message(title: str, problems: Sequence[str]) -> str:
    return f"{title}, {len(problems)} problem(s):\n  " + "\n  ".join(problems)
