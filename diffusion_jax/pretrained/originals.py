"""from_original and save_original: files of weights as the code of a paper has them."""

import difflib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from diffusion_jax.io.safetensors import write_safetensors
from diffusion_jax.io.shards import PICKLES
from diffusion_jax.io.tables.latent_diffusion import CLASSES
from diffusion_jax.pretrained.components import ORIGINALS
from diffusion_jax.pretrained.components.compvis import (
    FIRST_STAGES,
    LATENT_DIFFUSION_CLASS,
    UNET_CLASS,
)
from diffusion_jax.pretrained.folder import from_pretrained
from diffusion_jax.pretrained.hub import fetch_file, is_repository
from diffusion_jax.pretrained.networks import Loaded, Shardings, UnknownClassError, tensors_of
from diffusion_jax.pretrained.published import PUBLISHED
from diffusion_jax.pretrained.settings import read_values, with_scale_factor

# Classes whose configurations are settings, with targets, of what they are made of.
_BY_SETTINGS = (LATENT_DIFFUSION_CLASS, *FIRST_STAGES)


def from_original(
    file: str | PathLike,
    kind: str,
    config: Mapping[str, Any] | str | PathLike | None = None,
    *,
    revision: str | None = None,
    weights: str | None = None,
    dtype: Any = None,
    shardings: Shardings | None = None,
    check_finite: bool = False,
) -> Loaded:
    """Reads weights of guided-diffusion, GLIDE, latent diffusion or GLIGEN as they were released.

    from_original("256x256_diffusion.safetensors", "guided-diffusion/256x256_diffusion")
    from_original("mine.safetensors", "guided_diffusion.unet.UNetModel", {"image_size": 64, …})

    Pickles are converted once beforehand: diffusion-jax convert 256x256_diffusion.pt OUT. Tensors
    are read one by one, and every tensor and every option has to be known.

    Args:
      file: a safetensors file; a folder of its shards; or OWNER/NAME:FILE, a file on the Hugging
        Face hub, whose commit is printed.
      kind: a key of `PUBLISHED`, which knows the configuration, or of `ORIGINALS`, the class of
        the network.
      config: of a class, the arguments of its constructor or the settings that it was trained
        with, {"model": {"target": …, "params": …}}, of which a UNet takes its own part; or the
        YAML or JSON file that holds either.
      revision: branch, tag or commit of the repository.
      weights: "ema" for the moving averages in a file of latent diffusion, else "raw".
      dtype: of floating-point parameters and of the modules' activations; float32 where None,
        whatever the file holds.
      shardings: how parameters lie on devices, see `from_pretrained`.
      check_finite: refuse weights with a NaN or an infinity, which takes reading them twice.

    Returns:
      The network; its class_name is the class that `kind` stands for.

    Raises:
      FileNotFoundError: if there is no such file.
      HubError: if it cannot be had from the hub.
      WeightsFileError: if it is a pickle, or broken.
      UnknownClassError: if `kind` is neither a class nor a published file.
      UnsupportedOption: if the configuration has an option, or a value of one, that is not
        computed here.
      MappingError: if tensors are missing, left over or of another shape.
      ValueError: if `config` is missing, is not of this class, or is given beside the name of a
        published file.
      ImportError: if `config` is YAML and PyYAML is not installed.
    """
    class_name, arguments = _described(kind, config)
    path = _local(file, revision)
    if class_name == LATENT_DIFFUSION_CLASS and path.suffix not in PICKLES:
        arguments = with_scale_factor(arguments, path)
    loaded = from_pretrained(
        path,
        config={**arguments, "_class_name": class_name},
        weights=weights,
        dtype=dtype,
        shardings=shardings,
        check_finite=check_finite,
    )
    if not isinstance(loaded, Loaded):
        raise TypeError(f"{file} holds a {type(loaded).__name__}, expected one network")
    return loaded


