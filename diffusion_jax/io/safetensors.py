"""Tensors in safetensors files: checked before use, mapped into memory, written as they are read.

A file is 8 bytes N (little-endian), N bytes of JSON and the data. The JSON maps a name to
{"dtype", "shape", "data_offsets"}, the offsets counted from the start of the data, and
"__metadata__" to strings. Nothing of a file is executed, and no path is made of a name in it.

Source: the safetensors format, https://huggingface.co/docs/safetensors.
"""

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 50_000
MAX_RANK = 16
# More than any memory holds; only the shape of an empty tensor can say so.
MAX_ELEMENTS = 2**48

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}

# What people rename to .safetensors or get in its place, by its first bytes. They may as well be
# the length of an honest header, so they explain an error and never cause one.
_IMPOSTORS = {
    b"version ": "a pointer of git-lfs; fetch the file itself with: git lfs pull",
    b"PK\x03\x04": "a zip, as torch writes; convert it with: diffusion-jax convert FILE OUT",
    b"\x80\x02": "a pickle; convert it with: diffusion-jax convert FILE OUT",
    b"<": "a page of a web site; the download went wrong",
}


class WeightsFileError(ValueError):
    """A file of weights is broken, hostile or of another format; the message names the file."""


class TensorSpec(NamedTuple):
    """Where a tensor lies in its file.

    Attributes:
      dtype: of its elements.
      shape: its shape.
      start: its first byte, counted from the start of the file.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class _Invalid(ValueError):
    """What is wrong with a header, without the name of the file."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r:.200} occurs twice")
        result[key] = value
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _infinity(name: str) -> float:
    return _refuse_constant(name) if name == "NaN" else float(name)


def parse_json(text: bytes, *, infinities: bool = False) -> dict[str, Any]:
    """A JSON object, in which no key occurs twice.

    Args:
      text: its bytes.
      infinities: read Infinity and -Infinity, which are no JSON but which Python writes.

    Raises:
      ValueError: if the text is no UTF-8, no JSON, nested too deeply, or no such object.
    """
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_infinity if infinities else _refuse_constant,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    return value


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _spec(name: str, entry: Any) -> tuple[TensorSpec, int]:
    """(a tensor's spec with its start in the data, its end)."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _Invalid(
            f"tensor {name!r:.200} must have dtype, shape and data_offsets, got {entry!r:.99}"
        )
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise _Invalid(
            f"tensor {name!r:.200} has dtype {code!r:.99}; known are {', '.join(DTYPES)}"
        )
    if not isinstance(shape, list) or not all(map(_is_count, shape)) or len(shape) > MAX_RANK:
        raise _Invalid(
            f"tensor {name!r:.200} must have a shape of at most {MAX_RANK} integers >= 0, got "
            f"{shape!r:.99}"
        )
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise _Invalid(f"tensor {name!r:.200} of shape {shape!r:.200} is larger than any memory")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _Invalid(f"tensor {name!r:.200} must have two data_offsets >= 0, got {offsets!r:.99}")
    spec = TensorSpec(DTYPES[code], tuple(shape), offsets[0])
    if offsets[1] - offsets[0] != spec.nbytes:
        raise _Invalid(
            f"tensor {name!r:.200} of dtype {code} and shape {shape!r:.200} needs {spec.nbytes} "
            f"bytes, its data_offsets {offsets} hold {offsets[1] - offsets[0]}"
        )
    return spec, offsets[1]


def _parse(text: bytes) -> dict[str, Any]:
    try:
        return parse_json(text)
    except ValueError as error:
        raise _Invalid(f"its header is not valid JSON: {error}") from error


def _checked(
    header: dict[str, Any], start: int, size: int
) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """(specs with absolute starts, metadata) of a header whose data lie in [start, size)."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(type(v) is not str for v in metadata.values()):
        raise _Invalid(f"__metadata__ must map strings to strings, got {metadata!r:.99}")
    if len(header) > MAX_TENSORS:
        raise _Invalid(f"it holds {len(header)} tensors, more than {MAX_TENSORS}")
    found = {name: _spec(name, entry) for name, entry in header.items()}
    position = 0
    for name, (spec, end) in sorted(found.items(), key=lambda item: (item[1][0].start, item[1][1])):
        if spec.start != position:
            kind = "overlaps the tensor before it" if spec.start < position else "follows a hole"
            raise _Invalid(
                f"tensor {name!r:.200} begins at {spec.start}, not at {position}: it {kind}"
            )
        position = end
    if start + position != size:
        kind = "is cut off" if start + position > size else "has data that belong to no tensor"
        raise _Invalid(f"it {kind}: {start + position} bytes are announced, {size} are there")
    specs = {name: spec._replace(start=start + spec.start) for name, (spec, _) in found.items()}
    return specs, metadata


