"""Renames and reshapes weights between a file's tensors and a parameter tree, both ways."""

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion_jax.core.types import Params


class MappingError(ValueError):
    """Tensors and parameters do not fit; the message lists everything that is wrong."""


class Share(NamedTuple):
    """The share that a row takes of tensors which several rows lie in.

    The file's first axis is read as [groups, count, rest]; the row takes `index` of the second
    axis, and the other rows of that source the others.

    Attributes:
      index: 0 … count - 1.
      count: number of rows that share the tensors.
      groups: how often their turns come; 1 where each row's share is one piece.
    """

    index: int
    count: int
    groups: int = 1


class Row(NamedTuple):
    """One line of a table: a module of the file, a module of the tree, how its leaves relate.

    `{i}` stands for a number; the same letter means the same number on both sides.

    Attributes:
      source: dotted name in the file, "down_blocks.{i}.resnets.{j}.conv1".
      target: path in the tree, "down_{i}/res_{j}/conv_1".
      kind: a key of `KINDS`.
      share: which part of the source's tensors; None where they are this row's alone.
      copies: names under which a file may hold the source once more, or alone: weights that
        two modules of another library share. Copies must be equal; `export` writes none.
    """

    source: str
    target: str
    kind: str
    share: Share | None = None
    copies: tuple[str, ...] = ()


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


def _width1_to_linear(tensor: np.ndarray) -> np.ndarray:
    if tensor.shape[2:] != (1,):
        raise ValueError(f"a convolution of width 1 must have shape (O, I, 1), got {tensor.shape}")
    return tensor[:, :, 0].T


def _linear_to_width1(tensor: np.ndarray) -> np.ndarray:
    return tensor.T[:, :, None]


_BIAS = Leaf("bias", "bias", _same, _same, 1)

KINDS: Mapping[str, tuple[Leaf, ...]] = {
    "conv": (Leaf("weight", "kernel", _oihw_to_hwio, _hwio_to_oihw, 4), _BIAS),
    "linear": (Leaf("weight", "kernel", _transpose, _transpose, 2), _BIAS),
    "conv1x1_as_linear": (
        Leaf("weight", "kernel", _pointwise_to_linear, _linear_to_pointwise, 4),
        _BIAS,
    ),
    "conv1d_as_linear": (
        Leaf("weight", "kernel", _width1_to_linear, _linear_to_width1, 3),
        _BIAS,
    ),
    "norm": (Leaf("weight", "scale", _same, _same, 1), _BIAS),
    "embed": (Leaf("weight", "embedding", _same, _same, 2),),
    "param": (Leaf("", "", _same, _same),),
    "transposed": (Leaf("", "", _transpose, _transpose, 2),),
}


def prefixed(rows: Sequence[Row], *, source: str = "", target: str = "") -> tuple[Row, ...]:
    """The same table for a component that lies deeper in the file or in the tree.

    Args:
      rows: a table.
      source: what precedes the dotted names, with its final dot: "model.diffusion_model.".
      target: what precedes the paths, with its final slash: "unet/".
    """
    return tuple(
        row._replace(
            source=source + row.source,
            target=target + row.target,
            copies=tuple(source + name for name in row.copies),
        )
        for row in rows
    )


class _Rule(NamedTuple):
    pattern: re.Pattern
    source: str
    leaf: Leaf
    share: Share | None
    copies: tuple[str, ...]


class _Place(NamedTuple):
    """Where a parameter lies in the file."""

    name: str
    leaf: Leaf
    share: Share | None
    copies: tuple[str, ...] = ()


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
        if row.share and not (0 <= row.share.index < row.share.count and row.share.groups > 0):
            raise ValueError(f"a share must have 0 <= index < count and groups >= 1, got {row}")
        for leaf in KINDS[row.kind]:
            target = f"{row.target}/{leaf.target}" if leaf.target else row.target
            names = [f"{n}.{leaf.source}" if leaf.source else n for n in (row.source, *row.copies)]
            rules.append(_Rule(_pattern(target), names[0], leaf, row.share, tuple(names[1:])))
    return rules


