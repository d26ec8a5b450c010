"""Tokenizers: prompts to integers with the files of released models, without torch."""

import dataclasses
import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from diffusion_jax.data.byte_pairs import (
    BytePairs,
    openai_clip_vocabulary,
    read_merges,
    read_vocabulary,
)
from diffusion_jax.data.tokenizer_files import (
    CONFIG,
    KINDS,
    NO_LENGTH,
    OPENAI_CLIP,
    Folder,
    kind_of,
    length_of,
    read_config,
    read_folder,
)

PADDINGS = ("length", "longest")
ON_LONG_PROMPT = ("warn", "error")
BACKENDS = ("transformers", "sentencepiece")

_SHOWN = 500


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
        least = max(1, len(self.encode("", NO_LENGTH)[0]))
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

    def with_length(self, length: int) -> "Tokenizer":
        """The same tokenizer with another length L.

        Raises:
          ValueError: if no prompt fits into it.
        """
        return dataclasses.replace(self, length=length)

    def save(self, folder: str | Path) -> None:
        """Writes the files as they were read, and `length` into tokenizer_config.json.

        Raises:
          OSError: if the folder cannot be written.
        """
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        classes = KINDS[self.kind].classes
        config = {"tokenizer_class": classes[0]} if classes else {}
        config = json.loads(self.files[CONFIG]) if CONFIG in self.files else config
        config = json.dumps({**config, "model_max_length": self.length}, indent=2)
        for name, content in {**self.files, CONFIG: f"{config}\n".encode()}.items():
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
    end = f"more than {length} tokens and lost"
    if count == 1:
        return f"the prompt has {end} its end, {_shortened(repr(lost[0]))}"
    ends = "; ".join(f"prompt {i} lost {_shortened(repr(text))}" for i, text in lost.items())
    return f"{len(lost)} of {count} prompts have {end} their ends: {ends}"


