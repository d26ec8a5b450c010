"""Settings that a latent diffusion was trained with: YAML or JSON files beside its weights."""

import json
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from diffusion_jax.io.safetensors import WeightsFile
from diffusion_jax.io.shards import open_weights
from diffusion_jax.io.tables.options import UnsupportedOption

MAX_BYTES = 2**20
# YAML 1.1 takes 1e-5 for a word, the programs that wrote these files for a number.
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)$")


def with_scale_factor(settings: Mapping[str, Any], weights: str | PathLike) -> dict[str, Any]:
    """Settings whose `scale_by_std`, if they say so, is the factor that the weights hold.

    Args:
      settings: with "model" at their top, or what "model" says.
      weights: a safetensors file, or a folder of them.

    Raises:
      UnsupportedOption: if the factor is needed and not there, or is no single number.
    """
    if isinstance(settings.get("model"), Mapping):
        return {**settings, "model": with_scale_factor(settings["model"], weights)}
    params = settings.get("params")
    if not isinstance(params, Mapping) or not params.get("scale_by_std"):
        return dict(settings)
    weights = Path(weights)
    tensors = open_weights(weights) if weights.is_dir() else WeightsFile(weights)
    if "scale_factor" not in tensors:
        raise UnsupportedOption(
            f"the settings say scale_by_std, so {weights} must hold scale_factor, and does not"
        )
    found = tensors["scale_factor"]
    if found.size != 1:
        raise UnsupportedOption(f"scale_factor of {weights} must be one number, got {found.shape}")
    factor = found.item()
    return {**settings, "params": {**params, "scale_factor": factor, "scale_by_std": False}}


def read_values(path: str | PathLike) -> dict[str, Any]:
    """The plain values of a YAML or JSON file.

    YAML needs PyYAML, which transformers brings along, and is read by its safe loader, which makes
    nothing but plain values.

    Raises:
      UnsupportedOption: if it is not a mapping, or longer than 1 MiB.
      ImportError: if it is YAML and PyYAML is not installed.
    """
    path = Path(path).expanduser()
    if path.stat().st_size > MAX_BYTES:
        raise UnsupportedOption(f"{path} is longer than {MAX_BYTES} bytes, expected settings")
    try:
        values = _parse(path.read_text(encoding="utf-8"), path)
    except UnicodeDecodeError as error:
        raise UnsupportedOption(f"{path} is neither JSON nor plain YAML: {error}") from error
    if not isinstance(values, dict):
        raise UnsupportedOption(f"{path} must be a mapping of options, got {values!r:.80}")
    return values


def _parse(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        pass
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            f"{path} is no JSON, and reading YAML needs PyYAML: pip install pyyaml, or write the "
            "settings as JSON"
        ) from error

    class Loader(yaml.SafeLoader):
        """The safe loader, for numbers such as 1e-5 too, and without aliases."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            # A few lines of them can stand for more values than memory holds, or for themselves.
            if self.check_event(yaml.AliasEvent):
                raise UnsupportedOption(
                    f"{path} refers to values by aliases (*name); write the values themselves"
                )
            return super().compose_node(parent, index)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789."))
    try:
        return yaml.load(text, Loader)
    except UnsupportedOption:
        raise
    # Besides its own error, PyYAML raises what Python says of a date such as 2022-13-01.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise UnsupportedOption(f"{path} is neither JSON nor plain YAML: {error}") from error
