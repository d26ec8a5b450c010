"""Arrays computed once for every example of a source, such as latents and text embeddings.

A cache is a folder of index.json, which says what made it, and shards of safetensors, 00000 …,
each with the arrays [n, ...] of n consecutive examples.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from diffusion_jax.data.sources import Source, numeric_keys, stack

INDEX = "index.json"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

_FORMAT = 1
_MIRRORED_KEYS = frozenset({"image", "label", "caption"})

# A batch of examples to arrays [B, ...] by name.
Function = Callable[[dict[str, Any]], Mapping[str, Any]]
# Name -> shape of one example and dtype.
_Layout = dict[str, tuple[tuple[int, ...], np.dtype]]


class Mirrored:
    """Every image of a source and its mirror image, for caches of both.

    Example 2 i is example i of the source, 2 i + 1 has its image mirrored left-right. Captions
    stay as they are: do not use this where they say left or right.

    Raises:
      ValueError: if examples have more than image, label and caption, or no image.
    """

    def __init__(self, source: Source):
        self._source = source
        keys = set(source[0])
        if "image" not in keys or keys - _MIRRORED_KEYS:
            raise ValueError(
                f"mirrored are examples of image, and maybe label and caption, got {sorted(keys)}"
            )

    def __len__(self) -> int:
        return 2 * len(self._source)

    def __repr__(self) -> str:
        return f"Mirrored({self._source!r})"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """What the source gives, with image [H, W, C] mirrored where the index is odd."""
        example = self._source[index // 2]
        return {**example, "image": example["image"][:, ::-1]} if index % 2 else example


def _digest(made_by: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def _count(made_by: Mapping[str, Any]) -> int:
    return -(-made_by["examples"] // made_by["shard_size"])


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} is no cache: it has no {INDEX}")
    try:
        made_by = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    expected = {"format", "examples", "shard_size", "dtype", "description"}
    if not isinstance(made_by, dict) or set(made_by) != expected or made_by["format"] != _FORMAT:
        raise ValueError(f"{path}: expected {sorted(expected)}, of format {_FORMAT}")
    counts = made_by["examples"], made_by["shard_size"]
    if any(type(count) is not int or count < 1 for count in counts):
        raise ValueError(f"{path}: examples and shard_size must be at least 1, got {counts}")
    return made_by


def _claim(folder: Path, made_by: Mapping[str, Any], process_index: int) -> None:
    """Writes the index of a new cache, or refuses one that something else made."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX).exists():
        found = _read_index(folder)
        changed = [
            f"{key} was {found[key]!r} and is {value!r}"
            for key, value in made_by.items()
            if found[key] != value
        ]
        if changed:
            raise ValueError(
                f"{str(folder)!r} was made by something else: {'; '.join(changed)}. Choose another "
                "folder"
            )
        return
    if any(folder.glob("*.safetensors")):
        raise ValueError(f"{str(folder)!r} has files but no {INDEX}; choose another folder")
    partial = folder / f".{INDEX}.{process_index}.partial"
    partial.write_text(json.dumps(made_by, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / INDEX)


def _read_layout(path: Path, digest: str, rows: int) -> _Layout:
    """What a shard holds, from its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
            layout = {name: (shapes[name][1:], each[:0].dtype) for name, each in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); delete it and compute it again") from error
    if metadata.get("digest") != digest or any(shape[:1] != (rows,) for shape in shapes.values()):
        raise ValueError(f"{path}: was not made with this {INDEX}; delete it and compute it again")
    return layout


def _layout(arrays: Mapping[str, np.ndarray]) -> _Layout:
    return {name: (array.shape[1:], array.dtype) for name, array in arrays.items()}


def _check_layout(where: Any, layout: _Layout, expected: _Layout) -> None:
    if layout != expected:
        raise ValueError(f"{where}: has {layout}, those before have {expected}")


def _ranges(made_by: Mapping[str, Any]) -> Iterator[tuple[int, range]]:
    size, examples = made_by["shard_size"], made_by["examples"]
    for number in range(_count(made_by)):
        yield number, range(number * size, min(examples, (number + 1) * size))


def _batch(source: Source, indices: range, batch_size: int, pool: ThreadPoolExecutor) -> dict:
    rows = list(pool.map(source.__getitem__, indices))
    if "index" in rows[0]:
        raise ValueError(f"{source!r} has a key 'index', which is the example's number here")
    rows = [{**row, "index": np.int32(index)} for row, index in zip(rows, indices, strict=True)]
    # A short batch repeats its last example, so that a jitted function compiles once.
    rows += rows[-1:] * (batch_size - len(rows))
    texts = [key for key, value in rows[0].items() if isinstance(value, str)]
    return {
        **stack(rows, numeric_keys(rows[0])),
        **{key: [row[key] for row in rows] for key in texts},
    }


def _stored(name: str, value: Any, batch_size: int, indices: range, dtype: str) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim < 1 or len(array) != batch_size:
        raise ValueError(
            f"the function's {name!r} must be an array [{batch_size}, ...], one row an example, "
            f"got the shape {array.shape}"
        )
    array = array[: len(indices)]
    if array.dtype.kind in "biu":
        return array
    if not jnp.issubdtype(array.dtype, np.floating):
        raise ValueError(f"the function's {name!r} must be real numbers, got {array.dtype}")
    with np.errstate(over="ignore"):  # reported below
        array = array.astype(DTYPES[dtype])
    finite = np.isfinite(array.astype(np.float32)).reshape(len(array), -1).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{name!r} of example {indices[int(np.argmin(finite))]} is not finite as {dtype}"
        )
    return array


def _compute(
    source: Source,
    function: Function,
    indices: range,
    batch_size: int,
    dtype: str,
    pool: ThreadPoolExecutor,
) -> dict[str, np.ndarray]:
    parts = []
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        found = function(_batch(source, part, batch_size, pool))
        if not isinstance(found, Mapping) or not found:
            raise ValueError(f"the function must return arrays by name, got {found!r:.200}")
        parts.append({name: _stored(name, x, batch_size, part, dtype) for name, x in found.items()})
        _check_layout(f"batch of example {part[0]}", _layout(parts[-1]), _layout(parts[0]))
    # Contiguous, because safetensors writes the memory as it lies.
    return {
        name: np.ascontiguousarray(np.concatenate([part[name] for part in parts]))
        for name in parts[0]
    }


def precompute(
    source: Source,
    function: Function,
    folder: str | Path,
    *,
    description: str,
    batch_size: int = 32,
    shard_size: int = 1024,
    dtype: str = "float32",
    num_threads: int = 2,
    process_index: int = 0,
    process_count: int = 1,
) -> None:
    """Computes arrays for every example of a source and writes them as a cache.

    A shard appears under its name only when it is whole. A call that was interrupted is repeated
    to go on: shards that are there are not computed again. Read the cache with
    `pipeline.Cached(folder)`.

    Args:
      source: random access to examples.
      function: batch -> arrays [B, ...] by name, row by row: a row may depend on nothing but its
        example. The batch has all numbers of the examples as arrays [B, ...], strings as lists
        of B, and "index" [B] int32, the examples' numbers, to draw noise from. A short last
        batch repeats its last example.
      folder: of the cache, new or to be continued.
      description: what makes the arrays: names and digests of the data, of the weights, of
        the options. A cache with another description is not continued.
      batch_size: B.
      shard_size: examples a file.
      dtype: "float32", "float16" or "bfloat16", how floating-point arrays are stored; integers
        stay as they are.
      num_threads: threads that read examples.
      process_index: which of the processes this is; process p makes shards p, p + P, ….
      process_count: P, the number of processes that fill the folder at once.

    Raises:
      ValueError: if the folder was made by something else: another number of examples, shard
        size, description or dtype; if an option is out of range; or if the function gives no
        arrays [B, ...], other arrays than before, or numbers that are not finite in this dtype.
    """
    from safetensors.numpy import save_file

    if not description.strip() or dtype not in DTYPES:
        raise ValueError(
            f"a description and a dtype of {tuple(DTYPES)} are needed, got {description!r} and "
            f"{dtype!r}"
        )
    folder = Path(folder).expanduser()
    if min(len(source), batch_size, shard_size, num_threads) < 1:
        raise ValueError(
            "examples, batch_size, shard_size and num_threads must be at least 1, got "
            f"{len(source)}, {batch_size}, {shard_size} and {num_threads}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index must lie below process_count, got {process_index} of {process_count}"
        )
    made_by = {
        "format": _FORMAT,
        "examples": len(source),
        "shard_size": shard_size,
        "dtype": dtype,
        "description": description,
    }
    _claim(folder, made_by, process_index)
    digest, layout = _digest(made_by), None
    with ThreadPoolExecutor(num_threads) as pool:
        for number, indices in _ranges(made_by):
            path = _shard(folder, number)
            if number % process_count != process_index:
                continue
            if not path.exists():
                arrays = _compute(source, function, indices, batch_size, dtype, pool)
                found = _layout(arrays)
                _check_layout(path, found, layout or found)
                partial = path.with_name(f".{path.name}.partial")
                save_file(arrays, partial, metadata={"digest": digest})
                os.replace(partial, path)
            else:
                found = _read_layout(path, digest, len(indices))
                _check_layout(path, found, layout or found)
            layout = found


class CachedSource:
    """Random access to a cache that `precompute` wrote.

    Attributes:
      description: what made it.
      flippable: False. The latents of a mirrored image are not the mirrored latents; make a
        cache of `Mirrored(source)` instead.

    Raises:
      ValueError: if the folder is no cache, a shard is missing or damaged, or they differ in
        what they hold.
    """

    flippable = False

    def __init__(self, folder: str | Path):
        self._folder = Path(folder).expanduser()
        self._made_by = _read_index(self._folder)
        self.description = self._made_by["description"]
        ranges = dict(_ranges(self._made_by))
        missing = [number for number in ranges if not _shard(self._folder, number).is_file()]
        if missing:
            raise ValueError(
                f"{str(self._folder)!r}: {len(missing)} of {len(ranges)} shards are missing, the "
                f"first is {_shard(self._folder, missing[0]).name}; call precompute again to go on"
            )
        digest, self._layout = _digest(self._made_by), {}
        for number, indices in ranges.items():
            path = _shard(self._folder, number)
            layout = _read_layout(path, digest, len(indices))
            _check_layout(path, layout, self._layout or layout)
            self._layout = layout

    def __len__(self) -> int:
        return self._made_by["examples"]

    def __repr__(self) -> str:
        return f"CachedSource({str(self._folder)!r}, {list(self._layout)}, {len(self)} examples)"

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The arrays [...] of an example; floating-point ones are float32 however stored."""
        from safetensors import safe_open

        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {self!r}")
        number, row = divmod(int(index), self._made_by["shard_size"])
        with safe_open(_shard(self._folder, number), framework="numpy") as file:
            found = {name: file.get_slice(name)[row] for name in self._layout}
        return {
            name: value if value.dtype.kind in "biu" else value.astype(np.float32)
            for name, value in found.items()
        }
