"""EDM's samplers and KDPM2: the churned level, one step against the paper, orders."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.commands.moments import variance_error
from diffusion_jax.core.arrays import image_keys, per_image_normal
from diffusion_jax.core.parameterization import X0, EDMPreconditioning, Eps, V
from diffusion_jax.core.schedules import EDM, Cosine, FlowMatching, Linear, ZeroTerminalSNR
from diffusion_jax.core.timesteps import from_times, karras, trailing
from diffusion_jax.core.types import NoiseLevel, Prediction
from diffusion_jax.samplers import (
    KDPM2,
    Euler,
    EulerChurn,
    Heun,
    HeunChurn,
    ReferenceEulerChurn,
    StepInfo,
    fit_grid,
    initial_noise,
    sample,
)
from tests import analytic
from tests.noise import drawn_by
from tests.samplers.grids import grid_for
from tests.samplers.test_convergence import SIGMA_MAX, SIGMA_MIN, reference, rms, solve

KEYS = image_keys(0, range(4))
X = np.asarray([[0.8], [-0.4], [0.1], [1.5]])
GAUSSIAN = analytic.gaussian(0.0, 0.25)
CHURN = {"s_churn": 2.0, "s_tmin": 0.5, "s_tmax": 20.0, "s_noise": 1.1}


def level_of(t, alpha, sigma):
    return NoiseLevel(jnp.float32(t), jnp.float32(alpha), jnp.float32(sigma))


def bent(x, level):
    """A denoiser that is not linear and depends on what it is told."""
    return Prediction(jnp.tanh(x / level.alpha + 0.01 * level.t))


def slope_of_bent(u, sigma, t):
    """dx/dσ at alpha = 1 according to `bent`."""
    return (u - np.tanh(u + 0.01 * t)) / sigma


@functools.partial(jax.jit, static_argnames="denoise")
def one_step(sampler, grid, x, index, noise, *, denoise=bent):
    info = StepInfo(index, grid.start, grid.stop, grid.middle_level(index))
    with drawn_by(lambda keys, x: noise):
        state = sampler.init(x)
        return sampler.step(KEYS, denoise, state, grid.level(index), grid.next_level(index), info).x


# The churned level.


def test_churn_on_an_edm_path_is_algorithm_2():
    """γ = S_churn / N between S_tmin and S_tmax, at most √2 - 1; the network is told σ̂."""
    schedule = EDM()
    grid = fit_grid(EulerChurn(**CHURN), karras(schedule, 7, max_steps=8), schedule)
    sigma = np.asarray(grid.levels.sigma)[:7]
    gamma = np.where((sigma >= 0.5) & (sigma <= 20.0), 2.0 / 7, 0.0)
    assert 2 <= np.count_nonzero(gamma) <= 4
    np.testing.assert_allclose(grid.middle.sigma[:7], sigma * (1 + gamma), rtol=1e-6)
    np.testing.assert_array_equal(grid.middle.t[:7], grid.middle.sigma[:7])
    np.testing.assert_array_equal(grid.middle.alpha, 1.0)
    # After the last step there is padding.
    np.testing.assert_array_equal(grid.middle.sigma[7:], 0.0)


def test_churn_is_at_most_a_doubling_of_the_variance_and_goes_beyond_sigma_max():
    schedule = EDM()
    grid = fit_grid(HeunChurn(s_churn=1e3), karras(schedule, 4, max_steps=8), schedule)
    ratio = np.asarray(grid.middle.sigma[:4]) / np.asarray(grid.levels.sigma[:4])
    np.testing.assert_allclose(ratio**2, 2.0, rtol=1e-5)
    assert float(grid.middle.t[0]) > 100.0


@pytest.mark.parametrize("schedule", [Linear(), FlowMatching()], ids=["vp", "flow"])
def test_the_churned_level_lies_on_the_path(schedule):
    """Its σ/α is exactly (1 + γ) times the old one, its time the schedule's own."""
    grid = trailing(schedule, 8, max_steps=8)
    middle = fit_grid(EulerChurn(s_churn=2.0), grid, schedule).middle
    t, alpha, sigma = (np.asarray(field, np.float64)[1:] for field in middle)
    before = NoiseLevel(*(np.asarray(field, np.float64)[1:8] for field in grid.levels))
    np.testing.assert_allclose(sigma / alpha, 1.25 * before.sigma / before.alpha, rtol=1e-6)
    expected = schedule(schedule.inverse(2 * np.log(alpha / sigma)))
    np.testing.assert_allclose(t, expected.t, rtol=1e-4)
    np.testing.assert_allclose(alpha, expected.alpha, rtol=1e-3)


