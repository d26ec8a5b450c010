"""Kills the demo five times at random moments, and compares its end with an undisturbed one's.

python -m tests.faults.demo [--seed N]

Takes three times as long as the demo. Prints when it was killed and which checkpoints were there,
both digests, and whether they are equal.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from diffusion_jax.io.checkpoint import Checkpoints

KILLS = 5


def _start(workdir: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "diffusion_jax.cli", "demo", "--workdir", str(workdir)]
    with workdir.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def _steps(workdir: Path) -> tuple[int, ...]:
    return Checkpoints(workdir / "checkpoints").steps()


def _digest(workdir: Path) -> str:
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return checkpoints.digest()


def main() -> int:
    """0 if the digests are equal."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.demo")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    rng = np.random.default_rng(parser.parse_args().seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "undisturbed", Path(folder) / "killed"
        start = time.monotonic()
        assert _start(whole).wait() == 0, whole.with_suffix(".log").read_text()
        usual = time.monotonic() - start
        print(f"undisturbed: {usual:.0f} s, digest {_digest(whole)}", flush=True)
        for seconds in rng.uniform(0.1 * usual, 0.5 * usual, KILLS):
            process = _start(killed)
            time.sleep(seconds)
            process.kill()
            process.wait()
            print(f"killed after {seconds:.0f} s, complete are {_steps(killed)}", flush=True)
        assert _start(killed).wait() == 0, killed.with_suffix(".log").read_text()
        same = _digest(killed) == _digest(whole)
        print(f"killed: digest {_digest(killed)}, {'the same' if same else 'ANOTHER'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
