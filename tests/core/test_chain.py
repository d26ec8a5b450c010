"""The training chain: neighbours in the table, and networks that predict the mean of one."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.chain import PreviousX, following_level, previous_level
from diffusion_jax.core.forward import add_noise
from diffusion_jax.core.schedules import EDM, Cosine, CosineLogSNR, Linear, ShiftedLogSNR

SCHEDULE = Cosine(10)
TIMES = np.arange(10.0)
TABLE = SCHEDULE.alphas_cumprod()


def test_the_cleaner_neighbour_of_every_time():
    level = previous_level(SCHEDULE, TIMES)
    np.testing.assert_allclose(level.alpha, np.sqrt([1.0, *TABLE[:-1]]), rtol=1e-12)
    np.testing.assert_allclose(level.sigma, np.sqrt([0.0, *(1 - TABLE[:-1])]), rtol=1e-12)
    np.testing.assert_array_equal(level.t, [0.0, *TIMES[:-1]])


def test_the_noisier_neighbour_of_every_time():
    level = following_level(SCHEDULE, TIMES)
    np.testing.assert_allclose(level.alpha, np.sqrt([*TABLE[1:], TABLE[-1]]), rtol=1e-12)
    np.testing.assert_array_equal(level.t, [*TIMES[1:], 9.0])


@pytest.mark.slow
def test_neighbours_of_traced_times_and_of_single_ones():
    for function in (previous_level, following_level):
        traced, exact = function(SCHEDULE, jnp.float32(TIMES)), function(SCHEDULE, TIMES)
        np.testing.assert_allclose(traced.sigma, exact.sigma, rtol=1e-5)
        one = function(SCHEDULE, jnp.float32(0.0))
        assert one.alpha.shape == () and float(one.sigma) == np.float32(exact.sigma[0])


@pytest.mark.parametrize("schedule", [SCHEDULE, Linear(10), ShiftedLogSNR(SCHEDULE, 1.0)])
def test_the_target_is_the_posterior_mean_and_leads_back(schedule):
    """Against the DDPM paper's formula in ᾱ and β, at every time in one batch."""
    rng = np.random.default_rng(0)
    x0, eps = rng.uniform(-1, 1, (10, 3)), rng.standard_normal((10, 3))
    levels = schedule(TIMES)
    at = levels.alpha[:, None] ** 2
    before = np.concatenate([[[1.0]], at[:-1]])
    beta = 1 - at / before
    x = np.sqrt(at) * x0 + np.sqrt(1 - at) * eps
    mean = (
        np.sqrt(before) * beta / (1 - at) * x0 + np.sqrt(at / before) * (1 - before) / (1 - at) * x
    )
    parameterization, level = PreviousX(schedule), schedule(jnp.float32(TIMES))
    target = parameterization.target(jnp.float32(x0), jnp.float32(eps), level)
    np.testing.assert_allclose(target, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(target[0], x0[0], rtol=1e-5)
    noisy = add_noise(jnp.float32(x0), jnp.float32(eps), level)
    np.testing.assert_allclose(parameterization.to_x0(target, noisy, level), x0, atol=1e-4)
    assert parameterization.scale_input(noisy, level) is noisy


def test_single_levels_serve_a_whole_batch():
    x = jnp.asarray([[0.4, -1.0], [0.2, 0.3]])
    level = SCHEDULE(jnp.float32(4.0))
    batched = SCHEDULE(jnp.full(2, 4.0))
    one = PreviousX(SCHEDULE).to_x0(0.5 * x, x, level)
    np.testing.assert_allclose(one, PreviousX(SCHEDULE).to_x0(0.5 * x, x, batched), rtol=1e-6)


@pytest.mark.parametrize("schedule", [CosineLogSNR(), EDM()])
def test_continuous_time_has_no_chain(schedule):
    name = type(schedule).__name__
    for make in (
        lambda: previous_level(schedule, 0.5),
        lambda: following_level(schedule, 0.5),
        lambda: PreviousX(schedule),
    ):
        with pytest.raises(ValueError, match=f"{name} has continuous time.*Cosine or Linear"):
            make()
