"""The weights of a folder: one safetensors file, or several with an index that lists them.

| name | holds |
| --- | --- |
| STEM.safetensors | everything |
| STEM-00001-of-00002.safetensors, … | parts of it |
| STEM.safetensors.index.json | {"weight_map": {tensor: file}}, where there are parts |
| STEM.fp16.safetensors, … | the same in another precision, the variant "fp16" |

STEM is "diffusion_pytorch_model" in diffusers' folders and "model" in those of transformers.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.io.files import write_text
from diffusion_jax.io.safetensors import (
    TensorSpec,
    WeightsFile,
    WeightsFileError,
    parse_json,
    write_safetensors,
)

STEMS = ("diffusion_pytorch_model", "model")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
MAX_JSON_BYTES = 50_000_000
DEFAULT_SHARD_BYTES = 10_000_000_000


def read_json(path: str | PathLike) -> dict[str, Any]:
    """A JSON object in a file; numbers may be infinite, as in released schedulers' options.

    Raises:
      WeightsFileError: if the file is larger than `MAX_JSON_BYTES`, or holds anything else.
      FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise WeightsFileError(f"{path} has {size} bytes; at most {MAX_JSON_BYTES} are read")
    try:
        return parse_json(path.read_bytes(), infinities=True)
    except ValueError as error:
        raise WeightsFileError(f"{path} is not valid JSON: {error}") from error


def _weight_map(path: Path, ending: str = ".safetensors") -> dict[str, str]:
    """Tensor -> file, as an index says it; every file is a neighbour of the index."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(type(v) is str for v in weight_map.values()):
        raise WeightsFileError(f"{path} must have a weight_map from tensors to names of files")
    for file in set(weight_map.values()):
        if file != Path(file).name or "\\" in file or not file.endswith(ending):
            raise WeightsFileError(
                f"{path} names the file {file!r}; expected the plain name of a {ending[1:]} file "
                "in the same folder"
            )
    return weight_map


def indexed_files(path: str | PathLike, *, ending: str = ".safetensors") -> list[str]:
    """The names of the files that an index lists.

    Args:
      path: the index.
      ending: of the files.

    Raises:
      WeightsFileError: if it lists anything but files of its own folder that end so.
    """
    return sorted(set(_weight_map(Path(path), ending).values()))


class ShardedWeights(Mapping[str, np.ndarray]):
    """The tensors of several safetensors files, as their index lists them.

    All files are opened and compared with the index at once, their data only when asked for.

    Attributes:
      path: the index.
      specs: name -> dtype, shape and place in its file of every tensor.

    Raises:
      WeightsFileError: if the index names a file outside of its folder or one that is not there,
        if it and the files disagree about which tensor is where, or a file is damaged.
    """

    def __init__(self, path: str | PathLike):
        self.path = Path(path)
        weight_map = _weight_map(self.path)
        files = sorted(set(weight_map.values()))
        missing = [file for file in files if not (self.path.parent / file).exists()]
        if missing:
            raise WeightsFileError(
                f"{self.path} names files that are not there: {', '.join(missing)}"
            )
        shards = {file: WeightsFile(self.path.parent / file) for file in files}
        problems = [
            f"{file} lacks {name}" for name, file in weight_map.items() if name not in shards[file]
        ]
        for file, shard in shards.items():
            problems += [
                f"{file} holds {name}, which the index does not place there"
                for name in shard
                if weight_map.get(name) != file
            ]
        if problems:
            raise WeightsFileError(
                f"{self.path} and its files disagree, {len(problems)} tensor(s):\n  "
                + "\n  ".join(problems)
            )
        self._shards = {name: shards[file] for name, file in weight_map.items()}
        self.specs: dict[str, TensorSpec] = {
            name: shard.specs[name] for name, shard in self._shards.items()
        }

    def __getitem__(self, name: str) -> np.ndarray:
        return self._shards[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)


def weight_names(stem: str, variant: str | None = None) -> tuple[str, ...]:
    """Names that a whole file or an index of this stem and variant may have, the usual first."""
    if variant is None:
        return f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    return (
        f"{stem}.{variant}.safetensors",
        f"{stem}.safetensors.index.{variant}.json",
        f"{stem}.{variant}.safetensors.index.json",
    )


def _variants(folder: Path, stem: str) -> list[str]:
    names = [path.name for path in folder.glob(f"{stem}.*.safetensors")]
    found = {name.removeprefix(f"{stem}.").removesuffix(".safetensors") for name in names}
    for path in folder.glob(f"{stem}.safetensors.index.*.json"):
        found.add(path.name.split(".")[-2])
    return sorted(name.partition("-")[0] for name in found)


def has_weights(folder: str | PathLike, *, variant: str | None = None) -> bool:
    """Whether a folder has the files, or their index, that `open_weights` would open."""
    names = [name for stem in STEMS for name in weight_names(stem, variant)]
    return any((Path(folder) / name).exists() for name in names)


def open_weights(
    folder: str | PathLike, *, variant: str | None = None, stems: Sequence[str] = STEMS
) -> WeightsFile | ShardedWeights:
    """The weights of a folder, whichever form they have.

    Args:
      folder: where they lie.
      variant: None for the plain files, "fp16" for STEM.fp16.safetensors and the like.
      stems: what the files may be called, one of which has to be there.

    Raises:
      WeightsFileError: if there are none, or two sets of them; the message says which variants
        there are, and how pickled weights are converted.
    """
    folder = Path(folder)
    wanted = [name for stem in stems for name in weight_names(stem, variant)]
    found = [folder / name for name in wanted if (folder / name).exists()]
    if len(found) > 1:
        raise WeightsFileError(
            f"{folder} holds weights twice: {', '.join(path.name for path in found)}; delete those "
            "that are not meant"
        )
    if found:
        is_index = found[0].suffix == ".json"
        return ShardedWeights(found[0]) if is_index else WeightsFile(found[0])
    raise WeightsFileError(_nothing_found(folder, variant, stems))


def _nothing_found(folder: Path, variant: str | None, stems: Sequence[str]) -> str:
    which = "weights" if variant is None else f"weights of the variant {variant!r}"
    message = f"{folder} holds no {which}: there is no {weight_names(stems[0], variant)[0]}"
    variants = sorted({name for stem in stems for name in _variants(folder, stem)})
    plain = any((folder / name).exists() for stem in stems for name in weight_names(stem))
    if variants or plain:
        there = [*(["variant=None"] if plain else []), *(f"variant={v!r}" for v in variants)]
        return f"{message}; there is {', '.join(there)}"
    pickled = sorted(path for path in folder.glob("*") if path.suffix in PICKLES)
    if pickled:
        parts = [path for path in pickled if "-of-" in path.name] or pickled[:1]
        return (
            f"{message}, only the pickled {', '.join(path.name for path in pickled)}. Pickles can "
            "run any code when they are read, so they are never read here; convert them once, "
            f"where torch is installed: diffusion-jax convert {' '.join(map(str, parts))} {folder}"
        )
    return message


def _shards(tensors: Mapping[str, Any], max_shard_size: int) -> list[list[str]]:
    """Names in groups of at most that many bytes, larger tensors alone; in the given order."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        nbytes = int(np.prod(tensor.shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize
        if groups[-1] and used + nbytes > max_shard_size:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += nbytes
    return groups