def from_folder(
    folder: str | Path,
    *,
    subfolder: str | None = None,
    kind: str | None = None,
    length: int | None = None,
    backend: str = "transformers",
    special_as_text: bool = False,
) -> Tokenizer:
    """The tokenizer of a released model.

    CLIP, BERT and T5 are read by transformers, and its options in tokenizer_config.json hold:
    white space, case and accents are normalised as the class there does it, and the padding is
    what the files say ("<|endoftext|>" in SD 1, "!" in SD 2). Texts are not repaired with ftfy
    and HTML entities are not resolved. Special tokens that a prompt spells out are these tokens:
    "<|endoftext|>" moves CLIP's pooled position, "!" becomes SD 2's padding.

    GLIDE's text is lowered in case, its white space is kept, it has no start or end token, and
    the padding is the last id, so that "" is padding only.

    Args:
      folder: of a tokenizer, or of a pipeline that has one in tokenizer/. Files of the classes
        CLIPTokenizer, BertTokenizer and T5Tokenizer, of OpenAI's CLIP (bpe_simple_vocab_16e6.txt,
        padded with 0) or GLIDE (encoder.json with vocab.bpe); the last two also as .gz.
      subfolder: such as "tokenizer_2" for the second one of SDXL.
      kind: "clip", "bert", "t5" or "glide" where the files would make more than one.
      length: L; model_max_length of tokenizer_config.json where None. 77 for CLIP, for latent
        diffusion's BERT and DeepFloyd IF's T5, 128 for GLIDE.
      backend: "sentencepiece" reads T5's spiece.model with the library that made it instead. It
        differs from transformers where the model's own normaliser leaves white space alone (tabs
        and line ends in models without one), and never recognises special tokens.
      special_as_text: read special tokens that a prompt spells out like any other text, as
        GLIDE's encoding and sentencepiece always do.

    Raises:
      ValueError: if the folder has no such files, they cannot be read, no length is known, or the
        backend does not fit.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    found = read_folder(folder, subfolder)
    config = read_config(found)
    kind = kind_of(found, config, kind)
    if backend == "sentencepiece":
        if kind != "t5":
            raise ValueError(
                f"backend 'sentencepiece' is for T5's files, {found.path} has {kind}'s"
            )
        made = _sentencepiece(found)
    elif kind == "glide":
        made = _glide(found)
    else:
        made = _transformers(kind, found, special_as_text)
    length = length_of(found, config) if length is None else length
    return Tokenizer(kind, length, made.vocab_size, made.pad, made.encode, found.files)


class _Made(NamedTuple):
    encode: Encode
    vocab_size: int
    pad: int


def _glide(folder: Folder) -> _Made:
    names = "encoder.json", "vocab.bpe"
    vocabulary = read_vocabulary(folder.text(names[0]), str(folder.path / names[0]))
    pairs = BytePairs(vocabulary, read_merges(folder.text(names[1]), str(folder.path / names[1])))

    def encode(text: str, length: int) -> tuple[list[int], str]:
        ids = pairs.encode(text)
        return ids[:length], pairs.decode(ids[length:])

    return _Made(encode, len(pairs), pairs.end)


def _sentencepiece(folder: Folder) -> _Made:
    from sentencepiece import SentencePieceProcessor

    path = folder.path / "spiece.model"
    if path.name not in folder.files:
        raise ValueError(f"{folder.path}: the backend 'sentencepiece' needs {path.name}")
    try:
        model = SentencePieceProcessor(model_proto=folder.files[path.name])
    except RuntimeError as error:
        raise ValueError(f"{path}: no sentencepiece model ({error})") from error
    if model.eos_id() < 0 or model.pad_id() < 0:
        raise ValueError(f"{path}: has no end token or no padding, which T5's has")

    def encode(text: str, length: int) -> tuple[list[int], str]:
        ids = model.encode(text, out_type=int)
        return [*ids[: length - 1], model.eos_id()], model.decode(ids[length - 1 :])

    return _Made(encode, len(model), model.pad_id())


def _without_advice(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()


def _classes() -> dict[str, Any]:
    # The advice to install PyTorch is for those who want transformers' models.
    logger = logging.getLogger("transformers")
    logger.addFilter(_without_advice)
    try:
        from transformers import BertTokenizer, CLIPTokenizer, T5Tokenizer
    finally:
        logger.removeFilter(_without_advice)
    return {"clip": CLIPTokenizer, "bert": BertTokenizer, "t5": T5Tokenizer}


def _transformers(kind: str, folder: Folder, special_as_text: bool) -> _Made:
    make, pad = _classes()[kind], None
    try:
        if kind == "clip" and not folder.has("vocab.json") and folder.has(OPENAI_CLIP):
            merges = read_merges(folder.text(OPENAI_CLIP), str(folder.path / OPENAI_CLIP))
            vocabulary, merges = openai_clip_vocabulary(merges)
            theirs, pad = make(vocab=vocabulary, merges=merges), 0
        else:
            theirs = make.from_pretrained(str(folder.path), local_files_only=True)
    except Exception as error:  # The tokenizers library raises the bare class.
        raise ValueError(f"{folder.path}: cannot read this {kind} tokenizer: {error}") from error
    pad = theirs.pad_token_id if pad is None else pad
    if pad is None:
        raise ValueError(f"{folder.path}: this {kind} tokenizer has no padding token")

    def encode(text: str, length: int) -> tuple[list[int], str]:
        found = theirs(
            text, truncation=True, max_length=length, split_special_tokens=special_as_text
        )
        overflow = found.encodings[0].overflowing
        return list(found["input_ids"]), _left_out(text, overflow[0]) if overflow else ""

    return _Made(encode, len(theirs), pad)


def _left_out(text: str, encoding: Any) -> str:
    """The text from the first token of the part that did not fit."""
    for (start, _), added in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
        if not added:
            return text[start:]
    return ""
