"""What every classifier of noisy data promises, and each pool against its definition."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.condition import Condition
from diffusion_jax.models import (
    CLASSIFIERS,
    ClassifierConfig,
    LevelConfig,
    MLPClassifierConfig,
    TextAttention,
)
from tests.models.trees import random_params

POOLS = ("attention", "adaptive", "spatial", "spatial_v2")


def unet(pool):
    return ClassifierConfig(
        levels=(LevelConfig(4, num_blocks=1), LevelConfig(8, num_blocks=1, attention=True)),
        norm_groups=2,
        dropout=0.5,
        scale_shift=True,
        resample="block",
        head_dim=4,
        num_classes=3,
        pool=pool,
        hidden=6 if pool.startswith("spatial") else None,
    )


TINY = {"unet": unet("attention"), "mlp": MLPClassifierConfig(width=8, depth=2, dropout=0.5)}
assert set(TINY) == set(CLASSIFIERS)

X = np.random.default_rng(0).normal(size=(4, 4, 4, 3)).astype(np.float32)
T = np.array([0.0, 1.0, 500.0, 999.0], np.float32)
KEYS = jax.random.split(jax.random.key(7), 4)

every_classifier = pytest.mark.parametrize("name", list(TINY))


@functools.cache
def params_of(config):
    return random_params(config.build(), X, T, scale=0.5)


@functools.cache
def applied(config):
    return jax.jit(config.build().apply)


def logits_of(config, x=X, t=T, keys=KEYS):
    return np.asarray(applied(config)({"params": params_of(config)}, x, t, keys=keys))


@every_classifier
def test_logits_are_float32_whatever_the_network_computes_in(name):
    config = TINY[name]
    for dtype in ("float32", "bfloat16"):
        network = config.build(dtype=dtype, param_dtype=dtype)
        out, variables = jax.eval_shape(network.init_with_output, jax.random.key(0), X, T)
        assert (out.shape, out.dtype) == ((4, config.num_classes), jnp.dtype("float32"))
        assert list(variables) == ["params"]
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(dtype)}


@pytest.mark.slow
@every_classifier
def test_dropout_follows_the_keys_example_by_example(name):
    out = logits_of(TINY[name])
    order = np.array([2, 0, 3, 1])
    moved = logits_of(TINY[name], X[order], T[order], KEYS[order])
    np.testing.assert_allclose(moved, out[order], rtol=1e-4, atol=1e-5)
    other = logits_of(TINY[name], keys=KEYS[order])
    assert (np.abs(other - out).max(1) > 1e-3).all()


@every_classifier
def test_pixels_and_time_reach_the_logits_of_their_example(name):
    base = logits_of(TINY[name])
    x = X.copy()
    x[0] += 1.0
    for changed in (
        logits_of(TINY[name], x=x),
        logits_of(TINY[name], t=T + np.float32([9, 0, 0, 0])),
    ):
        difference = np.abs(changed - base).max(1)
        assert difference[0] > 1e-3
        np.testing.assert_allclose(difference[1:], 0.0, atol=1e-6)


@pytest.mark.slow
@every_classifier
def test_remat_changes_no_number_and_does_something(name):
    remat = dataclasses.replace(TINY[name], remat=True)
    np.testing.assert_allclose(logits_of(remat), logits_of(TINY[name]), rtol=1e-4, atol=1e-5)
    program = str(jax.make_jaxpr(remat.build().apply)({"params": params_of(remat)}, X, T))
    assert "checkpoint" in program or "remat" in program


@pytest.mark.parametrize("config", [unet("adaptive"), TINY["mlp"]], ids=["adaptive", "mlp"])
def test_a_new_classifier_knows_nothing(config):
    """Its last layer starts at zero, so that every class has the same probability."""

    def last_layer(key):
        return config.build().init(key, X, T)["params"]["logits"]

    zeros = jax.jit(last_layer)(jax.random.key(0, impl="rbg"))
    assert set(zeros) == {"kernel", "bias"}
    assert all((np.asarray(leaf) == 0).all() for leaf in zeros.values())


def silu(h):
    return h / (1 + np.exp(-h))


def group_norm(h, p, groups=2, eps=1e-5):
    """[B, N, C] over N and the channels of a group, in float64."""
    g = h.reshape(h.shape[0], h.shape[1], groups, -1)
    g = (g - g.mean((1, 3), keepdims=True)) / np.sqrt(g.var((1, 3), keepdims=True) + eps)
    return g.reshape(h.shape) * p["scale"] + p["bias"]


def dense(h, p):
    return h @ p["kernel"].astype(np.float64) + p["bias"]


def pooled(pool, p, bottom, means):
    """The head in float64. bottom: [B, N, C], means: [B, F] of all activations."""
    if pool == "spatial":
        return dense(np.maximum(dense(means, p["hidden"]), 0.0), p["logits"])
    if pool == "spatial_v2":
        h = group_norm(dense(means, p["hidden"])[:, None], p["norm_hidden"])[:, 0]
        return dense(silu(h), p["logits"])
    h = silu(group_norm(bottom, p["norm_out"]))
    if pool == "adaptive":
        return dense(h.mean(1), p["logits"])
    h = np.concatenate([h.mean(1, keepdims=True), h], axis=1) + p["pool"]["position"]
    q, k, v = (dense(h, p["pool"]["attention"][name]) for name in ("query", "key", "value"))
    heads = []
    for part in np.split(np.arange(8), 2):
        logits = q[:, :, part] @ k[:, :, part].swapaxes(1, 2) / np.sqrt(len(part))
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, :, part])
    return dense(np.concatenate(heads, axis=-1), p["pool"]["attention"]["out"])[:, 0]


@pytest.mark.parametrize("pool", POOLS)
def test_pool_is_its_formula_on_what_the_encoder_made(pool):
    config = unet(pool)
    params = params_of(config)

    @jax.jit
    def run(params):
        return config.build().apply({"params": params}, X, T, capture_intermediates=True)

    ours, made = run(params)
    made = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), made["intermediates"])
    [bottom] = made["mid"]["__call__"]
    activations = [made["conv_in"]["__call__"][0]]
    for level in ("down_0", "down_1"):
        activations += made[level]["__call__"][0][1]
    # conv_in, block and change of resolution of the first level, block of the second, bottom.
    assert [h.shape[-1] for h in [*activations, bottom]] == [4, 4, 4, 8, 8]
    means = np.concatenate([h.mean((1, 2)) for h in [*activations, bottom]], axis=-1)
    expected = pooled(pool, params, bottom.reshape(4, -1, 8), means)
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)
    assert expected.std() > 1e-2


def test_the_attention_pool_is_for_images_of_one_size():
    network = TINY["unet"].build()
    params = {"params": params_of(TINY["unet"])}
    with pytest.raises(Exception, match="position"):
        jax.eval_shape(network.apply, params, np.zeros((1, 8, 8, 3), np.float32), T[:1])


@every_classifier
@pytest.mark.parametrize(
    "change, words",
    [
        ({"cond": Condition(vector=np.zeros((4, 8), np.float32))}, r"\['vector'\]"),
        ({"cond": Condition(image=X)}, "reads x and t alone"),
        ({"t": T[:3]}, r"shape \(4,\), got \(3,\)"),
        ({"keys": KEYS[:2]}, "one key per example"),
        ({"x": np.zeros(4, np.float32)}, "x must"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name, change, words):
    arguments = {"x": X, "t": T, "cond": Condition(), "keys": None} | change
    with pytest.raises(ValueError, match=words):
        TINY[name].build().init(jax.random.key(0), **arguments)


@every_classifier
def test_configurations_are_values(name):
    config = TINY[name]
    assert hash(config) == hash(dataclasses.replace(config))
    assert json.loads(json.dumps(dataclasses.asdict(config)))["dropout"] == 0.5
    assert CLASSIFIERS[name]().build() == CLASSIFIERS[name]().build()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ClassifierConfig(middle_attention=TextAttention()), "reads x and t alone"),
        (lambda: ClassifierConfig(pool="max"), "got 'max'"),
        (lambda: ClassifierConfig(num_classes=0), "num_classes must be at least 1, got 0"),
        (lambda: ClassifierConfig(hidden=64), "hidden = 64 with pool = 'attention'"),
        (lambda: ClassifierConfig(pool="spatial_v2", hidden=48), "norm_groups = 32, got 48"),
        (lambda: ClassifierConfig(head_dim=48, middle_attention=False), "head_dim = 48"),
        (lambda: ClassifierConfig(dropout=1.0), "got 1.0"),
        (lambda: MLPClassifierConfig(num_classes=0), "num_classes must be at least 1, got 0"),
        (lambda: MLPClassifierConfig(width=2), "width must be at least 4, got 2"),
    ],
)
def test_bad_configurations_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
