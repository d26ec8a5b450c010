"""Likelihood by the probability flow against the exact densities of a mixture and a Gaussian."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.schedules import EDM, FlowMatching
from diffusion_jax.core.timesteps import karras, trailing
from diffusion_jax.core.types import NoiseLevel, Prediction
from diffusion_jax.losses.vlb import discretized_gaussian_log_likelihood
from diffusion_jax.samplers.inversion import reverse
from diffusion_jax.samplers.likelihood import bits_per_dimension, log_likelihood
from tests.analytic import MIXTURE, gaussian, gaussian_flow, in_vp

KEYS = image_keys(0, range(4))
# Mean error in nats of Heun's method at N steps: measured independently of this library.
ERRORS = {32: 8.8e-2, 64: 2.1e-2, 128: 5.3e-3, 256: 1.4e-3, 512: 3.9e-4}


def edm_grid(num_steps):
    grid = karras(EDM(0.002, 80.0), num_steps + 1, max_steps=513)
    return grid._replace(stop=jnp.asarray(num_steps, jnp.int32))


@functools.partial(jax.jit, static_argnames="order")
def of_mixture(grid, x, order=2):
    return log_likelihood(
        MIXTURE.denoise, grid, x, order=order, log_prior=MIXTURE.log_density
    ).log_prob


def mean_error(grid, x, **options):
    end = NoiseLevel(*(np.asarray(field)[int(grid.stop)] for field in grid.levels))
    x = end.alpha * x
    exact = MIXTURE.log_density(x, end)
    return float(np.mean(np.abs(of_mixture(grid, jnp.asarray(x), **options) - exact)))


def test_error_against_the_exact_density(x64):
    """The window of each number of steps, and order 2; Euler's is of order 1 and larger."""
    x = MIXTURE.draw(np.random.default_rng(0), 128)
    error = {n: mean_error(edm_grid(n), x) for n in ERRORS}
    assert all(0.5 * window < error[n] < 1.1 * window for n, window in ERRORS.items()), error
    slopes = [np.log2(error[n] / error[2 * n]) for n in (64, 128, 256)]
    assert all(1.9 < slope < 2.1 for slope in slopes), slopes
    euler = [mean_error(edm_grid(n), x, order=1) for n in (256, 512)]
    assert 0.9 < np.log2(euler[0] / euler[1]) < 1.1 and euler[1] > 10 * error[512]


def test_the_path_does_not_matter(x64):
    """On a variance-preserving path p(x_t) is another density, and comes out as well."""
    x = MIXTURE.draw(np.random.default_rng(0), 128)
    grid = edm_grid(64)
    assert abs(mean_error(in_vp(grid), x) - mean_error(grid, x)) < 1e-9


