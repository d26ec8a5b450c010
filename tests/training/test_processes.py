"""Several processes: they find each other, compute what one does, agree, and end together.

The jobs are two processes with two CPU devices each, and one process with four.
"""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_jax.training import processes
from diffusion_jax.training.processes import Processes
from tests.training import worker

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120
HEARTBEAT = 10
LAUNCHER_VARIABLES = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JAX_COORDINATOR", "KUBERNETES_")


def _clean_environment():
    return {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}


def _free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@dataclasses.dataclass
class Worker:
    """A process that runs worker.py."""

    process: subprocess.Popen
    report: Path
    log: Path

    @classmethod
    def start(cls, folder, name, config, tasks, *, devices=2, env=None):
        """Starts it; `config` are the arguments of `Processes`."""
        report, log = folder / f"{name}.json", folder / f"{name}.log"
        report.touch()
        command = [sys.executable, "-m", "tests.training.worker"]
        with log.open("w") as output:
            process = subprocess.Popen(
                [*command, json.dumps(config), str(report), *tasks],
                cwd=ROOT,
                stdout=output,
                stderr=output,
                env={
                    **_clean_environment(),
                    "JAX_PLATFORMS": "cpu",
                    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                    **(env or {}),
                },
            )
        return cls(process, report, log)

    def said(self, name):
        """What it reports under a name, once it does."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            ended = self.process.poll() is not None
            for line in self.report.read_text().splitlines():
                if name in (values := json.loads(line)):
                    return values[name]
            assert not ended, f"no {name}, exit code {self.process.poll()}: {self.log.read_text()}"
            time.sleep(0.05)
        raise TimeoutError(f"no {name} in {SECONDS} s: {self.log.read_text()}")

    def wait(self, seconds=SECONDS):
        """Its exit code."""
        return self.process.wait(seconds)


def _pair(folder, name, tasks):
    """Two processes that are told everything."""
    place = {"coordinator": f"127.0.0.1:{_free_port()}", "count": 2}
    return [
        Worker.start(
            folder,
            f"{name}{index}",
            {**place, "index": index, "heartbeat_seconds": HEARTBEAT},
            tasks,
        )
        for index in range(2)
    ]


def _slurm(index, port):
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
        "JAX_COORDINATOR_PORT": str(port),
    }


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """Keeps what it is given, and ends it after the tests of this file."""
    started = []
    yield tmp_path_factory.mktemp("jobs"), started
    for each in started:
        each.process.kill()
        each.process.wait()


@pytest.fixture(scope="module")
def one(running):
    """One process with four devices."""
    folder, started = running
    tasks = ["curves", "memory"]
    started.append(Worker.start(folder, "one", {"launcher": "none"}, tasks, devices=4))
    return started[-1]


@pytest.fixture(scope="module")
def job(running, one):
    """Two processes that find each other by what Slurm would say; started beside `one`."""
    folder, started = running
    port, tasks = _free_port(), ["curves", "agreement", "placement", "files", "preempted"]
    pair = [
        Worker.start(folder, f"slurm{index}", {}, tasks, env=_slurm(index, port))
        for index in range(2)
    ]
    started.extend(pair)
    return pair


def test_a_process_that_dies_or_fails_ends_the_others(running, job):
    """None waits much longer than a heartbeat for one that is gone; `job` computes meanwhile."""
    del job
    folder, started = running
    jobs = [_pair(folder, name, [name]) for name in ("stepping", "failing")]
    started.extend(jobs[0] + jobs[1])
    for each in jobs[0] + jobs[1]:
        assert each.said("stepping") == 4
    jobs[0][1].process.kill()
    start = time.monotonic()
    assert jobs[0][0].wait(3 * HEARTBEAT) == -signal.SIGABRT
    assert "unhealthy (stopped sending heartbeats)" in jobs[0][0].log.read_text()
    for each in jobs[1]:
        assert each.wait(3 * HEARTBEAT) == -signal.SIGABRT
    assert time.monotonic() - start < 3 * HEARTBEAT
    assert "OSError: only in this process" in jobs[1][1].log.read_text()


def test_a_launcher_is_found_without_arguments(job):
    for index, each in enumerate(job):
        assert (each.said("processes"), each.said("index"), each.said("devices")) == (2, index, 4)
        assert "joined already; initialize them once" in each.said("twice")


@pytest.mark.parametrize("fsdp", ["1", "2", "4"])
def test_two_processes_train_like_one(one, job, fsdp):
    """Every process sees the same metrics, and they are those of one process but for rounding."""
    expected = one.said("curves")[fsdp]
    assert expected["processes"] == [0]
    assert expected["curve"][-1][0] < 0.5 * expected["curve"][0][0], "the run learns"
    curves = [each.said("curves")[fsdp] for each in job]
    assert curves[0]["curve"] == curves[1]["curve"] and curves[0]["sums"] == curves[1]["sums"]
    assert curves[0]["processes"] == [0, 1]
    np.testing.assert_allclose(curves[0]["curve"], expected["curve"], rtol=1e-5)
    for name, value in expected["sums"].items():
        np.testing.assert_allclose(curves[0]["sums"][name], value, rtol=1e-5)
    width = worker.WIDTH // int(fsdp)
    assert curves[0]["first_shard"] == [[4, width]] * 2


def test_sharding_over_four_devices_takes_a_quarter_of_the_memory(one):
    """Compiled arguments and the state after a step, in bytes on one device."""
    whole, split = (one.said("memory")[fsdp] for fsdp in ("1", "4"))
    # Parameters, their average and two moments, each 4·1024 + 1024 + 1024·4 floats.
    size = 4 * 4 * (4 * 1024 + 1024 + 1024 * 4)
    for a, b in zip(whole, split, strict=True):
        # The rest are counters, the batch and its keys.
        assert size <= a < size + 2048 and size / 4 <= b < size / 4 + 2048


def test_states_batches_and_images_are_where_they_belong(job):
    whole = np.arange(32, dtype=np.float32).reshape(4, 8)
    keys = worker.step_keys(jax.random.key(3), 0, 4)
    noise = np.stack([jax.random.normal(key, (2,)) for key in keys])
    images = 3 * noise + 1 + np.arange(4)[:, None]
    keys = np.asarray(jax.random.key_data(keys))
    for index, each in enumerate(job):
        seen = each.said("placement")
        columns = [whole[:, 2 * d : 2 * d + 2].tolist() for d in (2 * index, 2 * index + 1)]
        assert seen["split"] == columns and seen["resplit"] == columns and seen["again"]
        assert seen["back"] == whole.tolist() and seen["host"] == whole.tolist()
        assert seen["blocks"] == [0, 0, 1, 1]
        assert seen["number"] == "float32" and seen["own_mesh"]
        assert seen["key"] == jax.random.key_data(jax.random.key(5)).tolist()
        assert seen["keys"] == [[keys[2 * index].tolist()], [keys[2 * index + 1].tolist()]]
        drawn = np.concatenate(seen["images"])
        np.testing.assert_allclose(drawn, images[2 * index : 2 * index + 2], rtol=1e-5)


def test_what_does_not_fit_the_processes_is_refused(job):
    for each in job:
        seen = each.said("placement")
        assert "this mesh has the devices of [1, 0, 1, 0]" in seen["order"]
        assert "over 2 devices, got shapes [(3,)]" in seen["rows"]
        assert seen["size"] == (
            "ValueError: batch_size 12 does not split over 4 devices in 2 processes x 2 "
            "microbatches; choose a multiple of 8"
        )
        assert "this job has 2; use mesh_train" in seen["pmap"]


def test_processes_that_disagree_all_say_so(job):
    said = [each.said("agreement") for each in job]
    assert [seen["same"] for seen in said] == ["", ""]
    assert said[0]["other"] == said[1]["other"] and said[0]["absent"] == said[1]["absent"]
    assert said[0]["other"].startswith("ValueError: the processes of this job disagree")
    assert said[0]["other"].splitlines()[1:] == ["  model: [0, 0, 0] in [0], [0, 0, 1] in [1]"]
    assert said[0]["absent"].splitlines()[1:] == ["  rank: nothing in [0], 0 in [1]"]


def test_a_writer_that_fails_fails_everywhere(job):
    first, second = (each.said("agreement") for each in job)
    assert first["writer"] and not second["writer"]
    assert first["written"] == [-1, 0] and second["written"] == []
    assert first["success"] == second["success"] == ""
    assert first["failure"] == "OSError: no space left"
    assert second["failure"] == "ValueError: process 0 failed: OSError: no space left"


def test_a_directory_that_one_process_does_not_see_is_refused_by_all(job):
    for each in job:
        seen = each.said("files")
        assert seen["shared"] == ""
        assert "ValueError: the processes [1] do not see what process 0 writes" in seen["own"]


def test_a_part_that_one_process_cannot_read_is_passed_over_by_all(job):
    """The newest checkpoint is set aside, and both go on from the one before."""
    for each in job:
        assert each.said("files")["restored"] == [8, True, [8]]


def test_a_notice_to_one_process_stops_all_at_the_same_step_and_a_second_kills(job):
    for each in job:
        assert each.said("stepping")
    job[1].process.send_signal(signal.SIGTERM)
    steps = [each.said("preempted") for each in job]
    assert steps[0] == steps[1] > 0
    # The coordinator last: without it the other would be aborted.
    for each in reversed(job):
        assert each.process.poll() is None
        each.process.send_signal(signal.SIGTERM)
        assert each.wait(5) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "a:1", "index": 0}, "count missing"),
        ({"count": 2}, "coordinator and index missing"),
        ({"coordinator": "a", "count": 2, "index": 0}, "must be HOST:PORT, got 'a'"),
        ({"coordinator": "a:0", "count": 2, "index": 0}, "must be HOST:PORT, got 'a:0'"),
        ({"coordinator": "a:65536", "count": 2, "index": 0}, "must be HOST:PORT"),
        ({"coordinator": "a:1", "count": 2, "index": 2}, "index=2, count=2"),
        ({"coordinator": "a:1", "count": 2, "index": -1}, "index=-1, count=2"),
        ({"coordinator": "a:1", "count": 2, "index": 0, "launcher": "none"}, "not both"),
        ({"heartbeat_seconds": 0}, "at least 1, got 0"),
        ({"launcher": "pbs"}, "must be one of .*'slurm'.*, got 'pbs'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Processes(**arguments)


def test_a_taken_port_is_an_error_before_jax_tries_it(calls):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        place = {"coordinator": f"127.0.0.1:{port}", "count": 2}
        with pytest.raises(ValueError, match=f"cannot listen at port {port} .*in use"):
            processes.initialize(Processes(**place, index=0))
        assert not calls
        processes.initialize(Processes(**place, index=1))  # another machine's port is its own
    assert [arguments[2] for arguments in calls] == [1]
    processes.initialize(Processes(**place, index=0))
    assert len(calls) == 2


@pytest.fixture
def calls(monkeypatch):
    """Arguments of jax.distributed.initialize, in an environment without launchers."""
    for name in set(os.environ) - set(_clean_environment()):
        monkeypatch.delenv(name)
    seen = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: seen.append((*a, k)))
    return seen


PATIENCE = {"heartbeat_timeout_seconds": 7, "shutdown_timeout_seconds": 7}


def test_explicit_arguments_ask_no_launcher(calls, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    processes.initialize(Processes("[::1]:12", 2, 1, heartbeat_seconds=7))
    assert calls == [("[::1]:12", 2, 1, {"cluster_detection_method": "deactivate", **PATIENCE})]


@pytest.mark.parametrize(
    ("environment", "joined"),
    [
        ({}, False),
        (_slurm(0, 1), True),
        ({**_slurm(0, 1), "SLURM_NTASKS": "1"}, False),
        # What a batch script sees, before srun starts its tasks.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0"}, False),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_a_launcher_is_asked_where_it_started_several_processes(
    calls, monkeypatch, environment, joined
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.initialize(Processes(heartbeat_seconds=7))
    assert calls == ([({"cluster_detection_method": None, **PATIENCE},)] if joined else [])
    calls.clear()
    processes.initialize(Processes(launcher="none"))
    assert calls == []


def test_a_named_launcher_must_be_there(calls, monkeypatch):
    with pytest.raises(ValueError, match="launcher='slurm', but the environment has no SLURM_JOB"):
        processes.initialize(Processes(launcher="slurm"))
    with pytest.raises(ValueError, match="no TPU_WORKER_HOSTNAMES, TPU_WORKER_ID"):
        processes.initialize(Processes(launcher="gketpu"))
    assert calls == []
    for name, value in {**_slurm(0, 1), "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    processes.initialize(Processes(launcher="slurm", heartbeat_seconds=7))
    assert calls == [({"cluster_detection_method": "slurm", **PATIENCE},)]


def test_an_environment_that_cannot_be_used_is_an_error(calls, monkeypatch):
    """Never several processes that each take themselves for the whole job."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")

    def refuse(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(ValueError, match="OMPI_COMM_WORLD_SIZE=2 says .* give coordinator"):
        processes.initialize(Processes())
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="must be a number, but the environment has 'two'"):
        processes.initialize(Processes())


def test_processes_are_joined_before_a_device_is_used():
    assert jax.devices()
    with pytest.raises(RuntimeError, match="must be called before"):
        processes.initialize(Processes("127.0.0.1:1", 1, 0))


def test_one_process_agrees_with_itself():
    processes.barrier("alone")
    processes.check_agreement({"seed": 1})
    assert processes.is_writer() and not processes.reached_preemption()
    ran = []
    processes.agree_from_writer(lambda: ran.append(1))
    assert ran == [1]

    def fail():
        raise KeyError("its own error")

    with pytest.raises(KeyError, match="its own error"):
        processes.agree_from_writer(fail)
