"""Guard: bad updates are as if their batch had not been drawn, whatever runs the step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.core.types import AdaptiveLoss
from diffusion_jax.training import parallel
from diffusion_jax.training.ema import EMA
from diffusion_jax.training.guard import Guard
from diffusion_jax.training.optimizer import Optimizer
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.step import make_train_step, step_keys
from tests.training import toy

# A rate that changes with every update and Adam's moments tell one update more or less.
OPTIMIZER = Optimizer(learning_rate=0.05, schedule="linear", total_steps=50)
TX = OPTIMIZER.build()
# The average's decay is still growing.
AVERAGE = EMA(0.999)
WATCHED = Guard(max_skipped=3)
SPIKE = Guard(spike=20.0, decay=0.8, warmup=3)
MOVED = ("trainable", "ema", "opt_state", "loss_state")


def _state(loss=toy.loss):
    return TrainState.create(toy.params(), TX, trainable=("adapter/**",), loss=loss)


def _make(guard=WATCHED, loss=toy.loss, **options):
    rate = OPTIMIZER.learning_rate_at
    return make_train_step(loss, TX, ema=AVERAGE, guard=guard, learning_rate=rate, **options)


@functools.cache
def _step(guard=WATCHED):
    return jax.jit(_make(guard))


def _batch(step, factor=None):
    """Batch number `step`; with a factor, the targets of its last example times that."""
    batch = toy.batch(step)
    if factor is not None:
        batch["y"][-1] *= factor
    return batch, step_keys(jax.random.key(0), step, toy.BATCH)


def _run(step, state, batches):
    rows = []
    for batch, keys in batches:
        state, metrics = step(state, batch, keys)
        rows.append(jax.device_get(metrics))
    return state, rows


def _moved(state):
    return {name: getattr(state, name) for name in MOVED}


@pytest.mark.parametrize("factor", [np.nan, np.inf])
def test_bad_updates_are_as_if_their_batches_had_not_been_drawn(factor):
    bad = (2, 3, 6)
    given = [_batch(n, factor if n in bad else None) for n in range(8)]
    state, rows = _run(_step(), _state(), given)
    left, good = _run(_step(), _state(), [given[n] for n in range(8) if n not in bad])
    toy.assert_bit_equal(_moved(state), _moved(left))
    assert np.isfinite(jax.tree.leaves(state.trainable)[0]).all()
    assert (int(state.step), int(left.step), int(state.applied)) == (8, 5, 5)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 0, 0, 1, 0]
    assert [row["skipped_in_a_row"] for row in rows] == [0, 0, 1, 2, 0, 0, 1, 0]
    rates = [row["learning_rate"] for row in rows if not row["skipped"]]
    np.testing.assert_array_equal(rates, [row["learning_rate"] for row in good])
    np.testing.assert_allclose(rates, 0.05 * (1 - np.arange(5) / 50), rtol=1e-6)
    assert (int(state.guard_state.good), int(state.guard_state.skipped)) == (5, 3)


def test_no_number_of_bad_updates_is_ever_applied():
    """Where optax.apply_if_finite gives up and applies them."""
    start = _run(_step(), _state(), [_batch(0)])[0]
    state, rows = _run(_step(), start, [_batch(1, np.nan)] * 12)
    toy.assert_bit_equal(_moved(state), _moved(start))
    assert rows[-1]["skipped_in_a_row"] == 12

    tx = optax.apply_if_finite(TX, WATCHED.max_skipped)
    plain = jax.jit(make_train_step(toy.loss, tx, ema=AVERAGE))
    other = TrainState.create(toy.params(), tx, trainable=("adapter/**",))
    other, _ = _run(plain, other, [_batch(1, np.nan)] * 12)
    assert np.isnan(other.trainable["adapter"]["w"]).all()


def test_a_gradient_that_is_not_finite_is_bad_though_the_loss_is_finite():
    def loss(params, batch, keys):
        value, metrics = toy.loss(params, batch, keys)
        # At flag = 0 the root is 0 and its slope infinite.
        flag = batch["flag"].mean()
        return value + jnp.sqrt(flag * jnp.sum(params["adapter"]["w"] ** 2)), metrics

    start = _state()
    batch, keys = _batch(0)
    batch["flag"] = np.zeros(toy.BATCH, np.float32)
    state, metrics = jax.jit(_make(loss=loss))(start, batch, keys)
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert metrics["skipped"] == 1
    toy.assert_bit_equal(_moved(state), _moved(start))


def test_spikes_are_told_by_the_running_mean_of_good_norms():
    """Against the equations in float64, at a factor that ordinary batches reach."""
    guard = Guard(spike=1.2, decay=0.8, warmup=3)
    given = [_batch(n, 3.0 if n == 1 else None) for n in range(40)]
    state, rows = _run(_step(guard), _state(), given)
    mean, good, skipped = 0.0, 0, []
    for row in rows:
        norm = float(row["grad_norm"])
        bad = good >= 3 and norm > 1.2 * mean / (1 - 0.8**good)
        skipped.append(bad)
        if not bad:
            mean, good = 0.8 * mean + 0.2 * norm, good + 1
    assert [bool(row["skipped"]) for row in rows] == skipped
    assert not any(skipped[:3]) and 5 < sum(skipped) < 30
    np.testing.assert_allclose(state.guard_state.mean_norm, mean, rtol=1e-5)
    assert int(state.guard_state.good) == good


def test_a_spike_is_left_out_and_forgotten():
    given = [_batch(n, 1000.0 if n in (5, 6) else None) for n in range(9)]
    state, rows = _run(_step(SPIKE), _state(), given)
    left, _ = _run(_step(SPIKE), _state(), given[:5] + given[7:])
    assert [row["skipped_in_a_row"] for row in rows] == [0] * 5 + [1, 2, 0, 0]
    assert all(np.isfinite(row["grad_norm"]) for row in rows)
    toy.assert_bit_equal(_moved(state), _moved(left))
    np.testing.assert_array_equal(state.guard_state.mean_norm, left.guard_state.mean_norm)


def test_the_memory_of_an_adaptive_loss_keeps_its_bits():
    def apply(params, batch, keys, memory):
        loss, metrics = toy.loss(params, batch, keys)
        return loss, metrics, {"y": batch["y"][:, 0]}

    loss = AdaptiveLoss(
        lambda: jnp.zeros(()), apply, lambda memory, seen: memory + jnp.sum(seen["y"][:-1])
    )
    step = jax.jit(_make(loss=loss))
    start, _ = _run(step, _state(loss=loss), [_batch(0)])
    assert float(start.loss_state) != 0.0
    state, rows = _run(step, start, [_batch(1, np.inf)])
    assert rows[0]["skipped"] == 1
    toy.assert_bit_equal(_moved(state), _moved(start))


def _forms():
    return {
        "accumulate": lambda: jax.jit(_make(accumulate=2)),
        "mesh": lambda: parallel.mesh_train(_make(accumulate=2), parallel.make_mesh()),
        "fsdp": lambda: parallel.mesh_train(_make(), parallel.make_mesh(fsdp=2), min_shard_size=1),
        "pmap": lambda: parallel.pmap_train(_make(axis_name="data")),
    }


@pytest.mark.parametrize(
    "form",
    ["accumulate", *(pytest.param(f, marks=pytest.mark.slow) for f in _forms() if f[0] != "a")],
)
def test_one_bad_example_leaves_the_update_out_everywhere(form):
    """It lies in the part of one microbatch and one device."""
    assert jax.device_count() == 2, "these tests need two devices, see conftest.py"
    run = _forms()[form]()
    before, _ = _run(run, _state(), [_batch(0), _batch(1)])
    expected = jax.device_get(_moved(before))
    state, rows = _run(run, before, [_batch(2, np.nan)])
    assert rows[0]["skipped"] == 1 and int(state.step) == 3
    toy.assert_bit_equal(jax.device_get(_moved(state)), expected)
    for leaf in jax.tree.leaves((state.guard_state, state.opt_state)):
        if leaf.is_fully_replicated:
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(shard.data, leaf)
    state, rows = _run(run, state, [_batch(3)])
    assert rows[0]["skipped"] == 0 and int(state.guard_state.good) == 3


@pytest.mark.parametrize("guard", [WATCHED, SPIKE])
def test_good_updates_are_those_of_a_run_without_a_guard(guard):
    given = [_batch(n) for n in range(5)]
    watched, _ = _run(_step(guard), _state(), given)
    plain, rows = _run(_step(Guard()), _state(), given)
    for a, b in zip(jax.tree.leaves(_moved(watched)), jax.tree.leaves(_moved(plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    assert not any(name.startswith("skipped") for name in rows[0])


def test_a_run_without_a_guard_can_go_on_with_one():
    given = [_batch(0), _batch(1), _batch(2, np.nan)]
    before, rows = _run(_step(Guard()), _state(), given[:2])
    assert not Guard().watches and "skipped" not in rows[0]
    after, rows = _run(_step(), before, given[2:])
    assert rows[0]["skipped"] == 1 and int(after.guard_state.in_a_row) == 1
    toy.assert_bit_equal(_moved(after), _moved(before))


def test_the_state_can_be_donated():
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(_state())]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_skipped": -1}, "max_skipped must be at least 0, got -1"),
        ({"spike": 1.0}, "spike must be a finite number above 1, got 1.0"),
        ({"spike": float("inf")}, "got inf"),
        ({"spike": 2.0, "decay": 1.0}, r"decay must lie in \[0, 1\), got 1.0"),
        ({"spike": 2.0, "warmup": 0}, "warmup must be at least 1, got 0"),
        ({"decay": 0.5}, "decay = 0.5 and warmup = 100 .* set spike"),
        ({"max_skipped": 2, "warmup": 5}, "warmup = 5"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Guard(**options)
