"""Bad examples of a source, left out without making a run depend on when they were met."""

import threading
import warnings
from typing import Any

from diffusion_jax.data.decode import BadImageError
from diffusion_jax.data.sources import Source

ON_BAD_EXAMPLE = ("raise", "skip")


class SkipBad:
    """Another source's examples, with the next good one in the place of every bad one.

    Bad is an example for which the source raises `BadImageError`. Example i is the first good one
    of i, i + 1, …, N - 1, 0, …: a function of the data alone, so that a resumed run gets the same
    ones. A good example that follows a bad one is there twice.

    A bad example is warned of once. Threads may share this source; of worker processes each has
    its own copy, which warns and counts for itself.

    Args:
      source: N examples.
      limit: the share of bad examples above which reading raises, in (0, 1); one is always
        allowed, N never are.

    Raises:
      ValueError: if the limit is out of range; when an example is read, if more are bad.
    """

    def __init__(self, source: Source, limit: float = 0.01):
        if not 0.0 < limit < 1.0:
            raise ValueError(f"the limit is a share of the examples in (0, 1), got {limit}")
        self._source = source
        self._allowed = min(max(1, int(limit * len(source))), len(source) - 1)
        self._bad: set[int] = set()
        self._lock = threading.Lock()
        self.flippable = getattr(source, "flippable", True)

    def __len__(self) -> int:
        return len(self._source)

    def __repr__(self) -> str:
        return f"SkipBad({self._source!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    @property
    def num_bad(self) -> int:
        """How many different bad examples were met so far."""
        return len(self._bad)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The source's example, or the next good one."""
        place = index % len(self)
        while True:
            if place not in self._bad:
                try:
                    return self._source[place]
                except BadImageError as error:
                    self._note(place, error)
            # Also where nothing new was found: who goes on after the error is to see it again.
            if self.num_bad > self._allowed:
                raise ValueError(
                    f"{self.num_bad} of the {len(self)} examples of {self._source!r} are bad, more "
                    f"than the {self._allowed} that may be skipped; mend or remove those that were "
                    "warned of, or allow more with data.bad_examples.SkipBad(source, limit=…)"
                )
            place = (place + 1) % len(self)

    def _note(self, place: int, error: BadImageError) -> None:
        with self._lock:
            known = place in self._bad
            self._bad.add(place)
        if not known:
            warnings.warn(f"skipped a bad example: {error}", stacklevel=3)