def save_weights(
    tensors: Mapping[str, Any],
    folder: str | PathLike,
    *,
    stem: str,
    variant: str | None = None,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
) -> list[Path]:
    """Writes tensors to a folder, in several files and an index where one would be too large.

    Args:
      tensors: name -> array.
      folder: made if it is not there.
      stem: first part of the files' names, see the table above.
      variant: "fp16" and the like, or None.
      max_shard_size: bytes of tensors in one file; a larger tensor has a file of its own.

    Returns:
      The files written, the index last.

    Raises:
      ValueError: if max_shard_size < 1, or the folder already has weights of this name.
    """
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size must be at least 1 byte, got {max_shard_size}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    whole, index, *_ = names = weight_names(stem, variant)
    old = [name for name in names if (folder / name).exists()]
    if old:
        # Another number of files would leave old ones, and a reader could take those.
        raise ValueError(f"{folder} already holds {', '.join(old)}; choose another folder")
    groups = _shards(tensors, max_shard_size)
    if len(groups) == 1:
        write_safetensors(tensors, folder / whole)
        return [folder / whole]
    base = whole.removesuffix(".safetensors")
    weight_map, paths = {}, []
    for number, group in enumerate(groups, 1):
        paths.append(folder / f"{base}-{number:05d}-of-{len(groups):05d}.safetensors")
        write_safetensors({name: tensors[name] for name in group}, paths[-1])
        weight_map |= dict.fromkeys(group, paths[-1].name)
    total = sum(
        int(np.prod(tensor.shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize
        for tensor in tensors.values()
    )
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(folder / index, json.dumps(content, indent=2, sort_keys=True) + "\n")
    return [*paths, folder / index]