def save_original(loaded: Loaded, file: str | PathLike) -> None:
    """Writes weights as the code of the paper names them, in the dtype that they have.

    `from_original` of the file, with loaded.class_name and the same configuration, gives the same
    parameters bit for bit. `ORIGINALS[loaded.class_name].write(loaded.config)` are the
    constructor's arguments. torch reads the file by safetensors.torch.load_file.

    Args:
      loaded: as `from_original` gave it, or made by hand: Loaded(class_name, config, module,
        params) of a class of `ORIGINALS`.
      file: a safetensors file that is not there yet.

    Raises:
      UnknownClassError: if the network is of another class.
      MappingError: if parameters are not those of the configuration.
      ValueError: if the file is there, or is to have another ending.
    """
    path = Path(file).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end with .safetensors")
    if path.exists():
        raise ValueError(f"{path} is there already; choose another file")
    write_safetensors(tensors_of(loaded, ORIGINALS[_class_of(loaded.class_name)]), path)


def _class_of(kind: str) -> str:
    """The class that a key of `PUBLISHED` or `ORIGINALS` stands for."""
    if kind in PUBLISHED:
        return PUBLISHED[kind].class_name
    if kind in ORIGINALS:
        return kind
    near = difflib.get_close_matches(kind, [*PUBLISHED, *ORIGINALS], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UnknownClassError(
        f"{kind!r} is no original class and no published file; {hint}Classes: "
        f"{', '.join(ORIGINALS)}. Files: {', '.join(PUBLISHED)}"
    )


def _described(
    kind: str, config: Mapping[str, Any] | str | PathLike | None
) -> tuple[str, Mapping[str, Any]]:
    """(class, its configuration)."""
    class_name = _class_of(kind)
    if kind in PUBLISHED:
        if config is not None:
            raise ValueError(
                f"the configuration of {kind} is known, so config must be None; to give another "
                f"one, name its class: {class_name}"
            )
        return class_name, PUBLISHED[kind].config
    if config is None:
        names = [name for name, each in PUBLISHED.items() if each.class_name == class_name]
        raise ValueError(
            f"config must hold the arguments of {class_name}; it is known without for "
            f"{', '.join(names) or 'no published file'}"
        )
    values = config if isinstance(config, Mapping) else read_values(config)
    named = values.get("_class_name", class_name)
    if named != class_name:
        raise ValueError(f"config is of {named}, expected one of {class_name}")
    return class_name, _own(values, class_name)


def _own(values: Mapping[str, Any], class_name: str) -> Mapping[str, Any]:
    """What a class is made by, of arguments or of settings that may be about more."""
    model = values.get("model")
    if class_name in _BY_SETTINGS:
        is_settings = "model" in values or "target" in values
        return values if is_settings else {"target": class_name, "params": dict(values)}
    if not isinstance(model, Mapping):
        return values
    target, params = _part(model, "model")
    if class_name == UNET_CLASS and target.rpartition(".")[2] in CLASSES:
        target, params = _part(params.get("unet_config"), "unet_config")
    # GLIGEN's settings say nothing of the repository that its class is told apart by here.
    if not f".{class_name}".endswith(f".{target}"):
        raise ValueError(f"config has settings of a {target}, expected a {class_name}")
    return params


def _part(settings: Any, what: str) -> tuple[str, Mapping[str, Any]]:
    """(target, params) of a part of settings."""
    params = settings.get("params") or {} if isinstance(settings, Mapping) else None
    if not isinstance(params, Mapping):
        raise ValueError(
            f"{what} in config must have a target and its params, got {settings!r:.99}"
        )
    return str(settings.get("target")), params


def _local(file: str | PathLike, revision: str | None) -> Path:
    path = Path(file).expanduser()
    repository, colon, name = str(file).partition(":")
    if colon and not path.exists() and is_repository(repository):
        return fetch_file(repository, name, revision)
    if revision is not None:
        raise ValueError(f"revision is for OWNER/NAME:FILE on the hub, got {file}")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {file}; on the hub it is OWNER/NAME:FILE")
    return path
