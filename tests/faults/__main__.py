"""Tries what can happen to a run and prints a row for each fault.

python -m tests.faults [--only GLOB ...] [--table]

The last line is `N passed, M failed`. --table prints the table of docs/faults.md instead.
"""

import argparse
import fnmatch
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults.cases import FAULTS, Fault
from tests.faults.lab import Lab


def table() -> str:
    """The table of docs/faults.md."""
    rows = ["| fault | tried how | what the user sees | lost |", "| --- | --- | --- | --- |"]
    rows += [f"| {one.name} | {one.tried} | {one.sees} | {one.lost} |" for one in FAULTS]
    return "\n".join(rows)


def attempt(one: Fault, lab: Lab) -> bool:
    """Tries a fault, prints what came of it, and says whether all held."""
    start = time.monotonic()
    try:
        one.run(lab)
    # Whatever it was, the other faults are tried too.
    except Exception as error:
        print(f"FAILED  {one.name}\n{type(error).__name__}: {error}", flush=True)
        return False
    print(f"passed  {one.name} ({time.monotonic() - start:.1f} s)", flush=True)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--only", nargs="*", default=["*"], help="globs of names")
    parser.add_argument("--table", action="store_true", help="print the table of the docs")
    cores = max(2, os.cpu_count() or 2)
    parser.add_argument("--workers", type=int, default=cores, help="faults tried at once")
    options = parser.parse_args(arguments)
    if options.table:
        print(table())
        return 0
    chosen = [f for f in FAULTS if any(fnmatch.fnmatch(f.name, g) for g in options.only)]
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        print(f"the undisturbed run: {lab.undisturbed.name}", flush=True)
        with ThreadPoolExecutor(options.workers) as pool:
            passed = list(pool.map(lambda one: attempt(one, lab), chosen))
    print(f"{sum(passed)} passed, {len(passed) - sum(passed)} failed")
    return 0 if passed and all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
