"""The host loop with real checkpoints: resuming, signals, NaN, logs."""

import functools
import os
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.core.part_mean import Ratio
from diffusion_jax.io import checkpoint
from diffusion_jax.io.checkpoint import Checkpoints
from diffusion_jax.io.checkpoint_errors import CheckpointSaveError, CheckpointWarning
from diffusion_jax.training import processes
from diffusion_jax.training.ema import EMA
from diffusion_jax.training.guard import Guard
from diffusion_jax.training.interrupt import TrainingInterrupted
from diffusion_jax.training.loop import BadUpdateError, LoopConfig, fit
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.step import make_train_step
from tests.training import toy

TX = optax.adam(0.05)
KEY = jax.random.key(5)
TIMES = ("step_seconds", "images_per_second", "data_wait")


class Memory:
    """A logger that remembers."""

    def __init__(self):
        self.rows, self.truncated = {}, []

    def scalars(self, step, values):
        assert step not in self.rows
        self.rows[step] = {k: v for k, v in values.items() if k not in TIMES}

    def image(self, step, name, image):
        raise AssertionError("the loop draws nothing")

    def truncate_after(self, step):
        self.truncated.append(step)
        self.rows = {s: row for s, row in self.rows.items() if s <= step}


@functools.cache
def _step():
    step = make_train_step(toy.loss, TX, ema=EMA(0.9), accumulate=1, axis_name=None)
    return jax.jit(step, donate_argnums=0)


def _state():
    return TrainState.create(toy.params(), TX, trainable=("adapter/**",))


def _fit(*, data=None, num_steps=6, step_fn=None, key=KEY, **options):
    loop = {"log_every": 4, "checkpoint_every": 4, "progress": False}
    others = ("eval_every", "max_skipped", "trace_dir")
    loop |= {name: options.pop(name) for name in (*loop, *others) if name in options}
    config = LoopConfig(num_steps=num_steps, batch_size=toy.BATCH, **loop)
    data = toy.Data() if data is None else data
    return fit(_state(), step_fn or _step(), data, key=key, config=config, **options)


@functools.cache
def _uninterrupted():
    log = Memory()
    return _fit(loggers=[log]), log.rows


def _send(number, position):
    return lambda at: os.kill(os.getpid(), number) if at == position else None


