"""Loads the checkpoints of reference cases as users would, pickled ones too where torch is."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_jax.io.convert import MissingTorchError, convert_files
from diffusion_jax.io.safetensors import WeightsFileError
from diffusion_jax.pretrained import Loaded, from_pretrained
from diffusion_jax.pretrained.networks import load_network


class NotRun(Exception):
    """A case needs something that is not installed here."""


def load(case: Mapping[str, Any], folder: Path, *, class_name: str | None = None) -> Loaded:
    """The network of a case with one component, as `from_pretrained` gives it.

    Options that nobody knows are left out, as the peers do. Pickled weights have to be refused,
    and are then converted, if torch is installed.

    Args:
      case: names its checkpoint, and the variant of its files.
      folder: of the manifest.
      class_name: as which class the peer read it; what the files say where None.

    Raises:
      NotRun: if they would have to be converted, and torch is not installed.
      AssertionError: if pickled weights were not refused.
    """
    checkpoint = folder / case["checkpoint"]
    options = {"variant": case.get("load_kwargs", {}).get("variant"), "ignore_unknown": True}
    if any(checkpoint.glob("*.safetensors")):
        return _loaded(checkpoint, class_name, options)
    try:
        from_pretrained(checkpoint, **options)
    except WeightsFileError as refusal:
        if "diffusion-jax convert" not in str(refusal):
            raise
    else:
        raise AssertionError(f"{checkpoint} was not refused")
    with tempfile.TemporaryDirectory() as place:
        converted = Path(place)
        try:
            convert_files(sorted(checkpoint.glob("*.bin")), converted)
        except MissingTorchError as error:
            raise NotRun("its pickle was refused; converting it needs torch") from error
        shutil.copyfile(checkpoint / "config.json", converted / "config.json")
        return _loaded(converted, class_name, options)


def _loaded(folder: Path, class_name: str | None, options: Mapping[str, Any]) -> Loaded:
    if class_name is not None:
        return load_network(folder, class_name=class_name, **options)
    found = from_pretrained(folder, **options)
    if not isinstance(found, Loaded):
        raise TypeError(f"{folder} holds a {type(found).__name__}, expected one component")
    return found
