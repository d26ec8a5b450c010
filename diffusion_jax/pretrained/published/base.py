"""What is known of a file of weights that was published without a config.json."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Published(NamedTuple):
    """A file of weights that was published without a config.json.

    Attributes:
      class_name: of the network in it, a key of `ORIGINALS`.
      config: arguments of the class, or of a latent diffusion its settings.
      file: where it was published: a URL, or OWNER/NAME:FILE on the Hugging Face hub. All but
        safetensors have to be converted first.
    """

    class_name: str
    config: Mapping[str, Any]
    file: str


def part(target: str, **params: Any) -> dict[str, Any]:
    """A part of settings: a class and its arguments."""
    return {"target": target, "params": params}
