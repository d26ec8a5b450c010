"""Captions as integers, so that they can be in batches."""

import warnings
from typing import Any

import numpy as np

from diffusion_jax.data.sources import Source
from diffusion_jax.data.tokenizers import Tokenizer, check_prompts

ON_LONG_CAPTION = ("warn", "error")


class Tokenized:
    """Another source's examples with the tokens of their captions.

    Captions are never dropped here: classifier-free guidance's dropout is the conditioner's,
    which knows what stands for no caption. A second tokenizer goes around the first, which then
    keeps the captions and has other names.

    Args:
      source: examples with a string "caption".
      tokenizer: what encodes it.
      tokens: name of the ids, [L] int32.
      mask: name of the mask [L] bool, True where a token is not padding; None for no mask.
      drop_caption: leave the string out.
      on_long_caption: "warn" once about captions of more than L tokens, which lose their ends, or
        "error".

    Raises:
      ValueError: if the examples have no caption, or have something of these names already; when
        an example is read, if its caption is no text, or too long where that is an error.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        *,
        tokens: str = "tokens",
        mask: str | None = None,
        drop_caption: bool = True,
        on_long_caption: str = "warn",
    ):
        if on_long_caption not in ON_LONG_CAPTION:
            raise ValueError(
                f"on_long_caption must be one of {ON_LONG_CAPTION}, got {on_long_caption!r}"
            )
        self._source, self._tokenizer = source, tokenizer
        self._tokens, self._mask, self._drop = tokens, mask, drop_caption
        self._on_long, self._warned = on_long_caption, False
        self.flippable = getattr(source, "flippable", True)
        present = set(source[0])
        if "caption" not in present:
            raise ValueError(f"{source!r} has no 'caption', but {sorted(present)}")
        if taken := present & {tokens, mask} or {tokens} & {mask, "caption"}:
            raise ValueError(f"{sorted(taken)} would stand for two things; choose other names")

    def __len__(self) -> int:
        return len(self._source)

    def __repr__(self) -> str:
        return f"Tokenized({self._source!r}, {self._tokenizer.kind}, {self._tokenizer.length})"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """What the source gives, tokens [L] int32, and a mask [L] bool if asked for."""
        example = dict(self._source[index])
        caption = self._caption(index, example["caption"])
        length = self._tokenizer.length
        ids, lost = self._tokenizer.encode(caption, length)
        if lost:
            self._too_long(index, caption)
        example[self._tokens] = np.full(length, self._tokenizer.pad, np.int32)
        example[self._tokens][: len(ids)] = ids
        if self._mask is not None:
            example[self._mask] = np.arange(length) < len(ids)
        if self._drop:
            del example["caption"]
        return example

    def _caption(self, index: int, caption: Any) -> str:
        # In a list, because a caption that is a list itself is no text.
        try:
            return check_prompts([caption])[0]
        except ValueError as error:
            raise ValueError(
                f"the caption of example {index} of {self._source!r}: {error}"
            ) from error

    def _too_long(self, index: int, caption: str) -> None:
        message = f"caption {index} has more than {self._tokenizer.length} tokens: {caption!r:.500}"
        if self._on_long == "error":
            raise ValueError(f"{message}; shorten it or choose on_long_caption='warn'")
        # A set of long captions would print nothing else.
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{message}; the ends of such captions are lost, and this is said once",
                stacklevel=3,
            )