def test_beyond_a_discrete_schedule_the_network_is_told_its_last_time():
    grid = fit_grid(EulerChurn(s_churn=1.0), trailing(Linear(), 4, max_steps=8), Linear())
    assert float(grid.middle.t[0]) == 999.0
    ratio = float(grid.middle.sigma[0] / grid.middle.alpha[0])
    np.testing.assert_allclose(ratio, 1.25 * 157.4, rtol=1e-3)
    np.testing.assert_allclose(grid.middle.alpha[0] ** 2 + grid.middle.sigma[0] ** 2, 1, rtol=1e-6)


def test_pure_noise_is_not_churned():
    schedule = ZeroTerminalSNR(1000, Cosine())
    grid = fit_grid(HeunChurn(s_churn=4.0), trailing(schedule, 4, max_steps=8), schedule)
    assert [float(f[0]) for f in grid.middle] == [float(f[0]) for f in grid.levels]
    assert np.all(np.isfinite(jnp.stack(grid.middle)))
    assert float(grid.middle.sigma[1]) > float(grid.levels.sigma[1])


def test_fit_grid_keeps_levels_that_are_there():
    grid = karras(EDM(), 4, max_steps=8)
    fitted = fit_grid(HeunChurn(s_churn=1.0), grid, EDM())
    assert fit_grid(HeunChurn(s_churn=2.0), fitted, EDM()).middle is fitted.middle
    anew = fit_grid(HeunChurn(s_churn=2.0), grid, EDM())
    assert float(anew.middle.sigma[1]) > float(fitted.middle.sigma[1])
    assert fit_grid(Heun(), grid, EDM()).middle is None


def test_samples_keep_the_type_of_their_noise(x64):
    """A grid in float64 with middle levels and ends, and noise in float32."""
    grid = fit_grid(HeunChurn(s_churn=2.0), karras(EDM(), 4, max_steps=8), EDM())
    grid = grid._replace(ends=NoiseLevel(*(field[1:] for field in grid.levels)))
    noise = initial_noise(KEYS, (1,), EDM().prior_std(grid.level(0)))
    assert grid.levels.t.dtype == grid.middle.t.dtype == jnp.float64
    assert noise.dtype == jnp.float32
    out = [
        sample(HeunChurn(s_churn=2.0), GAUSSIAN.denoise, grid, noise.astype(dtype), KEYS)[0]
        for dtype in (jnp.float32, jnp.float64)
    ]
    assert [x.dtype for x in out] == [jnp.float32, jnp.float64]


@pytest.mark.parametrize("sampler", [EulerChurn(), KDPM2()], ids=["churn", "kdpm2"])
def test_a_grid_that_was_not_fitted_is_refused(sampler):
    with pytest.raises(ValueError, match=f"{type(sampler).__name__}.*fit_grid"):
        sample(sampler, bent, karras(EDM(), 4, max_steps=8), jnp.ones((4, 1)), KEYS)


