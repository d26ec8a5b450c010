"""Pickled weights of torch as safetensors: the one place that reads pickles, and that needs torch.

torch's loader is asked for weights only, which builds tensors and plain containers and refuses
everything else; there is no option that trusts a file.
"""

import fnmatch
import importlib
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from diffusion_jax.io.safetensors import DTYPES, WeightsFileError, write_safetensors
from diffusion_jax.io.shards import PICKLES, indexed_files, save_weights

# What training code keeps beside the weights, and is not meant.
TRAINING_STATE = (
    "callbacks",
    "hyper_parameters",
    "loops",
    "lr_scheduler",
    "lr_schedulers",
    "opt",
    "optimizer",
    "optimizer_states",
    "optimizers",
    "scheduler",
)
# What checkpoints of training frameworks mention beside weights: callbacks and single numbers.
# Each is read as an empty object of ours, so no code of the file or of the framework runs.
INERT = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    *(f"numpy.dtypes.{name}DType" for name in ("Float32", "Float64", "Int32", "Int64", "Bool")),
)
_SAFE_TORCH = 2, 6


class MissingTorchError(ImportError):
    """torch is needed to read pickled weights, and is not installed or too old."""


class _Inert:
    """Stands for an object that is not wanted."""

    def __init__(self, *arguments: Any):
        del arguments

    def __setstate__(self, state: Any) -> None:
        del state


def _torch() -> Any:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise MissingTorchError(
            "converting pickled weights needs torch, which nothing else here does; install it for "
            "this once: pip install torch"
        ) from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < _SAFE_TORCH:
        raise MissingTorchError(
            f"torch {torch.__version__} can be made to run code even where it is asked for weights "
            "only (CVE-2025-32434); converting needs a newer one: pip install 'torch>=2.6'"
        )
    return torch


