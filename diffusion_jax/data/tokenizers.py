"""Tokenizers: prompts to integers with the files of released models, without torch."""

import gzip
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from diffusion_jax.data.byte_pairs import BytePairs, read_merges, read_vocabulary

PADDINGS = ("length", "longest")
ON_LONG_PROMPT = ("warn", "error")
BACKENDS = ("transformers", "sentencepiece")

# Without a limit in their files transformers' tokenizers count to 1e30.
_NO_LENGTH = 10**6
# Vocabularies have a megabyte or two; a hostile .gz unpacks to anything.
_MAX_BYTES = 64 * 2**20
_SHOWN = 500

CONFIG = "tokenizer_config.json"
# Everything that a tokenizer's folder may hold and that is read, and written again by `save`.
FILES = (
    CONFIG,
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "encoder.json",
    "encoder.json.gz",
    "vocab.bpe",
    "vocab.bpe.gz",
)


class Tokens(NamedTuple):
    """Prompts as integers; without the axis B where a single string was given.

    Attributes:
      ids: [B, L] int32.
      mask: [B, L] bool, True where a token is not padding.
    """

    ids: np.ndarray
    mask: np.ndarray


class Encode(Protocol):
    """A text to integers, without padding."""

    def __call__(self, text: str, length: int) -> tuple[list[int], str]:
        """At most `length` ids, special tokens among them, and the end of the text left out."""
        ...


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Prompts to integers.

    Made by `from_folder`. Too long prompts are cut at their end, and their user is told what was
    lost. Special tokens that a prompt spells out ("<|endoftext|>" for CLIP) are the special
    tokens, which moves CLIP's pooled position; see `from_folder` for how to forbid it.

    Attributes:
      kind: "clip", "bert", "t5" or "glide".
      length: L, number of tokens that every prompt is padded or cut to.
      vocab_size: ids lie in [0, vocab_size).
      pad: id of the padding.
      encode: a text to ids without padding.
      files: the folder's files by name.
    """

    kind: str
    length: int
    vocab_size: int
    pad: int
    encode: Encode = field(repr=False)
    files: Mapping[str, bytes] = field(repr=False)

    def __post_init__(self):
        least = max(1, len(self.encode("", _NO_LENGTH)[0]))
        if self.length < least:
            raise ValueError(f"length must be at least {least}, got {self.length}")

    def __call__(
        self, prompts: Any, *, padding: str = "length", on_long_prompt: str = "warn"
    ) -> Tokens:
        """The ids of a prompt [L] or of a list of prompts [B, L].

        Args:
          prompts: a string, or a list, tuple or array of B strings; "" is a prompt.
          padding: "length" pads to `length`, so that all calls have one shape; "longest" to the
            longest of these prompts.
          on_long_prompt: "warn" or "error", about prompts that do not fit.

        Raises:
          ValueError: if there is no prompt, one is no text, or one is too long and that is an
            error.
        """
        for name, value, known in (
            ("padding", padding, PADDINGS),
            ("on_long_prompt", on_long_prompt, ON_LONG_PROMPT),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        texts = check_prompts(prompts)
        encoded = [self.encode(text, self.length) for text in texts]
        lost = {index: left for index, (_, left) in enumerate(encoded) if left}
        if lost:
            message = _too_long(lost, len(texts), self.length)
            if on_long_prompt == "error":
                raise ValueError(f"{message}; shorten it or pass on_long_prompt='warn'")
            warnings.warn(message, stacklevel=2)
        counts = np.asarray([len(ids) for ids, _ in encoded])
        width = self.length if padding == "length" else int(counts.max())
        ids = np.full((len(texts), width), self.pad, np.int32)
        for row, (numbers, _) in zip(ids, encoded, strict=True):
            row[: len(numbers)] = numbers
        mask = np.arange(width) < counts[:, None]
        return Tokens(ids[0], mask[0]) if isinstance(prompts, str) else Tokens(ids, mask)

    def save(self, folder: str | Path) -> None:
        """Writes the files that were read, with `length` as the configuration's limit.

        Raises:
          OSError: if the folder cannot be written.
        """
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            if name == CONFIG:
                config = {**json.loads(content), "model_max_length": self.length}
                content = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
            (folder / name).write_bytes(content)


def check_prompts(prompts: Any) -> tuple[str, ...]:
    """One string or several as a tuple.

    Args:
      prompts: a string, or a list, tuple or array [B] of strings; "" is a prompt.

    Raises:
      ValueError: naming index and type, if there is no prompt, or one is no string or has half
        of a surrogate pair in it.
    """
    if isinstance(prompts, str):
        return (_checked(prompts, "the prompt"),)
    if isinstance(prompts, np.ndarray) and prompts.ndim == 1:
        prompts = prompts.tolist()
    if not isinstance(prompts, list | tuple):
        raise ValueError(
            f"expected a prompt or a list of prompts, got {type(prompts).__name__}: "
            f"{_shortened(repr(prompts))}{_hint(prompts)}"
        )
    if not prompts:
        raise ValueError("expected at least one prompt, got an empty list; '' is a legal prompt")
    return tuple(_checked(text, f"prompt {index}") for index, text in enumerate(prompts))


def _checked(text: Any, name: str) -> str:
    if not isinstance(text, str):
        raise ValueError(
            f"{name} is no string but {type(text).__name__}: {_shortened(repr(text))}{_hint(text)}"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} (str) has half of a surrogate pair, {text[error.start]!r}, at character "
            f"{error.start}, and is no text; decode its bytes with errors='strict' or 'replace'"
        ) from error
    return text


def _hint(value: Any) -> str:
    if isinstance(value, bytes):
        return "; decode it, e.g. .decode('utf-8')"
    return "; '' is the prompt that says nothing" if value is None else ""


def _shortened(text: str) -> str:
    if len(text) <= _SHOWN:
        return text
    return f"{text[:_SHOWN]}… ({len(text) - _SHOWN} more characters)"


def _too_long(lost: Mapping[int, str], count: int, length: int) -> str:
    which = f"{len(lost)} of {count} prompts" if count > 1 else "the prompt"
    verb = "have" if len(lost) > 1 else "has"
    parts = "; ".join(
        f"prompt {index} lost {_shortened(repr(text))}" for index, text in lost.items()
    )
    return f"{which} {verb} more than {length} tokens and the end was cut off: {parts}"


def from_folder(
    folder: str | Path,
    *,
    subfolder: str | None = None,
    length: int | None = None,
    backend: str = "transformers",
    special_as_text: bool = False,
) -> Tokenizer:
    """The tokenizer of a released model.

    CLIP, BERT and T5 are read by transformers, whose options in tokenizer_config.json hold: white
    space, case and accents are normalised as the model's class does it, and pads with what
    the files say ("<|endoftext|>" for SD 1, "!" for SD 2). Texts are not repaired with ftfy and
    HTML entities are not resolved. GLIDE's has no configuration: lower case, white space kept,
    padded with the last id, and no start or end token, so that "" is padding only.

    Args:
      folder: of a tokenizer, or of a pipeline that has one in tokenizer/. Files of the classes
        CLIPTokenizer and T5Tokenizer (also where their name ends with Fast), BertTokenizer, or
        GLIDE's encoder.json and vocab.bpe, also as .gz.
      subfolder: such as "tokenizer_2" for the second one of SDXL.
      length: L; model_max_length of tokenizer_config.json where None. 77 for CLIP, for latent
        diffusion's BERT and DeepFloyd IF's T5, 128 for GLIDE.
      backend: "sentencepiece" reads T5's spiece.model with the library that made it instead. It
        differs from transformers on white space that the model's own normaliser leaves alone
        (tabs, line ends, runs), and where a prompt spells out a special token.
      special_as_text: read special tokens that a prompt spells out like any other text. GLIDE's
        encoding and sentencepiece always do.

    Raises:
      ValueError: if the folder has no such files, they cannot be read, no length is known, or the
        backend does not fit.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    path, files = _read_files(Path(folder).expanduser(), subfolder)
    config = _config(files, path)
    kind = _kind(files, config, path)
    if backend == "sentencepiece":
        if kind != "t5":
            raise ValueError(f"the backend 'sentencepiece' reads T5's files, {path} has {kind}'s")
        made = _sentencepiece(files, path)
    elif kind == "glide":
        made = _glide(files, path)
    else:
        made = _transformers(kind, path, special_as_text)
    length = _length(config, path) if length is None else length
    return Tokenizer(kind, length, made.vocab_size, made.pad, made.encode, files)


