"""The loss of every quarter of time: edges by hand, means by numpy, and what stays apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.schedules import (
    EDM,
    CosineLogSNR,
    FlowMatching,
    Linear,
    ShiftedLogSNR,
)
from diffusion_jax.losses.base import averaged, quarter_of_time
from diffusion_jax.losses.importance import LossAware, LossMemory

T = 8
SCHEDULE = Linear(T, beta_start=0.01, beta_end=0.1)
# A loss for every time; the larger, the more often LossAware draws it.
LOSSES = np.array([30.0, 4.0, 1.0, 0.5, 0.2, 0.1, 0.3, 0.7], np.float32)
NAMES = [f"loss_q{k}" for k in range(4)]


def example_loss(params, x0, t, cond, keys):
    """A loss that is a function of the time, and the time as a metric."""
    return params[t.astype(jnp.int32)], {"t": t}


def of_schedule(losses, keys):
    """Loss and metrics of a batch at times that the schedule draws."""
    x0 = jnp.zeros((len(keys), 1))
    return averaged(example_loss, SCHEDULE)(jnp.asarray(losses), x0, Condition(), keys)


def drawn(keys):
    return np.asarray(SCHEDULE.sample_t(jax.vmap(lambda k: jax.random.split(k, 3))(keys)[:, 0]))


@pytest.mark.parametrize(
    "schedule, times, expected",
    [
        (Linear(10), range(10), [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]),
        (Linear(1000), [0, 249, 250, 499, 500, 749, 750, 999], [0, 0, 1, 1, 2, 2, 3, 3]),
        (ShiftedLogSNR(Linear(8)), range(8), [0, 0, 1, 1, 2, 2, 3, 3]),
        (CosineLogSNR(), [0.0, 0.249, 0.25, 0.5, 0.75, 1.0], [0, 0, 1, 2, 3, 3]),
        (FlowMatching(t_min=0.2), [0.2, 0.39, 0.41, 0.61, 0.81, 1.0], [0, 0, 1, 2, 3, 3]),
        # Quarters of log σ: 1, 2, 4, 8, 16; training draws σ beyond both ends.
        (EDM(1.0, 16.0), [0.5, 1.0, 1.9, 2.1, 4.1, 8.1, 16.0, 99.0], [0, 0, 0, 1, 2, 3, 3, 3]),
    ],
)
def test_edges_of_the_quarters(schedule, times, expected):
    found = jax.jit(lambda t: quarter_of_time(schedule, t))(jnp.asarray(times, jnp.float32))
    np.testing.assert_array_equal(found, expected)


def test_a_quarter_is_the_mean_over_its_examples():
    keys = image_keys(5, range(64))
    t, (_, metrics) = drawn(keys).astype(int), of_schedule(LOSSES, keys)
    assert set(metrics) == {"t", *NAMES}
    for k, name in enumerate(NAMES):
        inside = LOSSES[t][t // 2 == k]
        total, count = metrics[name]
        np.testing.assert_allclose(total / count, inside.mean(), rtol=1e-5)
        assert float(count) == len(inside) / 64


def test_parts_average_to_the_whole_though_their_quarters_differ_in_size():
    """And a quarter that no example lies in has total and count 0."""
    keys = image_keys(5, range(8))
    whole, *halves = (of_schedule(LOSSES, part)[1] for part in (keys, keys[:4], keys[4:]))
    counts = [[float(metrics[name].count) for name in NAMES] for metrics in halves]
    assert counts[0] != counts[1] and 0.0 in counts[0] + counts[1]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    for name in NAMES:
        np.testing.assert_allclose(mean[name], whole[name], rtol=1e-6)
    assert all(m[n].total == 0 for m in halves for n in NAMES if m[n].count == 0)


def test_a_loss_that_is_not_finite_shows_in_its_own_quarter_only():
    losses = LOSSES.copy()
    losses[2] = np.nan
    _, metrics = of_schedule(losses, image_keys(5, range(64)))
    assert [bool(np.isfinite(metrics[name].total)) for name in NAMES] == [True, False, True, True]


def test_importance_sampled_quarters_have_no_weight():
    keys = image_keys(5, range(256))
    memory = LossMemory(jnp.asarray(LOSSES)[:, None], jnp.ones(T, jnp.int32))
    apply = LossAware(history=1).wrap(example_loss, SCHEDULE).apply
    x0 = jnp.zeros((len(keys), 1))
    loss, metrics, seen = apply(jnp.asarray(LOSSES), x0, Condition(), keys, memory)
    t = np.asarray(seen["t"])
    # Drawn by importance the mean itself is far from that of the losses drawn.
    assert abs(float(loss) / LOSSES[t].mean() - 1) > 0.5
    for k, name in enumerate(NAMES):
        inside = LOSSES[t][t // 2 == k]
        assert float(metrics[name].count) == len(inside) / 256
        np.testing.assert_allclose(metrics[name].total, inside.sum() / 256, rtol=1e-5)


def test_a_metric_of_that_name_is_refused():
    def named(params, x0, t, cond, keys):
        return t, {"loss_q1": t}

    with pytest.raises(ValueError, match=r"its own metrics \['loss_q1'\]; rename"):
        averaged(named, SCHEDULE)({}, jnp.zeros((2, 1)), Condition(), image_keys(0, range(2)))