def _read(torch: Any, path: Path) -> Any:
    """The content of one file; raises WeightsFileError where it is more than weights."""
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in INERT]):
            return torch.load(str(path), map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # A broken pickle can bring about any of them.
        # torch's own advice is to trust the file, so of its message only the culprit is shown.
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {culprit[1]}" if culprit else f"torch says {type(error).__name__}"
        raise WeightsFileError(
            f"{path} is not made of tensors and plain containers alone, {reason}; it is not read "
            "in any other way"
        ) from error


def _is_tensor(torch: Any, value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _candidates(torch: Any, tree: Any, path: str = "", depth: int = 3) -> dict[str, Mapping]:
    """Dotted key -> dictionary that holds tensors itself, over the first levels of a tree."""
    if not isinstance(tree, Mapping) or depth == 0:
        return {}
    found = {path: tree} if any(_is_tensor(torch, value) for value in tree.values()) else {}
    for key, value in tree.items():
        if isinstance(key, str):
            found |= _candidates(torch, value, f"{path}.{key}" if path else key, depth - 1)
    return found


def _state_dict(torch: Any, content: Any, path: Path, key: str | None) -> Mapping[str, Any]:
    found = _candidates(torch, content)
    if key is None:
        found = {k: v for k, v in found.items() if k.split(".")[0] not in TRAINING_STATE}
    names = ", ".join(name or "'' (the top level)" for name in found)
    if key is None and len(found) > 1:
        raise WeightsFileError(
            f"{path} holds several dictionaries of tensors, choose one as key (--key): {names}"
        )
    key = next(iter(found), "") if key is None else key
    if key not in found:
        named = f" called {key!r}; there is {names or 'none'}" if key else ""
        raise WeightsFileError(f"{path} holds no dictionary of tensors{named}")
    return found[key]


def _to_numpy(torch: Any, name: str, tensor: Any) -> np.ndarray:
    try:
        tensor = tensor.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            # numpy has no such type of its own, so the bits travel as integers.
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        array = tensor.numpy()
        if array.dtype not in DTYPES.values():
            raise TypeError("safetensors files have no such dtype")
        return array
    except (TypeError, RuntimeError) as error:
        raise WeightsFileError(f"tensor {name!r} of dtype {tensor.dtype}: {error}") from error


class Converted(NamedTuple):
    """What a conversion did.

    Attributes:
      files: what was written.
      tensors: how many tensors.
      left_out: keys of the chosen dictionary that are no tensors.
    """

    files: list[Path]
    tensors: int
    left_out: list[str]


def _tensors(torch: Any, path: Path, key: str | None) -> tuple[dict[str, np.ndarray], list[str]]:
    """(tensors by name, other keys) of one file."""
    chosen = _state_dict(torch, _read(torch, path), path, key)
    tensors, left_out = {}, []
    for name, value in chosen.items():
        if isinstance(name, str) and _is_tensor(torch, value):
            tensors[name] = _to_numpy(torch, name, value)
        else:
            left_out.append(str(name))
    return tensors, left_out


def _inputs(files: Sequence[Path]) -> list[Path]:
    """The pickles that are meant: an index stands for its files."""
    result = []
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"there is no file {file}")
        if file.name.endswith(".bin.index.json"):
            result += [file.parent / name for name in indexed_files(file, ending=".bin")]
        elif file.suffix in PICKLES:
            result.append(file)
        else:
            raise ValueError(f"{file} must end with one of {', '.join(PICKLES)} or .bin.index.json")
    return result


def _new_stem(file: Path) -> tuple[str, str | None]:
    """(stem, variant) of the safetensors file in place of a pickle; transformers renames its."""
    stem = file.name.removesuffix(file.suffix)
    if fnmatch.fnmatchcase(stem, "*-[0-9]*-of-[0-9]*"):
        stem = stem.rpartition("-of-")[0].rpartition("-")[0]
    known = {"pytorch_model": "model", "diffusion_pytorch_model": "diffusion_pytorch_model"}
    base, _, variant = stem.partition(".")
    return (known[base], variant or None) if base in known else (stem, None)


def convert_files(
    files: Sequence[str | PathLike],
    out: str | PathLike,
    *,
    key: str | None = None,
    max_shard_size: int | None = None,
) -> Converted:
    """Writes what pickled files of torch hold as safetensors, every tensor under its own name.

    Tensors that share memory in a file are written each by itself. dtypes stay as they are.

    Args:
      files: .bin, .pt, .pth or .ckpt; the parts of one set of weights, or their .bin.index.json.
      out: a .safetensors file; or a folder, in which files get the names that other libraries
        expect: pytorch_model.bin becomes model.safetensors.
      key: dotted key of the dictionary of tensors, "model_ema", in files that hold several;
        state of optimizers and the like does not count.
      max_shard_size: bytes of tensors in one file of a folder; as many files as were given, about,
        where None.

    Raises:
      MissingTorchError: if torch is not installed, or older than 2.6.
      WeightsFileError: if a file holds more than weights, several dictionaries of them, a tensor
        twice with another file, or a dtype that has no place in safetensors.
      ValueError: if a name ends with something else, `out` exists or is named as a pickle, or
        `max_shard_size` is given for a single file.
    """
    out = Path(out)
    inputs = _inputs([Path(file) for file in files])
    if not inputs:
        raise ValueError("there is nothing to convert; give .bin, .pt, .pth or .ckpt files")
    if out.suffix in PICKLES or (out.is_file() and out.suffix != ".safetensors"):
        raise ValueError(f"the last path is written: a .safetensors file or a folder, got {out}")
    if out.suffix == ".safetensors" and max_shard_size is not None:
        raise ValueError(f"max_shard_size is for folders, and {out} is one file")
    torch = _torch()
    tensors: dict[str, np.ndarray] = {}
    left_out = []
    for path in inputs:
        more, others = _tensors(torch, path, key)
        twice = sorted(tensors.keys() & more.keys())
        if twice:
            raise WeightsFileError(
                f"{path} holds tensors that an earlier file has too: {twice[:5]}"
            )
        tensors |= more
        left_out += others
    if out.suffix == ".safetensors":
        if out.exists():
            raise ValueError(f"{out} exists; choose another name or delete it")
        out.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(tensors, out)
        return Converted([out], len(tensors), left_out)
    stem, variant = _new_stem(inputs[0])
    if max_shard_size is None:
        largest = max(path.stat().st_size for path in inputs)
        max_shard_size = largest if len(inputs) > 1 else 2**63
    written = save_weights(tensors, out, stem=stem, variant=variant, max_shard_size=max_shard_size)
    return Converted(written, len(tensors), left_out)
