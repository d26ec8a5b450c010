"""What every network of the table promises: one test per promise, run on all of them."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.condition import Condition
from diffusion_jax.models import NETWORKS, DiTConfig, LevelConfig, MLPConfig, UNetConfig
from tests.models.trees import random_params

TINY = {
    "unet": UNetConfig(
        levels=(LevelConfig(4, num_blocks=1), LevelConfig(8, num_blocks=1)),
        out_channels=2,
        norm_groups=2,
        dropout=0.5,
        head_dim=4,
    ),
    "mlp": MLPConfig(width=8, depth=2, out_channels=2, dropout=0.5),
    "dit": DiTConfig(width=8, depth=2, num_heads=2, out_channels=2, dropout=0.5),
}
assert set(TINY) == set(NETWORKS)

SHAPE = (4, 4, 4, 3)
X = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
T = np.array([0.0, 1.0, 500.0, 999.0], np.float32)
IMAGE = np.random.default_rng(1).normal(size=(4, 4, 4, 1)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(7), 4)

every_network = pytest.mark.parametrize("name", list(TINY))


def condition(config, batch=slice(None)):
    vector = np.random.default_rng(2).normal(size=(4, config.embed_dim)).astype(np.float32)
    return Condition(vector=vector[batch], image=IMAGE[batch])


@functools.cache
def params_of(config):
    """Every leaf is drawn, since a new network is zero whatever goes in."""
    return random_params(config.build(), X, T, condition(config), scale=0.3)


@functools.cache
def applied(config):
    """(x, t, cond, params) -> the network's output, with dropout from KEYS unless others come."""
    apply = jax.jit(config.build().apply)

    def call(x, t, cond, *, keys=KEYS, params=None):
        params = params_of(config) if params is None else params
        return np.asarray(apply({"params": params}, x, t, cond, keys=keys))

    return call


@pytest.mark.slow
@every_network
def test_shapes_and_types_are_the_promised_ones(name):
    config = TINY[name]
    for dtype in ("float32", "bfloat16"):
        network = config.build(dtype=dtype)
        out, variables = jax.eval_shape(
            network.init_with_output, jax.random.key(0), X, T, condition(config)
        )
        assert (out.shape, out.dtype) == ((4, 4, 4, 2), jnp.dtype(dtype))
        assert list(variables) == ["params"]
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    half = config.build(param_dtype=jnp.bfloat16)
    variables = jax.eval_shape(half.init, jax.random.key(0), X, T, condition(config))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("bfloat16")}


@pytest.mark.slow
@every_network
def test_a_new_network_is_zero(name):
    """Its last layer is initialized with zeros, and with that layer zero the output is."""
    config, last = TINY[name], {"unet": "conv_out", "mlp": "dense_out", "dit": "patch_out"}[name]

    def last_layer(key):
        return config.build().init(key, X, T, condition(config))["params"][last]

    zeros = jax.jit(last_layer)(jax.random.key(0))
    assert all((np.asarray(leaf) == 0).all() for leaf in zeros.values())
    params = {**params_of(config), last: jax.tree.map(np.asarray, zeros)}
    out = applied(config)(X, T, condition(config), params=params)
    np.testing.assert_array_equal(out, np.zeros((4, 4, 4, 2)))


@pytest.mark.slow
@every_network
def test_dropout_follows_the_keys_example_by_example(name):
    config = TINY[name]
    out = applied(config)(X, T, condition(config))
    order = np.array([2, 0, 3, 1])
    moved = applied(config)(X[order], T[order], condition(config, order), keys=KEYS[order])
    np.testing.assert_allclose(moved, out[order], rtol=1e-4, atol=1e-5)
    other = applied(config)(X, T, condition(config), keys=KEYS[order])
    assert (np.abs(other - out).max((1, 2, 3)) > 1e-2).all()


@pytest.mark.slow
@every_network
def test_remat_changes_no_number_and_does_something(name):
    config = TINY[name]
    remat = dataclasses.replace(config, remat=True)
    arguments = (X, T, condition(config))
    expected = applied(config)(*arguments)
    np.testing.assert_allclose(applied(remat)(*arguments), expected, rtol=1e-4, atol=1e-5)
    program = jax.make_jaxpr(remat.build().apply)({"params": params_of(config)}, *arguments)
    assert "checkpoint" in str(program) or "remat" in str(program)


