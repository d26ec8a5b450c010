"""Importance-sampled times: their distribution, the estimate's moments, what is remembered."""

import functools
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.schedules import EDM, CosineLogSNR, Linear, ShiftedLogSNR
from diffusion_jax.losses.base import averaged
from diffusion_jax.losses.importance import LossAware, LossMemory, ScheduleTimes

# Losses of T = 8 times that differ as the terms of the variational bound do, and a zero.
LOSSES = np.array([30.0, 4.0, 1.0, 0.5, 0.2, 0.1, 0.01, 0.0])
SCHEDULE = Linear(len(LOSSES), beta_start=0.01, beta_end=0.1)
COUNT = 40_000


def example_loss(params, x0, t, cond, keys):
    """A loss that is a function of the time, with two metrics."""
    values = jnp.asarray(params, jnp.float32)[t.astype(jnp.int32)]
    return values, {"t": t, "one": jnp.ones_like(values)}


def wrapped(times, schedule=SCHEDULE):
    return times.wrap(example_loss, schedule)


def full(losses, history=10):
    """A memory after warm-up in which every t had one value again and again."""
    rows = np.repeat(np.float32(losses)[:, None], history, axis=1)
    return LossMemory(jnp.asarray(rows), jnp.full(len(rows), history, jnp.int32))


def observe(t, loss):
    return {"t": jnp.asarray(t, jnp.int32), "loss": jnp.asarray(loss, jnp.float32)}


@functools.cache
def compiled(times):
    adaptive = wrapped(times)
    return jax.jit(adaptive.apply), jax.jit(adaptive.update)


def draw(times, memory, losses=LOSSES, *, keys=None):
    """(loss, metrics, observations) of one batch."""
    keys = image_keys(5, range(64)) if keys is None else keys
    return compiled(times)[0](losses, jnp.zeros((len(keys), 1)), Condition(), keys, memory)


def expected_probabilities(history, fraction):
    """√E[L²] normalised, mixed with uniform, in float64."""
    rms = np.sqrt(np.mean(np.float64(history) ** 2, axis=1))
    return (1.0 - fraction) * rms / rms.sum() + fraction / len(rms)


@pytest.mark.parametrize("num_timesteps", [8, 4000])
def test_probabilities_are_the_root_mean_square_mixed_with_uniform(num_timesteps):
    rng = np.random.default_rng(0)
    history = np.exp(rng.normal(0.0, 3.0, (num_timesteps, 10))).astype(np.float32)
    memory = LossMemory(jnp.asarray(history), jnp.full(num_timesteps, 10, jnp.int32))
    p = np.asarray(LossAware().probabilities(memory))
    # The rarest of 4000 times has 0.001 / 4000, which a resolution of 2^-30 tells to 1/500.
    np.testing.assert_allclose(p, expected_probabilities(history, 0.001), rtol=2e-5, atol=1e-9)
    np.testing.assert_allclose(np.sum(p, dtype=np.float64), 1.0, rtol=1e-6)


def test_times_are_drawn_with_these_probabilities_and_the_loss_is_unbiased():
    """Frequencies by χ², mean and variance of w L in closed form."""
    fraction = 0.1
    loss, metrics, seen = draw(
        LossAware(uniform_fraction=fraction), full(LOSSES), keys=image_keys(5, range(COUNT))
    )
    p = expected_probabilities(full(LOSSES).history, fraction)
    counts = np.bincount(seen["t"], minlength=8)
    chi2 = np.sum((counts - COUNT * p) ** 2 / (COUNT * p))
    # χ² with 7 degrees of freedom exceeds 29.9 with probability 1e-4.
    assert chi2 < 29.9, (counts, COUNT * p)
    np.testing.assert_array_equal(seen["loss"], np.float32(LOSSES)[seen["t"]])

    weighted = np.float64(seen["loss"]) / (8 * p[seen["t"]])
    np.testing.assert_allclose(loss, weighted.mean(), rtol=1e-5)
    variance = np.sum(LOSSES**2 / p) / 64 - LOSSES.mean() ** 2
    assert abs(weighted.mean() - LOSSES.mean()) < 4.0 * np.sqrt(variance / COUNT)
    np.testing.assert_allclose(weighted.var(), variance, rtol=0.1)
    # Uniform times have the variance of the losses.
    assert 10.0 * weighted.var() < LOSSES.var()

    # Metrics are weighted too: E[w t] is the mean time, E[w] is 1.
    for name, values in {"t": np.arange(8.0), "one": np.ones(8)}.items():
        error = np.sqrt((np.sum(values**2 / p) / 64 - values.mean() ** 2) / COUNT)
        assert abs(metrics[name] - values.mean()) < 4.0 * error, name


def test_warmup_draws_what_the_schedule_draws():
    """One loss short of a full memory, times and values are those of `averaged` exactly."""
    memory = full(LOSSES)
    short = memory._replace(count=memory.count.at[4].set(9))
    x0, keys = jnp.zeros((64, 1)), image_keys(2, range(64))
    expected = jax.jit(averaged(example_loss, SCHEDULE))(LOSSES, x0, Condition(), keys)
    loss, metrics, seen = draw(LossAware(), short, keys=keys)
    np.testing.assert_array_equal(loss, expected[0])
    np.testing.assert_array_equal(metrics["t"], expected[1]["t"])
    np.testing.assert_array_equal(seen["t"], SCHEDULE.sample_t(_time_keys(keys)))
    np.testing.assert_array_equal(LossAware().probabilities(short), np.full(8, 1 / 8))
    _, _, after = draw(LossAware(), memory, keys=keys)
    assert np.mean(np.asarray(after["t"]) == 0) > 0.6 > np.mean(np.asarray(seen["t"]) == 0)


