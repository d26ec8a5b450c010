"""A tidy CSV file that grows row by row and is gone on with after an interruption."""

import csv
import io
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import diffusion_jax
from diffusion_jax.io.files import write_text

Rows = list[dict[str, str]]

# Columns of the CSV that say what was measured, and columns that were measured.
SETTINGS = (
    "data", "run", "parameterization", "weight", "schedule", "schedule_options", "grid", "sampler",
    "sampler_options", "nfe_asked", "num_samples", "energy_points", "flow_points", "flow_steps",
    "seed",
)  # fmt: skip
SCORES = (
    "rms_error", "sliced_wasserstein", "energy_distance", "mode_error", "frechet_train",
    "frechet_test",
)  # fmt: skip
FLOORS = tuple(f"{score}_floor" for score in SCORES if score != "rms_error")
COLUMNS = (*SETTINGS, "num_steps", "nfe", *SCORES, *FLOORS, "versions")


def versions() -> str:
    """The libraries that the numbers depend on."""
    names = ("jax", "flax", "numpy")
    found = [f"diffusion_jax {diffusion_jax.__version__}"]
    return ", ".join([*found, *(f"{name} {metadata.version(name)}" for name in names)])


def _text(value: Any) -> str:
    # repr of a float is the shortest text that reads back as the same number.
    return repr(float(value)) if isinstance(value, float) else str(value)


class Table:
    """Rows of text by column, each identified by its settings.

    Args:
      path: of the file, which is made with the first row.
      columns: in this order.
      settings: columns that identify a row.

    Raises:
      ValueError: if the file has other columns.
    """

    def __init__(self, path: Path, columns: Sequence[str], settings: Sequence[str]):
        self.path, self.columns, self._settings = path, tuple(columns), tuple(settings)
        self._rows: dict[tuple[str, ...], dict[str, str]] = {}
        if path.exists():
            self._read()

    def _key(self, row: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(row[name] for name in self._settings)

    def _read(self) -> None:
        lines = self.path.read_text(encoding="utf-8")
        header, *rows = list(csv.reader(io.StringIO(lines))) or [[]]
        if tuple(header) != self.columns:
            raise ValueError(
                f"{self.path} has other columns than this benchmark writes: {header}; name another "
                "file or move that one away"
            )
        # A process that was killed may have left half a line, the last one.
        if rows and (len(rows[-1]) != len(header) or not lines.endswith("\n")):
            rows = rows[:-1]
        for row in rows:
            values = dict(zip(header, row, strict=True))
            self._rows[self._key(values)] = values
        self.rewrite([])

    def has(self, row: Mapping[str, str]) -> bool:
        """Whether a row with these settings is there."""
        return self._key(row) in self._rows

    def get(self, row: Mapping[str, str]) -> dict[str, str]:
        """The row with these settings."""
        return self._rows[self._key(row)]

    def _line(self, values: Sequence[str]) -> str:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerow(values)
        return buffer.getvalue()

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a row to the file; columns that it does not have stay empty.

        Raises:
          ValueError: if it has a column that the table does not have.
        """
        unknown = sorted(set(row) - set(self.columns))
        if unknown:
            raise ValueError(f"no columns {unknown} in {self.path}; there are {self.columns}")
        values = {name: _text(row[name]) if name in row else "" for name in self.columns}
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write((self._line(self.columns) if new else "") + self._line([*values.values()]))
        self._rows[self._key(values)] = values

    def rewrite(self, order: Sequence[Mapping[str, str]]) -> None:
        """Writes the file anew: these rows first, in this order, then all others."""
        if not self._rows:
            return
        keys = [key for row in order if (key := self._key(row)) in self._rows]
        keys = list(dict.fromkeys([*keys, *self._rows]))
        self._rows = {key: self._rows[key] for key in keys}
        lines = [self._line([*row.values()]) for row in self._rows.values()]
        write_text(self.path, self._line(self.columns) + "".join(lines))
