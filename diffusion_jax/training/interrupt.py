"""Interruptions: Ctrl-C and SIGTERM wait for the update under way, a second one does not."""

import signal
import threading
from typing import Any

import jax

from diffusion_jax.training import processes
from diffusion_jax.training.state import TrainState

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C came during training. In a notebook: `except TrainingInterrupted as stop: stop.state`.

    Attributes:
      step: updates that were done.
      state: the state after them, to be used or trained further.
    """

    def __init__(self, step: int, state: TrainState):
        self.step, self.state = step, state
        super().__init__(f"training was interrupted after step {step}")


class Signals:
    """Remembers Ctrl-C and SIGTERM so that the update under way can finish.

    The second signal acts at once. Nothing is installed outside of the main thread, where
    Python cannot. jax.distributed takes SIGTERM for a notice to all processes, and Ctrl-C is
    made one there.
    """

    def __init__(self):
        self._received: int | None = None
        self._ctrl_c = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            if jax.distributed.is_initialized():
                self._old[signal.SIGINT] = signal.signal(signal.SIGINT, self._notify)
            else:
                for number in (signal.SIGINT, signal.SIGTERM):
                    self._old[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: Any) -> None:
        del frame
        self._received = number
        self._restore()

    def _notify(self, number: int, frame: Any) -> None:
        del number, frame
        self._ctrl_c = True
        self._restore()
        signal.raise_signal(signal.SIGTERM)

    def _restore(self) -> None:
        while self._old:
            number, handler = self._old.popitem()
            # None stands for a handler that was not installed from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def __exit__(self, *exception: Any) -> None:
        self._restore()

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C came."""
        return self._received == signal.SIGINT

    def stop(self) -> bool:
        """Whether training is to stop here; the same in every process.

        Every process asks before the first update and after every one.
        """
        if processes.reached_preemption():
            self._received = signal.SIGINT if self._ctrl_c else signal.SIGTERM
            self._restore()
        return self._received is not None

    def raise_received(self, step: int, state: TrainState) -> None:
        """Raises what the signal asks for, once the state of `step` is safe."""
        if self.interrupted:
            raise TrainingInterrupted(step, state)
        if self._received == signal.SIGTERM:
            raise SystemExit(SIGTERM_EXIT_CODE)