@pytest.mark.parametrize("options", [{"s_churn": -1.0}, {"s_noise": np.nan}, {"s_tmin": 2e9}])
def test_churn_refuses_bad_knobs(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        HeunChurn(**{"s_tmax": 1e9, **options}).validate()
    HeunChurn(s_churn=40.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003).validate()


# One step.


@pytest.mark.parametrize("plain, churned", [(Euler(), EulerChurn()), (Heun(), HeunChurn())])
def test_without_churn_it_is_the_plain_method(plain, churned):
    """At the noisy end of a discrete schedule too, where rounding could leave some noise."""
    grid = fit_grid(churned, trailing(Linear(), 6, max_steps=8), Linear())
    noise = jnp.full((4, 1), 1e3)
    for index in (0, 3, 5):
        np.testing.assert_allclose(
            one_step(churned, grid, jnp.float32(X), index, noise),
            one_step(plain, grid, jnp.float32(X), index, noise),
            rtol=1e-6,
            atol=1e-6,
        )


@pytest.mark.parametrize("correct", [False, True], ids=["euler", "heun"])
def test_a_churned_step_is_algorithm_2(correct):
    """Noise up to σ̂, the slope there with the network told σ̂, then down to the next level."""
    sampler = (HeunChurn if correct else EulerChurn)(s_churn=0.3, s_noise=1.1)
    sigma, next_sigma = 2.0, 0.9
    grid = from_times(EDM(), [sigma, next_sigma], max_steps=8)
    grid = fit_grid(sampler, grid._replace(stop=jnp.int32(1)), EDM())
    hat = 1.3 * sigma
    noise = np.asarray(per_image_normal(KEYS, jnp.zeros((4, 1))))
    x = X + 1.1 * np.sqrt(hat**2 - sigma**2) * noise
    slope = slope_of_bent(x, hat, hat)
    expected = x + (next_sigma - hat) * slope
    if correct:
        end = slope_of_bent(expected, next_sigma, next_sigma)
        expected = x + (next_sigma - hat) * (slope + end) / 2
    np.testing.assert_allclose(
        one_step(sampler, grid, jnp.float32(X), 0, noise), expected, rtol=1e-5, atol=1e-5
    )


def reference_x0(parameterization, x, x_hat, sigma, hat):
    """What diffusers makes of the network's output about x when it has added noise, at alpha 1."""
    x0 = np.tanh(x + 0.01 * sigma)
    if isinstance(parameterization, X0):
        return x0
    if isinstance(parameterization, Eps):
        return x_hat - hat * (x - x0) / sigma
    if isinstance(parameterization, V):
        root = np.sqrt(sigma**2 + 1)
        v = (x / (sigma**2 + 1) - x0) * root / sigma
        return -sigma / root * v + x_hat / (sigma**2 + 1)
    data = parameterization.sigma_data

    def skip_and_out(s):
        return data**2 / (s**2 + data**2), s * data / np.sqrt(s**2 + data**2)

    skip, out = skip_and_out(sigma)
    output = (x0 - skip * x) / out
    skip, out = skip_and_out(hat)
    return skip * x_hat + out * output


@pytest.mark.parametrize("said_as", [Eps(), X0(), V(), EDMPreconditioning(0.7)], ids=repr)
def test_the_reference_calls_the_network_before_it_adds_noise(said_as):
    sampler = ReferenceEulerChurn(s_churn=0.3, s_noise=1.1, parameterization=said_as)
    sigma, next_sigma, hat = 2.0, 0.9, 2.6
    noise = np.asarray(per_image_normal(KEYS, jnp.zeros((4, 1))))
    x_hat = X + 1.1 * np.sqrt(hat**2 - sigma**2) * noise
    x0 = reference_x0(said_as, X, x_hat, sigma, hat)
    expected = x_hat + (next_sigma - hat) * (x_hat - x0) / hat
    grid = from_times(EDM(), [sigma, next_sigma], max_steps=8)
    grid = fit_grid(sampler, grid._replace(stop=jnp.int32(1)), EDM())
    if isinstance(said_as, V):
        # v is one of a path that preserves variance: the same step there.
        scale = 1 / np.sqrt(1 + np.asarray([sigma, next_sigma, hat]) ** 2)
        levels = [(sigma, scale[0], sigma * scale[0]), (0, scale[1], next_sigma * scale[1])]
        fields = (jnp.float32(field) for field in zip(*levels, strict=True))
        middle = (jnp.float32([value]) for value in (hat, scale[2], hat * scale[2]))
        grid = grid._replace(levels=NoiseLevel(*fields), middle=NoiseLevel(*middle))
        out = one_step(sampler, grid, jnp.float32(X * scale[0]), 0, noise) / scale[1]
    else:
        out = one_step(sampler, grid, jnp.float32(X), 0, noise)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)
    correct = one_step(EulerChurn(s_churn=0.3, s_noise=1.1), grid, jnp.float32(X), 0, noise)
    assert np.abs(correct - expected).max() > 1e-2


