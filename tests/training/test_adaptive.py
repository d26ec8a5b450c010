"""Losses with a memory in the training step: one memory whatever the split, exact resuming."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.core.condition import Condition
from diffusion_jax.core.schedules import Linear
from diffusion_jax.core.types import AdaptiveLoss
from diffusion_jax.io.checkpoint import CheckpointMismatchError, Checkpoints
from diffusion_jax.losses.importance import LossAware
from diffusion_jax.training import parallel
from diffusion_jax.training.ema import EMA
from diffusion_jax.training.loop import LoopConfig, fit
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.step import make_train_step, step_keys
from tests.training import toy

TX = optax.adam(0.05)
KEY = jax.random.key(0)
TIMES = LossAware(history=2)
NUM_TIMESTEPS = 4


def _queue():
    """A loss whose memory depends on the order of the examples: m ← m / 2 + y for each."""

    def apply(params, batch, keys, memory):
        scale = params["adapter"]["w"][0, 0]
        values = scale * batch["y"][:, 0] + memory
        return jnp.mean(values), {"memory": memory}, {"y": batch["y"][:, 0]}

    def update(memory, observations):
        def add(memory, y):
            return memory / 2.0 + y, None

        return jax.lax.scan(add, memory, observations["y"])[0]

    return AdaptiveLoss(lambda: jnp.zeros(()), apply, update)


@functools.cache
def _loss_aware():
    """The toy's error, larger for small t, behind loss-aware times."""

    def example_loss(params, x0, t, cond, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, (toy.WIDTH,)))(keys[:, 0])
        x = params["base"]["scale"][None, :] * x0 + noise
        error = x @ params["adapter"]["w"] - cond.vector
        values = 0.5 * jnp.sum(error**2, axis=-1) * 4.0**-t
        return values, {"t": t}

    times = TIMES.wrap(example_loss, Linear(NUM_TIMESTEPS))

    def apply(params, batch, keys, memory):
        return times.apply(params, batch["x"], Condition(vector=batch["y"]), keys, memory)

    return AdaptiveLoss(times.init, apply, times.update)


def _state(loss):
    return TrainState.create(toy.params(), TX, trainable=("adapter/**",), loss=loss)


def _step(loss, accumulate=1, axis_name=None):
    return make_train_step(loss, TX, ema=EMA(0.5), accumulate=accumulate, axis_name=axis_name)


def _run(run, state, *, num_steps=2, batch=lambda step: toy.batch(step, size=8)):
    for step in range(num_steps):
        state, metrics = run(state, batch(step), step_keys(KEY, step, 8))
    return state, metrics


def _whole_numbers(step):
    # Halves of small integers are exact in float32, so that equality tests the order alone.
    rng = np.random.default_rng(step)
    return {"x": np.zeros((8, 3), np.float32), "y": np.float32(rng.integers(0, 8, (8, 2)))}


def _forms():
    return {
        "whole": lambda loss: jax.jit(_step(loss)),
        "accumulate": lambda loss: jax.jit(_step(loss, accumulate=2)),
        "mesh": lambda loss: parallel.mesh_train(_step(loss, 2), parallel.make_mesh()),
        "pmap": lambda loss: parallel.pmap_train(_step(loss, 2, "data")),
    }


SPLITS = [
    "whole",
    "accumulate",
    pytest.param("mesh", marks=pytest.mark.slow),
    pytest.param("pmap", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("form", SPLITS)
def test_observations_come_once_and_in_the_order_of_the_global_batch(form):
    """Also, every part of a batch sees the memory as it was before the step."""
    assert jax.device_count() == 2, "these tests need two devices, see conftest.py"
    state, metrics = _run(_forms()[form](_queue()), _state(_queue()), batch=_whole_numbers)
    memory, before = 0.0, None
    for step in range(2):
        before = memory
        for y in _whole_numbers(step)["y"][:, 0]:
            memory = memory / 2 + float(y)
    np.testing.assert_array_equal(state.loss_state, np.float32(memory))
    np.testing.assert_array_equal(metrics["memory"], np.float32(before))
    for shard in state.loss_state.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.float32(memory))


@functools.cache
def _whole():
    return _forms()["whole"](_loss_aware())


@functools.cache
def _reference():
    return _run(_whole(), _state(_loss_aware()), num_steps=5)


@pytest.mark.slow
def test_the_reference_leaves_warmup_and_prefers_what_was_large():
    """Otherwise the tests against it would say nothing of importance sampling."""
    memory = _reference()[0].loss_state
    assert int(memory.count.sum()) == 5 * 8 and int(memory.count.min()) >= TIMES.history
    p = TIMES.probabilities(memory)
    assert int(jnp.argmax(p)) == 0 and float(p[3]) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("form", ["accumulate", "mesh", "pmap"])
def test_loss_aware_training_is_the_same_however_it_is_split(form):
    expected, expected_metrics = _reference()
    state, metrics = _run(_forms()[form](_loss_aware()), _state(_loss_aware()), num_steps=5)
    np.testing.assert_array_equal(state.loss_state.count, expected.loss_state.count)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)