class _Made(NamedTuple):
    encode: Encode
    vocab_size: int
    pad: int


class _Kind(NamedTuple):
    """What a kind is called in configurations, and the files that make one, any set of these."""

    classes: tuple[str, ...]
    files: tuple[tuple[str, ...], ...]


_BYTE_PAIR_FILES = tuple(
    (first, second)
    for first in ("encoder.json", "encoder.json.gz")
    for second in ("vocab.bpe", "vocab.bpe.gz")
)
KINDS: dict[str, _Kind] = {
    "clip": _Kind(
        ("CLIPTokenizer", "CLIPTokenizerFast"), (("vocab.json", "merges.txt"), ("tokenizer.json",))
    ),
    "bert": _Kind(("BertTokenizer", "BertTokenizerFast"), (("vocab.txt",), ("tokenizer.json",))),
    "t5": _Kind(("T5Tokenizer", "T5TokenizerFast"), (("spiece.model",), ("tokenizer.json",))),
    "glide": _Kind((), _BYTE_PAIR_FILES),
}


def _read_files(folder: Path, subfolder: str | None) -> tuple[Path, dict[str, bytes]]:
    """The folder that has the files, and these by name."""
    tried = [folder / subfolder] if subfolder is not None else [folder, folder / "tokenizer"]
    for path in tried:
        files = {name: _bytes(path / name) for name in FILES if (path / name).is_file()}
        if files:
            return path, files
    raise ValueError(
        f"no tokenizer in {' or '.join(map(str, tried))}; looked for {', '.join(FILES)}"
    )


