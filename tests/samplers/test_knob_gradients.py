"""Gradients with respect to the knobs of samplers, on grids that end with clean data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.schedules import Linear
from diffusion_jax.core.timesteps import from_times
from diffusion_jax.samplers import DDIM, DDPM, SAMPLERS, EulerAncestral, fit_grid, sample
from diffusion_jax.samplers.consistency import LCM, TCD, ConsistencyMultistep
from tests.analytic import MIXTURE

SCHEDULE = Linear()
TIMES = np.asarray([990.0, 700.0, 350.0])
STEP = 1e-5
# A knob that changes nothing has no gradient: values at which all of them count.
SET = {
    "ddpm": [DDPM("interpolated", fraction=0.3)],
    "ddim": [DDIM(0.0), DDIM(0.5), DDIM(1.0)],
    "euler_ancestral": [EulerAncestral(), EulerAncestral(0.4)],
    "euler_churn": [SAMPLERS["euler_churn"](0.7, 0.01, 50.0, 1.1)],
    "heun_churn": [SAMPLERS["heun_churn"](0.7, 0.01, 50.0, 1.1)],
    "consistency_multistep": [ConsistencyMultistep()],
    "lcm": [LCM(0.01)],
    # Between two times of the table, which is not differentiable at them.
    "tcd": [TCD(0.3137)],
}
QUICK = {"ddpm", "ddim", "euler_ancestral", "consistency_multistep"}
CASES = [
    pytest.param(sampler, marks=[] if name in QUICK else pytest.mark.slow)
    for name, make in SAMPLERS.items()
    for sampler in SET.get(name, [make()])
    if jax.tree.leaves(sampler)
]


@functools.cache
def compiled(structure):
    """Sum of the sample and its gradient, as functions of the leaves [L]."""

    grid = from_times(SCHEDULE, TIMES, max_steps=len(TIMES)).fixed()
    x, keys = jnp.asarray([[0.3, -1.0], [1.2, 0.4]]), image_keys(0, range(2))

    def total(leaves):
        sampler = jax.tree.unflatten(structure, list(leaves))
        fitted = fit_grid(sampler, grid, SCHEDULE)
        return jnp.sum(sample(sampler, MIXTURE.denoise, fitted, x, keys)[0])

    return jax.jit(jax.value_and_grad(total))


def value_and_gradient(sampler):
    leaves, structure = jax.tree.flatten(sampler)
    call = compiled(structure)
    return lambda change: call(jnp.asarray(leaves, jnp.float64) + change), len(leaves)


@pytest.mark.parametrize("sampler", CASES, ids=str)
def test_gradients_of_every_knob_are_those_of_finite_differences(sampler, x64):
    call, count = value_and_gradient(sampler)
    _, gradient = call(jnp.zeros(count))
    assert np.all(np.isfinite(gradient))
    for i, ours in enumerate(gradient):
        change = STEP * jnp.eye(count)[i]
        slope = (call(change)[0] - call(-change)[0]) / (2.0 * STEP)
        np.testing.assert_allclose(ours, slope, rtol=1e-5, atol=1e-7)
    assert np.any(np.abs(gradient) > 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler", [TCD(0.0), TCD(1.0), SAMPLERS["heun_churn"](), SAMPLERS["euler_churn"]()], ids=str
)
def test_where_the_noise_sets_in_gradients_are_finite(sampler, x64):
    """The noise is a root of these knobs, infinitely steep where it is 0."""
    call, count = value_and_gradient(sampler)
    assert np.all(np.isfinite(call(jnp.zeros(count))[1]))
