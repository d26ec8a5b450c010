"""The host loop: data, step, logs, checkpoints, and what to do when a run is cut short."""

import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from diffusion_jax.core.types import Batch, Checkpointer, DataIterator, Key, Logger, Metrics
from diffusion_jax.training.parallel import Step
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.step import step_keys

OnEval = Callable[[int, TrainState], None]

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM

# Steps that may be under way while the host prepares the next batch; more would hold
# batches in device memory and make the progress bar run ahead of the device.
_LOOKAHEAD = 2


class NonFiniteError(FloatingPointError):
    """The loss or the gradient is NaN or infinite, and the state with it.

    Attributes:
      step: first update whose loss or gradient was not finite.
      loss, grad_norm: their values there.
      last_checkpoint: step of the newest checkpoint, None if there is none.
    """

    def __init__(self, step: int, row: Mapping[str, float], last_checkpoint: int | None):
        self.step, self.last_checkpoint = step, last_checkpoint
        self.loss, self.grad_norm = row["loss"], row["grad_norm"]
        super().__init__(
            f"update {step} is not finite: loss={self.loss}, grad_norm={self.grad_norm}. The state "
            f"was not saved; the last checkpoint is of step {last_checkpoint}. Lower the learning "
            "rate, clip the gradient, or look at the batch of that step"
        )


@dataclass(frozen=True)
class LoopConfig:
    """How long to train and how often to report.

    Attributes:
      num_steps: updates in all, those of an earlier run included.
      batch_size: examples of a batch.
      log_every: updates between log rows; a row holds means over the updates since the last.
      eval_every: updates between calls of `on_eval`; None for none.
      checkpoint_every: updates between checkpoints; None for one at the end only.
      progress: whether to show a progress bar.

    Raises:
      ValueError: if a number is below 1.
    """

    num_steps: int
    batch_size: int
    log_every: int = 100
    eval_every: int | None = None
    checkpoint_every: int | None = 1000
    progress: bool = True

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "log_every", "eval_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