def _bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return _bounded(file.read, path)


def _bounded(read: Callable[[int], bytes], path: Path) -> bytes:
    content = read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"{path}: more than {_MAX_BYTES} bytes, too many for a tokenizer")
    return content


def _config(files: Mapping[str, bytes], path: Path) -> dict[str, Any]:
    if CONFIG not in files:
        return {}
    try:
        config = json.loads(files[CONFIG])
    except ValueError as error:
        raise ValueError(f"{path / CONFIG}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path / CONFIG}: expected an object, got {type(config).__name__}")
    if "auto_map" in config:
        raise ValueError(f"{path / CONFIG}: auto_map names code of its own, which is not run")
    for side in ("padding_side", "truncation_side"):
        if config.get(side, "right") != "right":
            raise ValueError(
                f"{path / CONFIG}: {side} = {config[side]!r} is unsupported, 'right' is"
            )
    return config


def _kind(files: Mapping[str, bytes], config: Mapping[str, Any], path: Path) -> str:
    name = config.get("tokenizer_class")
    if name is None:
        kinds = [kind for kind in KINDS if any(set(s) <= set(files) for s in _own(kind))]
    else:
        kinds = [kind for kind, row in KINDS.items() if name in row.classes]
    if not kinds and name is not None:
        known = sorted(name for row in KINDS.values() for name in row.classes)
        raise ValueError(f"{path / CONFIG}: tokenizer_class {name!r} is unsupported; {known} are")
    if len(kinds) != 1:
        raise ValueError(
            f"{path}: {sorted(files)} could be of {len(kinds)} kinds of tokenizer; name its "
            f"tokenizer_class in {CONFIG}"
        )
    (kind,) = kinds
    if not any(set(names) <= set(files) for names in KINDS[kind].files):
        wanted = " or ".join(" with ".join(names) for names in KINDS[kind].files)
        raise ValueError(f"{path}: a {kind} tokenizer needs {wanted}, found {sorted(files)}")
    return kind


