"""from_pretrained and save_pretrained: released networks, pipelines and runs by their folder."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from diffusion_jax.core.host_memory import trim_after_compiling
from diffusion_jax.data.tokenizer_files import FILES as TOKENIZER_FILES
from diffusion_jax.data.tokenizers import Tokenizer
from diffusion_jax.data.tokenizers import from_folder as load_tokenizer
from diffusion_jax.io.safetensors import WeightsFileError
from diffusion_jax.io.shards import DEFAULT_SHARD_BYTES, PICKLES
from diffusion_jax.pretrained.hub import fetch_small, fetch_weights, is_repository
from diffusion_jax.pretrained.networks import (
    CONFIG,
    Loaded,
    Shardings,
    load_network,
    save_network,
)
from diffusion_jax.pretrained.pipelines import (
    INDEX,
    SCHEDULER_CONFIG,
    Pipeline,
    load_pipeline,
    load_scheduler,
    part_folder,
    parts_with_weights,
    save_pipeline,
    save_scheduler,
)
from diffusion_jax.pretrained.runs import Trained, is_run, load_run
from diffusion_jax.pretrained.schedulers import Scheduler

_NETWORK_OPTIONS = ("dtype", "variant", "shardings", "check_finite", "ignore_unknown")
_FILE_OPTIONS = ("config", "dtype", "shardings", "weights", "check_finite", "ignore_unknown")
# What a folder may hold, and the arguments of from_pretrained that mean something for it.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "pipeline": (*_NETWORK_OPTIONS, "token_length"),
    "network": _NETWORK_OPTIONS,
    "file": _FILE_OPTIONS,
    "network without config.json": (*_FILE_OPTIONS, "variant"),
    "training directory": ("dtype", "shardings", "weights"),
    "scheduler": (),
    "tokenizer": ("token_length",),
}


def from_pretrained(
    folder: str | PathLike,
    *,
    revision: str | None = None,
    dtype: Any = None,
    variant: str | None = None,
    subfolder: str | None = None,
    shardings: Shardings | None = None,
    weights: str | None = None,
    check_finite: bool = False,
    ignore_unknown: bool = False,
    config: Mapping[str, Any] | None = None,
    token_length: int | None = None,
) -> Loaded | Pipeline | Trained | Scheduler | Tokenizer:
    """Reads what a library released, or what was trained here, from its folder.

    | the folder holds | and gives |
    | --- | --- |
    | config.json of diffusers or transformers, safetensors | `Loaded` |
    | model_index.json, a folder for each part | `Pipeline`, a mapping of parts |
    | config.json and checkpoints of diffusion-jax train | `Trained` |
    | nothing but safetensors, or is one such file, and there is a `config` | `Loaded` |
    | scheduler_config.json | `Scheduler` |
    | files of a tokenizer | `Tokenizer` |

    Nothing in a folder is run: pickles are refused, classes are looked up in `COMPONENTS`, and
    every tensor and every option of a configuration has to be known. Tensors are read one by one,
    so memory holds the parameters and one tensor more. From then on the process gives back what
    compiling frees, see `core.host_memory.trim_after_compiling`.

    Args:
      folder: a path, or the id of a repository of the Hugging Face hub where there is no such
        path. Its JSON, text and safetensors files are fetched and its commit is printed.
      revision: branch, tag or commit of the repository.
      dtype: of floating-point parameters and of the modules' activations; float32 where None,
        whatever the files hold.
      variant: "fp16" for the files STEM.fp16.safetensors. In a pipeline, parts that do not have
        the variant give their plain files.
      subfolder: of the folder or the repository, "unet".
      shardings: how parameters lie on devices: a `jax.sharding.Sharding`, a tree of them like the
        parameters, or a function of a parameter's path ("network/conv_in/kernel") and shape. No
        device then gets more than its own parts. In a pipeline trees are by part, and paths begin
        with the part's name. On the first device where None.
      weights: "ema" or "raw" of a training directory, where None means "ema", or of latent
        diffusion's original files, where None means "raw".
      check_finite: refuse weights with a NaN or an infinity, which takes reading them twice.
      ignore_unknown: print the options that nobody knows of a network's config.json and go on, as
        the libraries themselves do, in place of an error.
      config: what a config.json would hold, `_class_name` included, for weights that were released
        without one: the original files of guided-diffusion, GLIDE and latent diffusion.
      token_length: tokens that a tokenizer pads and cuts to; what its files say where None.

    Raises:
      FileNotFoundError: if there is no such path, and it is no id of a repository.
      HubError: if a repository cannot be had.
      WeightsFileError: if a file is broken, or there are no weights to be read.
      UnknownClassError: if a configuration is of a class that is not in `COMPONENTS`.
      UnsupportedOption: if it has an option, or a value of one, that is not computed here.
      MappingError: if tensors are missing, left over or of another shape.
      ValueError: if an argument has no meaning for what the folder holds.
    """
    trim_after_compiling()
    folder = str(folder)
    path = Path(folder).expanduser()
    repository = None
    if not path.exists():
        if not is_repository(folder):
            raise FileNotFoundError(
                f"there is no folder {folder}, and it is not the id of a repository, OWNER/NAME"
            )
        repository, path = folder, fetch_small(folder, revision)
    elif revision is not None:
        raise ValueError(f"revision is for repositories of the hub; {folder} is a folder")
    root, path = path, _below(path, subfolder)
    given = {
        "dtype": dtype,
        "variant": variant,
        "shardings": shardings,
        "weights": weights,
        "check_finite": check_finite or None,
        "ignore_unknown": ignore_unknown or None,
        "config": config,
        "token_length": token_length,
    }
    what = _kind(path, config)
    options = {name: value for name, value in given.items() if value is not None}
    for name in options:
        if name not in _OPTIONS[what]:
            raise ValueError(f"{name} has no meaning for {path}, which holds a {what}")
    if repository and what in ("pipeline", "network", "network without config.json"):
        names = parts_with_weights(path) if what == "pipeline" else []
        parts = [part_folder(path, name) for name in names] if what == "pipeline" else [path]
        below = [part.relative_to(root).as_posix().removeprefix(".") for part in parts]
        fetch_weights(repository, root, below, variant=variant)
    if what == "pipeline":
        return load_pipeline(path, **options)
    if what in ("network", "network without config.json", "file"):
        return load_network(path, **options)
    if what == "training directory":
        return load_run(path, **options)
    if what == "scheduler":
        return load_scheduler(path)
    return load_tokenizer(path, length=token_length)


def _kind(path: Path, config: Mapping[str, Any] | None) -> str:
    """What a folder holds, a key of `_OPTIONS`."""
    if path.is_file():
        if path.suffix in PICKLES:
            raise WeightsFileError(
                f"{path} is pickled, and pickles are never read; convert it once, where torch is "
                f"installed: diffusion-jax convert {path} {path.with_suffix('.safetensors')}"
            )
        if config is None:
            raise WeightsFileError(
                f"{path} is a file, which does not say what network it holds; give the folder that "
                "has its config.json, or config={'_class_name': …}"
            )
        return "file"
    if config is not None and not (path / CONFIG).exists() and not (path / INDEX).exists():
        return "network without config.json"
    if (path / INDEX).exists():
        return "pipeline"
    if is_run(path):
        return "training directory"
    if (path / CONFIG).exists():
        return "network"
    if (path / SCHEDULER_CONFIG).exists():
        return "scheduler"
    if any((path / name).exists() for name in TOKENIZER_FILES):
        return "tokenizer"
    raise WeightsFileError(_unknown_folder(path))


def _below(path: Path, subfolder: str | None) -> Path:
    if subfolder is None:
        return path
    parts = Path(subfolder).parts
    if Path(subfolder).is_absolute() or ".." in parts or not parts:
        raise ValueError(f"subfolder must lie in the folder, got {subfolder!r}")
    if path.is_file():
        raise ValueError(f"subfolder is for folders, and {path} is a file")
    if not (path / subfolder).is_dir():
        there = [name for name in _names(path) if (path / name).is_dir()]
        raise FileNotFoundError(f"{path} has no folder {subfolder!r}; it has {there}")
    return path / subfolder


def _names(path: Path) -> list[str]:
    """What a folder holds; of a repository without configurations no folder is made."""
    return sorted(each.name for each in path.iterdir()) if path.exists() else []


def _unknown_folder(path: Path) -> str:
    names = _names(path)
    shown = ", ".join(names[:20]) + (" …" if len(names) > 20 else "")
    message = (
        f"{path} must hold {CONFIG}, {INDEX}, {SCHEDULER_CONFIG}, a tokenizer's files or a run; it "
        f"has {shown or 'nothing'}. Weights alone are read by from_original, or with config="
    )
    if any(Path(name).suffix in PICKLES for name in names):
        message += (
            ". Pickled weights are never read; convert them once, where torch is installed: "
            "diffusion-jax convert FILE OUT"
        )
    return message


def save_pretrained(
    what: Loaded | Pipeline | Scheduler | Tokenizer,
    folder: str | PathLike,
    *,
    variant: str | None = None,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Writes a folder that `from_pretrained` reads, and diffusers or transformers too.

    Weights are written in the dtype that the parameters have. `from_pretrained` of the folder
    gives the same parameters bit for bit.

    Args:
      what: as `from_pretrained` gave it, or made by hand: Loaded(class_name, config, module,
        params) of a class of `COMPONENTS`.
      folder: made if it is not there.
      variant: "fp16" and the like, part of the files' names; says nothing about the dtype.
      max_shard_size: bytes of tensors in one file, with an index where there are several files.

    Raises:
      ValueError: if the folder holds such weights already, or `what` cannot be written.
      MappingError: if parameters are not those of the configuration.
    """
    path = Path(folder).expanduser()
    if isinstance(what, Pipeline):
        path.mkdir(parents=True, exist_ok=True)
        save_pipeline(what, path, variant=variant, max_shard_size=max_shard_size)
    elif isinstance(what, Loaded):
        path.mkdir(parents=True, exist_ok=True)
        save_network(what, path, variant=variant, max_shard_size=max_shard_size)
    elif isinstance(what, Scheduler):
        save_scheduler(what, path)
    elif isinstance(what, Tokenizer):
        what.save(path)
    else:
        raise ValueError(
            "expected a Loaded, Pipeline, Scheduler or Tokenizer, got "
            f"{type(what).__name__}; a training directory is already what from_pretrained reads"
        )
