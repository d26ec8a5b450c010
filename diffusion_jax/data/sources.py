"""Random-access sources around arrays, and what batches are made of."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np


class Source(Protocol):
    """Examples by index, each a dict of arrays (and maybe strings)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class Arrays:
    """Examples that lie in memory, as arrays [N, ...] by name.

    Raises:
      ValueError: if there is no array, or their lengths differ.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = {key: np.asarray(array) for key, array in arrays.items()}
        lengths = {key: len(array) for key, array in self.arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"arrays of one length are needed, got {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __repr__(self) -> str:
        return f"Arrays({list(self.arrays)}, {len(self)} examples)"

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: array[index] for key, array in self.arrays.items()}


def numeric_keys(example: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of an example whose values are numbers or arrays of numbers."""
    return tuple(key for key, value in example.items() if np.asarray(value).dtype.kind in "biuf")


def take(source: Source, count: int, keys: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The first `count` examples as arrays [count, ...], for evaluation.

    Args:
      source: where to take them from.
      count: how many, at least 1.
      keys: which; None for all numeric ones.

    Raises:
      ValueError: if the source has fewer examples, or lacks a key.
    """
    if not 1 <= count <= len(source):
        raise ValueError(f"cannot take {count} of the {len(source)} examples of {source!r}")
    examples = [source[index] for index in range(count)]
    return stack(examples, check_keys(examples[0], keys))


def check_keys(example: Mapping[str, Any], keys: Sequence[str] | None) -> tuple[str, ...]:
    """The keys to use: those given, or all numeric ones.

    Raises:
      ValueError: if a given key is not there or not numeric, or no key is left.
    """
    numeric = numeric_keys(example)
    wrong = [key for key in keys or () if key not in numeric]
    chosen = numeric if keys is None else tuple(keys)
    if wrong or not chosen:
        raise ValueError(
            f"batches can hold the numeric keys {numeric}, got {wrong or 'none at all'}; the "
            f"example has {tuple(example)}"
        )
    return chosen


def stack(examples: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, np.ndarray]:
    """A batch: the values of each key stacked along a new first axis."""
    return {key: np.stack([example[key] for example in examples]) for key in keys}
