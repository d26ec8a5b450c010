"""Latent diffusion's option names: which of ours they are, and names that do not exist."""

import numpy as np
import pytest

from diffusion_jax.core.schedules import Cosine, Linear, ScaledLinear, root_betas
from diffusion_jax.io.tables.unet import UnsupportedOption
from diffusion_jax.pretrained.latent_diffusion import (
    average,
    learning_rate_cycles,
    noise_schedule,
)
from diffusion_jax.training.rates import Cycle


def test_linear_is_linear_in_the_root():
    assert noise_schedule() == ScaledLinear(1000, 1e-4, 0.02)
    released = noise_schedule("linear", linear_start=0.00085, linear_end=0.012)
    assert released == ScaledLinear()
    assert noise_schedule("sqrt_linear", 400, linear_end=0.01) == Linear(400, 1e-4, 0.01)
    assert noise_schedule("sqrt", 30) == root_betas(30)
    assert noise_schedule("cosine", 50, cosine_s=0.01) == Cosine(50, 0.01)
    with pytest.raises(UnsupportedOption, match="'scaled_linear'; there are linear, sqrt_linear"):
        noise_schedule("scaled_linear")


def test_an_average_with_and_without_updates_counted():
    """LitEma counts before it averages, so that the first decay is 2 / 11."""
    np.testing.assert_allclose(average().decay_at(1), 2 / 11, rtol=1e-6)
    np.testing.assert_allclose(average(0.9, use_num_upates=False).decay_at(1), 0.9, rtol=1e-6)


def test_learning_rates_by_name_or_in_order():
    one = Cycle(50, 10, start=0.01, peak=1.0, floor=0.1)
    assert learning_rate_cycles("LambdaWarmUpCosineScheduler", [10, 0.1, 1.0, 0.01, 50, 7]) == (
        one,
    )
    lists = {
        "warm_up_steps": [10, 4],
        "cycle_lengths": [50, 9],
        "f_start": [0.01, 0.0],
        "f_max": [1.0, 0.5],
        "f_min": [0.1, 0.2],
        "verbosity_interval": 0,
    }
    two = (one, Cycle(9, 4, start=0.0, peak=0.5, floor=0.2))
    assert learning_rate_cycles("ldm.lr_scheduler.LambdaWarmUpCosineScheduler2", lists) == two
    (line,) = learning_rate_cycles("LambdaLinearScheduler", [[10], [1.0], [1.0], [1e-6], [10**13]])
    assert line == Cycle(10**13, 10, start=1e-6, peak=1.0, floor=1.0, shape="linear")


@pytest.mark.parametrize(
    "name, arguments, error, message",
    [
        ("LambdaStep", [], UnsupportedOption, "'LambdaStep'; there are LambdaWarmUpCosine"),
        ("LambdaLinearScheduler", {"lr_min": [1]}, UnsupportedOption, r"has no \['lr_min'\]"),
        ("LambdaLinearScheduler", {"f_min": [1]}, ValueError, "needs warm_up_steps, f_max"),
        ("LambdaLinearScheduler", [[1], [1], [1], [0, 0], [2]], ValueError, "'f_start': 2"),
        ("LambdaLinearScheduler", [[3], [1], [1], [0], [2]], ValueError, "warmup_steps must lie"),
    ],
)
def test_learning_rates_that_cannot_be_read_say_why(name, arguments, error, message):
    with pytest.raises(error, match=message):
        learning_rate_cycles(name, arguments)
