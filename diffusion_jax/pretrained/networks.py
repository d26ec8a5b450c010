"""One released network: its configuration, module and parameters, from a folder and into one."""

import difflib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from diffusion_jax.core.types import Params
from diffusion_jax.io.files import write_text
from diffusion_jax.io.mapping import MappingError, convert, export
from diffusion_jax.io.safetensors import WeightsFile
from diffusion_jax.io.safetensors import check_finite as check_all_finite
from diffusion_jax.io.shards import DEFAULT_SHARD_BYTES, open_weights, read_json, save_weights
from diffusion_jax.io.tables.options import UnknownOptions, UnsupportedOption
from diffusion_jax.pretrained.components import COMPONENTS, Component

CONFIG = "config.json"

# How parameters lie on devices: one sharding for all, a tree like the parameters', or a function
# of a parameter's path, "network/conv_in/kernel", and its shape.
Shardings = jax.sharding.Sharding | Mapping[str, Any] | Callable[[str, tuple[int, ...]], Any]


class UnknownClassError(ValueError):
    """A configuration is of a class that is not read here."""


class Loaded(NamedTuple):
    """A released network, ready to be applied, trained on or written.

    Attributes:
      class_name: its class in the library that released it, a key of `COMPONENTS`.
      config: what it is, a frozen dataclass; `config.build(dtype=, param_dtype=)` is the module.
      module: as built when it was loaded.
      params: its parameters.
    """

    class_name: str
    config: Any
    module: Any
    params: Params


def class_of(config: Mapping[str, Any], path: Path) -> str:
    """The class that a config.json names: diffusers' `_class_name`, transformers' `architectures`.

    Raises:
      UnknownClassError: if it names none, or several.
    """
    name = config.get("_class_name")
    architectures = config.get("architectures")
    if name is None and isinstance(architectures, list) and len(architectures) == 1:
        name = architectures[0]
    if not isinstance(name, str):
        raise UnknownClassError(
            f"{path} must name its class as _class_name, or as the one entry of architectures; got "
            f"{config.get('_class_name')!r} and {architectures!r}"
        )
    return name


def component_of(class_name: str, where: Any) -> Component:
    """The row of `COMPONENTS` of a class.

    Raises:
      UnknownClassError: listing the classes that there are.
    """
    if class_name not in COMPONENTS:
        near = difflib.get_close_matches(class_name, COMPONENTS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UnknownClassError(
            f"{where}: the class {class_name!r} is not read here; {hint}Known classes: "
            f"{', '.join(sorted(COMPONENTS))}"
        )
    return COMPONENTS[class_name]


def with_dtype(shapes: Params, dtype: Any) -> Params:
    """A tree of `jax.ShapeDtypeStruct`s whose floating-point leaves have another dtype."""

    def changed(leaf: Any) -> jax.ShapeDtypeStruct:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, dtype if floating else leaf.dtype)

    return jax.tree.map(changed, shapes)


def floating_dtype(dtype: Any) -> np.dtype:
    """The dtype that a user asks for, float32 where None.

    Raises:
      ValueError: if it is no floating-point dtype.
    """
    try:
        found = jnp.dtype(jnp.float32 if dtype is None else dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"dtype must be of floating point, such as 'bfloat16', got {dtype!r}")
    return found


def sharding_of(shardings: Shardings | None, shapes: Params) -> dict[str, Any]:
    """The sharding of every parameter by its path, None where it goes to the first device.

    Raises:
      ValueError: if a tree of shardings does not have the leaves of `shapes`, or a leaf is no
        sharding.
    """
    leaves = {"/".join(path): leaf for path, leaf in flatten_dict(dict(shapes)).items()}
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        return dict.fromkeys(leaves, shardings)
    if isinstance(shardings, Mapping):
        found = {"/".join(path): each for path, each in flatten_dict(dict(shardings)).items()}
        differing = sorted(found.keys() ^ leaves.keys())
        if differing:
            raise ValueError(
                f"the tree of shardings and the parameters differ in {', '.join(differing[:10])}"
                f"{' …' if len(differing) > 10 else ''}"
            )
    else:
        found = {path: shardings(path, tuple(leaf.shape)) for path, leaf in leaves.items()}
    wrong = [path for path, each in found.items() if not isinstance(each, jax.sharding.Sharding)]
    if wrong:
        raise ValueError(
            f"the sharding of {wrong[0]} must be a jax.sharding.Sharding, got {found[wrong[0]]!r}"
        )
    return found


