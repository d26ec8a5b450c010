"""LoRA files of diffusers and PEFT, in and out."""

import json
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion_jax.core.lora import merge_lora
from diffusion_jax.core.types import Array, Params
from diffusion_jax.io.mapping import MappingError, tensor_places
from diffusion_jax.io.safetensors import WeightsFile, WeightsFileError, write_safetensors
from diffusion_jax.io.shards import read_json
from diffusion_jax.pretrained.networks import Loaded, component_of
from diffusion_jax.pretrained.pipelines import Pipeline

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Where diffusers keeps each component's adapter configuration in the file's metadata.
METADATA = "lora_adapter_metadata"
_PEFT_PREFIX = "base_model.model."
_NAME = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"lora_(?P<peft>[AB])(?:\.default)?\.weight"
    r"|lora(?:_linear_layer)?\.(?P<old>down|up)\.weight)"
)
_SIDES = {"down": "A", "up": "B"}
# Options of PEFT under which a file means something else than W + α / r · B A.
_OTHER_METHODS = ("use_dora", "lora_bias", "use_qalora", "use_bdlora")


def _file(path: str | PathLike) -> tuple[WeightsFile, dict[str, Any] | None]:
    """The weights, and PEFT's configuration where there is one beside them."""
    path = Path(path).expanduser()
    if path.is_dir():
        known = [name for name in (DIFFUSERS_FILE, PEFT_FILE) if (path / name).exists()]
        if len(known) != 1:
            raise WeightsFileError(
                f"{path} must hold {DIFFUSERS_FILE} or {PEFT_FILE}, found {known or 'neither'}"
            )
        path = path / known[0]
    config = path.parent / PEFT_CONFIG
    beside = path.name == PEFT_FILE and config.exists()
    return WeightsFile(path), read_json(config) if beside else None


