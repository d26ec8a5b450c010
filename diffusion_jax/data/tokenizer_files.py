"""Folders of released tokenizers: which files they hold, and of what kind these are."""

import gzip
import io
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

CONFIG = "tokenizer_config.json"
SHARED = "tokenizer.json"
OPENAI_CLIP = "bpe_simple_vocab_16e6.txt"
# Files of the originals may be packed.
PACKABLE = ("encoder.json", "vocab.bpe", OPENAI_CLIP)

# What transformers' tokenizers count to where their files give no limit is 1e30.
NO_LENGTH = 10**6
# Vocabularies have a megabyte or two; a hostile .gz unpacks to anything.
_MAX_BYTES = 64 * 2**20


class Kind(NamedTuple):
    """How a kind of tokenizer is known: its classes in configurations, and its files.

    Attributes:
      classes: names of tokenizer_class.
      files: sets of files, any of which makes one.
    """

    classes: tuple[str, ...]
    files: tuple[tuple[str, ...], ...]


KINDS: dict[str, Kind] = {
    "clip": Kind(
        ("CLIPTokenizer", "CLIPTokenizerFast"),
        (("vocab.json", "merges.txt"), (SHARED,), (OPENAI_CLIP,)),
    ),
    "bert": Kind(("BertTokenizer", "BertTokenizerFast"), (("vocab.txt",), (SHARED,))),
    "t5": Kind(("T5Tokenizer", "T5TokenizerFast"), (("spiece.model",), (SHARED,))),
    "glide": Kind((), (("encoder.json", "vocab.bpe"),)),
}
# Everything that is read from a folder, and written again.
FILES = (
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    *sorted({name for kind in KINDS.values() for names in kind.files for name in names}),
    *(name + ".gz" for name in PACKABLE),
)


class Folder(NamedTuple):
    """The files of a tokenizer.

    Attributes:
      path: where they were read.
      files: content by name, .gz files as they are.
    """

    path: Path
    files: Mapping[str, bytes]

    def has(self, *names: str) -> bool:
        """Whether all of these files are there, packed or not."""
        return set(names) <= {name.removesuffix(".gz") for name in self.files}

    def text(self, name: str) -> str:
        """A file as text, unpacked.

        Raises:
          ValueError: if it is no UTF-8, its .gz is broken or unpacks to more than 64 MiB.
        """
        path = self.path / name
        try:
            if name in self.files:
                return self.files[name].decode()
            with gzip.open(io.BytesIO(self.files[name + ".gz"])) as file:
                return _bounded(file.read(_MAX_BYTES + 1), path).decode()
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise ValueError(f"{path}: cannot be read ({error})") from error


def read_folder(folder: str | Path, subfolder: str | None = None) -> Folder:
    """The tokenizer's files in a folder, in one below it, or in tokenizer/ of a pipeline.

    Raises:
      ValueError: if there are none, or one is too large.
    """
    root = Path(folder).expanduser()
    tried = [root / subfolder] if subfolder is not None else [root, root / "tokenizer"]
    for path in tried:
        files = {}
        for name in FILES:
            if (path / name).is_file():
                with (path / name).open("rb") as file:
                    files[name] = _bounded(file.read(_MAX_BYTES + 1), path / name)
        if files:
            return Folder(path, files)
    raise ValueError(
        f"no tokenizer in {' or '.join(map(str, tried))}; looked for {', '.join(FILES)}"
    )


def _bounded(content: bytes, path: Path) -> bytes:
    if len(content) > _MAX_BYTES:
        raise ValueError(f"{path}: more than {_MAX_BYTES} bytes, too many for a tokenizer")
    return content


def read_config(folder: Folder) -> dict[str, Any]:
    """tokenizer_config.json, {} where there is none.

    Raises:
      ValueError: if it is no object, names code of its own, or pads or cuts on the left.
    """
    if CONFIG not in folder.files:
        return {}
    path = folder.path / CONFIG
    try:
        config = json.loads(folder.files[CONFIG])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object, got {type(config).__name__}")
    if "auto_map" in config:
        raise ValueError(f"{path}: auto_map names code of its own, which is never run; remove it")
    for side in ("padding_side", "truncation_side"):
        if config.get(side, "right") != "right":
            raise ValueError(f"{path}: {side} = {config[side]!r} is unsupported, only 'right' is")
    return config


def kind_of(folder: Folder, config: Mapping[str, Any], kind: str | None = None) -> str:
    """The kind that a folder's configuration or else its files make.

    Args:
      kind: which one of several the files make, None for the only one.

    Raises:
      ValueError: if the class or the kind is unknown, the files make none or several, or a file
        of the kind is missing.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be one of {sorted(KINDS)}, got {kind!r}")
    name = config.get("tokenizer_class")
    if name is None:
        found = [k for k, row in KINDS.items() if _sets(folder, row, but=SHARED)]
    else:
        found = [k for k, row in KINDS.items() if name in row.classes]
        if not found:
            known = sorted(name for row in KINDS.values() for name in row.classes)
            where = folder.path / CONFIG
            raise ValueError(f"{where}: tokenizer_class {name!r} is unsupported; {known} are")
    if kind is None:
        if len(found) != 1:
            raise ValueError(
                f"{folder.path}: {sorted(folder.files)} make {found or 'none'} of {sorted(KINDS)}; "
                f"say which by kind= or by tokenizer_class in {CONFIG}"
            )
        kind = found[0]
    elif name is not None and kind not in found:
        raise ValueError(f"{folder.path / CONFIG}: tokenizer_class {name!r} is not {kind!r}")
    if not _sets(folder, KINDS[kind]):
        wanted = " or ".join(" with ".join(names) for names in KINDS[kind].files)
        raise ValueError(
            f"{folder.path}: a {kind} tokenizer needs {wanted}, found {sorted(folder.files)}"
        )
    return kind


def _sets(folder: Folder, kind: Kind, but: str | None = None) -> list[tuple[str, ...]]:
    """The kind's sets of files that a folder has; `but` is a file that other kinds have too."""
    return [names for names in kind.files if but not in names and folder.has(*names)]


def length_of(folder: Folder, config: Mapping[str, Any]) -> int:
    """The configuration's limit of tokens.

    Raises:
      ValueError: if it has none.
    """
    length = config.get("model_max_length", NO_LENGTH)
    if isinstance(length, bool) or not isinstance(length, int) or length >= NO_LENGTH:
        raise ValueError(
            f"{folder.path}: no model_max_length in {CONFIG}; give length=, 77 for CLIP, latent "
            "diffusion's BERT and DeepFloyd IF's T5, 128 for GLIDE"
        )
    return length
