"""The training step against gradients derived by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.core.part_mean import Ratio
from diffusion_jax.training import parallel
from diffusion_jax.training.ema import EMA
from diffusion_jax.training.optimizer import Optimizer
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.step import make_train_step, step_keys
from tests.training import toy

RATE = 0.1


@functools.cache
def _take_step(accumulate):
    tx = optax.sgd(RATE)
    state = TrainState.create(toy.params(), tx, trainable=("adapter/**",))
    step = make_train_step(toy.loss, tx, ema=EMA(0.75, warmup=False), accumulate=accumulate)
    keys = step_keys(jax.random.key(1), 0, toy.BATCH)
    return *jax.jit(step)(state, toy.batch(), keys), keys


@pytest.mark.parametrize("accumulate", [1, 2])
def test_update_is_the_gradient_of_the_whole_batch(accumulate):
    state, metrics, keys = _take_step(accumulate)
    noise = [jax.random.normal(key, (toy.WIDTH,)) for key in keys]
    gradient = toy.gradient(toy.params(), toy.batch(), noise)
    expected = np.float64(toy.params()["adapter"]["w"]) - RATE * gradient
    np.testing.assert_allclose(state.trainable["adapter"]["w"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(metrics["noise"], np.mean(noise), rtol=1e-5)
    loss, own = toy.loss(toy.params(), toy.batch(), keys)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["abs_error"], own["abs_error"], rtol=1e-5)
    assert int(state.step) == 1


def test_frozen_leaves_keep_their_bits_and_the_average_moves():
    state, _, _ = _take_step(1)
    frozen = {"base": toy.params()["base"], "label": {}}
    toy.assert_bit_equal(state.frozen, frozen)
    old, new = toy.params()["adapter"]["w"], state.trainable["adapter"]["w"]
    assert not np.allclose(old, new)
    np.testing.assert_allclose(state.ema["adapter"]["w"], 0.75 * old + 0.25 * new, rtol=1e-5)


def test_step_keys_are_image_keys_of_the_step():
    key = jax.random.key(3)
    keys = step_keys(key, 7, 4)
    expected = [jax.random.fold_in(jax.random.fold_in(key, 7), i) for i in range(4)]
    data = jax.random.key_data
    np.testing.assert_array_equal(data(keys), [data(k) for k in expected])
    np.testing.assert_array_equal(data(step_keys(key, 7, 2, offset=2)), data(keys)[2:])
    assert not np.array_equal(data(step_keys(key, 8, 4)), data(keys))


@pytest.mark.parametrize("arguments", [(0, 0, 0), (-1, 1, 0), (0, 1, -1)])
def test_step_keys_refuse_what_cannot_be(arguments):
    step, size, offset = arguments
    with pytest.raises(ValueError, match=f"got batch_size={size}, step={step}, offset={offset}"):
        step_keys(jax.random.key(0), step, size, offset=offset)


def _bare_step(loss=toy.loss, **options):
    tx = optax.sgd(RATE)
    return make_train_step(loss, tx, ema=EMA(), **options), TrainState.create(toy.params(), tx)


def test_a_batch_that_does_not_fit_is_refused():
    step, state = _bare_step(accumulate=3)
    keys = step_keys(jax.random.key(0), 0, toy.BATCH)
    with pytest.raises(ValueError, match="4 does not split into 3"):
        jax.eval_shape(step, state, toy.batch(), keys)
    with pytest.raises(ValueError, match=r"4 keys need .* 4, got shapes \{'x': \[\(6, 3\)\]"):
        jax.eval_shape(step, state, toy.batch(size=6), keys)


@pytest.mark.parametrize("name", ["grad_norm", "learning_rate", "skipped_in_a_row"])
def test_metric_names_of_the_step_are_reserved(name):
    def loss(params, batch, keys):
        value, metrics = toy.loss(params, batch, keys)
        return value, {**metrics, name: jnp.zeros(())}

    step, state = _bare_step(loss)
    with pytest.raises(ValueError, match=rf"\['{name}'\]; rename"):
        jax.eval_shape(step, state, toy.batch(), step_keys(jax.random.key(0), 0, toy.BATCH))


def _parts_loss(params, batch, keys):
    """The toy's loss, and the mean of x over the examples where it is positive."""
    value, _ = toy.loss(params, batch, keys)
    x = batch["x"][:, 0]
    part = x > 0
    return value, {"part": Ratio(jnp.mean(jnp.where(part, x, 0.0)), jnp.mean(part * 1.0))}


@pytest.mark.parametrize("form", ["accumulate", "mesh", "pmap"])
def test_a_mean_over_part_of_the_batch_is_one_however_it_is_split(form):
    """Each half holds another number of positive examples."""
    tx, batch = optax.sgd(RATE), toy.batch()
    batch["x"][:, 0] = [1.0, 2.0, -3.0, 6.0]
    make = functools.partial(make_train_step, _parts_loss, tx, ema=EMA())
    run = {
        "accumulate": lambda: jax.jit(make(accumulate=2)),
        "mesh": lambda: parallel.mesh_train(make(accumulate=2), parallel.make_mesh()),
        "pmap": lambda: parallel.pmap_train(make(axis_name="data")),
    }[form]()
    keys = step_keys(jax.random.key(1), 0, toy.BATCH)
    _, metrics = run(TrainState.create(toy.params(), tx), batch, keys)
    total, count = metrics["part"]
    np.testing.assert_allclose([total, count, total / count], [9 / 4, 3 / 4, 3.0], rtol=1e-6)


def test_the_learning_rate_is_that_of_the_update():
    config = Optimizer(name="sgd", b1=0.0, learning_rate=RATE, schedule="linear", total_steps=4)
    tx = config.build()
    step = make_train_step(toy.loss, tx, ema=EMA(), learning_rate=config.learning_rate_at)
    state, run, rates, keys = TrainState.create(toy.params(), tx), jax.jit(step), [], None
    for n in range(3):
        before, keys = state.trainable, step_keys(jax.random.key(0), n, toy.BATCH)
        state, metrics = run(state, toy.batch(n), keys)
        moved = optax.tree.norm(jax.tree.map(jnp.subtract, state.trainable, before))
        # The optimizer clips the gradient to the norm 1.
        rates.append((metrics["learning_rate"], moved / min(1.0, metrics["grad_norm"])))
    np.testing.assert_allclose(rates, [[r, r] for r in (0.1, 0.075, 0.05)], rtol=1e-4)


def test_accumulate_below_one_is_refused():
    with pytest.raises(ValueError, match="got 0"):
        _bare_step(accumulate=0)
