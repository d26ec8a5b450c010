"""Optimizer: rates by hand, every named optimizer on a quadratic, options that do not apply."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.training.optimizer import OPTIMIZERS, SCHEDULES, Optimizer


@pytest.mark.parametrize(
    "schedule, expected",
    [
        # Warm-up of 4, then progress 0, 1/2, 1 and beyond the end.
        ("cosine", [0.25, 1.0, 1.0, 0.5, 0.0, 0.0]),
        ("linear", [0.25, 1.0, 1.0, 0.5, 0.0, 0.0]),
        ("constant", [0.25, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rate(schedule, expected):
    total = None if schedule == "constant" else 12
    config = Optimizer(learning_rate=0.2, schedule=schedule, warmup_steps=4, total_steps=total)
    rates = [float(config.learning_rate_at(n)) for n in (0, 3, 4, 8, 12, 99)]
    np.testing.assert_allclose(rates, 0.2 * np.array(expected), atol=1e-8)


def test_cosine_and_linear_differ_at_a_quarter():
    rates = {
        name: float(Optimizer(learning_rate=1.0, schedule=name, total_steps=4).learning_rate_at(1))
        for name in ("cosine", "linear")
    }
    np.testing.assert_allclose(rates["linear"], 0.75, rtol=1e-6)
    np.testing.assert_allclose(rates["cosine"], 0.5 + np.sqrt(2) / 4, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_descends(name):
    tx = Optimizer(name=name, learning_rate=0.05).build()
    params = {"w": jnp.array([3.0, -2.0])}

    def update(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda w: w - 1.0, params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (last, _), _ = jax.lax.scan(update, (params, tx.init(params)), length=200)
    assert float(jnp.abs(last["w"] - 1.0).max()) < 0.5


def test_the_first_adam_step_has_the_size_of_the_rate():
    tx = Optimizer(learning_rate=0.1, warmup_steps=10, clip_norm=None).build()
    params = {"w": jnp.array([1.0, 1.0])}
    updates, _ = tx.update({"w": jnp.array([4.0, -0.5])}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.01, 0.01], rtol=1e-4)


def test_clipping_bounds_the_global_norm():
    params = {"a": jnp.array([0.0]), "b": jnp.array([0.0])}
    tx = Optimizer(name="sgd", b1=0.0, learning_rate=1.0, clip_norm=2.0).build()
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-1.2, -1.6], rtol=1e-6)


def test_adamw_decays_by_rate_times_weight_decay():
    tx = Optimizer(name="adamw", learning_rate=0.1, weight_decay=0.5).build()
    params = {"w": jnp.array([2.0])}
    updates, _ = tx.update({"w": jnp.array([0.0])}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.1 * 0.5 * 2.0], rtol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "adamm"}, "'adamm'; there are .*'adamw'"),
        ({"schedule": "step"}, f"'step'; there are .*'{sorted(SCHEDULES)[0]}'"),
        ({"name": "adam", "weight_decay": 0.1}, "adam has no weight_decay.*adamw"),
        ({"name": "sgd", "b2": 0.9}, "sgd has no b2"),
        ({"total_steps": 10}, "never ends, got total_steps=10"),
        ({"schedule": "cosine"}, "needs total_steps above warmup_steps=0, got None"),
        ({"schedule": "linear", "warmup_steps": 5, "total_steps": 5}, "warmup_steps=5, got 5"),
        ({"warmup_steps": -1}, "got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"clip_norm": -1.0}, "clip_norm must be above 0, got -1.0"),
        ({"b1": 1.0}, r"b1 must lie in \[0, 1\), got 1.0"),
        ({"name": "adamw", "weight_decay": -0.1}, "got -0.1"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Optimizer(**options)