def test_kdpm2_is_dpm_solver_2():
    """The formulas of the paper's algorithm 1 with r1 = 1/2, in λ and ε, on a VP path."""
    schedule = Linear()
    grid = from_times(schedule, [600.0, 300.0], max_steps=8)
    grid = fit_grid(KDPM2(), grid, schedule)
    (alpha, sigma), (alpha_s, sigma_s) = (
        (float(grid.levels.alpha[i]), float(grid.levels.sigma[i])) for i in (0, 1)
    )
    here, there = np.log(alpha / sigma), np.log(alpha_s / sigma_s)
    h, middle = there - here, (here + there) / 2
    alpha_m, sigma_m = 1 / np.sqrt(1 + np.exp(-2 * middle)), 1 / np.sqrt(1 + np.exp(2 * middle))
    time = float(schedule.inverse(np.asarray(2 * middle)))

    def eps(x, alpha, sigma, t):
        return (x - alpha * np.tanh(x / alpha + 0.01 * t)) / sigma

    u = alpha_m / alpha * X - sigma_m * np.expm1(h / 2) * eps(X, alpha, sigma, 600.0)
    expected = alpha_s / alpha * X - sigma_s * np.expm1(h) * eps(u, alpha_m, sigma_m, time)
    out = one_step(KDPM2(), grid, jnp.float32(X), 0, jnp.zeros((4, 1)))
    np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-4)


def test_kdpm2_calls_the_network_2n_minus_1_times():
    calls = []

    def denoise(x, level):
        jax.debug.callback(lambda t: calls.append(float(t)), level.t, ordered=True)
        return Prediction(0.5 * x)

    grid = fit_grid(KDPM2(), karras(EDM(), 4, max_steps=8), EDM())
    out, _ = sample(KDPM2(), denoise, grid, jnp.ones((4, 1)), KEYS)
    jax.effects_barrier()
    t, middle = np.asarray(grid.levels.t), np.asarray(grid.middle.t)
    expected = [t[0], middle[0], t[1], middle[1], t[2], middle[2], t[3]]
    np.testing.assert_allclose(calls, expected, rtol=1e-6)
    assert np.all(np.isfinite(out))


# Orders.


def test_order_of_kdpm2(x64):
    """Against the exact flow of a mixture."""
    x, exact = reference()
    schedule = EDM(SIGMA_MIN, SIGMA_MAX)

    def error(num_steps):
        grid = karras(schedule, num_steps + 1, max_steps=257)
        grid = grid._replace(stop=jnp.asarray(num_steps, jnp.int32))
        return rms(solve(KDPM2(), fit_grid(KDPM2(), grid, schedule), x), exact)

    errors = [error(num_steps) for num_steps in (32, 64, 128)]
    assert errors[0] < 3e-3
    slopes = np.log2(errors[:-1]) - np.log2(errors[1:])
    assert np.all((1.9 < slopes) & (slopes < 2.1)), slopes


def churned_error(sampler, num_steps, *, vp=True):
    return variance_error(sampler, GAUSSIAN, grid_for(sampler, num_steps, vp=vp))


@pytest.mark.parametrize(
    "sampler, low, high", [(EulerChurn(20.0), 0.85, 1.1), (HeunChurn(20.0), 1.85, 2.15)]
)
def test_weak_order_with_churn(sampler, low, high, x64):
    """Heun's method with churn is of weak order 2, and Euler's of 1."""
    slope = np.log2(churned_error(sampler, 128) / churned_error(sampler, 512)) / 2
    assert low < slope < high, slope


def test_more_noise_than_the_process_has_stays(x64):
    """s_noise = 1.007 leaves 1.4% more variance, in the limit of many steps too."""
    biased, true = HeunChurn(20.0, s_noise=1.007), HeunChurn(20.0)
    extra = [churned_error(biased, n) - churned_error(true, n) for n in (128, 512)]
    assert all(0.0135 < value < 0.0145 for value in extra), extra


def test_the_path_of_a_churned_step_does_not_matter(x64):
    values = [churned_error(HeunChurn(20.0), 64, vp=vp) for vp in (True, False)]
    np.testing.assert_allclose(*values, rtol=0, atol=1e-12)
