"""Solvers of the probability flow against its exact solution: order, size of the error, moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.commands.order import measure
from diffusion_jax.commands.order_table import ORDERS, WITHOUT_ORDER
from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.schedules import EDM, Cosine
from diffusion_jax.core.timesteps import karras
from diffusion_jax.samplers import DDIM, DDPM, SAMPLERS, Heun, sample
from tests import analytic
from tests.analytic import MIXTURE
from tests.noise import drawn_by

SIGMA_MIN, SIGMA_MAX = 0.1, 10.0

# Solvers of one grid that several tests below compare.
SOLVERS = {
    name: ORDERS[name].sampler
    for name in ("euler", "ddim", "dpm_solver_pp_1", "heun", "dpm_solver_pp_2m")
}
# One row of each kind is enough for the fast suite; `bench order` and the full suite do all.
FAST = (
    "ddim",
    "heun",
    "dpm_solver_pp_2m",
    "dpm_solver_pp_3m",
    "dpm_solver_pp_3m reference",
    "unipc_3",
    "ddpm large",
    "dpm_solver_pp_2m sde",
)


def without_last_step(num_steps, *, max_steps=257, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX):
    """Karras levels that end at sigma_min: the step to sigma = 0 has an error of its own."""
    schedule = EDM(sigma_min=sigma_min, sigma_max=sigma_max)
    grid = karras(schedule, num_steps + 1, max_steps=max_steps)
    return grid._replace(stop=jnp.asarray(num_steps, jnp.int32))


@functools.cache
def reference():
    """256 starting points and where the exact flow takes them."""
    rng = np.random.default_rng(0)
    x = MIXTURE.draw(rng, 256) + SIGMA_MAX * rng.standard_normal((256, 2))
    return x, analytic.ode_solution(MIXTURE, x, SIGMA_MAX, SIGMA_MIN)


@functools.partial(jax.jit, static_argnames="sampler")
def solve(sampler, grid, x):
    return sample(sampler, MIXTURE.denoise, grid, x, image_keys(0, jnp.arange(x.shape[0])))[0]


def rms(a, b):
    return float(np.sqrt(np.mean(np.sum((np.asarray(a) - b) ** 2, axis=-1))))


def test_reference_solution_has_converged():
    x, exact = reference()
    coarse = analytic.ode_solution(MIXTURE, x[:16], SIGMA_MAX, SIGMA_MIN, steps=256)
    assert rms(coarse, exact[:16]) < 1e-7


def test_reference_solution_of_one_gaussian_is_the_closed_form():
    x = np.linspace(-20.0, 20.0, 5)[:, None]
    start, end = (analytic.NoiseLevel(0.0, 1.0, sigma) for sigma in (SIGMA_MAX, SIGMA_MIN))
    exact = analytic.gaussian_flow(x, start, end, mean=0.4, std=0.3)
    solved = analytic.ode_solution(analytic.gaussian(0.4, 0.3), x, SIGMA_MAX, SIGMA_MIN)
    np.testing.assert_allclose(solved, exact, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in ORDERS]
)
def test_order_of_convergence(name):
    """The error is as small as it should be, and falls as fast with the number of steps."""
    measured = measure(ORDERS[name])
    assert measured.inside, (measured.slopes, dict(measured.errors))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_has_a_row_or_a_reason(name):
    """No sampler joins the table without saying how fast it converges."""
    rows = {type(order.sampler) for order in ORDERS.values()}
    assert (SAMPLERS[name] in rows) != (name in WITHOUT_ORDER)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpm_solver_pp_2m"])
def test_path_does_not_matter(name, x64):
    """The solution at x / alpha is that of the alpha = 1 path, to rounding."""
    sampler = SOLVERS[name]
    x, _ = reference()
    grid = without_last_step(64)
    vp = analytic.in_vp(grid)
    exploding = np.asarray(solve(sampler, grid, x))
    preserving = solve(sampler, vp, x * float(vp.levels.alpha[0]))
    np.testing.assert_allclose(preserving / vp.levels.alpha[64], exploding, rtol=0, atol=1e-11)


def test_first_order_solvers_are_one(x64):
    """Euler = DDIM at eta 0 = DPM-Solver++ of order 1, on a path that ends at sigma = 0."""
    x, _ = reference()
    grid = karras(EDM(SIGMA_MIN, SIGMA_MAX), 16, max_steps=257)
    euler, ddim, dpm = (solve(SOLVERS[name], grid, x) for name in list(SOLVERS)[:3])
    np.testing.assert_allclose(ddim, euler, rtol=0, atol=4e-15)
    np.testing.assert_allclose(dpm, euler, rtol=0, atol=2e-14)


# Moments. For Gaussian data every step is affine in (x, noise), so variances are exact.

LAMBDA = 0.25**2
GAUSSIAN = analytic.gaussian(0.0, 0.25)


def denoise_gaussian(x, level, here, there):
    """The exact denoiser with the exact reverse variance of the step from here to there."""
    fraction = analytic.optimal_var_frac(here, there, LAMBDA)
    prediction = GAUSSIAN.denoise(x, level)
    return prediction._replace(var_frac=jnp.broadcast_to(fraction, x.shape))


@pytest.fixture
def probes():
    """Noise 0, 0, 1 for the three probe images of `analytic.affine_steps`."""
    with drawn_by(lambda keys, x: jnp.asarray([[0.0], [0.0], [1.0]], x.dtype)):
        yield


def variance_error(sampler, num_steps):
    grid = without_last_step(num_steps, max_steps=513, sigma_min=0.02, sigma_max=20.0)
    grid = analytic.in_vp(grid)
    a, b, _ = analytic.affine_steps(sampler, denoise_gaussian, grid)
    start, end = (
        analytic.NoiseLevel(*(np.asarray(field)[i] for field in grid.levels))
        for i in (0, num_steps)
    )
    variance = analytic.propagate_variance(a, b, start.alpha**2 * LAMBDA + start.sigma**2)
    return variance / (end.alpha**2 * LAMBDA + end.sigma**2) - 1.0


def ancestral_variance_error(num_steps, *, large):
    """The same number by a recursion in σ/α that shares no code with the samplers."""
    rho, start, end = 7.0, 20.0, 0.02
    ramp = np.linspace(0.0, 1.0, num_steps + 1)
    ratios = (start ** (1 / rho) + ramp * (end ** (1 / rho) - start ** (1 / rho))) ** rho
    variance = LAMBDA + ratios[0] ** 2
    for t, s in zip(ratios[:-1], ratios[1:], strict=True):
        keep = (s / t) ** 2
        gain = keep + (1.0 - keep) * LAMBDA / (LAMBDA + t**2)
        # β of the VP path, brought to x / α.
        noise = (t**2 - s**2) * (1 + s**2) / (1 + t**2) if large else s**2 * (1.0 - keep)
        variance = gain**2 * variance + noise
    return variance / (LAMBDA + ratios[-1] ** 2) - 1.0


def test_ancestral_variances(probes, x64):
    """Small under-disperses, large over-disperses, DDIM at eta = 1 is small, by exact numbers."""
    small = variance_error(DDPM("small"), 64)
    large = variance_error(DDPM("large"), 64)
    ddim = variance_error(DDIM(eta=1.0), 64)
    assert abs(small - ancestral_variance_error(64, large=False)) < 1e-12
    assert abs(large - ancestral_variance_error(64, large=True)) < 1e-12
    assert abs(ddim - small) < 1e-12
    assert -0.127 < small < -0.120 and 0.094 < large < 0.100


@pytest.mark.parametrize("sampler", [DDPM("small"), DDPM("large")], ids=["small", "large"])
def test_ancestral_sampling_is_weakly_first_order(sampler, probes, x64):
    slope = np.log2(variance_error(sampler, 128) / variance_error(sampler, 512)) / 2
    assert 0.9 < slope < 1.1


def test_deterministic_variances(probes, x64):
    assert abs(variance_error(Heun(), 64) - 0.0037) < 1e-4
    slope = np.log2(variance_error(Heun(), 128) / variance_error(Heun(), 512)) / 2
    assert 1.85 < slope < 2.15


@pytest.mark.parametrize("num_steps", [2, 8, 64])
def test_learned_range_with_the_exact_variance_is_exact(num_steps, probes, x64):
    """With the optimal variance the marginals are right for any number of steps."""
    assert abs(variance_error(DDPM("learned_range"), num_steps)) < 1e-11


def test_optimal_fraction_on_the_cosine_schedule():
    """v* of Gaussian data: .997, .972, .759, .393, .254 at λ = .25, T = 100."""
    schedule = Cosine(100)
    t = np.asarray([1, 5, 20, 50, 90])
    fraction = analytic.optimal_var_frac(schedule(t), schedule(t - 1), 0.25)
    np.testing.assert_allclose(fraction, [0.997, 0.972, 0.759, 0.393, 0.254], atol=6e-4)
    fraction = analytic.optimal_var_frac(schedule(t), schedule(t - 1), 1.0)
    np.testing.assert_allclose(fraction, 1.0, atol=1e-6)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_solver_pp_2m"])
def test_exact_flow_of_a_gaussian(name, x64):
    """From noise to sigma = 0 in 256 steps the flow of one Gaussian is the closed form."""
    data = analytic.gaussian(0.3, 0.5)
    grid = karras(EDM(0.002, 80.0), 256, max_steps=256)
    x = jnp.linspace(-100.0, 100.0, 4)[:, None]
    run = jax.jit(
        lambda x: sample(SOLVERS[name], data.denoise, grid, x, image_keys(0, range(4)))[0]
    )
    start, end = analytic.NoiseLevel(0.0, 1.0, 80.0), analytic.NoiseLevel(0.0, 1.0, 0.0)
    exact = analytic.gaussian_flow(x, start, end, mean=0.3, std=0.5)
    tolerance = 2e-2 if name == "euler" else 3e-4
    np.testing.assert_allclose(run(x), exact, atol=tolerance)
