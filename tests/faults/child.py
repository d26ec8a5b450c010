"""diffusion-jax with a fault in it: python -m tests.faults.child ARGUMENTS.

FAULT in the environment is JSON, the arguments of one fault by its name:

kill_in_save: [step, seconds]   SIGKILL so long after the save of a step began
kill_after: seconds             SIGKILL so long after the first update
signals: [step, count]          SIGTERM to itself, count times, while a step's batch is fetched
ctrl_c: step                    SIGINT to itself while a step's batch is fetched
nan_at: [step, count]           the images of so many updates from a step on are NaN
full_disk: step                 the folder ROOM fills up after the save of a step looked at its room
no_space: step                  writing a step's checkpoint ends with ENOSPC
small_disk: step                1 MB is free when a step is saved
log_fails: step                 the log cannot be written from a step on
"""

import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
from typing import Any

import numpy as np

FAULT = json.loads(os.environ.get("FAULT", "{}"))


def _kill_in(seconds: float) -> None:
    def kill() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


def kill_in_save(step: int, seconds: float) -> None:
    from diffusion_jax.io.checkpoint import Checkpoints

    save = Checkpoints.save

    def watched(self: Checkpoints, number: int, *args: Any) -> None:
        if number == step:
            # The save before must not be the one that is hit.
            self.wait()
            _kill_in(seconds)
        save(self, number, *args)

    Checkpoints.save = watched


def kill_after(seconds: float) -> None:
    from diffusion_jax.training import loop

    first = loop._Run.first_update

    def watched(self: Any, step: int) -> None:
        first(self, step)
        _kill_in(seconds)

    loop._Run.first_update = watched


def signals(step: int, count: int, number: int = signal.SIGTERM) -> None:
    from diffusion_jax.data.batching import Batches

    fetch = Batches.__next__

    def watched(self: Batches) -> Any:
        if self.get_state()["next_batch"] == step - 1:
            for _ in range(count):
                signal.raise_signal(number)
        return fetch(self)

    Batches.__next__ = watched


def ctrl_c(step: int) -> None:
    # A shell starts commands in the background with it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signals(step, 1, signal.SIGINT)


def nan_at(step: int, count: int) -> None:
    from diffusion_jax.data.batching import Batches

    fetch = Batches.__next__

    def poisoned(self: Batches) -> Any:
        number = self.get_state()["next_batch"] + 1
        batch = fetch(self)
        if step <= number < step + count:
            batch["image"] = np.full_like(batch["image"], np.nan)
        return batch

    Batches.__next__ = poisoned


def full_disk(step: int) -> None:
    from diffusion_jax.io.checkpoint import Checkpoints

    save = Checkpoints.save
    room = os.environ["ROOM"]

    def filled(self: Checkpoints, number: int, *args: Any) -> None:
        if number == step:
            self.wait()
            with open(os.path.join(room, "filler"), "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(b"\0" * 4096)
                except OSError as error:
                    assert error.errno == errno.ENOSPC
            self._check_space = lambda *unused: None
        save(self, number, *args)

    Checkpoints.save = filled


def no_space(step: int) -> None:
    from diffusion_jax.io.checkpoint import Checkpoints

    save = Checkpoints.save

    def failing(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def filled(self: Checkpoints, number: int, *args: Any) -> None:
        save(self, number, *args)
        if number == step:
            self._manager.wait_until_finished()
            shutil.rmtree(os.path.join(self.directory, str(number)))
            self._manager.wait_until_finished = failing

    Checkpoints.save = filled


def small_disk(step: int) -> None:
    from types import SimpleNamespace

    from diffusion_jax.io.checkpoint import Checkpoints

    save = Checkpoints.save

    def filled(self: Checkpoints, number: int, *args: Any) -> None:
        if number == step:
            shutil.disk_usage = lambda path: SimpleNamespace(free=10**6)
        save(self, number, *args)

    Checkpoints.save = filled


def log_fails(step: int) -> None:
    from diffusion_jax.io.loggers import JSONLLogger

    scalars = JSONLLogger.scalars

    def failing(self: JSONLLogger, number: int, values: Any) -> None:
        if number >= step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        scalars(self, number, values)

    # The warning names the method.
    failing.__name__ = scalars.__name__
    JSONLLogger.scalars = failing


def main() -> int:
    for name, arguments in FAULT.items():
        globals()[name](*(arguments if isinstance(arguments, list) else [arguments]))
    from diffusion_jax.cli import main

    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
