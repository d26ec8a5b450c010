"""Byte-pair encoding of GPT-2 and GLIDE: text to integers, nothing normalised but its case."""

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence

import regex

# Contractions, then runs of letters, of digits and of other signs, each with the space before
# it, then what is left of white space; the last space before a word belongs to the word.
_WORDS = regex.compile(r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
# Words whose numbers are remembered: merging is slow, and captions repeat their words.
_REMEMBERED_WORDS = 1 << 14
# The file of OpenAI's CLIP has five times as many.
_CLIP_MERGES = 49152 - 256 - 2


def byte_letters() -> tuple[str, ...]:
    """A visible character for each of the 256 bytes; the vocabulary is spelled in these.

    Bytes that are visible in Latin-1 stand for themselves, the other 68 for the characters from
    U+0100 on, in their order.
    """
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible}
    letters |= {byte: chr(256 + index) for index, byte in enumerate(hidden)}
    return tuple(letters[byte] for byte in range(256))


_LETTERS = byte_letters()
_BYTES = {letter: byte for byte, letter in enumerate(_LETTERS)}


def read_vocabulary(text: str, name: str) -> dict[str, int]:
    """The pieces and their numbers out of an encoder.json.

    Raises:
      ValueError: if it is no object of numbers 0 … N-1; `name` says which file that was.
    """
    try:
        vocabulary = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON ({error})") from error
    if not isinstance(vocabulary, dict) or sorted(
        number if type(number) is int else -1 for number in vocabulary.values()
    ) != list(range(len(vocabulary))):
        raise ValueError(f"{name}: expected an object from pieces to the numbers 0 … N-1")
    return vocabulary


def read_merges(text: str, name: str) -> list[tuple[str, str]]:
    """The pairs to merge, most urgent first, out of a vocab.bpe, whose first line is a header.

    Raises:
      ValueError: if a line does not have two parts; `name` says which file that was.
    """
    merges = []
    for number, line in enumerate(text.split("\n")[1:], start=2):
        parts = line.split()
        if parts and len(parts) != 2:
            raise ValueError(f"{name}, line {number}: expected two pieces, got {line!r}")
        if parts:
            merges.append((parts[0], parts[1]))
    return merges


def openai_clip_vocabulary(
    merges: Sequence[tuple[str, str]],
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Numbers of the pieces of OpenAI's CLIP, which follow from its merges, and the merges it uses.

    Visible bytes, the others, both again as ends of words ("</w>"), what the merges become, and
    the two special tokens: 49408 pieces with the 48894 merges that are used of the released file.

    Source: Radford et al. 2021 (arXiv:2103.00020), released code.
    """
    used = list(merges[:_CLIP_MERGES])
    letters = sorted(_LETTERS)
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    pieces += [first + second for first, second in used]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return {piece: number for number, piece in enumerate(pieces)}, used


class BytePairs:
    """GPT-2's encoding with GLIDE's lower case: UTF-8 bytes, merged pair by pair.

    A word starts as single bytes; of all neighbours the pair that comes first in the list of
    merges becomes one piece wherever it occurs, until no pair is in the list. White space is kept
    as it is, and no special token is recognised: "<|endoftext|>" in a text is thirteen signs.

    Args:
      vocabulary: number of every piece, 0 … N-1.
      merges: pairs of pieces, most urgent first.

    Attributes:
      end: the last number N-1, GLIDE's padding.

    Raises:
      ValueError: if a byte or what a pair becomes is missing in the vocabulary.

    Source: Radford et al. 2019 (GPT-2), section 2.2; Nichol et al. 2021 (arXiv:2112.10741),
    released code.
    """

    def __init__(self, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]):
        missing = [letter for letter in _LETTERS if letter not in vocabulary]
        missing += [first + second for first, second in merges if first + second not in vocabulary]
        if missing:
            raise ValueError(
                f"the vocabulary lacks {len(missing)} pieces, the first is {missing[0]!r}; "
                "its merges belong to another vocabulary"
            )
        self._numbers = dict(vocabulary)
        self._pieces = {number: piece for piece, number in vocabulary.items()}
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._word = functools.lru_cache(maxsize=_REMEMBERED_WORDS)(self._encode_word)
        self.end = len(vocabulary) - 1

    def __len__(self) -> int:
        return len(self._numbers)

    def encode(self, text: str) -> list[int]:
        """The numbers of a text, [] for the empty one."""
        return [number for word in _WORDS.findall(text.lower()) for number in self._word(word)]

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of these numbers, in lower case; parts of characters become U+FFFD."""
        letters = "".join(self._pieces[number] for number in numbers)
        return bytes(_BYTES[letter] for letter in letters).decode(errors="replace")

    def _encode_word(self, word: str) -> tuple[int, ...]:
        parts = [_LETTERS[byte] for byte in word.encode()]
        while len(parts) > 1:
            pair = min(
                zip(parts, parts[1:], strict=False), key=lambda p: self._ranks.get(p, math.inf)
            )
            if pair not in self._ranks:
                break
            parts = _joined(parts, pair)
        return tuple(self._numbers[part] for part in parts)


def _joined(parts: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """The parts with every occurrence of the pair made one, from left to right."""
    joined: list[str] = []
    index = 0
    while index < len(parts):
        found = tuple(parts[index : index + 2]) == pair
        joined.append(pair[0] + pair[1] if found else parts[index])
        index += 2 if found else 1
    return joined
