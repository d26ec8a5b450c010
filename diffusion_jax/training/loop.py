"""The host loop: data, step, logs, checkpoints, and what to do when a run is cut short."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from diffusion_jax.core.types import Batch, Checkpointer, DataIterator, Key, Logger
from diffusion_jax.training.interrupt import Signals, TrainingInterrupted
from diffusion_jax.training.meters import Clock, Window
from diffusion_jax.training.parallel import Step
from diffusion_jax.training.processes import agree_from_writer, is_writer
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.step import step_keys

OnEval = Callable[[int, TrainState], None]

# The updates after compilation that a trace leaves out, and those that it shows.
_TRACE_AFTER, _TRACE_STEPS = 5, 5


class BadUpdateError(FloatingPointError):
    """An update that must not be applied: of a loss or gradient that is NaN, infinite or a spike.

    Attributes:
      step: the update.
      loss, grad_norm: their values there.
      last_checkpoint: step of the newest checkpoint, None if there is none.
    """

    def __init__(self, step: int, row: Mapping[str, Any], last_checkpoint: int | None):
        self.step, self.last_checkpoint = step, last_checkpoint
        self.loss, self.grad_norm = row["loss"], row["grad_norm"]
        super().__init__(
            f"update {step} is bad: loss={self.loss}, grad_norm={self.grad_norm}. {self._what(row)}"
            f" The state was not saved; the last checkpoint is of step {last_checkpoint}. Lower "
            "the learning rate, clip the gradient, or look at the batch of that step"
        )

    def _what(self, row: Mapping[str, Any]) -> str:
        in_a_row = int(row.get("skipped_in_a_row", 0))
        return f"It was not applied, as the {in_a_row - 1} before it." if in_a_row else ""


@dataclass(frozen=True)
class LoopConfig:
    """How long to train and how often to report.

    Attributes:
      num_steps: updates in all, those of an earlier run included.
      batch_size: examples of a batch, over all processes.
      log_every: updates between log rows; a row holds means over the updates since the last.
      eval_every: updates between calls of `on_eval`; None for none.
      checkpoint_every: updates between checkpoints; None for one at the end only.
      progress: whether to show a progress bar.
      max_skipped: updates in a row that the step may skip, see `guard.Guard`; one more is an
        error.
      trace_dir: where a `jax.profiler` trace of five updates goes; None for none.

    Raises:
      ValueError: if a number is below 1, or max_skipped below 0.
    """

    num_steps: int
    batch_size: int
    log_every: int = 100
    eval_every: int | None = None
    checkpoint_every: int | None = 1000
    progress: bool = True
    max_skipped: int = 0
    trace_dir: str | None = None

    def __post_init__(self):
        if self.max_skipped < 0:
            raise ValueError(f"max_skipped must be at least 0, got {self.max_skipped}")
        for name in ("num_steps", "batch_size", "log_every", "eval_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def _say(text: str) -> None:
    if is_writer():
        tqdm.write(text)


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
    clock: Clock
    bar: Any = None
    window: Window = field(default_factory=Window)
    trace_until: int | None = None

    def resume(self) -> int:
        """Restores the newest good checkpoint, if there is one; the number of updates done."""
        if self.checkpointer is None:
            return int(self.state.step)
        self.checkpointer.claim()
        if self.checkpointer.last_committed_step is not None:
            self.state, position = self.checkpointer.restore(self.state)
            self.data.set_state(position["data"])
            self.window.rows = [(step, dict(row)) for step, row in position["metrics"]]
            _say(f"going on from the checkpoint of step {self.checkpointer.restored_step}")
        step = int(self.state.step)
        # Rows of updates that a killed run made after its last checkpoint come again.
        agree_from_writer(lambda: [logger.truncate_after(step) for logger in self.loggers])
        return step

    def next_batch(self, step: int, size: int) -> Batch:
        try:
            with self.clock.waiting():
                batch = next(self.data)
        except StopIteration as error:
            raise ValueError(
                f"the data ended after {step} updates but num_steps={self.config.num_steps}; "
                "pass an iterator that repeats"
            ) from error
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
        if any(shape[:1] != (size,) for shape in shapes):
            raise ValueError(
                f"batch_size={self.config.batch_size} over {jax.process_count()} processes but "
                f"the data gave arrays of shapes {shapes}"
            )
        return batch

    def update(self, step: int) -> None:
        """Update number `step`, counted from 1."""
        size = self.config.batch_size // jax.process_count()
        batch = self.next_batch(step - 1, size)
        keys = step_keys(self.key, step - 1, size, offset=jax.process_index() * size)
        self.state, metrics = self.step_fn(self.state, batch, keys)
        self.window.add(step, metrics)
        self.clock.step()

    def progress_bar(self, description: str, done: int) -> tqdm:
        config = self.config
        self.bar = tqdm(
            range(done + 1, config.num_steps + 1),
            desc=description,
            initial=done,
            total=config.num_steps,
            unit="step",
            disable=not (config.progress and is_writer()),
        )
        return self.bar

    def first_update(self, step: int) -> None:
        """The update that compiles, kept out of every rate."""
        start = time.perf_counter()
        with self.progress_bar("compiling…", step - 1) as bar:
            bar.leave = False
            self.update(step)
            jax.block_until_ready(self.state)
        _say(f"compiling and the first update took {time.perf_counter() - start:.1f} s")
        self.clock.restart()

    def check(self) -> None:
        """Raises if an update since the last check was bad, or one too many was skipped."""
        for step, row in self.window.fetch():
            if row.get("skipped"):
                bad = row["skipped_in_a_row"] > self.config.max_skipped
            else:
                bad = not np.isfinite([row["loss"], row["grad_norm"]]).all()
            if bad:
                raise BadUpdateError(step, row, self.last_checkpoint())

    def last_checkpoint(self) -> int | None:
        if self.checkpointer is None:
            return None
        self.checkpointer.wait()
        return self.checkpointer.last_committed_step

    def log(self, step: int) -> None:
        self.check()
        values = {**self.window.means(), **self.clock.take()}
        if "loss" in values:
            self.bar.set_postfix(loss=f"{values['loss']:.4g}", refresh=False)
        for logger in self.loggers:
            logger.scalars(step, values)

    def save(self, step: int) -> None:
        if self.checkpointer is None:
            return
        self.check()
        self.clock.pause()
        position = {"data": self.data.get_state(), "metrics": self.window.rows}
        self.checkpointer.save(step, self.state, position)
        self.clock.run()

    def evaluate(self, step: int, on_eval: OnEval) -> None:
        self.check()
        self.clock.pause()
        on_eval(step, self.state)
        self.clock.run()

    def trace(self, step: int, start: int) -> None:
        """Starts and ends the profiler's trace, before update number `step`."""
        if self.config.trace_dir is None or not is_writer():
            return
        if step == start + _TRACE_AFTER:
            jax.profiler.start_trace(self.config.trace_dir)
            self.trace_until = step + _TRACE_STEPS
        elif step == self.trace_until:
            jax.block_until_ready(self.state)
            self.end_trace()

    def end_trace(self) -> None:
        if self.trace_until is not None:
            jax.profiler.stop_trace()
            _say(f"the trace is in {self.config.trace_dir}: tensorboard --logdir, or xprof")
        self.trace_until = None

    def after(self, step: int, signals: Signals) -> None:
        """What is due after update number `step`."""
        config, last = self.config, step == self.config.num_steps
        stopping = signals.stop()

        def due(every: int | None) -> bool:
            return every is not None and step % every == 0

        if last or due(config.log_every):
            self.log(step)
        try:
            if last or due(config.checkpoint_every) or stopping:
                self.save(step)
            if stopping:
                self.last_checkpoint()
        except Exception as error:
            if signals.interrupted:
                # In a notebook the state is still there.
                raise TrainingInterrupted(step, self.state) from error
            raise
        if stopping:
            signals.raise_received(step, self.state)
        # Behind the save, since drawing takes memory that may not be there.
        if self.on_eval is not None and due(config.eval_every):
            self.evaluate(step, self.on_eval)

    def loop(self, start: int) -> None:
        with Signals() as signals:
            if signals.stop():
                signals.raise_received(start, self.state)
            if self.config.trace_dir is not None and start + _TRACE_AFTER > self.config.num_steps:
                _say(f"no trace is made: fewer than {_TRACE_AFTER} updates are left")
            self.first_update(start + 1)
            self.after(start + 1, signals)
            with self.progress_bar("training", start + 1) as steps:
                for step in steps:
                    self.trace(step, start)
                    self.update(step)
                    self.after(step, signals)
            # A signal during the last log row or evaluation.
            signals.raise_received(self.config.num_steps, self.state)


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
    bit on the same devices, and up to rounding on others. Ctrl-C and SIGTERM let the update
    under way finish, save a checkpoint and then raise TrainingInterrupted or SystemExit(143); a
    second signal acts at once. With several processes one to any of them stops all at the same
    step, the others with SystemExit(143). Writes under way are waited for however the call ends.

    Args:
      state: state to start from; its arrays may be donated and must not be used afterwards.
      step_fn: (state, batch, keys [B]) -> (state, metrics) with the metrics `loss` and
        `grad_norm`, for example from `mesh_train`.
      data: this process's rows of batches of `config.batch_size` examples.
      key: [] key of the run; the same one in every part of an interrupted run.
      config: lengths and intervals.
      checkpointer: where checkpoints are; None for none.
      loggers: where means of the metrics go, with step_seconds, images_per_second and data_wait,
        the share of the time that the host waited for data; with a checkpointer they first
        forget the steps that will be repeated. Those of process 0 alone, if there are several.
      on_eval: called as on_eval(step, state) every `config.eval_every` updates; it must not
        keep the state, whose arrays the next update donates.

    Returns:
      the last state.

    Raises:
      BadUpdateError: if loss or gradient norm is not finite, or more than `config.max_skipped`
        updates in a row were skipped; noticed at the next log row, checkpoint or evaluation, and
        nothing is saved.
      ValueError: if the data ends early or its batches have another size, or batch_size does not
        split over the processes.
      TrainingInterrupted, SystemExit: see above. The former holds the state.
      CheckpointError: if a checkpoint cannot be written or none of those there can be read.
    """
    if config.batch_size % jax.process_count():
        raise ValueError(
            f"batch_size {config.batch_size} does not split over {jax.process_count()} processes"
        )
    run = _Run(
        state=state,
        step_fn=step_fn,
        data=data,
        key=key,
        config=config,
        checkpointer=checkpointer,
        loggers=loggers,
        on_eval=on_eval,
        clock=Clock(config.batch_size),
    )
    start = run.resume()
    if start >= config.num_steps:
        _say(f"{start} of {config.num_steps} updates are done already, nothing to do")
        return run.state
    try:
        run.loop(start)
    finally:
        run.end_trace()
        if checkpointer is not None:
            try:
                checkpointer.wait()
            finally:
                checkpointer.release()
    return run.state