def _putter(shardings: Mapping[str, Any]) -> Callable[[str, np.ndarray, np.dtype], jax.Array]:
    """Brings one tensor at a time to its devices; each device gets no more than its own part."""

    def put(path: str, value: np.ndarray, dtype: np.dtype) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            # A copy, because on CPU a device may go on using the buffer, which is the file.
            return np.array(value[index], dtype, order="C")

        if shardings[path] is None:
            return jax.device_put(part(...)).block_until_ready()
        placed = jax.make_array_from_callback(value.shape, shardings[path], part)
        return placed.block_until_ready()

    return put


def _read(component: Component, config: Mapping[str, Any], path: Path, ignore_unknown: bool) -> Any:
    """Our configuration; errors name the file."""
    try:
        return component.read(config)
    except UnknownOptions as error:
        if not ignore_unknown:
            raise UnknownOptions(f"{path}: {error}", error.names) from error
        print(f"{path}: ignored {', '.join(error.names)}", file=sys.stderr)
        left = {key: value for key, value in config.items() if key not in error.names}
        return _read(component, left, path, False)
    except UnsupportedOption as error:
        raise UnsupportedOption(f"{path}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path}: an option has a value of the wrong kind: {error!r}") from error


def load_network(
    folder: Path,
    *,
    class_name: str | None = None,
    dtype: Any = None,
    variant: str | None = None,
    shardings: Shardings | None = None,
    check_finite: bool = False,
    ignore_unknown: bool = False,
    config: Mapping[str, Any] | None = None,
    weights: str | None = None,
) -> Loaded:
    """Reads a folder with config.json and safetensors, or one file; see `from_pretrained`."""
    path = folder / CONFIG if config is None else Path("config")
    config = read_json(path) if config is None else config
    class_name = class_of(config, path) if class_name is None else class_name
    component = component_of(class_name, path)
    ours = _read(component, config, path, ignore_unknown)
    dtype = floating_dtype(dtype)
    try:
        expected = with_dtype(component.shapes(ours), dtype)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{path}: no network can be built of these options: {error}") from error
    is_file = folder.is_file()
    tensors = WeightsFile(folder) if is_file else open_weights(folder, variant=variant)
    if check_finite:
        check_all_finite(tensors, str(tensors.path))
    try:
        chosen = _chosen(tensors, weights, component, class_name)
        params = convert(
            chosen,
            component.rows(ours, tuple(chosen)),
            expected,
            ignore=component.ignore,
            cast=True,
            put=_putter(sharding_of(shardings, expected)),
        )
    except MappingError as error:
        raise MappingError(f"{tensors.path} as a {class_name}: {error}") from error
    return Loaded(class_name, ours, ours.build(dtype=dtype, param_dtype=dtype), params)


def _chosen(
    tensors: Mapping[str, Any], weights: str | None, component: Component, class_name: str
) -> Mapping[str, Any]:
    """The weights as they were trained, or their moving averages."""
    if weights in (None, "raw"):
        return tensors
    if weights != "ema" or component.averages is None:
        known = "'raw'" if component.averages is None else "'raw' or 'ema'"
        raise ValueError(f"weights of a {class_name} must be {known}, got {weights!r}")
    return component.averages(tensors)


def _check_params(params: Params, shapes: Params) -> None:
    def flat(tree: Params) -> dict[str, tuple[int, ...]]:
        return {"/".join(k): tuple(v.shape) for k, v in flatten_dict(dict(tree)).items()}

    given, wanted = flat(params), flat(shapes)
    problems = [
        f"{path}: has {given.get(path, 'nothing')}, expected {wanted.get(path, 'nothing')}"
        for path in sorted(given.keys() | wanted.keys())
        if given.get(path) != wanted.get(path)
    ]
    if problems:
        raise MappingError(
            f"the parameters are not those of the configuration, {len(problems)} differ:\n  "
            + "\n  ".join(problems)
        )


def tensors_of(loaded: Loaded, component: Component) -> dict[str, Any]:
    """The tensors of a network by the names that its library gives them.

    Raises:
      MappingError: if the parameters are not those of the configuration.
    """
    _check_params(loaded.params, component.shapes(loaded.config))
    return export(loaded.params, component.rows(loaded.config, ()))


def save_network(
    loaded: Loaded,
    folder: Path,
    *,
    variant: str | None = None,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Writes config.json and safetensors to a folder; see `save_pretrained`."""
    component = component_of(loaded.class_name, "class_name")
    path = folder / CONFIG
    config = component.write(loaded.config)
    if path.exists() and read_json(path) != json.loads(json.dumps(config)):
        raise ValueError(f"{path} is of another network; choose another folder")
    tensors = tensors_of(loaded, component)
    stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
    save_weights(tensors, folder, stem=stem, variant=variant, max_shard_size=max_shard_size)
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