@pytest.mark.parametrize(
    "number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, number, error):
    """Stopped within a log window, away from every regular checkpoint."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    log = Memory()
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(error) as stopped:
            data = toy.Data(hook=_send(number, position=2))
            _fit(data=data, checkpointer=checkpoints, loggers=[log])
        # The update under way was finished, and its checkpoint is complete when fit returns.
        assert checkpoints.last_committed_step == 3
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
        if error is SystemExit:
            assert stopped.value.code == 143
    with Checkpoints(tmp_path) as checkpoints:
        state = _fit(checkpointer=checkpoints, loggers=[log])
    expected, rows = _uninterrupted()
    toy.assert_bit_equal(state, expected)
    assert log.rows == rows and set(rows) == {4, 6}


def test_killed_run_repeats_what_was_after_its_checkpoint(tmp_path):
    class Killed(Exception):
        pass

    def hook(position):
        if position == 5:
            raise Killed

    log = Memory()
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(Killed):
            _fit(data=toy.Data(hook), checkpointer=checkpoints, loggers=[log], log_every=5)
        assert checkpoints.last_committed_step == 4
        assert set(log.rows) == {5}
        state = _fit(checkpointer=checkpoints, loggers=[log], log_every=5)
    assert log.truncated == [0, 4] and set(log.rows) == {5, 6}
    toy.assert_bit_equal(state, _uninterrupted()[0])


def test_a_finished_run_says_so_and_trains_no_more(tmp_path, capsys):
    with Checkpoints(tmp_path) as checkpoints:
        first = _fit(checkpointer=checkpoints, num_steps=2)
        untouched = toy.Data(length=0)
        again = _fit(data=untouched, checkpointer=checkpoints, num_steps=2)
    toy.assert_bit_equal(first, again)
    assert "2 of 2 updates are done already" in capsys.readouterr().out


def test_log_rows_are_means_over_their_window():
    every, log = Memory(), Memory()
    _fit(loggers=[every], log_every=1)
    _fit(loggers=[log], log_every=4)
    assert set(every.rows) == {1, 2, 3, 4, 5, 6} and set(log.rows) == {4, 6}
    for name in ("loss", "grad_norm", "abs_error"):
        values = [every.rows[step][name] for step in range(1, 7)]
        means = [np.mean(values[:4]), np.mean(values[4:])]
        np.testing.assert_allclose([log.rows[4][name], log.rows[6][name]], means, rtol=1e-12)


def _poisoned(at):
    """A step whose loss is NaN from update number `at` on."""

    def step(state, batch, keys):
        state, metrics = _step()(state, batch, keys)
        bad = state.step >= at
        return state, {**metrics, "loss": jnp.where(bad, jnp.nan, metrics["loss"])}

    return step


@pytest.mark.parametrize("log_every", [1, 100])
def test_nan_stops_the_run_and_is_not_saved(tmp_path, log_every):
    """Noticed at the next log row, or at the latest before a checkpoint would be written."""
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(BadUpdateError, match="update 3 is bad: loss=nan.* is of step 2"):
            _fit(
                step_fn=_poisoned(at=3),
                checkpointer=checkpoints,
                log_every=log_every,
                checkpoint_every=2,
            )
        assert checkpoints.steps() == (2,)


def test_an_infinite_gradient_stops_the_run_without_checkpoints():
    def step(state, batch, keys):
        state, metrics = _step()(state, batch, keys)
        return state, {**metrics, "grad_norm": jnp.inf}

    with pytest.raises(BadUpdateError) as stopped:
        _fit(step_fn=step)
    assert (stopped.value.step, stopped.value.last_checkpoint) == (1, None)
    assert stopped.value.grad_norm == np.inf


def _guarded(guard):
    step = make_train_step(toy.loss, TX, ema=EMA(0.9), guard=guard)
    return jax.jit(step, donate_argnums=0)


class Poisoned(toy.Data):
    """Batches number 3 and 4 are NaN."""

    def __next__(self):
        batch = super().__next__()
        if self.position in (3, 4):
            batch["y"] = np.full_like(batch["y"], np.nan)
        return batch


def test_skipped_updates_are_counted_and_left_out_of_the_means():
    every, log = Memory(), Memory()
    options = {"step_fn": _guarded(Guard(max_skipped=2)), "max_skipped": 2}
    state = _fit(data=Poisoned(), loggers=[every], log_every=1, **options)
    _fit(data=Poisoned(), loggers=[log], log_every=6, **options)
    assert [every.rows[step]["skipped"] for step in range(1, 7)] == [0, 0, 1, 1, 0, 0]
    assert set(every.rows[3]) == {"skipped"}
    good = [every.rows[step]["loss"] for step in (1, 2, 5, 6)]
    assert log.rows[6]["skipped"] == 2
    np.testing.assert_allclose(log.rows[6]["loss"], np.mean(good), rtol=1e-12)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_one_more_skipped_update_than_allowed_is_an_error():
    with pytest.raises(BadUpdateError, match="update 4 is bad.* not applied, as the 1 before"):
        _fit(data=Poisoned(), step_fn=_guarded(Guard(max_skipped=1)), max_skipped=1)


def test_a_mean_over_part_of_the_batch_is_the_quotient_of_the_means():
    totals, counts = np.array([1.0, 0.0, 3.0, 0.5]), np.array([0.5, 0.0, 0.25, 0.25])

    def step(state, batch, keys):
        state, metrics = _step()(state, batch, keys)
        n = int(state.step) - 1
        ratio = Ratio(np.float32(totals[n % 4]), np.float32(counts[n % 4]))
        return state, {**metrics, "part": ratio}

    log = Memory()
    _fit(step_fn=step, loggers=[log], log_every=2, num_steps=4)
    assert log.rows[2]["part"] == pytest.approx(1.0 / 0.5)
    assert log.rows[4]["part"] == pytest.approx(3.5 / 0.5)
    _fit(step_fn=step, loggers=[log := Memory()], log_every=1, num_steps=2)
    assert "part" in log.rows[1] and "part" not in log.rows[2]


def test_an_open_window_survives_with_its_ratios(tmp_path):
    def step(state, batch, keys):
        state, metrics = _step()(state, batch, keys)
        n = np.float32(state.step)
        return state, {**metrics, "part": Ratio(n, n / 2 - 0.25)}

    expected, log = Memory(), Memory()
    _fit(step_fn=step, loggers=[expected], log_every=6)
    with Checkpoints(tmp_path) as checkpoints:
        options = {"step_fn": step, "checkpointer": checkpoints, "loggers": [log], "log_every": 6}
        with pytest.raises(SystemExit):
            _fit(data=toy.Data(hook=_send(signal.SIGTERM, position=2)), **options)
        _fit(**options)
    assert log.rows == expected.rows


def test_rows_say_how_fast_it_went_and_how_long_data_took():
    class Timed:
        rows = []

        def scalars(self, step, values):
            self.rows.append({name: values.get(name) for name in TIMES})

        def truncate_after(self, step):
            pass

    _fit(loggers=[Timed()], log_every=2)
    for row in Timed.rows[1:]:
        assert row["images_per_second"] == pytest.approx(toy.BATCH / row["step_seconds"])
        assert 0.0 <= row["data_wait"] <= 1.0


def test_ctrl_c_leaves_a_usable_state():
    """As in a notebook, without checkpoints; it can be trained further."""
    with pytest.raises(TrainingInterrupted, match="after step 3") as stopped:
        _fit(data=toy.Data(hook=_send(signal.SIGINT, position=2)))
    state, data = stopped.value.state, toy.Data()
    assert stopped.value.step == int(state.step) == 3
    data.set_state({"position": 3})
    config = LoopConfig(num_steps=6, batch_size=toy.BATCH, progress=False)
    state = fit(state, _step(), data, key=KEY, config=config)
    toy.assert_bit_equal(state, _uninterrupted()[0])


def test_a_trace_can_be_taken(tmp_path):
    _fit(num_steps=12, trace_dir=str(tmp_path / "trace"))
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_a_run_too_short_for_a_trace_says_so(tmp_path, capsys):
    _fit(num_steps=4, trace_dir=str(tmp_path / "trace"))
    assert "no trace is made: fewer than 5 updates are left" in capsys.readouterr().out
    _fit(num_steps=5, trace_dir=str(tmp_path / "trace"))
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_a_corrupted_checkpoint_is_passed_over_and_its_step_made_again(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        _fit(checkpointer=checkpoints, checkpoint_every=2, num_steps=4)
    (tmp_path / "4" / "layout" / "metadata").write_text("{}")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.warns(CheckpointWarning, match="step 4 .* passed over"):
            state = _fit(checkpointer=checkpoints, checkpoint_every=2)
        assert checkpoints.steps() == (2, 4, 6) and (tmp_path / "4.corrupted").is_dir()
    toy.assert_bit_equal(state, _uninterrupted()[0])


def test_a_checkpoint_that_cannot_be_written_stops_the_run(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=9))
        with pytest.raises(CheckpointSaveError, match="9 are free"):
            _fit(checkpointer=checkpoints)


def test_ctrl_c_leaves_the_state_where_it_cannot_be_saved(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=9))
        with pytest.raises(TrainingInterrupted) as stopped:
            data = toy.Data(hook=_send(signal.SIGINT, position=2))
            _fit(data=data, checkpointer=checkpoints)
    assert isinstance(stopped.value.__cause__, CheckpointSaveError)
    assert int(stopped.value.state.step) == 3


def test_a_signal_in_the_last_evaluation_is_not_lost():
    with pytest.raises(SystemExit):
        _fit(eval_every=6, on_eval=lambda step, state: os.kill(os.getpid(), signal.SIGTERM))


def test_a_failing_evaluation_loses_no_update(tmp_path):
    def fails(step, state):
        raise MemoryError

    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(MemoryError):
            _fit(checkpointer=checkpoints, eval_every=4, on_eval=fails)
        assert checkpoints.steps() == (4,)


def test_the_claim_ends_with_the_call(tmp_path):
    """So that a cell of a notebook can be run again while its checkpoints are still open."""
    kept = Checkpoints(tmp_path)
    _fit(checkpointer=kept, num_steps=2)
    with Checkpoints(tmp_path) as checkpoints:
        _fit(checkpointer=checkpoints, num_steps=4)
    kept.close()


def test_evaluation_sees_the_state_of_its_step():
    seen = []
    _fit(eval_every=2, on_eval=lambda step, state: seen.append((step, int(state.step))))
    assert seen == [(2, 2), (4, 4), (6, 6)]


def test_compilation_is_reported_apart(capsys):
    _fit(num_steps=2, progress=True)
    captured = capsys.readouterr()
    assert "compiling and the first update took" in captured.out
    assert "compiling…" in captured.err and "training: 100%" in captured.err


@pytest.fixture
def ctrl_c():
    """SIGINT as in a terminal; a shell starts commands in the background with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_acts_at_once(tmp_path, ctrl_c):
    def hook(position):
        if position == 1:
            # Raised in this thread, so that two of them are never delivered as one.
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(KeyboardInterrupt):
            _fit(data=toy.Data(hook), checkpointer=checkpoints)
        assert checkpoints.steps() == ()


def test_no_handler_is_installed_under_jax_distributed(monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    before, during = signal.getsignal(signal.SIGTERM), []
    _fit(num_steps=1, data=toy.Data(lambda _: during.append(signal.getsignal(signal.SIGTERM))))
    assert during == [before]


def test_ctrl_c_under_jax_distributed_is_a_notice_to_all_processes(monkeypatch, ctrl_c):
    notices, before = [], signal.getsignal(signal.SIGINT)
    old = signal.signal(signal.SIGTERM, lambda *_: notices.append(True))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processes, "reached_preemption", lambda: bool(notices))
    try:
        with pytest.raises(TrainingInterrupted) as stop:
            _fit(data=toy.Data(_send(signal.SIGINT, position=2)))
    finally:
        signal.signal(signal.SIGTERM, old)
    assert stop.value.step == 3 and notices == [True]
    assert signal.getsignal(signal.SIGINT) == before


def test_data_that_ends_or_has_another_size_is_refused():
    with pytest.raises(ValueError, match="ended after 2 updates but num_steps=6"):
        _fit(data=toy.Data(length=2))
    config = LoopConfig(num_steps=1, batch_size=5, progress=False)
    with pytest.raises(ValueError, match=r"batch_size=5 over 1 .* shapes \[\(4, 3\), \(4, 2\)\]"):
        fit(_state(), _step(), toy.Data(), key=KEY, config=config)


def test_lengths_below_one_are_refused():
    with pytest.raises(ValueError, match="log_every must be at least 1, got 0"):
        LoopConfig(num_steps=1, batch_size=1, log_every=0)