def _time_keys(keys):
    return jax.vmap(lambda key: jax.random.split(key, 3))(keys)[:, 0]


def test_an_example_depends_on_its_own_key_and_the_memory_only():
    """In any place of any batch."""
    keys = image_keys(3, range(64))
    whole = draw(LossAware(), full(LOSSES + 1.0), keys=keys)[2]["t"]
    mixed = keys[::-1].at[:32].set(keys[7])
    t = draw(LossAware(), full(LOSSES + 1.0), keys=mixed)[2]["t"]
    np.testing.assert_array_equal(t[:32], np.full(32, whole[7]))
    np.testing.assert_array_equal(t[32:], whole[::-1][32:])


def test_noise_and_dropout_keys_are_those_of_plain_times():
    seen = []

    def spy(params, x0, t, cond, keys):
        assert t.dtype == jnp.float32
        seen.append(keys)
        return jnp.zeros(3), {}

    @jax.jit
    def both(keys):
        x0 = jnp.zeros((3, 1))
        ScheduleTimes().wrap(spy, SCHEDULE)({}, x0, Condition(), keys)
        LossAware().wrap(spy, SCHEDULE).apply({}, x0, Condition(), keys, full(LOSSES))
        return [jax.random.key_data(k) for k in seen]

    np.testing.assert_array_equal(*both(image_keys(3, range(3))))


def test_memory_is_a_queue_of_the_last_losses_of_every_time():
    """Against queues filled one by one; one time comes more often than a queue is long."""
    rng = np.random.default_rng(1)
    queues = [deque(maxlen=3) for _ in range(8)]
    adaptive = wrapped(LossAware(history=3))
    memory, update = adaptive.init(), compiled(LossAware(history=3))[1]
    assert (memory.history.shape, memory.count.shape) == ((8, 3), (8,))
    seen = np.zeros(8, int)
    for _ in range(6):
        t = np.minimum(rng.integers(0, 12, 16), 7)
        loss = rng.uniform(1.0, 2.0, 16).astype(np.float32)
        memory = update(memory, observe(t, loss))
        for i, value in zip(t, loss, strict=True):
            queues[i].append(value)
            seen[i] += 1
        np.testing.assert_array_equal(memory.count, seen)
        for row, queue in zip(np.asarray(memory.history), queues, strict=True):
            np.testing.assert_array_equal(np.sort(row[row > 0]), np.sort(queue))


def test_one_batch_equals_its_examples_one_by_one():
    t, loss = [2, 5, 2, 2, 5, 2, 2], np.arange(1.0, 8.0)
    adaptive, (_, update) = wrapped(LossAware(history=2)), compiled(LossAware(history=2))
    at_once, single = update(adaptive.init(), observe(t, loss)), adaptive.init()
    for i in range(7):
        single = update(single, observe(t[i : i + 1], loss[i : i + 1]))
    jax.tree.map(np.testing.assert_array_equal, at_once, single)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_shows_in_the_mean_and_is_not_remembered(bad):
    memory, losses = full(LOSSES), LOSSES.copy()
    losses[0] = bad
    loss, _, seen = draw(LossAware(), memory, losses)
    assert not np.isfinite(loss) and not np.isfinite(seen["loss"]).all()
    after = compiled(LossAware())[1](memory, seen)
    np.testing.assert_array_equal(after.history, memory.history)
    counts = np.bincount(seen["t"][np.isfinite(seen["loss"])], minlength=8)
    np.testing.assert_array_equal(after.count, 10 + counts)


def test_losses_of_zero_and_huge_losses_divide_nothing_by_zero():
    times = LossAware()
    zero = draw(times, full(np.zeros(8)), np.zeros(8))
    assert float(zero[0]) == 0.0
    np.testing.assert_allclose(times.probabilities(full(np.zeros(8))), np.full(8, 1 / 8))
    # Squares of 1e30 are not float32 numbers; the sign of a loss does not count.
    p = times.probabilities(full(np.array([1e30, -3e30, 0, 0, 0, 0, 0, 0])))
    expected = 0.999 * np.array([0.25, 0.75, 0, 0, 0, 0, 0, 0]) + 0.001 / 8
    np.testing.assert_allclose(p, expected, rtol=1e-5)


@pytest.mark.parametrize("schedule", [EDM(), CosineLogSNR(), ShiftedLogSNR(CosineLogSNR())])
def test_a_continuous_schedule_is_refused(schedule):
    with pytest.raises(ValueError, match=f"{type(schedule).__name__} is continuous"):
        wrapped(LossAware(), schedule)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"history": 0}, "history must be at least 1, got 0"),
        ({"uniform_fraction": 0.0}, r"\(0, 1\], got 0.0; at 0 a time"),
        ({"uniform_fraction": 1.5}, "got 1.5"),
        ({"uniform_fraction": float("nan")}, "got nan"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LossAware(**options)
