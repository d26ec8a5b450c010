"""Rows of measurements in a Markdown file, one table a section."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.io.files import write_text


def mean_and_error(values: Sequence[float]) -> str:
    """ "mean ± standard error" of one value a seed."""
    if len(values) < 2:
        return f"{values[0]:.4g}"
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.4g} ± {error:.2g}"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def append_row(path: Path, section: str, row: Mapping[str, Any]) -> None:
    """Appends a row to the table of a section, which is made if it is missing.

    A column that the table does not have yet is added to it, empty in earlier rows. A row that
    is there already is not repeated.

    Args:
      path: Markdown file; written as a whole or not at all.
      section: title of a heading of the second level.
      row: cells by column.
    """
    text = path.read_text() if path.exists() else "# Results\n"
    heading = f"## {section}"
    values = {key: f"{v:.4g}" if isinstance(v, float) else str(v) for key, v in row.items()}
    lines = text.rstrip("\n").split("\n")
    if heading not in lines:
        lines += ["", heading, "", _line(list(values)), _line(["---"] * len(values))]
        lines.append(_line(list(values.values())))
    else:
        first = next(i for i in range(lines.index(heading), len(lines)) if lines[i][:1] == "|")
        last = first
        while last + 1 < len(lines) and lines[last + 1][:1] == "|":
            last += 1
        columns = _cells(lines[first])
        added = [name for name in values if name not in columns]
        table = [_cells(line) for line in lines[first : last + 1]]
        table = [
            cells + (added if i == 0 else ["---" if i == 1 else ""] * len(added))
            for i, cells in enumerate(table)
        ]
        new = [values.get(name, "") for name in columns + added]
        if new not in table:
            table.append(new)
        lines[first : last + 1] = [_line(cells) for cells in table]
    write_text(path, "\n".join(lines) + "\n")
