"""One step on one device, on a mesh, with sharded parameters and under pmap: the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from diffusion_jax.training import parallel
from diffusion_jax.training.ema import EMA
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.step import make_train_step, step_keys
from tests.training import toy

pytestmark = pytest.mark.slow

TX = optax.adam(0.05)


def _step(axis_name=None):
    return make_train_step(toy.loss, TX, ema=EMA(0.5), accumulate=2, axis_name=axis_name)


def _train(run, *, num_steps=3, place=lambda state: state):
    params = toy.params()
    # An even first axis, so that fsdp has something to split.
    params["adapter"]["w"] = jnp.concatenate([params["adapter"]["w"]] * 2, axis=1)
    state = place(TrainState.create(params, TX, trainable=("adapter/**",)))
    metrics = []
    for step in range(num_steps):
        batch = toy.batch(step, size=8)
        batch["y"] = np.concatenate([batch["y"]] * 2, axis=1)
        state, values = run(state, batch, step_keys(jax.random.key(0), step, 8))
        metrics.append(values)
    return state, jax.device_get(metrics)


@functools.cache
def _reference():
    return _train(jax.jit(_step()))


def _forms():
    return {
        "mesh": lambda: parallel.mesh_train(_step(), parallel.make_mesh()),
        "fsdp": lambda: parallel.mesh_train(_step(), parallel.make_mesh(fsdp=2), min_shard_size=1),
        "pmap": lambda: parallel.pmap_train(_step("data")),
    }


def _count_compilations(function):
    seen = []

    def listener(name, duration, **_):
        if "backend_compile" in name:
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        function()
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    return len(seen)


@pytest.mark.parametrize("form", ["mesh", "fsdp", "pmap"])
def test_training_gives_the_same_numbers_everywhere_and_compiles_once(form):
    assert jax.device_count() == 2, "these tests need two devices, see conftest.py"
    expected, expected_metrics = _reference()
    run, results = _forms()[form](), []
    assert _count_compilations(lambda: _train(run, num_steps=1)) > 0
    # The forms take each other's states: this one comes from a mesh.
    place = functools.partial(parallel.replicate, parallel.make_mesh())
    assert _count_compilations(lambda: results.extend(_train(run, place=place))) == 0
    state, metrics = results
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and len(a.sharding.device_set) == 2
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    for a, b in zip(metrics, expected_metrics, strict=True):
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=2e-6)
    toy.assert_bit_equal(state.frozen, expected.frozen)


def _sample(params, inputs, keys, scale):
    noise = jax.vmap(lambda key: jax.random.normal(key, (2, 2, 1)))(keys)
    return scale * noise + params["bias"][None] + inputs["label"][:, None, None, None]


def _samplers():
    return {
        "mesh": parallel.mesh_sample(_sample, parallel.make_mesh()),
        "fsdp": parallel.mesh_sample(_sample, parallel.make_mesh(fsdp=2), min_shard_size=1),
        "pmap": parallel.pmap_sample(_sample),
    }


@pytest.mark.parametrize("form", ["mesh", "fsdp", "pmap"])
def test_sampling_has_the_same_noise_everywhere(form):
    """Inputs are per image, params and the rest are for all; noise is equal bit for bit."""
    sample, keys = _samplers()[form], step_keys(jax.random.key(4), 0, 6)
    noise = np.stack([jax.random.normal(key, (2, 2, 1)) for key in keys])
    zeros = {"label": np.zeros(6, np.float32)}
    images = sample({"bias": jnp.zeros((2, 2, 1))}, zeros, keys, jnp.float32(1.0))
    np.testing.assert_array_equal(images, noise)
    labels = np.arange(6, dtype=np.float32)
    images = sample({"bias": jnp.ones((2, 2, 1))}, {"label": labels}, keys, jnp.float32(3.0))
    expected = 3.0 * noise + 1.0 + labels[:, None, None, None]
    np.testing.assert_allclose(images, expected, rtol=1e-6, atol=1e-6)


def test_big_leaves_are_split_over_fsdp_and_small_ones_are_not():
    mesh = parallel.make_mesh(fsdp=2)
    tree = {"big": jnp.ones((3, 8)), "odd": jnp.ones((3, 5)), "small": jnp.ones((2,))}
    state = parallel.shard_state(mesh, tree, min_shard_size=10)
    assert state["big"].sharding.spec == P(None, "fsdp")
    assert {s.data.shape for s in state["big"].addressable_shards} == {(3, 4)}
    assert state["odd"].is_fully_replicated and state["small"].is_fully_replicated
    whole = parallel.shard_state(parallel.make_mesh(), tree, min_shard_size=1)
    assert all(leaf.is_fully_replicated for leaf in whole.values())


@pytest.mark.parametrize("fsdp", [1, 2])
def test_a_state_is_made_where_it_belongs(fsdp):
    """Bit for bit what one device makes, with each leaf split as `shard_state` would."""

    def init(key, scale):
        noise = jax.random.normal(key, (3, 8))
        return TrainState.create({"w": scale * noise, "b": jnp.zeros(3)}, TX)

    mesh = parallel.make_mesh(fsdp=fsdp)
    arguments = jax.random.key(3), jnp.float32(0.3)
    state = parallel.init_state(init, mesh, *arguments, min_shard_size=10)
    toy.assert_bit_equal(jax.device_get(state), jax.device_get(jax.jit(init)(*arguments)))
    shardings = parallel.state_shardings(mesh, state, min_shard_size=10)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding == sharding
    assert {s.data.shape for s in state.ema["w"].addressable_shards} == {(3, 8 // fsdp)}


def test_a_copy_on_the_host_outlives_the_state():
    tree = parallel.shard_state(parallel.make_mesh(fsdp=2), {"w": jnp.ones((2, 4))})
    host = parallel.to_host(tree)
    jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)(tree)
    assert type(host["w"]) is np.ndarray and host["w"].flags.owndata
    np.testing.assert_array_equal(host["w"], np.ones((2, 4)))


def test_a_batch_size_that_does_not_split_is_refused_with_its_numbers():
    mesh = parallel.make_mesh()
    parallel.check_batch_size(12, mesh, accumulate=3)
    message = "batch_size 8 does not split over 2 devices in 1 process x 3 microbatches.* of 6$"
    with pytest.raises(ValueError, match=message):
        parallel.check_batch_size(8, mesh, accumulate=3)
    with pytest.raises(ValueError, match="batch_size 0 does not split"):
        parallel.check_batch_size(0, mesh)


def test_mesh_axes():
    assert dict(parallel.make_mesh().shape) == {"data": 2, "fsdp": 1}
    assert dict(parallel.make_mesh(fsdp=2).shape) == {"data": 1, "fsdp": 2}
    one = parallel.make_mesh(devices=jax.devices()[:1])
    assert one.size == 1
    with pytest.raises(ValueError, match="data=3 and fsdp=1 do not cover the 2 devices"):
        parallel.make_mesh(data=3)
    with pytest.raises(ValueError, match="got data=None, fsdp=0"):
        parallel.make_mesh(fsdp=0)


@pytest.mark.parametrize("shard", ["mesh", "pmap"])
def test_a_batch_that_does_not_split_is_refused(shard):
    keys = step_keys(jax.random.key(0), 0, 3)
    sample = _samplers()[shard]
    with pytest.raises(ValueError, match=r"over 2 devices, got shapes \[\(3,\)\].* multiple of 2"):
        sample({}, {}, keys, jnp.float32(1.0))


def test_a_step_for_the_other_form_is_refused():
    with pytest.raises(ValueError, match="drift apart"):
        parallel.pmap_train(_step())
    with pytest.raises(ValueError, match="without axis_name, got axis_name='data'"):
        parallel.mesh_train(_step("data"), parallel.make_mesh())