def test_bfloat16_activations_follow_float32():
    config = dataclasses.replace(TINY["mlp"], dropout=0.0)
    params = {"params": params_of(config)}
    exact, ours = (
        jax.jit(config.build(dtype=dtype).apply)(params, X, T, condition(config))
        for dtype in ("float32", "bfloat16")
    )
    error = np.abs(ours.astype(np.float32) - exact).max() / np.abs(exact).max()
    # bfloat16 keeps 8 bits; a dozen roundings in a row.
    assert 0.0 < error < 0.1


@every_network
def test_time_vector_and_image_reach_the_output_of_their_example(name):
    config = TINY[name]
    cond = condition(config)
    base = applied(config)(X, T, cond)

    def change(t=T, **slots):
        return np.abs(applied(config)(X, t, cond.replace(**slots)) - base).max((1, 2, 3))

    changes = [change(t=T + np.array([3, 0, 0, 0], np.float32))]
    for slot in ("vector", "image"):
        value = np.array(getattr(cond, slot))
        value[0] += 1.0
        changes.append(change(**{slot: value}))
    for each in changes:
        assert each[0] > 1e-3
        np.testing.assert_allclose(each[1:], 0.0, atol=1e-6)


@every_network
def test_configurations_are_values(name):
    """Hashable, comparable and made of what JSON holds."""
    config = TINY[name]
    assert hash(config) == hash(dataclasses.replace(config))
    assert config == dataclasses.replace(config)
    assert json.loads(json.dumps(dataclasses.asdict(config)))["dropout"] == 0.5
    assert NETWORKS[name]().build() == NETWORKS[name]().build()


@every_network
@pytest.mark.parametrize(
    "change, words",
    [
        ({"x": np.zeros(4, np.float32)}, "x must"),
        ({"t": np.float32(3)}, r"shape \(4,\), got \(\)"),
        ({"t": T[:3]}, r"shape \(4,\), got \(3,\)"),
        ({"keys": KEYS[:2]}, "one key per example"),
        ({"cond": Condition()}, "needs_vector=True"),
        ({"cond": Condition(vector=np.zeros((4, 3), np.float32))}, r"got \(4, 3\)"),
        ({"cond": Condition(tokens=np.zeros((4, 2, 8), np.float32))}, "'tokens'"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name, change, words):
    config = dataclasses.replace(TINY[name], needs_vector=True)
    arguments = {"x": X, "t": T, "cond": condition(config), "keys": None} | change
    with pytest.raises(ValueError, match=words):
        config.build().init(jax.random.key(0), **arguments)


@every_network
def test_an_image_of_another_size_is_refused(name):
    config = TINY[name]
    cond = Condition(image=np.zeros((4, 2, 2, 1), np.float32))
    with pytest.raises(ValueError, match=r"cond.image \(4, 2, 2, 1\)"):
        config.build().init(jax.random.key(0), X, T, cond)


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 2), (3, 2, 2, 2, 1)])
def test_the_mlp_takes_data_of_any_rank(shape):
    x = np.zeros(shape, np.float32)
    network = MLPConfig(width=4, depth=1).build()
    out, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), x, T[:3], Condition())
    assert out.shape == shape


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: MLPConfig(width=2), "width must be at least 4, got 2"),
        (lambda: MLPConfig(depth=0), "depth must be at least 1, got 0"),
        (lambda: MLPConfig(out_channels=0), "out_channels"),
        (lambda: MLPConfig(dropout=1.0), r"dropout must lie in \[0, 1\), got 1.0"),
        (lambda: DiTConfig(width=10, num_heads=4), "num_heads = 4, got 10"),
        (lambda: DiTConfig(position="rope"), "got 'rope'"),
        (lambda: DiTConfig(width=6, num_heads=2), "4 divides, got 6"),
        (lambda: DiTConfig(patch_size=0), "patch_size must be at least 1"),
        (lambda: DiTConfig(dropout=-0.5), "got -0.5"),
        (lambda: DiTConfig(attention_dropout=1.0), "attention_dropout must lie"),
        (lambda: DiTConfig(activation="tanh"), "got 'tanh'"),
        (lambda: DiTConfig(base_size=0), "base_size must be at least 1"),
        (lambda: DiTConfig(base_size=4, position="learned"), "got 4 and 'learned'"),
    ],
)
def test_bad_configurations_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
