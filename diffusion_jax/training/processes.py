"""Processes: how those of one job find each other, agree, and stop together.

The only file that uses jax.distributed. With one process every function here works too, and
has nothing to wait for.
"""

import itertools
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# What jax must find in the environment of a launcher; of the others it asks a server or a library.
_VARIABLES = {
    "slurm": (
        "SLURM_JOB_ID",
        "SLURM_STEP_NODELIST",
        "SLURM_NTASKS",
        "SLURM_PROCID",
        "SLURM_LOCALID",
    ),
    "ompi": (
        "OMPI_MCA_orte_hnp_uri",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    "gketpu": ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"),
    "k8s": ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"),
    "gcetpu": (),
    "mpi4py": (),
}
LAUNCHERS = ("auto", "none", *_VARIABLES)

# A launcher tells the processes one after another that the job ends.
_NOTICE_SECONDS = 1.0


@dataclass(frozen=True)
class Processes:
    """How the processes of a job find each other.

    Attributes:
      coordinator: HOST:PORT of process 0, a free port there; with `count` and `index`.
      count: processes of the job.
      index: number of this process, from 0.
      heartbeat_seconds: how long a process may be silent before the others take it for dead
        and end, and how long one that ends waits for the others to end too.
      launcher: "auto" to join the processes that Slurm (srun), Open MPI or Kubernetes on TPU
        started where there are several, and to be alone otherwise; "none" to be alone; the
        name of a launcher, as jax calls it, to insist on it: slurm, ompi, gketpu, gcetpu, k8s,
        mpi4py. Slurm and Open MPI give each process one device of its machine, unless
        JAX_LOCAL_DEVICE_IDS names them.

    Raises:
      ValueError: if coordinator, count and index are not given together or are out of range,
        a launcher is named besides them, or the launcher is unknown.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    heartbeat_seconds: int = 100
    launcher: str = "auto"

    def __post_init__(self):
        given = {name: getattr(self, name) for name in ("coordinator", "count", "index")}
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            raise ValueError(
                f"{' and '.join(missing)} missing: coordinator, count and index belong together"
            )
        if self.heartbeat_seconds < 1:
            raise ValueError(f"heartbeat_seconds must be at least 1, got {self.heartbeat_seconds}")
        if self.launcher not in LAUNCHERS:
            raise ValueError(f"launcher must be one of {list(LAUNCHERS)}, got {self.launcher!r}")
        if self.coordinator is None or self.count is None or self.index is None:
            return
        if self.launcher != "auto":
            raise ValueError(f"give a coordinator or launcher={self.launcher!r}, not both")
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise ValueError(f"coordinator must be HOST:PORT, got {self.coordinator!r}")
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"index must be at least 0 and below count, got index={self.index}, "
                f"count={self.count}"
            )


def _number(variable: str) -> int:
    text = os.environ.get(variable, "1")
    if not text.isdigit():
        raise ValueError(f"{variable} must be a number, but the environment has {text!r}")
    return int(text)


def _several() -> str | None:
    """What in the environment says that a launcher started several processes."""
    # Without SLURM_STEP_NODELIST this is the batch script itself and not one of its tasks.
    if "SLURM_STEP_NODELIST" in os.environ and _number("SLURM_NTASKS") > 1:
        return "SLURM_NTASKS"
    for variable in ("OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES"):
        if _number(variable) > 1:
            return variable
    for variable in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if "," in os.environ.get(variable, ""):
            return variable
    return None


def _check_environment(launcher: str) -> None:
    missing = [name for name in _VARIABLES[launcher] if name not in os.environ]
    if launcher == "gketpu" and "TPU_PROCESS_ADDRESSES" in os.environ:
        missing = [name for name in missing if name != "TPU_WORKER_HOSTNAMES"]
    if missing:
        raise ValueError(
            f"launcher={launcher!r}, but the environment has no {', '.join(missing)}; start the "
            "processes with it, or give coordinator, count and index"
        )


def _check_port(port: int) -> None:
    """A taken port would be a segmentation fault of jax."""
    dual = socket.has_dualstack_ipv6()
    with socket.socket(socket.AF_INET6 if dual else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if dual:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ValueError(
                f"process 0 cannot listen at port {port} of its machine ({error.strerror}); choose "
                "a free one, the same for all processes"
            ) from error


def initialize(config: Processes) -> None:
    """Joins the processes of the job, if there are several; call it before jax sees a device.

    SIGTERM means from then on that the job is about to end, see `reached_preemption`. A process
    that is killed or ends by an error makes jax abort the others (SIGABRT, exit code 134 in a
    shell) after at most about `heartbeat_seconds`, and one that finds no process 0 in 5 minutes
    is aborted too; to start the job again is up to its launcher.

    Raises:
      ValueError: if a launcher was named, or started several processes, whose environment is
        not complete, or if the coordinator's port is taken.
      RuntimeError: if the processes were joined already, or jax has used a device already.
    """
    if jax.distributed.is_initialized():
        raise RuntimeError("the processes of this job are joined already; initialize them once")
    if config.launcher == "none":
        return
    # A process that ends by an error of its own waits for the others, which wait for it.
    patience = {
        "heartbeat_timeout_seconds": config.heartbeat_seconds,
        "shutdown_timeout_seconds": config.heartbeat_seconds,
    }
    if config.coordinator is not None:
        if config.index == 0:
            _check_port(int(config.coordinator.rpartition(":")[2]))
        jax.distributed.initialize(
            config.coordinator,
            config.count,
            config.index,
            cluster_detection_method="deactivate",
            **patience,
        )
        return
    if config.launcher == "auto":
        reason, method = _several(), None
        if reason is None:
            return
        reason = f"{reason}={os.environ[reason]} says that there are several processes"
    else:
        _check_environment(config.launcher)
        reason, method = f"launcher={config.launcher!r}", config.launcher
    try:
        jax.distributed.initialize(cluster_detection_method=method, **patience)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{reason}, but jax cannot learn from the environment how to reach them ({error}); "
            "give coordinator, count and index, or launcher='none' for processes that have "
            "nothing to do with each other"
        ) from error


def is_writer() -> bool:
    """Whether this is process 0, the one that writes what belongs to the whole job."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has come to the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _gather_text(text: str) -> list[str]:
    """The texts of all processes in their order, in every process."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    # Every process must send arrays of one shape.
    padded = np.pad(data, (0, max(sizes) - data.size))
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def check_agreement(what: Mapping[str, Any]) -> None:
    """Checks that every process has the same values; all of them must call it.

    Args:
      what: JSON values by name, such as the configuration and the step to go on from.

    Raises:
      ValueError: in every process, with the names whose values differ, and who has which.
    """
    own = json.dumps({name: json.dumps(value, sort_keys=True) for name, value in what.items()})
    rows = [json.loads(text) for text in _gather_text(own)]
    differences = []
    for name in sorted(set().union(*rows)):
        owners: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            owners.setdefault(row.get(name, "nothing"), []).append(index)
        if len(owners) > 1:
            values = [f"{_short(v)} in {_short(str(who))}" for v, who in owners.items()]
            differences.append(f"{name}: {', '.join(values)}")
    if differences:
        raise ValueError(
            "the processes of this job disagree; start all of them with the same arguments and "
            "the same files\n  " + "\n  ".join(differences)
        )


def check_shared(directory: Path) -> None:
    """Checks that every process sees the same local directory; process 0 creates it.

    Raises:
      ValueError: in every process, with the numbers of those that do not see it.
    """
    if jax.process_count() == 1:
        return
    file = directory / f".seen-{_gather_text(secrets.token_hex(8))[0]}"

    def leave() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        file.touch()

    agree_from_writer(leave)
    answers = _gather_text("" if file.exists() else "no")
    if is_writer():
        file.unlink()
    blind = [index for index, answer in enumerate(answers) if answer]
    if blind:
        raise ValueError(
            f"the processes {blind} do not see what process 0 writes into {directory}; the working "
            "directory must be on a file system that all of them share"
        )


def agree_from_writer(function: Callable[[], object]) -> None:
    """Runs a function in process 0; if it raises, every process does.

    Raises:
      ValueError: in the other processes, with the text of what process 0 raised.
    """
    error, text = None, ""
    if is_writer():
        try:
            function()
        # The others wait for an answer, whatever it was that happened.
        except BaseException as caught:
            error, text = caught, f"{type(caught).__name__}: {caught}"
    answer = _gather_text(text)[0]
    if error is not None:
        raise error
    if answer:
        raise ValueError(f"process 0 failed: {answer}")


# jax agrees on the number behind the largest one that any process has asked with, so that
# numbers must follow each other without a gap, also from one training to the next.
_questions = itertools.count(1)


def reached_preemption() -> bool:
    """Whether the job is about to end and this is the step to save, the same in every process.

    Every process asks before training and after every step. A SIGTERM to any of them is the
    notice; it becomes True one question after the furthest process. From then on SIGTERM kills,
    so that a save that hangs can be ended; this call waits a second before, for notices that come
    late.

    Returns:
      False if there is no notice, and always if the processes were not joined.
    """
    if not jax.distributed.is_initialized():
        return False
    if not multihost_utils.reached_preemption_sync_point(next(_questions)):
        return False
    time.sleep(_NOTICE_SECONDS)
    # Python sets handlers in the main thread only.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return True
