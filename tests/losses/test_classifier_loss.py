"""The noisy classifier's loss: its definition, its minimum, its control and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import image_keys, per_image_normal
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.forward import add_noise
from diffusion_jax.core.parameterization import PARAMETERIZATIONS
from diffusion_jax.core.schedules import Linear
from diffusion_jax.core.types import NoiseLevel
from diffusion_jax.losses.classifier import (
    NoisyCrossEntropy,
    averaged_over_times,
    classifier_log_prob,
    log_prob,
)

EPS, EDM = PARAMETERIZATIONS["eps"](), PARAMETERIZATIONS["edm"]()
SCHEDULE = Linear()
LABELS = np.array([2, 0, 1, 2], np.int32)
X0 = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
T = np.array([0.0, 100.0, 500.0, 999.0], np.float32)
KEYS = jax.vmap(lambda key: jax.random.split(key, 2))(image_keys(0, range(4)))
WEIGHT = np.random.default_rng(1).normal(size=(3, 3)).astype(np.float32)


def network(params, x, t, cond, *, keys=None):
    """Logits that depend on all it is given; keys act as dropout would."""
    assert cond.slots() == ()
    logits = x @ params + 1e-3 * t[:, None] * jnp.arange(3.0)[None]
    if keys is None:
        return logits
    return logits + 0.1 * jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64))
    return weights / weights.sum(-1, keepdims=True)


def test_log_prob_is_the_logarithm_of_the_softmax():
    logits = np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32) * 5
    expected = np.log(softmax(logits))[np.arange(4), LABELS]
    np.testing.assert_allclose(log_prob(jnp.asarray(logits), LABELS), expected, rtol=1e-5)
    far = log_prob(jnp.asarray([[1e4, 0.0]]), np.array([1]))
    np.testing.assert_allclose(far, [-1e4])
    assert log_prob(jnp.zeros((1, 2), jnp.bfloat16), np.array([1])).dtype == jnp.float32


def test_a_label_that_does_not_exist_is_not_a_number():
    out = np.asarray(log_prob(jnp.zeros((4, 3)), np.array([-1, 0, 2, 3])))
    np.testing.assert_array_equal(np.isnan(out), [True, False, False, True])


@pytest.mark.parametrize(
    "logits, labels, words",
    [
        (np.zeros((4, 3)), LABELS.astype(np.float32), r"got float32 \(4,\)"),
        (np.zeros((4, 3)), LABELS[:2], r"got int32 \(2,\)"),
        (np.zeros((4, 3)), np.eye(3, dtype=np.int32)[LABELS], r"got int32 \(4, 3\)"),
        (np.zeros((4, 3, 1)), LABELS, r"logits must have shape \[B, K\], got \(4, 3, 1\)"),
    ],
)
def test_shapes_and_types_that_do_not_fit_are_refused(logits, labels, words):
    with pytest.raises(ValueError, match=words):
        log_prob(logits, labels)


@pytest.mark.slow
def test_loss_and_accuracy_are_those_of_the_noisy_example():
    example_loss = NoisyCrossEntropy().per_example(network, SCHEDULE, EPS)
    loss, metrics = jax.jit(example_loss)(WEIGHT, X0, T, LABELS, KEYS)
    eps = per_image_normal(KEYS[:, 0], X0)
    level = SCHEDULE(jnp.asarray(T))
    x = np.asarray(level.alpha)[:, None] * X0 + np.asarray(level.sigma)[:, None] * np.asarray(eps)
    logits = np.asarray(network(WEIGHT, x, T, Condition(), keys=KEYS[:, 1]))
    expected = -np.log(softmax(logits))[np.arange(4), LABELS]
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(metrics["accuracy"], logits.argmax(1) == LABELS)
    assert set(metrics) == {"accuracy"} and 0 < np.mean(metrics["accuracy"]) < 1


def test_an_example_depends_on_its_own_keys():
    example_loss = jax.jit(NoisyCrossEntropy().per_example(network, SCHEDULE, EPS))
    loss, _ = example_loss(WEIGHT, X0, T, LABELS, KEYS)
    order = np.array([3, 1, 0, 2])
    moved, _ = example_loss(WEIGHT, X0[order], T[order], LABELS[order], KEYS[order])
    np.testing.assert_allclose(moved, np.asarray(loss)[order], rtol=1e-5)
    other, _ = example_loss(WEIGHT, X0, T, LABELS, KEYS[order])
    assert (np.abs(other - loss)[[0, 2, 3]] > 1e-3).all()


def test_the_control_sees_clean_data_at_the_first_time():
    """At t = 999 nothing is left of x0 with noise, and everything without."""
    late = np.full(4, 999.0, np.float32)
    seen = []

    def recording(params, x, t, cond, *, keys=None):
        seen.append((np.asarray(x), np.asarray(t)))
        return network(params, x, t, cond, keys=keys)

    clean = NoisyCrossEntropy(noisy=False).per_example(recording, SCHEDULE, EPS)
    loss, _ = clean(WEIGHT, X0, late, LABELS, KEYS)
    [(x, t)] = seen
    np.testing.assert_array_equal(x, X0)
    np.testing.assert_array_equal(t, late)
    noisy, _ = NoisyCrossEntropy().per_example(network, SCHEDULE, EPS)(
        WEIGHT, X0, late, LABELS, KEYS
    )
    assert np.abs(noisy - loss).max() > 0.1


def bayes_logits(scale, x, t, cond, *, keys=None):
    """Two classes N(±1, 0.5²): log p(y = 1 | x_t) - log p(y = 0 | x_t) = 2 α x / (0.25 α² + σ²)."""
    del cond, keys
    level = SCHEDULE(t)
    odds = 2.0 * level.alpha * x[:, 0] / (0.25 * level.alpha**2 + level.sigma**2)
    return scale * jnp.stack([-odds, odds], axis=1) / 2.0


@pytest.mark.slow
@pytest.mark.parametrize("scale, least", [(1.0, 0.0), (0.5, 20.0), (2.0, 20.0)])
def test_the_minimum_is_the_exact_posterior(scale, least):
    """The gradient is zero within five standard errors there, and far from it elsewhere."""
    count = 20000
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, count).astype(np.int32)
    x0 = (2.0 * labels - 1.0 + 0.5 * rng.normal(size=count))[:, None].astype(np.float32)
    keys = jax.vmap(lambda key: jax.random.split(key, 3))(image_keys(1, range(count)))
    t = SCHEDULE.sample_t(keys[:, 0])
    example_loss = NoisyCrossEntropy().per_example(bayes_logits, SCHEDULE, EPS)

    @jax.jit
    def slopes(scale):
        return jax.jvp(
            lambda s: example_loss(s, x0, t, labels, keys[:, 1:])[0],
            (scale,),
            (jnp.ones(()),),
        )[1]

    each = np.asarray(slopes(jnp.float32(scale)), np.float64)
    errors = abs(each.mean()) / (each.std() / np.sqrt(count))
    assert errors < 5 if least == 0.0 else errors > least


@pytest.mark.slow
def test_the_average_is_over_times_that_the_schedule_draws():
    example_loss = NoisyCrossEntropy().per_example(network, SCHEDULE, EPS)
    keys = image_keys(5, range(4))
    loss, metrics = jax.jit(averaged_over_times(example_loss, SCHEDULE))(WEIGHT, X0, LABELS, keys)
    split = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    each, accuracy = example_loss(WEIGHT, X0, SCHEDULE.sample_t(split[:, 0]), LABELS, split[:, 1:])
    np.testing.assert_allclose(loss, np.mean(each), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(accuracy["accuracy"]))
    assert loss.shape == () and metrics["accuracy"].shape == ()


def test_guidance_gets_the_gradient_of_the_softmax():
    """∇_x log p(y|x) = W (onehot(y) - p) for linear logits."""
    at = SCHEDULE(jnp.float32(300.0))
    bound = classifier_log_prob(network, EPS)(WEIGHT, LABELS)
    ignored = Condition(vector=jnp.ones((4, 2)))
    value, grad = jax.value_and_grad(lambda x: bound(x, at, ignored).sum())(jnp.asarray(X0))
    p = softmax(network(WEIGHT, X0, np.full(4, 300.0), Condition()))
    np.testing.assert_allclose(value, np.log(p)[np.arange(4), LABELS].sum(), rtol=1e-5)
    np.testing.assert_allclose(grad, (np.eye(3)[LABELS] - p) @ WEIGHT.T, rtol=1e-4, atol=1e-6)


def test_training_and_guidance_scale_the_input_alike():
    """EDM's networks see c_in · x_t."""
    level = NoiseLevel(jnp.float32(2.0), jnp.float32(1.0), jnp.float32(3.0))
    scaled = EDM.scale_input(jnp.asarray(X0), level)
    assert np.abs(scaled - X0).max() > 0.1
    ours = classifier_log_prob(network, EDM)(WEIGHT, LABELS)(jnp.asarray(X0), level)
    expected = log_prob(network(WEIGHT, scaled, np.full(4, 2.0), Condition()), LABELS)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)

    def always(t):
        return NoiseLevel(jnp.full_like(t, 2.0), jnp.full_like(t, 1.0), jnp.full_like(t, 3.0))

    loss = NoisyCrossEntropy().per_example(lambda *args, keys: network(*args), always, EDM)(
        WEIGHT, X0, jnp.asarray(T), LABELS, KEYS
    )[0]
    noisy = add_noise(X0, per_image_normal(KEYS[:, 0], X0), always(jnp.asarray(T)))
    again = classifier_log_prob(network, EDM)(WEIGHT, LABELS)(noisy, level)
    np.testing.assert_allclose(loss, -np.asarray(again), rtol=1e-5)
