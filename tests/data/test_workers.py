"""Worker processes: the same batches as without them, and what becomes of them at the end."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from absl import flags

from diffusion_jax.data.batching import batches
from diffusion_jax.data.sources import Arrays

OPTIONS = {"batch_size": 3, "seed": 5, "flip": True, "num_threads": 0}


def _numbers():
    image = np.zeros((10, 2, 2, 1), np.float32)
    image[:, :, 0, 0] = np.arange(10)[:, None] / 100
    return Arrays({"image": image, "label": np.arange(10, dtype=np.int32)})


def _take(iterator, count):
    return list(itertools.islice(iterator, count))


def _equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def _workers():
    return multiprocessing.active_children()


def test_batches_and_positions_do_not_depend_on_the_number_of_workers():
    """Over the ends of epochs, with positions handed on from two workers to none to one.

    In a program that has not parsed the flags of absl, such as a notebook, and while the workers
    get the signals that end the main process.
    """
    expected = _take(batches(_numbers(), **OPTIONS), 14)
    flags.FLAGS.unparse_flags()
    two, none, one = (batches(_numbers(), **OPTIONS, num_workers=n) for n in (2, 0, 1))
    _equal(found := _take(two, 5), expected[:5])
    assert {type(value) for batch in found for value in batch.values()} == {np.ndarray}
    assert len(_workers()) == 2 and two.bad_examples is None
    for worker, number in itertools.product(_workers(), (signal.SIGINT, signal.SIGTERM)):
        os.kill(worker.pid, number)
    none.set_state(two.get_state())
    _equal(_take(none, 3), expected[5:8])
    _equal(_take(two, 5), expected[5:10])
    del two
    assert not _workers()
    one.set_state(none.get_state())
    _equal(_take(one, 6), expected[8:14])
    assert one.get_state() == {**none.get_state(), "next_batch": 14}
    one.close()
    assert not _workers()


@pytest.mark.slow
def test_all_batches_of_an_epoch_come_and_then_the_workers_go():
    options = {**OPTIONS, "batch_size": 2, "num_epochs": 1}
    found = list(batches(_numbers(), **options, num_workers=2))
    _equal(found, list(batches(_numbers(), **options)))
    assert len(found) == 5 and not _workers()


@pytest.mark.slow
def test_a_killed_worker_is_an_error_after_which_one_can_go_on():
    expected = _take(batches(_numbers(), **OPTIONS), 40)
    iterator = batches(_numbers(), **OPTIONS, num_workers=1)
    _equal(_take(iterator, 1), expected[:1])
    (worker,) = _workers()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="terminated unexpectedly with exit code -9"):
        _take(iterator, 40)
    position = iterator.get_state()["next_batch"]
    _equal(_take(iterator, 1), expected[position : position + 1])
    iterator.close()


@pytest.mark.slow
def test_what_a_worker_finds_wrong_is_raised_here():
    images = np.full((6, 2, 2, 1), 3.0, np.float32)
    with pytest.raises(ValueError, match=r"batch 0: 'image' .*\[3, 3\]"):
        next(batches(Arrays({"image": images}), batch_size=2, seed=0, num_workers=1))


class Locked:
    def __init__(self):
        self.lock, self.source = threading.Lock(), _numbers()

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        with self.lock:
            return self.source[index]


def test_a_source_that_cannot_be_sent_is_refused_at_once():
    next(batches(Locked(), **OPTIONS))
    with pytest.raises(ValueError, match=r"Locked.* cannot be sent to worker.*lock.*num_workers=0"):
        batches(Locked(), **OPTIONS, num_workers=1)


PROGRAM = """
import multiprocessing, sys, time
from tests.data.test_workers import OPTIONS, _numbers, batches

if __name__ == "__main__":
    iterator = batches(_numbers(), **OPTIONS, num_workers=1)
    batch = next(iterator)
    print(multiprocessing.active_children()[0].pid, flush=True)
    time.sleep(float(sys.argv[1]))
"""


def _program(folder, request, seconds):
    (folder / "program.py").write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, folder / "program.py", str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(request.config.rootpath)},
    )


@pytest.mark.slow
def test_a_program_may_end_without_closing(tmp_path, request):
    main = _program(tmp_path, request, seconds=0)
    output, errors = main.communicate(timeout=60)
    assert int(output) and (main.returncode, errors) == (0, b"")


@pytest.mark.slow
def test_workers_end_with_a_main_process_that_was_killed(tmp_path, request):
    main = _program(tmp_path, request, seconds=60)
    worker = int(main.stdout.readline())
    main.kill()
    try:
        # The worker has the same output, which ends when both have.
        assert main.communicate(timeout=20)[0] == b""
    except subprocess.TimeoutExpired:
        os.kill(worker, signal.SIGKILL)
        raise
