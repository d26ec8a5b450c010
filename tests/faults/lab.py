"""Where faults are tried: runs of a small experiment in processes of their own, and their ends."""

import functools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.io.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]
EXPERIMENT = Path(__file__).with_name("experiment.py")
# Updates of every run, and where it saves.
STEPS = 24
SAVES = (8, 16, 24)


@dataclass(frozen=True)
class End:
    """How a process ended: exit code (negative: the signal), what it printed, seconds it took."""

    code: int
    text: str
    seconds: float


class Lab:
    """A folder in which runs are made; the undisturbed run is made once."""

    def __init__(self, folder: Path):
        self.folder = folder

    def start(
        self,
        workdir: Path,
        *options: str,
        fault: Mapping[str, Any] | None = None,
        devices: int = 1,
        within: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen:
        """A training process, `within` being a command that it is run by."""
        command = [sys.executable, "-m", "tests.faults.child", "train", str(EXPERIMENT)]
        variables = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            # Quick compilation to slow code is the better half, once for all runs.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "FAULT": json.dumps(fault or {}),
            **(environment or {}),
        }
        return subprocess.Popen(
            [*within, *command, "--workdir", str(workdir), *options],
            cwd=ROOT,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self, process: subprocess.Popen, seconds: float = 120.0) -> End:
        """Waits for a process; one that hangs is killed, and an error."""
        start = time.monotonic()
        try:
            text, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            process.kill()
            text, _ = process.communicate()
            raise AssertionError(f"hung for {seconds} s:\n{text}") from error
        return End(process.returncode, text, time.monotonic() - start)

    def run(self, workdir: Path, *options: str, expect: int = 0, **rest: Any) -> End:
        """Trains to the end in one process, and checks the exit code."""
        end = self.wait(self.start(workdir, *options, **rest))
        assert end.code == expect, f"exit code {end.code}, expected {expect}:\n{end.text}"
        return end

    def start_two(
        self,
        workdir: Path,
        *options: Sequence[str],
        fault: Mapping[str, Any] | None = None,
        of: Sequence[int] = (1,),
    ) -> list[subprocess.Popen]:
        """Two processes of one job with two devices each; options of each and a fault of some."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        each = options or ((), ())
        common = ("--processes.coordinator", f"127.0.0.1:{port}", "--processes.count", "2")
        heartbeat = ("--processes.heartbeat-seconds", "10")
        return [
            self.start(
                workdir,
                *(*common, *heartbeat, "--processes.index", str(index), *each[index]),
                fault=fault if index in of else None,
                devices=2,
            )
            for index in range(2)
        ]

    def wait_two(self, processes: Sequence[subprocess.Popen]) -> list[End]:
        """Waits for both; what they print comes at their end."""
        return [self.wait(process) for process in processes]

    @functools.cached_property
    def undisturbed(self) -> Path:
        """The run that nothing happened to."""
        workdir = self.folder / "undisturbed"
        self.run(workdir)
        return workdir

    def digest(self, workdir: Path, step: int = STEPS) -> str:
        """Of all arrays of a checkpoint."""
        with Checkpoints(workdir / "checkpoints") as checkpoints:
            return checkpoints.digest(step)

    def steps(self, workdir: Path) -> tuple[int, ...]:
        """Of the complete checkpoints."""
        return Checkpoints(workdir / "checkpoints").steps()

    def check_same(self, workdir: Path) -> None:
        """Whether a run has checkpoint and loss curve of the undisturbed one, bit for bit."""
        assert self.digest(workdir) == self.digest(self.undisturbed), "another checkpoint"
        assert curve(workdir) == curve(self.undisturbed), "another loss curve"

    def check_close(self, workdir: Path, rtol: float = 1e-5) -> None:
        """Whether its loss curve is that of the undisturbed run, to rounding."""
        np.testing.assert_allclose(
            [row["loss"] for row in curve(workdir)],
            [row["loss"] for row in curve(self.undisturbed)],
            rtol=rtol,
        )


def rows(workdir: Path) -> list[dict[str, Any]]:
    """The rows of the log."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def curve(workdir: Path) -> list[dict[str, float]]:
    """Step, loss and gradient norm of every update."""
    names = ("step", "loss", "grad_norm")
    found = [{name: row[name] for name in names} for row in rows(workdir) if "loss" in row]
    assert [row["step"] for row in found] == list(range(1, STEPS + 1)), "a step is missing or twice"
    return found
