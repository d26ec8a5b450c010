"""Learning rates in cycles: values by hand, and latent diffusion's released configuration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.configuration import from_dict, to_dict
from diffusion_jax.training.optimizer import Optimizer
from diffusion_jax.training.rates import Cycle, factor_at


def test_a_cosine_cycle():
    cycle = Cycle(length=12, warmup_steps=4, start=0.2, peak=1.0, floor=0.1)
    # Quarter, half and three quarters of the decay are at 6, 8 and 10.
    factors = [float(cycle.factor_at(n)) for n in (0, 1, 4, 6, 8, 10, 12, 99)]
    half = np.sqrt(0.5)
    expected = [0.2, 0.4, 1.0, 0.1 + 0.45 * (1 + half), 0.55, 0.1 + 0.45 * (1 - half), 0.1, 0.1]
    np.testing.assert_allclose(factors, expected, rtol=1e-6)


def test_a_linear_cycle_jumps_after_its_warmup():
    cycle = Cycle(length=10, warmup_steps=2, start=0.0, peak=1.0, floor=0.5, shape="linear")
    factors = [float(cycle.factor_at(n)) for n in (0, 1, 2, 5, 10, 11)]
    np.testing.assert_allclose(factors, [0.0, 0.5, 0.9, 0.75, 0.5, 0.5], rtol=1e-6)


def test_cycles_follow_each_other_and_the_last_one_stays():
    """The update at a boundary ends the earlier cycle; the next one goes on with its n = 1."""
    cycles = (
        Cycle(4, 2, start=0.0, peak=1.0, floor=0.2),
        Cycle(5, 2, start=0.0, peak=0.6, floor=0.1),
        Cycle(2, floor=0.3, shape="linear"),
    )
    factors = jax.vmap(lambda n: factor_at(cycles, n))(jnp.arange(14))
    second = [0.1 + 0.25 * (1 + np.cos(np.pi * part / 3)) for part in (1, 2, 3)]
    expected = [0.0, 0.5, 1.0, 0.6, 0.2, 0.3, 0.6, *second, 0.65, 0.3, 0.3, 0.3]
    np.testing.assert_allclose(factors, expected, rtol=1e-5)


def test_the_released_configuration():
    """10 000 updates of warm-up, then constant for 10^13, more than int32 counts."""
    cycle = Cycle(10**13, 10_000, start=1e-6, peak=1.0, floor=1.0, shape="linear")
    rates = Optimizer(learning_rate=2e-4, schedule="cycles", cycles=(cycle,)).learning_rate_at
    at = jax.jit(rates)(jnp.asarray([0, 5_000, 10_000, 2_000_000]))
    np.testing.assert_allclose(at, 2e-4 * np.asarray([1e-6, 0.5000005, 1, 1]), rtol=1e-6)


def test_an_optimizer_with_cycles_updates_with_their_rate_and_comes_back_from_json():
    cycles = (Cycle(3, 1, start=0.5), Cycle(4, shape="linear", peak=0.25))
    config = Optimizer("sgd", 2.0, "cycles", cycles=cycles, b1=0.0, clip_norm=None)
    assert from_dict(Optimizer, to_dict(config)) == config
    tx, params = config.build(), {"w": jnp.asarray([1.0])}
    state, steps = tx.init(params), []
    for _ in range(5):
        updates, state = tx.update({"w": jnp.asarray([1.0])}, state, params)
        steps.append(-float(updates["w"][0]))
    np.testing.assert_allclose(steps, [1.0, 2.0, 1.0, 0.0, 0.375], atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"length": 0}, r"warmup_steps must lie in \[0, length\), got 0 with length = 0"),
        ({"length": 4, "warmup_steps": 4}, "got 4 with length = 4"),
        ({"length": 4, "warmup_steps": -1}, "got -1"),
        ({"length": 4, "peak": -0.1}, "peak must be at least 0, got -0.1"),
        ({"length": 4, "floor": float("nan")}, "floor must be at least 0, got nan"),
        ({"length": 4, "shape": "square"}, "shape must be one of .*'square'"),
    ],
)
def test_a_cycle_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Cycle(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"schedule": "cycles"}, "go together, got schedule = 'cycles' and 0 cycles"),
        ({"cycles": (Cycle(3),)}, "got schedule = 'constant' and 1 cycles"),
        ({"schedule": "cycles", "cycles": (Cycle(3),), "warmup_steps": 2}, "got warmup_steps = 2"),
        ({"schedule": "cycles", "cycles": (Cycle(3),), "total_steps": 9}, "total_steps = 9"),
    ],
)
def test_an_optimizer_that_does_not_fit_its_cycles_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Optimizer(**options)


def test_no_cycles_have_no_factor():
    with pytest.raises(ValueError, match="at least one cycle"):
        factor_at((), 0)