class _Signals:
    """Remembers Ctrl-C and SIGTERM so that the step under way can finish.

    The second signal acts at once. Nothing is installed outside of the main thread, where
    Python cannot, nor under jax.distributed, which has a handler of its own.
    """

    def __init__(self):
        self.received: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and not jax.distributed.is_initialized():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: Any) -> None:
        del frame
        self.received = number
        self._restore()

    def _restore(self) -> None:
        while self._old:
            number, handler = self._old.popitem()
            # None stands for a handler that was not installed from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def __exit__(self, *exception: Any) -> None:
        self._restore()

    def raise_received(self, step: int) -> None:
        """Raises what the signal asks for, once the state of `step` is safe."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt(f"training was interrupted after step {step}")
        if self.received == signal.SIGTERM:
            raise SystemExit(SIGTERM_EXIT_CODE)


@dataclass
class _Window:
    """Metrics since the last log row; they stay on the device until they are needed."""

    rows: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    pending: list[tuple[int, Metrics]] = field(default_factory=list)

    def add(self, step: int, metrics: Metrics) -> None:
        self.pending.append((step, metrics))
        if len(self.pending) > _LOOKAHEAD:
            jax.block_until_ready(self.pending[-1 - _LOOKAHEAD])

    def fetch(self) -> tuple[int, dict[str, float]] | None:
        """Moves pending metrics to the host; the first row that is not finite, if any."""
        for step, metrics in jax.device_get(self.pending):
            self.rows.append((int(step), {name: float(value) for name, value in metrics.items()}))
        self.pending.clear()
        for step, row in self.rows:
            if not np.isfinite([row["loss"], row["grad_norm"]]).all():
                return step, row
        return None

    def means(self) -> dict[str, float]:
        means = {name: np.mean([row[name] for _, row in self.rows]) for name in self.rows[0][1]}
        self.rows.clear()
        return {name: float(value) for name, value in means.items()}


@dataclass
class _Rate:
    """Steps per second; compilation, evaluation and checkpoints do not count."""

    steps: int = 0
    seconds: float = 0.0
    since: float | None = None

    def run(self) -> None:
        self.since = time.perf_counter()

    def pause(self) -> None:
        if self.since is not None:
            self.seconds += time.perf_counter() - self.since
        self.since = None

    def take(self) -> dict[str, float]:
        self.pause()
        rate = {"steps_per_second": self.steps / self.seconds} if self.steps else {}
        self.steps, self.seconds = 0, 0.0
        self.run()
        return rate


@dataclass
class _Run:
    """One call of `fit`: its arguments, and what changes from step to step."""

    state: TrainState
    step_fn: Step
    data: DataIterator
    key: Key
    config: LoopConfig
    checkpointer: Checkpointer | None
    loggers: Sequence[Logger]
    on_eval: OnEval | None
    bar: Any = None
    window: _Window = field(default_factory=_Window)
    rate: _Rate = field(default_factory=_Rate)
    saved: int | None = None

    def resume(self) -> int:
        """Restores the newest checkpoint, if there is one; the number of updates done."""
        if self.checkpointer is None:
            return int(self.state.step)
        self.saved = self.checkpointer.latest_step()
        if self.saved is not None:
            self.state, position = self.checkpointer.restore(self.state, self.saved)
            self.data.set_state(position["data"])
            self.window.rows = [(step, dict(row)) for step, row in position["metrics"]]
            tqdm.write(f"going on from the checkpoint of step {self.saved}")
        step = int(self.state.step)
        for logger in self.loggers:
            # Rows of updates that a killed run made after its last checkpoint come again.
            logger.truncate_after(step)
        return step

    def next_batch(self, step: int) -> Batch:
        size = self.config.batch_size
        try:
            batch = next(self.data)
        except StopIteration as error:
            raise ValueError(
                f"the data ended after {step} updates but num_steps={self.config.num_steps}; "
                "pass an iterator that repeats"
            ) from error
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
        if any(shape[:1] != (size,) for shape in shapes):
            raise ValueError(f"batch_size={size} but the data gave arrays of shapes {shapes}")
        return batch

    def update(self, step: int) -> None:
        """Update number `step`, counted from 1."""
        batch = self.next_batch(step - 1)
        keys = step_keys(self.key, step - 1, self.config.batch_size)
        self.state, metrics = self.step_fn(self.state, batch, keys)
        self.window.add(step, metrics)
        self.rate.steps += 1

    def progress_bar(self, description: str, done: int) -> tqdm:
        config = self.config
        self.bar = tqdm(
            range(done + 1, config.num_steps + 1),
            desc=description,
            initial=done,
            total=config.num_steps,
            unit="step",
            disable=not config.progress,
        )
        return self.bar

    def first_update(self, step: int) -> None:
        """The update that compiles, kept out of every rate."""
        start = time.perf_counter()
        with self.progress_bar("compiling…", step - 1) as bar:
            bar.leave = False
            self.update(step)
            jax.block_until_ready(self.state)
        tqdm.write(f"compiling and the first update took {time.perf_counter() - start:.1f} s")
        self.rate.steps = 0
        self.rate.run()

    def check(self) -> None:
        bad = self.window.fetch()
        if bad is not None:
            last = None
            if self.checkpointer is not None:
                self.checkpointer.wait()
                last = self.checkpointer.latest_step()
            raise NonFiniteError(*bad, last)

    def log(self, step: int) -> None:
        self.check()
        means = self.window.means()
        self.bar.set_postfix(loss=f"{means['loss']:.4g}", refresh=False)
        values = {**means, **self.rate.take()}
        for logger in self.loggers:
            logger.scalars(step, values)

    def save(self, step: int) -> None:
        if self.checkpointer is None or self.saved == step:
            return
        self.check()
        self.rate.pause()
        position = {"data": self.data.get_state(), "metrics": self.window.rows}
        self.checkpointer.save(step, self.state, position)
        self.saved = step
        self.rate.run()

    def evaluate(self, step: int, on_eval: OnEval) -> None:
        self.check()
        self.rate.pause()
        on_eval(step, self.state)
        self.rate.run()

    def after(self, step: int, signals: _Signals) -> None:
        """What is due after update number `step`."""
        config, last = self.config, step == self.config.num_steps

        def due(every: int | None) -> bool:
            return every is not None and step % every == 0

        if last or due(config.log_every):
            self.log(step)
        if self.on_eval is not None and due(config.eval_every) and not signals.received:
            self.evaluate(step, self.on_eval)
        if last or due(config.checkpoint_every) or signals.received:
            self.save(step)
        signals.raise_received(step)

    def loop(self, start: int) -> None:
        with _Signals() as signals:
            self.first_update(start + 1)
            self.after(start + 1, signals)
            with self.progress_bar("training", start + 1) as steps:
                for step in steps:
                    self.update(step)
                    self.after(step, signals)


def fit(
    state: TrainState,
    step_fn: Step,
    data: DataIterator,
    *,
    key: Key,
    config: LoopConfig,
    checkpointer: Checkpointer | None = None,
    loggers: Sequence[Logger] = (),
    on_eval: OnEval | None = None,
) -> TrainState:
    """Trains until `config.num_steps` updates are done, going on from the newest checkpoint.

    Keys are `step_keys(key, step, batch_size)` and a checkpoint holds the position of the
    data, so that a run that was interrupted and resumed equals an uninterrupted one bit for
    bit on the same devices. Ctrl-C and SIGTERM let the update under way finish, save a
    checkpoint and then raise KeyboardInterrupt or SystemExit(143); a second signal acts at
    once. Writes under way are waited for however the call ends.

    Args:
      state: state to start from; its arrays may be donated and must not be used afterwards.
      step_fn: (state, batch, keys [B]) -> (state, metrics) with the metrics `loss` and
        `grad_norm`, for example from `mesh_train`.
      data: batches of `config.batch_size` examples.
      key: [] key of the run; the same one in every part of an interrupted run.
      config: lengths and intervals.
      checkpointer: where checkpoints are; None for none.
      loggers: where means of the metrics go; with a checkpointer they first forget the steps
        that will be repeated.
      on_eval: called as on_eval(step, state) every `config.eval_every` updates; it must not
        keep the state, whose arrays the next update donates.

    Returns:
      the last state.

    Raises:
      NonFiniteError: if loss or gradient norm is not finite; noticed at the next log row,
        checkpoint or evaluation, and nothing is saved.
      ValueError: if the data ends early or its batches have another size.
      KeyboardInterrupt, SystemExit: see above.
    """
    run = _Run(
        state=state,
        step_fn=step_fn,
        data=data,
        key=key,
        config=config,
        checkpointer=checkpointer,
        loggers=loggers,
        on_eval=on_eval,
    )
    start = run.resume()
    if start >= config.num_steps:
        tqdm.write(f"{start} of {config.num_steps} updates are done already, nothing to do")
        return run.state
    try:
        run.loop(start)
    finally:
        if checkpointer is not None:
            checkpointer.wait()
    return run.state