def _own(kind: str) -> list[tuple[str, ...]]:
    """Sets of files that only this kind has; tokenizer.json is everybody's."""
    return [names for names in KINDS[kind].files if names != ("tokenizer.json",)]


def _length(config: Mapping[str, Any], path: Path) -> int:
    length = config.get("model_max_length", _NO_LENGTH)
    if isinstance(length, bool) or not isinstance(length, int) or length >= _NO_LENGTH:
        raise ValueError(
            f"{path}: no model_max_length in {CONFIG}; give length=, 77 for CLIP, latent "
            "diffusion's BERT and DeepFloyd IF's T5, 128 for GLIDE"
        )
    return length


def _glide(files: Mapping[str, bytes], path: Path) -> _Made:
    def text(name: str) -> str:
        packed = name + ".gz"
        try:
            if name in files:
                return files[name].decode()
            with gzip.open(path / packed) as file:
                return _bounded(file.read, path / packed).decode()
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot read {name} ({error})") from error

    vocabulary = read_vocabulary(text("encoder.json"), str(path / "encoder.json"))
    pairs = BytePairs(vocabulary, read_merges(text("vocab.bpe"), str(path / "vocab.bpe")))

    def encode(text: str, length: int) -> tuple[list[int], str]:
        ids = pairs.encode(text)
        return ids[:length], pairs.decode(ids[length:])

    return _Made(encode, len(pairs), pairs.end)


def _sentencepiece(files: Mapping[str, bytes], path: Path) -> _Made:
    from sentencepiece import SentencePieceProcessor

    if "spiece.model" not in files:
        raise ValueError(f"{path}: the backend 'sentencepiece' needs spiece.model")
    try:
        model = SentencePieceProcessor(model_proto=files["spiece.model"])
    except RuntimeError as error:
        raise ValueError(f"{path / 'spiece.model'}: no sentencepiece model ({error})") from error
    if model.eos_id() < 0 or model.pad_id() < 0:
        raise ValueError(f"{path / 'spiece.model'}: no end token or no padding, not T5's")

    def encode(text: str, length: int) -> tuple[list[int], str]:
        ids = model.encode(text, out_type=int)
        return [*ids[: length - 1], model.eos_id()], model.decode(ids[length - 1 :])

    return _Made(encode, len(model), model.pad_id())


def _silenced(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()


def _tokenizer_class(kind: str) -> Any:
    # The advice to install PyTorch is for those who want transformers' models.
    logger = logging.getLogger("transformers")
    logger.addFilter(_silenced)
    try:
        from transformers import BertTokenizer, CLIPTokenizer, T5Tokenizer
    finally:
        logger.removeFilter(_silenced)
    return {"clip": CLIPTokenizer, "bert": BertTokenizer, "t5": T5Tokenizer}[kind]


def _transformers(kind: str, path: Path, special_as_text: bool) -> _Made:
    try:
        theirs = _tokenizer_class(kind).from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # The tokenizers library raises the bare class.
        raise ValueError(f"{path}: cannot read this {kind} tokenizer ({error})") from error
    if theirs.pad_token_id is None:
        raise ValueError(f"{path}: the {kind} tokenizer has no padding token")

    def encode(text: str, length: int) -> tuple[list[int], str]:
        found = theirs(
            text, truncation=True, max_length=length, split_special_tokens=special_as_text
        )
        overflow = found.encodings[0].overflowing
        return list(found["input_ids"]), _left_out(text, overflow[0]) if overflow else ""

    return _Made(encode, len(theirs), theirs.pad_token_id)


def _left_out(text: str, encoding: Any) -> str:
    """The text from the first token of the part that did not fit."""
    for (start, _), added in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
        if not added:
            return text[start:]
    return ""
