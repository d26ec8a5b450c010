"""What a benchmark shows: rows averaged over seeds, and tables sorted by error."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from diffusion_jax.commands.bench_csv import Rows

# 97.5 % quantiles of Student's t with 1, 2, … degrees of freedom; from 10 on the normal's is near.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


class Score(NamedTuple):
    """A score over seeds.

    Attributes:
      mean: over the seeds; inf if one diverged.
      half_width: of the 95 % confidence interval of the mean; nan for one seed.
    """

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Score":
        """The score of one value a seed."""
        values = np.asarray(values, np.float64)
        if not np.isfinite(values).all():
            return cls(math.inf, math.nan)
        if len(values) < 2:
            return cls(float(values[0]), math.nan)
        quantile = _T[len(values) - 2] if len(values) - 2 < len(_T) else 1.96
        return cls(
            float(values.mean()), float(quantile * values.std(ddof=1) / np.sqrt(len(values)))
        )


class Line(NamedTuple):
    """A cell of the benchmark over its seeds.

    Attributes:
      run, parameterization, weight: of a trained network, empty for the mixture.
      schedule, grid, sampler: names.
      nfe_asked, nfe, num_steps: network calls allowed and made, steps.
      scores: by name; only those that were measured.
    """

    run: str
    parameterization: str
    weight: str
    schedule: str
    grid: str
    sampler: str
    nfe_asked: int
    nfe: int
    num_steps: int
    scores: Mapping[str, Score]


_NAMES = Line._fields[:6]
_NUMBERS = ("nfe_asked", "nfe", "num_steps")


def lines(rows: Rows, scores: Iterable[str]) -> list[Line]:
    """The rows of each cell put together, in the order of the first row of each."""
    cells: dict[tuple, Rows] = {}
    for row in rows:
        cells.setdefault(tuple(row[name] for name in (*_NAMES, *_NUMBERS)), []).append(row)
    found, scores = [], tuple(scores)
    for key, group in cells.items():
        measured = {
            name: Score.of([float(row[name]) for row in group])
            for name in scores
            if all(row[name] for row in group)
        }
        names = dict(zip(_NAMES, key[: len(_NAMES)], strict=True))
        numbers = dict(zip(_NUMBERS, map(int, key[len(_NAMES) :]), strict=True))
        found.append(Line(**names, **numbers, scores=measured))
    return found


def _cell(score: Score | None, width: int = 17) -> str:
    if score is None:
        return " " * width
    if not math.isfinite(score.mean):
        return f"{'diverged':>{width}}"
    error = "" if math.isnan(score.half_width) else f" ± {score.half_width:.1e}"
    return f"{f'{score.mean:.4f}{error}':>{width}}"


def table(found: Sequence[Line], *, by: str, shown: int | None = None) -> str:
    """A table for each number of network calls, sorted by a score.

    Args:
      by: the score; lines without it are left out.
      shown: lines in each table; all of them if None.
    """
    found = [line for line in found if by in line.scores]
    columns = dict.fromkeys([by, *(name for line in found for name in line.scores)])
    named = [name for name in _NAMES if any(getattr(line, name) for line in found)]
    width = {
        name: max([len(name), *(len(getattr(line, name)) for line in found)]) for name in named
    }
    head = "  ".join(f"{name:{width[name]}}" for name in named) + "    N  NFE"
    head += "".join(f"  {name.removesuffix('_error') + ' error' * name.endswith('_error'):>17}"
                    for name in columns)  # fmt: skip
    parts = []
    for nfe in sorted({line.nfe_asked for line in found}):
        here = sorted(
            (line for line in found if line.nfe_asked == nfe), key=lambda line: line.scores[by].mean
        )
        count = len(here) if shown is None else min(shown, len(here))
        parts.append(f"at most {nfe} network calls, the best {count} of {len(here)} by {by}")
        parts.append(head)
        for line in here[:count]:
            text = "  ".join(f"{getattr(line, name):{width[name]}}" for name in named)
            text += f"  {line.num_steps:3}  {line.nfe:3}"
            parts.append(text + "".join(f"  {_cell(line.scores.get(name))}" for name in columns))
        parts.append("")
    return "\n".join(parts)


def floors(rows: Rows, scores: Iterable[str]) -> dict[str, Score]:
    """What two independent true sets score, by score: no sampler can be told from the truth below.

    Of the energy distance it is the size that counts, which is negative as often as positive.
    """
    found = {}
    for name in scores:
        column = f"{name}_floor"
        seeds = {row["seed"]: float(row[column]) for row in rows if row.get(column)}
        if seeds:
            size: Callable = abs if name == "energy_distance" else float
            found[name] = Score.of([size(value) for value in seeds.values()])
    return found