def _plan(paths: Sequence[str], rows: Sequence[Row]) -> tuple[dict[str, _Place], list[str]]:
    """(path -> place, problems): which tensor belongs to which parameter."""
    rules, plan, problems = _rules(rows), {}, []
    for path in paths:
        hits = [(rule, match) for rule in rules if (match := rule.pattern.fullmatch(path))]
        if len(hits) != 1:
            found = "no row" if not hits else f"{len(hits)} rows"
            problems.append(f"parameter {path}: {found} of the table for it")
            continue
        rule, match = hits[0]
        name, *copies = (n.format(**match.groupdict()) for n in (rule.source, *rule.copies))
        plan[path] = _Place(name, rule.leaf, rule.share, tuple(copies))
    return plan, problems + _sharing_problems(plan)


def _by_tensor(plan: Mapping[str, _Place]) -> dict[str, list[str]]:
    """Tensor name -> the paths of its parameters, in the order of their shares."""
    tensors: dict[str, list[str]] = {}
    for path, place in plan.items():
        tensors.setdefault(place.name, []).append(path)
    order = {path: place.share.index if place.share else 0 for path, place in plan.items()}
    return {name: sorted(paths, key=order.__getitem__) for name, paths in tensors.items()}


def _sharing_problems(plan: Mapping[str, _Place]) -> list[str]:
    """Tensors that are wanted twice, or of which a share belongs to nobody."""
    problems = []
    for name, paths in _by_tensor(plan).items():
        shares = [plan[path].share for path in paths]
        first = shares[0]
        if shares == ([first._replace(index=i) for i in range(first.count)] if first else [None]):
            continue
        wanted = " and ".join(
            f"{path} ({share.index} of {share.count}, {share.groups} groups)" if share else path
            for path, share in zip(paths, shares, strict=True)
        )
        problems.append(f"tensor {name}: wanted by {wanted}, which do not share it out")
    return problems


