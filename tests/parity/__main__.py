"""Runs a folder of reference cases and prints a row for each.

python -m tests.parity FOLDER [--only GLOB ...]

FOLDER holds manifest.json and the files it names. A case passes if everything that was
recorded for it is produced and lies within its tolerance |a - b| <= atol + rtol |b|. A case is
not run, which is neither, if it needs what is not installed here: torch, to convert a pickle.
"""

import argparse
import fnmatch
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.parity import (
    autoencoders,
    compvis,
    denoisers,
    diffusion,
    encoders,
    glide,
    gligen,
    ldm,
    ldm_tables,
    originals,
    pipelines,
    priors,
    samplers,
    tokenizers,
)
from tests.parity.layouts import NotRun

# (case, folder) -> outputs by name, or None where the library cannot do what the case asks.
Handler = Callable[[Mapping[str, Any], Path], Mapping[str, np.ndarray] | None]
HANDLERS: tuple[Handler, ...] = (
    pipelines.run,
    samplers.run,
    ldm.run,
    ldm_tables.run,
    denoisers.run,
    originals.run,
    diffusion.run,
    gligen.run,
    glide.run,
    compvis.run,
    priors.run,
    tokenizers.run,
    encoders.run,
    autoencoders.run,
)

PASSED, FAILED, NOT_IMPLEMENTED, NOT_RUN = "passed", "FAILED", "not implemented", "not run"


class Row(NamedTuple):
    """What became of one case, with the error that comes closest to its tolerance."""

    status: str
    error: float = math.nan
    tolerance: float = math.nan
    message: str = ""


def compare(produced: np.ndarray, expected: np.ndarray, atol: float, rtol: float) -> Row:
    """Compares one output; a different shape or a NaN where none is expected fails."""
    produced, expected = np.asarray(produced, np.float64), np.asarray(expected, np.float64)
    if produced.shape != expected.shape:
        return Row(FAILED, message=f"shape {produced.shape}, expected {expected.shape}")
    if expected.size == 0:
        return Row(PASSED, 0.0, atol)
    same = (produced == expected) | (np.isnan(produced) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0.0, np.abs(produced - expected))
    allowed = np.where(np.isfinite(expected), atol + rtol * np.abs(expected), 0.0)
    badness = np.where(same, 0.0, error / np.maximum(allowed, np.finfo(float).tiny))
    # A NaN that was not expected is worse than any number.
    badness = np.where(np.isnan(badness), np.inf, badness)
    worst = np.unravel_index(np.argmax(badness), badness.shape)
    status = PASSED if badness[worst] <= 1.0 else FAILED
    return Row(status, float(error[worst]), float(allowed[worst]))


def run_case(case: Mapping[str, Any], folder: Path, handlers: Sequence[Handler]) -> Row:
    """Runs the first handler that knows the case and compares everything that was recorded."""
    try:
        for handler in handlers:
            outputs = handler(case, folder)
            if outputs is not None:
                break
        else:
            return Row(NOT_IMPLEMENTED)
        with np.load(folder / case["outputs_file"]) as file:
            recorded = dict(file)
        if not recorded:
            return Row(FAILED, message="nothing was recorded")
        missing = sorted(set(recorded) - set(outputs))
        if missing:
            return Row(FAILED, message=f"not produced: {', '.join(missing)}")
        rows = []
        for name, expected in recorded.items():
            spec = case["outputs"].get(name, {})
            row = compare(outputs[name], expected, spec.get("atol", 0.0), spec.get("rtol", 0.0))
            message = f"{name} {row.message}".strip() if row.status == FAILED else ""
            rows.append(row._replace(message=message))
    except NotRun as reason:
        return Row(NOT_RUN, message=str(reason))
    except Exception as error:  # Any error of a handler is a failure of its case alone.
        return Row(FAILED, message=f"{type(error).__name__}: {error}".splitlines()[0])
    failed = [row for row in rows if row.status == FAILED]
    if failed:
        return failed[0]._replace(message="; ".join(row.message for row in failed))
    return max(rows, key=lambda row: row.error / row.tolerance if row.error else 0.0)


def run_folder(
    folder: Path, only: Sequence[str], handlers: Sequence[Handler] = HANDLERS
) -> dict[str, int]:
    """Prints a row per case and the totals; returns the totals by status.

    Raises:
      ValueError: if the folder has no case with a matching id.
    """
    cases = json.loads((folder / "manifest.json").read_text())["cases"]
    chosen = [c for c in cases if any(fnmatch.fnmatchcase(c["id"], glob) for glob in only)]
    if not chosen:
        raise ValueError(f"no case of {folder} matches {list(only)}; it has {len(cases)} cases")
    width = max(len(case["id"]) for case in chosen)
    totals = dict.fromkeys((PASSED, FAILED, NOT_IMPLEMENTED, NOT_RUN), 0)
    for case in chosen:
        row = run_case(case, folder, handlers)
        totals[row.status] += 1
        numbers = f"{row.error:10.2e} {row.tolerance:10.2e}"
        if math.isnan(row.error) and math.isnan(row.tolerance):
            numbers = f"{'-':>10} {'-':>10}"
        print(f"{case['id']:{width}} {numbers} {row.status} {row.message}".rstrip(), flush=True)
    counts = ", ".join(
        f"{count} {status.lower()}"
        for status, count in totals.items()
        if count or status is not NOT_RUN
    )
    print(counts, flush=True)
    return totals


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 1 if a case failed, 2 if there was nothing to run."""
    import jax

    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with manifest.json")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="ids to run")
    args = parser.parse_args(argv)
    # References are float32; accelerators would multiply in fewer bits.
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        totals = run_folder(args.folder, args.only)
    except (OSError, ValueError, KeyError) as error:
        print(f"cannot run {args.folder}: {error}", file=sys.stderr)
        return 2
    return 1 if totals[FAILED] else 0


if __name__ == "__main__":
    sys.exit(main())
