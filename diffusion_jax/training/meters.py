"""Meters: what a log row says of the updates since the last one."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from diffusion_jax.core.types import Metrics

# Steps that may be under way while the host prepares the next batch; more would hold
# batches in device memory and make the progress bar run ahead of the device.
_LOOKAHEAD = 2

# Numbers by name; those of a `Ratio` as [total, count].
Row = dict[str, Any]


def _row(metrics: Metrics) -> Row:
    return {
        name: [float(part) for part in value] if isinstance(value, tuple) else float(value)
        for name, value in metrics.items()
    }


def _mean(values: list[Any]) -> float | None:
    """The mean; of ratios that of the totals over that of the counts, None if nothing counts."""
    if not isinstance(values[0], list):
        return float(np.mean(values))
    total, count = np.mean(values, axis=0)
    return float(total / count) if count else None


@dataclass
class Window:
    """Metrics since the last log row; they stay on the device until they are needed.

    Attributes:
      rows: step and numbers of the updates that were fetched.
    """

    rows: list[tuple[int, Row]] = field(default_factory=list)
    _pending: list[tuple[int, Metrics]] = field(default_factory=list)

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of one update, and waits if too many are under way."""
        self._pending.append((step, metrics))
        if len(self._pending) > _LOOKAHEAD:
            jax.block_until_ready(self._pending[-1 - _LOOKAHEAD])

    def fetch(self) -> list[tuple[int, Row]]:
        """Moves what is on the device to the host; the rows that came."""
        found = [(int(step), _row(metrics)) for step, metrics in jax.device_get(self._pending)]
        self._pending.clear()
        self.rows += found
        return found

    def means(self) -> dict[str, float]:
        """Means over the updates since the last call; skipped updates are counted instead."""
        done = [row for _, row in self.rows if not row.get("skipped")]
        skipped = len(self.rows) - len(done)
        guarded = any("skipped" in row for _, row in self.rows)
        self.rows.clear()
        names = [name for name in (done[0] if done else {}) if not name.startswith("skipped")]
        found = {name: _mean([row[name] for row in done]) for name in names}
        means = {name: value for name, value in found.items() if value is not None}
        return {**means, "skipped": float(skipped)} if guarded else means


@dataclass
class Clock:
    """Time of the updates; compilation, evaluation and checkpoints do not count.

    Attributes:
      images: examples of an update, over all processes.
    """

    images: int
    _steps: int = 0
    _seconds: float = 0.0
    _waited: float = 0.0
    _since: float | None = None

    def run(self) -> None:
        """Goes on counting."""
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Stops counting."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
        self._since = None

    def restart(self) -> None:
        """Forgets what was counted, and counts."""
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        self.run()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the host's wait for a batch."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def step(self) -> None:
        """Counts an update."""
        self._steps += 1

    def take(self) -> dict[str, float]:
        """Seconds a step, images a second, and the share of the time that data took; restarts."""
        self.pause()
        steps, seconds, waited = self._steps, self._seconds, self._waited
        self.restart()
        if not steps:
            return {}
        return {
            "step_seconds": seconds / steps,
            "images_per_second": steps * self.images / seconds,
            "data_wait": min(waited / seconds, 1.0),
        }