def _configs(weights: WeightsFile, config: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """PEFT's configuration of every component, "" for a file of one."""
    if config is not None:
        return {"": config}
    text = weights.metadata.get(METADATA)
    found: dict[str, dict[str, Any]] = {}
    for name, value in (json.loads(text) if text else {}).items():
        component, _, option = name.partition(".")
        found.setdefault(component, {})[option] = value
    return found


def _scale(config: Mapping[str, Any], module: str, rank: int, where: Path) -> float:
    """α / r of a module."""
    wrong = [name for name in _OTHER_METHODS if config.get(name)]
    if wrong or config.get("fan_in_fan_out"):
        raise WeightsFileError(f"{where}: {', '.join(wrong) or 'fan_in_fan_out'} is not read here")
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def load_lora(path: str | PathLike, networks: Mapping[str, Loaded]) -> dict[str, Params]:
    """Reads LoRAs of the components of a pipeline, or of one network.

    Args:
      path: a safetensors file, or a folder with pytorch_lora_weights.safetensors as diffusers
        writes it, or with adapter_model.safetensors and adapter_config.json as PEFT does.
      networks: components by name, {"unet": pipeline["unet"]}. PEFT's files say no component: one
        network is then the one.

    Returns:
      component -> LoRA as `core.lora.init_lora` makes it, with α / r in `up`.

    Raises:
      WeightsFileError: if a file is broken, or holds another method than LoRA.
      MappingError: listing every tensor that belongs to no module, has no partner or another
        shape.
    """
    weights, config = _file(path)
    configs = _configs(weights, config)
    names = {name: _modules(loaded) for name, loaded in networks.items()}
    alphas = {n.removesuffix(".alpha"): n for n in weights if n.endswith(".alpha")}
    pairs: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    problems = []
    for tensor in weights:
        if tensor.endswith(".alpha"):
            continue
        match = _NAME.fullmatch(tensor)
        if match is None:
            problems.append(f"tensor {tensor}: no LoRA's name")
            continue
        module, side = match["module"], {"A": "down", "B": "up"}.get(match["peft"], match["old"])
        component, module = _component(module.removeprefix(_PEFT_PREFIX), names)
        if component is None:
            problems.append(f"tensor {tensor}: of none of {sorted(names)}")
            continue
        pairs.setdefault((component, module), {})[side] = np.asarray(weights[tensor], np.float32)
    found: dict[str, dict[tuple[str, ...], np.ndarray]] = {}
    for (component, module), pair in pairs.items():
        if module not in names[component]:
            problems.append(f"module {component}.{module}: not in the network, or no kernel")
            continue
        target, shape, _ = names[component][module]
        if set(pair) != {"down", "up"}:
            problems.append(f"module {component}.{module}: only {sorted(pair)}")
            continue
        down, up = _down(pair["down"], len(shape)), pair["up"].reshape(len(pair["up"]), -1).T
        if (*down.shape[:-1], up.shape[1]) != shape or down.shape[-1] != up.shape[0]:
            problems.append(
                f"module {component}.{module}: {pair['down'].shape} and {pair['up'].shape} do not "
                f"make a kernel of {shape}"
            )
            continue
        rank = len(up)
        own = configs.get(component, configs.get("", {}))
        alpha = alphas.get(f"{component}.{module}", alphas.get(module))
        scale = _scale(own, module, rank, weights.path)
        scale = scale if alpha is None else float(np.asarray(weights[alpha])) / rank
        place = found.setdefault(component, {})
        place[(*target, "down")], place[(*target, "up")] = down, up * np.float32(scale)
    if not pairs:
        problems.append("no LoRA's tensors at all")
    if problems:
        raise MappingError(
            f"{weights.path}, {len(problems)} problem(s):\n  " + "\n  ".join(problems)
        )
    return {component: unflatten_dict(flat) for component, flat in found.items()}


def _component(module: str, names: Mapping[str, Any]) -> tuple[str | None, str]:
    first, _, rest = module.partition(".")
    if first in names:
        return first, rest
    return (next(iter(names)), module) if len(names) == 1 else (None, module)


class _Module(NamedTuple):
    """A module with a kernel: its path, the kernel's shape, and the axes of the file's tensor."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    rank: int | None


def _modules(loaded: Loaded) -> dict[str, _Module]:
    """Every module with a kernel, by its name in the network's own library."""
    flat = flatten_dict(dict(loaded.params))
    rows = component_of(loaded.class_name, "class_name").rows(loaded.config, ())
    found = {}
    for path, (name, rank) in tensor_places(loaded.params, rows).items():
        parts = tuple(path.split("/"))
        if parts[-1] == "kernel" and name.endswith(".weight"):
            module = _Module(parts[:-1], tuple(flat[parts].shape), rank)
            found[name.removesuffix(".weight")] = module
    return found


def _down(tensor: np.ndarray, ndim: int) -> np.ndarray:
    """[r, in] or [r, in, h, w] as [in, r] or [h, w, in, r]; a 1x1 convolution may be dense."""
    if ndim == 2:
        return tensor.reshape(tensor.shape[0], -1).T
    tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor
    return tensor.transpose(2, 3, 1, 0)


def save_lora(
    path: str | PathLike, loras: Mapping[str, Params], networks: Mapping[str, Loaded]
) -> Path:
    """Writes LoRAs as diffusers' load_lora_weights reads them, into a folder.

    Args:
      path: the folder; gets pytorch_lora_weights.safetensors.
      loras: component -> LoRA.
      networks: component -> network that it adapts.

    Returns:
      the file.

    Raises:
      ValueError: if a LoRA is of no network, or of modules that the network does not have.
    """
    tensors = {}
    for component, lora in loras.items():
        if component not in networks:
            raise ValueError(f"a LoRA of {component!r}, but the networks are {sorted(networks)}")
        merge_lora(networks[component].params, lora)
        modules = {module.path: (n, module) for n, module in _modules(networks[component]).items()}
        for place, leaf in flatten_dict(dict(lora)).items():
            if place[:-1] not in modules:
                raise ValueError(f"{'/'.join(place[:-1])} lies in a tensor with others of its file")
            (name, module), value = modules[place[:-1]], np.asarray(leaf, np.float32)
            tensors[f"{component}.{name}.lora_{_SIDES[place[-1]]}.weight"] = _tensor(
                value, convolution=module.rank == 4
            )
    folder = Path(path).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(tensors, folder / DIFFUSERS_FILE)
    return folder / DIFFUSERS_FILE


def _tensor(value: np.ndarray, *, convolution: bool) -> np.ndarray:
    """`down` or `up` in the file's layout: of a convolution [r, in, h, w] and [out, r, 1, 1]."""
    if value.ndim == 2:
        value = value.T[..., None, None] if convolution else value.T
    else:
        value = value.transpose(3, 2, 0, 1)
    return np.ascontiguousarray(value)


def with_lora(pipeline: Pipeline, path: str | PathLike, scale: Array | float = 1.0) -> Pipeline:
    """The pipeline with LoRAs of a file merged into its networks.

    Args:
      pipeline: that the file was made for.
      path: see `load_lora`.
      scale: 1 for as it was trained, 0 for nothing of it.

    Raises:
      WeightsFileError, MappingError: see `load_lora`.
    """
    networks = {name: part for name, part in pipeline.items() if isinstance(part, Loaded)}
    merged = {
        name: networks[name]._replace(params=merge_lora(networks[name].params, lora, scale))
        for name, lora in load_lora(path, networks).items()
    }
    return pipeline.replace(**merged)