def test_density_and_noise_of_one_gaussian():
    """From clean data on, in float32, with the prior as a Gaussian of known width."""
    data, std = gaussian(0.0, 0.5), 0.5
    grid = karras(EDM(0.01, 20.0), 200, max_steps=200)
    x = jnp.linspace(-1.0, 1.0, 4)[:, None]
    out = jax.jit(
        lambda grid, x: log_likelihood(data.denoise, grid, x, prior_std=float(np.hypot(std, 20.0)))
    )(grid, x)
    exact = -0.5 * (np.asarray(x[:, 0]) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(out.log_prob, exact, rtol=0, atol=3e-3)
    start, end = NoiseLevel(0.0, 1.0, 20.0), NoiseLevel(0.0, 1.0, 0.0)
    noise = gaussian_flow(np.asarray(x), end, start, mean=0.0, std=std)
    np.testing.assert_allclose(out.noise, noise, rtol=3e-3)


def rotated(x, level):
    """A denoiser whose Jacobian is far from diagonal: of a Gaussian with correlation 0.9."""
    covariance = jnp.asarray([[0.25, 0.225], [0.225, 0.25]], x.dtype)
    total = level.alpha**2 * covariance + level.sigma**2 * jnp.eye(2, dtype=x.dtype)
    return Prediction(x @ (level.alpha * covariance @ jnp.linalg.inv(total)).T)


@pytest.mark.parametrize(
    "divergence", ["rademacher", pytest.param("gaussian", marks=pytest.mark.slow)]
)
def test_probes_are_right_on_average(divergence):
    """512 estimates of one example's log p scatter around the exact trace's."""
    grid = karras(EDM(0.05, 10.0), 17, max_steps=17)
    x = jnp.broadcast_to(jnp.asarray([0.4, -0.3]), (512, 2))
    exact = float(log_likelihood(rotated, grid, x[:1]).log_prob[0])
    estimate = jax.jit(
        lambda keys: log_likelihood(rotated, grid, x, divergence=divergence, keys=keys).log_prob
    )
    found = np.asarray(estimate(image_keys(0, range(512))), np.float64)
    spread = found.std() / np.sqrt(512)
    assert spread > 1e-3 and abs(found.mean() - exact) < 4 * spread
    # The probes of an image are its own, whatever the batch.
    alone = log_likelihood(
        rotated, grid, x[:2], divergence=divergence, keys=image_keys(0, range(2))
    )
    np.testing.assert_allclose(found[:2], alone.log_prob, rtol=1e-5)
    assert abs(found[0] - found[1]) > 1e-3


@pytest.mark.slow
def test_probe_of_signs_is_exact_where_dimensions_do_not_mix():
    """v'Jv = tr J for a diagonal J and v of ±1; images have their own trace and any rank."""
    grid, data = karras(EDM(0.05, 10.0), 9, max_steps=9), gaussian(0.1, 0.4)

    def denoise(x, level):
        return Prediction(data.x0(x.reshape(-1, 1), level).reshape(x.shape))

    x = jax.random.normal(jax.random.key(0), (4, 2, 3, 1))
    exact = log_likelihood(denoise, grid, x).log_prob
    signs = log_likelihood(denoise, grid, x, divergence="rademacher", keys=KEYS).log_prob
    np.testing.assert_allclose(signs, exact, rtol=1e-5)
    alone = log_likelihood(denoise, grid, x.reshape(24, 1)).log_prob
    np.testing.assert_allclose(exact, alone.reshape(4, 6).sum(axis=1), rtol=1e-4)


def test_number_of_steps_is_data():
    x = jnp.zeros((2, 2), jnp.float32)
    of_mixture(edm_grid(8), x)
    before = of_mixture._cache_size()
    assert of_mixture(edm_grid(9), x)[0] != of_mixture(edm_grid(30), x)[0]
    assert of_mixture._cache_size() == before


def test_bits_are_those_of_the_bound():
    """Density times a narrow bin is the probability that the decoder's term of the bound has."""
    x = jnp.asarray([[0.2], [-0.45], [0.0]])
    mean, std, half_bin = 0.1, 0.3, 1.0 / 255.0
    discrete = -discretized_gaussian_log_likelihood(
        x, jnp.full_like(x, mean), jnp.full_like(x, np.log(std)), half_bin=half_bin
    )[:, 0]
    density = -0.5 * ((x[:, 0] - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    bits = bits_per_dimension(density, 1, half_bin=half_bin)
    np.testing.assert_allclose(bits, discrete / np.log(2), rtol=0, atol=2e-4)
    np.testing.assert_allclose(bits_per_dimension(6 * density, 6), bits, rtol=1e-6)


@pytest.mark.parametrize("divergence", ["exact", "rademacher"])
def test_gradients_pass_on_grids_with_python_bounds(divergence, x64):
    """In reverse mode, against central differences of the same steps and the exact score."""
    grid = karras(EDM(0.05, 10.0), 33, max_steps=40).starting_at(1).fixed()
    assert isinstance(reverse(grid).stop, int) and reverse(grid).start == 0
    x, keys = jnp.asarray([[0.4, -0.3], [0.1, 0.2]]), image_keys(0, range(2))
    std = float(grid.level(1).sigma)
    options = {} if divergence == "exact" else {"divergence": divergence, "keys": keys}

    @jax.jit
    def log_prob(x):
        return log_likelihood(rotated, grid, x, prior_std=std, **options).log_prob

    found = jax.jit(jax.grad(lambda x: jnp.sum(log_prob(x))))(x)
    for i in range(2):
        h = 1e-4 * jnp.eye(2)[i][None]
        slope = (log_prob(x + h) - log_prob(x - h)) / 2e-4
        np.testing.assert_allclose(found[:, i], slope, rtol=1e-6)
    covariance = np.asarray([[0.25, 0.225], [0.225, 0.25]]) + 0.05**2 * np.eye(2)
    np.testing.assert_allclose(found, -np.asarray(x) @ np.linalg.inv(covariance), rtol=0.05)


def test_data_in_float32_meets_grids_in_float64(x64):
    grid = karras(EDM(0.05, 10.0), 5, max_steps=5)
    assert grid.levels.t.dtype == jnp.float64
    x = jnp.asarray([[0.4, -0.3]], jnp.float32)
    out = log_likelihood(rotated, grid, x)
    assert out.log_prob.dtype == out.noise.dtype == jnp.float32
    wide = log_likelihood(rotated, grid, x.astype(jnp.float64))
    np.testing.assert_allclose(out.log_prob, wide.log_prob, rtol=1e-4)


GRID = trailing(FlowMatching(), 4, max_steps=4)
X = jnp.zeros((4, 2))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: log_likelihood(rotated, GRID, X, divergence="hutch"), "got 'hutch'"),
        (lambda: log_likelihood(rotated, GRID, X, order=3), r"\(1, 2\), got 3"),
        (lambda: log_likelihood(rotated, GRID, X, divergence="gaussian"), "got none with 'gau"),
        (lambda: log_likelihood(rotated, GRID, X, keys=KEYS), "got keys with 'exact'"),
        (lambda: log_likelihood(rotated, GRID._replace(ends=GRID.levels), X), "ends of its own"),
        (
            lambda: log_likelihood(
                rotated, GRID, X, prior_std=1.0, log_prior=lambda x, level: x[:, 0]
            ),
            "prior_std .* give one",
        ),
        (lambda: log_likelihood(rotated, GRID, X), r"alpha = 0, .* grid.starting_at\(1\)"),
        (lambda: bits_per_dimension(X[:, 0], 2, half_bin=0.0), "got 0.0 and 2"),
        (lambda: bits_per_dimension(X[:, 0], 0), "and 0"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_grid_without_its_first_step_is_finite():
    """Flow matching: α = 0 at the first level."""
    log_prob = log_likelihood(rotated, GRID.starting_at(1), X).log_prob
    assert np.all(np.isfinite(log_prob))