def _take(tensor: np.ndarray, share: Share | None) -> np.ndarray:
    """A row's share of a tensor."""
    if share is None:
        return tensor
    parts = share.count * share.groups
    if tensor.ndim == 0 or tensor.shape[0] % parts:
        raise ValueError(f"has shape {tensor.shape}, whose first axis has to fall into {parts}")
    rest = tensor.shape[1:]
    grouped = tensor.reshape(share.groups, share.count, tensor.shape[0] // parts, *rest)
    return grouped[:, share.index].reshape(-1, *rest)


def _join(shares: Sequence[np.ndarray], groups: int) -> np.ndarray:
    """The tensor of which these are all the shares, in order; raises ValueError if none is."""
    first = shares[0]
    if any((share.shape, share.dtype) != (first.shape, first.dtype) for share in shares):
        kinds = ", ".join(f"{share.dtype} {share.shape}" for share in shares)
        raise ValueError(f"its shares differ in shape or dtype: {kinds}")
    if first.ndim == 0 or first.shape[0] % groups:
        raise ValueError(f"its shares have shape {first.shape}, which has no {groups} groups")
    rest = first.shape[1:]
    parts = [share.reshape(groups, first.shape[0] // groups, *rest) for share in shares]
    return np.stack(parts, axis=1).reshape(-1, *rest)


def _flat(params: Params) -> dict[str, Any]:
    return {"/".join(path): leaf for path, leaf in flatten_dict(dict(params)).items()}


def _fit(tensor: np.ndarray, place: _Place, expected: Any, cast: bool) -> np.ndarray:
    """One tensor in our layout, mostly a view; raises ValueError if it does not fit."""
    leaf, share = place.leaf, place.share
    if leaf.rank is not None and tensor.ndim != leaf.rank:
        raise ValueError(f"has shape {tensor.shape}, expected {leaf.rank} dimensions")
    value = leaf.load(_take(tensor, share))
    if value.shape != tuple(expected.shape):
        raise ValueError(
            f"has shape {tensor.shape}, which becomes {value.shape}, expected "
            f"{tuple(expected.shape)}"
        )
    dtype = np.dtype(expected.dtype)
    floats = jnp.issubdtype(value.dtype, jnp.floating) and jnp.issubdtype(dtype, jnp.floating)
    if not np.can_cast(value.dtype, dtype, "safe") and not (cast and floats):
        raise ValueError(
            f"has dtype {value.dtype}, which {dtype} cannot hold exactly; cast it on purpose "
            "before converting"
        )
    return value


def _contiguous(path: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    # Not ascontiguousarray, which makes a vector of a scalar.
    return np.asarray(value, dtype, order="C")


def convert(
    tensors: Mapping[str, np.ndarray],
    rows: Sequence[Row],
    expected: Params,
    *,
    ignore: Sequence[str] = (),
    cast: bool = False,
    put: Callable[[str, np.ndarray, np.dtype], Any] = _contiguous,
) -> Params:
    """Tensors of a file as a parameter tree; strict in both directions.

    Everything is checked before the first tensor is handed on, and tensors are taken one by
    one, so a mapping that reads them from a file when asked never has to hold two.

    Args:
      tensors: name -> tensor in the file's layout.
      rows: the table; rows that no parameter asks for are allowed.
      expected: the wanted tree, of arrays or `jax.ShapeDtypeStruct`s. A tensor may be
        widened to the wanted dtype (float16 to float32), never narrowed.
      ignore: globs of tensor names that may be left over, "*.position_ids".
      cast: round tensors to a narrower wanted dtype of floating point, too.
      put: (path, a view of the tensor in our layout, wanted dtype) -> the leaf.

    Returns:
      The tree of `expected`, with C-contiguous numpy leaves, or those that `put` made.

    Raises:
      MappingError: listing every missing, unexpected and ill-fitting tensor at once.
    """
    wanted = _flat(expected)
    plan, problems = _plan(list(wanted), rows)
    sources = {}
    for path, place in plan.items():
        names = [name for name in (place.name, *place.copies) if name in tensors]
        if not names:
            problems.append(f"missing: {place.name} (for {path})")
            continue
        sources[path] = names[0]
        tensor = np.asarray(tensors[names[0]])
        for copy in names[1:]:
            if not np.array_equal(tensor, np.asarray(tensors[copy])):
                problems.append(f"{copy}: must equal {names[0]}, of which it is a copy")
        try:
            _fit(tensor, place, wanted[path], cast)
        except ValueError as error:
            problems.append(f"{names[0]} (for {path}): {error}")
    used = {name for place in plan.values() for name in (place.name, *place.copies)}
    for name in sorted(set(tensors) - used):
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore):
            problems.append(f"unexpected: {name} {tuple(np.shape(tensors[name]))}")
    if problems:
        raise MappingError(_message("the tensors do not fit the parameters", problems))
    loaded = {}
    for path, name in sources.items():
        value = _fit(np.asarray(tensors[name]), plan[path], wanted[path], cast)
        loaded[tuple(path.split("/"))] = put(path, value, np.dtype(wanted[path].dtype))
    return unflatten_dict(loaded)


def tensor_places(params: Params, rows: Sequence[Row]) -> dict[str, tuple[str, int | None]]:
    """Where every parameter lies in the file: path -> (tensor's name, its number of axes).

    Parameters that share a tensor with others are left out, and the number of axes is None where
    the table does not fix it.

    Args:
      params: tree of arrays or shapes.
      rows: the table.

    Raises:
      MappingError: if a parameter has no row or two rows, or if two want the same tensor.
    """
    plan, problems = _plan(list(_flat(params)), rows)
    if problems:
        raise MappingError(_message("the table does not cover the parameters", problems))
    return {p: (x.name, x.leaf.rank) for p, x in plan.items() if x.share is None}


def export(params: Params, rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """A parameter tree as tensors of a file: `convert` backwards.

    Args:
      params: tree of arrays.
      rows: the table.

    Returns:
      name -> C-contiguous tensor in the file's layout.

    Raises:
      MappingError: if a parameter has no row or two rows, if two want the same tensor, or if
        the shares of a tensor are not all there or do not fit each other.
    """
    flat = _flat(params)
    plan, problems = _plan(list(flat), rows)
    tensors = {}
    for name, paths in _by_tensor(plan).items():
        saved = [plan[path].leaf.save(np.asarray(flat[path])) for path in paths]
        share = plan[paths[0]].share
        try:
            # safetensors writes the buffer of a transposed view as it lies, that is wrongly.
            tensors[name] = np.asarray(_join(saved, share.groups) if share else saved[0], order="C")
        except ValueError as error:
            problems.append(f"tensor {name}: {error}")
    if problems:
        raise MappingError(_message("the table does not cover the parameters", problems))
    return tensors


def _message(title: str, problems: Sequence[str]) -> str:
    return f"{title}, {len(problems)} problem(s):\n  " + "\n  ".join(problems)