def test_gradient_is_that_of_the_weighted_loss_by_finite_differences():
    """Weights and times are constants of the gradient."""
    state, keys, batch = _reference()[0], step_keys(KEY, 9, 8), toy.batch(9, size=8)
    # Adam's first moment tells the gradient: m' = 0.9 m + 0.1 g.
    moments = [s.opt_state[0].mu["adapter"]["w"] for s in (state, _whole()(state, batch, keys)[0])]
    gradient = (np.asarray(moments[1]) - 0.9 * np.asarray(moments[0])) / 0.1

    def at(offset):
        moved = {"adapter": {"w": state.trainable["adapter"]["w"] + offset}}
        return float(_whole()(state.replace(trainable=moved), batch, keys)[1]["loss"])

    direction = np.float32(np.sign(gradient)) / 64
    # The loss is quadratic in w, for which central differences are exact up to rounding.
    slope = (at(direction) - at(-direction)) / 2
    np.testing.assert_allclose(slope, np.sum(gradient * direction), rtol=1e-3)


class _Interrupted(Exception):
    pass


class Data(toy.Data):
    """Batches of eight."""

    def __next__(self):
        super().__next__()
        return toy.batch(self.position, size=8)


@pytest.mark.slow
def test_resumed_from_a_checkpoint_equals_uninterrupted_bit_for_bit(tmp_path):
    """Past warm-up, where a memory that was lost would change the times."""

    def train(data, checkpointer=None):
        config = LoopConfig(num_steps=10, batch_size=8, checkpoint_every=7, progress=False)
        state = _state(_loss_aware())
        return fit(state, _whole(), data, key=KEY, config=config, checkpointer=checkpointer)

    def stop(position):
        if position == 8:
            raise _Interrupted

    expected = train(Data())
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(_Interrupted):
        train(Data(stop), checkpoints)
    with Checkpoints(tmp_path) as checkpoints:
        saved, _ = checkpoints.restore(_state(_loss_aware()), 7)
        toy.assert_bit_equal(train(Data(), checkpoints), expected)
    assert int(saved.loss_state.count.min()) >= TIMES.history


def test_checkpoints_of_plain_and_adaptive_losses_do_not_mix(tmp_path):
    """A plain state has no leaf more than before there were memories."""
    plain, adaptive = _state(toy.loss), _state(_loss_aware())
    assert plain.loss_state == ()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, plain, {})
        checkpoints.save(2, adaptive, {})
        checkpoints.wait()
        toy.assert_bit_equal(checkpoints.restore(plain, 1)[0], plain)
        message = r"loss_state/history: saved nothing, wanted float32\[4, 2\]"
        with pytest.raises(CheckpointMismatchError, match=message):
            checkpoints.restore(adaptive, 1)
        message = r"another model, optimizer, loss .*\n.*loss_state/count: saved int32\[4\]"
        with pytest.raises(CheckpointMismatchError, match=message):
            checkpoints.restore(plain, 2)


def test_a_state_without_the_memory_of_the_loss_is_refused():
    keys, batch = step_keys(KEY, 0, 8), toy.batch(size=8)

    def take(state, loss):
        jax.eval_shape(_step(loss), state, batch, keys)

    message = r"needs a memory of float32\[4, 2\], int32\[4\], but .* has none; .*loss=loss"
    with pytest.raises(ValueError, match=message):
        take(_state(None), _loss_aware())
    with pytest.raises(ValueError, match=r"needs a memory of none, but .* has float32\[4, 2\]"):
        take(_state(_loss_aware()), toy.loss)
    with pytest.raises(ValueError, match=r"float32\[4, 2\], int32\[4\], but .* has float32\[\]"):
        take(_state(_queue()), _loss_aware())


def test_the_memory_can_be_donated_and_the_loss_keeps_its_own():
    start = jnp.ones(3)
    loss = AdaptiveLoss(lambda: start, lambda *_: None, lambda *_: None)
    state = _state(loss)
    jax.block_until_ready(jax.jit(lambda s: s.loss_state + 1.0, donate_argnums=0)(state))
    np.testing.assert_array_equal(start, [1.0, 1.0, 1.0])