def _read_header(file: Any) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    if len(first) < 8:
        raise _Invalid(f"it has {size} bytes, too few for a header")
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise _Invalid(
            f"it announces a header of {length} bytes; the file has {size}, and at most "
            f"{MAX_HEADER_BYTES} are allowed"
        )
    return _checked(_parse(file.read(length)), 8 + length, size)


def _hint(file: Any) -> str:
    file.seek(0)
    first = file.read(8)
    return next(
        (
            f"; it looks like {what}"
            for magic, what in _IMPOSTORS.items()
            if first.startswith(magic)
        ),
        "",
    )


class WeightsFile(Mapping[str, np.ndarray]):
    """The tensors of one safetensors file; reading one touches only its own bytes.

    Arrays are read-only views of the mapped file: copy what has to outlive it. The whole header
    is checked when the file is opened.

    Attributes:
      path: the file.
      specs: name -> dtype, shape and place of every tensor.
      metadata: the strings that the file carries.

    Raises:
      WeightsFileError: if the file is no safetensors file, is damaged, or says something that
        no honest writer says: a key twice, data of two tensors or of none, more than
        `MAX_TENSORS` tensors, a shape beyond any memory.
      FileNotFoundError: if there is no such file.
    """

    def __init__(self, path: str | PathLike):
        self.path = Path(path)
        if self.path.is_dir():
            raise WeightsFileError(f"{self.path} is a folder, expected a safetensors file")
        with self.path.open("rb") as file:
            try:
                self.specs, self.metadata = _read_header(file)
            except _Invalid as error:
                raise WeightsFileError(f"{self.path}: {error}{_hint(file)}") from error
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._seen = 0, 0

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape, start = spec = self.specs[name]
        if spec.nbytes == 0:
            return np.empty(shape, dtype)
        self._forget()
        self._seen = start, start + spec.nbytes
        flat = np.frombuffer(self._map, dtype, count=math.prod(shape), offset=start)
        return flat.reshape(shape)

    def _forget(self) -> None:
        """Gives back the memory of the tensor before, which the file still has if it is asked for.

        A process that reads tensor by tensor would else grow by the whole file.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            start = self._seen[0] // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, self._seen[1] - start)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def check_finite(tensors: Mapping[str, np.ndarray], where: str) -> None:
    """Looks at every floating-point tensor, one after the other.

    Args:
      tensors: by name.
      where: what holds them, for the message.

    Raises:
      WeightsFileError: naming the tensors that hold a NaN or an infinity.
    """
    bad = []
    for name in tensors:
        tensor = tensors[name]
        if tensor.dtype.kind in "iub":
            continue
        if not np.isfinite(tensor).all():
            bad.append(name)
    if bad:
        raise WeightsFileError(f"{where}: {len(bad)} tensors are not finite: {', '.join(bad)}")


def _header(tensors: Mapping[str, Any], names: list[str], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in names:
        tensor = tensors[name]
        code = _CODES.get(np.dtype(tensor.dtype).newbyteorder("<"))
        if code is None:
            raise ValueError(
                f"tensor {name!r:.200} has dtype {tensor.dtype}; safetensors files hold "
                f"{', '.join(str(dtype) for dtype in _CODES)}"
            )
        end = position + math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
        entries[name] = {
            "dtype": code,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    # Readers map the data, which are then aligned for every dtype.
    return text + b" " * (-len(text) % 8)


def write_safetensors(
    tensors: Mapping[str, Any], path: str | PathLike, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors as one file, which appears under its name only when it is complete.

    Tensors go to the file one after the other, whatever their strides and byte order.

    Args:
      tensors: name -> array of any strides.
      path: the file.
      metadata: strings to carry; {"format": "pt"} where None, without which other libraries
        refuse a file.

    Raises:
      ValueError: if a dtype has no place in the format, or a name is "__metadata__".
    """
    path = Path(path)
    if "__metadata__" in tensors:
        raise ValueError("a tensor cannot be named '__metadata__', which the format reserves")
    # Wide types first keeps every tensor aligned, as the format's own writer does.
    names = sorted(tensors, key=lambda name: (-np.dtype(tensors[name].dtype).itemsize, name))
    header = _header(tensors, names, {"format": "pt"} if metadata is None else metadata)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name in names:
                array = np.asarray(tensors[name])
                # Not ascontiguousarray, which makes a vector of a scalar.
                array = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
                file.write(array.reshape(-1).view(np.uint8).data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
