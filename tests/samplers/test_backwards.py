"""Exponential integrators from data to noise: their order, and what history serves which way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.types import NoiseLevel
from diffusion_jax.samplers import DPMSolverMultistep, DPMSolverSinglestep, UniPC, encode
from diffusion_jax.samplers.exponential import known
from tests import analytic
from tests.samplers.test_convergence import SIGMA_MAX, SIGMA_MIN, without_last_step

M, S = DPMSolverMultistep, DPMSolverSinglestep
DATA = analytic.gaussian(0.4, 0.3)
slow = pytest.mark.slow


@functools.partial(jax.jit, static_argnames="sampler")
def encoded(sampler, grid, x):
    return encode(sampler, DATA.denoise, grid, x)


@pytest.mark.parametrize(
    "sampler, window",
    [
        pytest.param(M(2, "dpmsolver", lower_order_below=0), (1.85, 2.25), marks=slow),
        (M(3, lower_order_below=0), (2.8, 3.3)),
        (S(2), (1.85, 2.15)),
        pytest.param(S(3), (2.8, 3.2), marks=slow),
        (UniPC(2, lower_order_final=False), (2.7, 3.2)),
        pytest.param(UniPC(3, predict="eps", lower_order_final=False), (2.7, 4.3), marks=slow),
    ],
    ids=lambda value: type(value).__name__ + str(getattr(value, "order", "")),
)
def test_order_of_convergence_from_data_to_noise(sampler, window, x64):
    """The same as from noise to data: earlier predictions are used in both directions."""
    x = jnp.linspace(-0.6, 1.4, 6)[:, None]
    start, end = (NoiseLevel(0.0, 1.0, sigma) for sigma in (SIGMA_MIN, SIGMA_MAX))
    exact = analytic.gaussian_flow(np.asarray(x), start, end, mean=0.4, std=0.3)
    error = [np.abs(encoded(sampler, without_last_step(n), x) - exact).max() for n in (96, 192)]
    assert window[0] < np.log2(error[0] / error[1]) < window[1], error


@pytest.mark.parametrize(
    "history, here, end, usable",
    [
        ((0.0, -1.0), 1.0, 2.0, (True, True)),  # sampling
        ((0.0, 1.0), -1.0, -2.0, (True, True)),  # encoding
        ((0.0, 1.0), -1.0, -np.inf, (True, True)),  # to pure noise
        ((1.0, 0.0), -1.0, 0.5, (False, False)),  # after a jump upwards
        ((0.0, 1.0), 1.0, 2.0, (True, False)),  # a step after a jump upwards
        ((1.0, 0.0), 1.0, 2.0, (False, False)),  # a step of length zero
        ((0.0, 0.0), 1.0, 2.0, (True, False)),
        ((-np.inf, -np.inf), 1.0, 2.0, (False, False)),
        ((0.0, -np.inf), 1.0, np.inf, (True, False)),
        ((np.inf, -np.inf), 1.0, 0.0, (False, False)),  # from clean data
    ],
)
def test_history_is_usable_in_the_direction_that_it_was_made_in(history, here, end, usable):
    arrays = [jnp.float32(value) for value in (*history, here, end)]
    assert tuple(bool(ok) for ok in known(arrays[:2], *arrays[2:])) == usable
