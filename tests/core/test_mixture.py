"""The mixture against numeric calculus, and its probability flow against closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.mixture import MIXTURE, Mixture, exact_flow, gaussian
from diffusion_jax.core.types import NoiseLevel
from tests import analytic

LEVELS = {
    "vp": NoiseLevel(np.asarray(0.4), np.asarray(0.6), np.asarray(0.8)),
    "ve": NoiseLevel(np.asarray(0.4), np.asarray(1.0), np.asarray(0.3)),
    "flow": NoiseLevel(np.asarray(0.4), np.asarray(0.3), np.asarray(0.7)),
}
every_path = pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)


def level(alpha, sigma):
    return NoiseLevel(np.asarray(sigma), np.asarray(alpha), np.asarray(sigma))


def points(count=40, seed=0):
    return np.random.default_rng(seed).normal(0.0, 1.2, (count, 2))


def plane(half_width, count):
    """A square grid [count², 2] and the area that each of its points stands for."""
    axis, step = np.linspace(-half_width, half_width, count, retstep=True)
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2), step**2


@every_path
def test_the_denoiser_is_the_slope_of_the_log_density(level):
    """Tweedie: α x̂0 = x + σ² ∇ log p(x), the gradient by central differences."""
    x, h = points(), 1e-5
    slope = np.stack(
        [
            (MIXTURE.log_density(x + h * e, level) - MIXTURE.log_density(x - h * e, level))
            / (2 * h)
            for e in np.eye(2)
        ],
        axis=-1,
    )
    expected = (x + level.sigma**2 * slope) / level.alpha
    np.testing.assert_allclose(MIXTURE.x0(x, level), expected, rtol=0, atol=1e-8)


@every_path
def test_the_density_integrates_to_one(level):
    x, area = plane(6.0, 481)
    assert abs(np.exp(MIXTURE.log_density(x, level)).sum() * area - 1.0) < 1e-9


def test_the_noisy_density_is_the_clean_one_convolved_with_noise():
    """p(x_t) = ∫ p(x0) N(x_t; α x0, σ²) dx0, and E[x0 | x_t] its mean, by quadrature."""
    here = LEVELS["vp"]
    x0, area = plane(4.0, 401)
    clean = np.exp(MIXTURE.log_density(x0, level(1.0, 0.0)))
    for x in points(5):
        square = ((x - here.alpha * x0) ** 2).sum(-1)
        joint = clean * np.exp(-square / (2 * here.sigma**2)) / (2 * np.pi * here.sigma**2) * area
        density = np.exp(MIXTURE.log_density(x[None], here))[0]
        assert abs(joint.sum() / density - 1.0) < 1e-9
        mean = (joint[:, None] * x0).sum(0) / joint.sum()
        np.testing.assert_allclose(MIXTURE.x0(x[None], here)[0], mean, rtol=0, atol=1e-9)


@every_path
def test_class_probabilities_are_the_shares_of_the_classes_densities(level):
    x = points()
    alone = [
        weight * np.exp(Mixture((1.0,), (mean,), (std,)).log_density(x, level))
        for weight, mean, std in zip(MIXTURE.weights, MIXTURE.means, MIXTURE.stds, strict=True)
    ]
    shares = np.stack(alone, -1) / np.sum(alone, axis=0)[:, None]
    np.testing.assert_allclose(MIXTURE.class_probability(x, level), shares, rtol=1e-9, atol=1e-12)
    labels = np.arange(len(x)) % 3
    chosen = np.log(shares[np.arange(len(x)), labels])
    np.testing.assert_allclose(MIXTURE.log_class(x, level, labels), chosen, rtol=0, atol=1e-9)


def test_one_allowed_class_is_the_mixture_of_that_class():
    x, here = points(), LEVELS["vp"]
    only = Mixture((1.0,), MIXTURE.means[1:2], MIXTURE.stds[1:2])
    allowed = np.asarray(MIXTURE.classes([1] * len(x)).vector)
    given = MIXTURE.x0(x, here, allowed)
    np.testing.assert_allclose(given, only.x0(x, here), rtol=0, atol=1e-12)


def test_jax_and_numpy_agree():
    x, here = points(), LEVELS["vp"]
    traced = MIXTURE.x0(jnp.asarray(x, jnp.float32), here)
    np.testing.assert_allclose(traced, MIXTURE.x0(x, here), rtol=0, atol=5e-6)


def test_draws_have_the_mixtures_mean_covariance_and_shares():
    x = MIXTURE.draw(np.random.default_rng(0), 200_000)
    weights, means, stds = (np.asarray(v) for v in (MIXTURE.weights, MIXTURE.means, MIXTURE.stds))
    mean = weights @ means
    second = np.einsum("k,ki,kj->ij", weights, means, means) + np.diag(weights @ stds**2)
    np.testing.assert_allclose(MIXTURE.mean(), mean, rtol=0, atol=1e-15)
    # Four standard errors of 200,000 draws whose standard deviations are about 1.
    np.testing.assert_allclose(x.mean(0), mean, rtol=0, atol=0.01)
    np.testing.assert_allclose(np.cov(x.T), second - np.outer(mean, mean), rtol=0, atol=0.015)
    shares = MIXTURE.class_probability(x, level(1.0, 0.0)).mean(0)
    np.testing.assert_allclose(shares, weights, rtol=0, atol=0.005)


@pytest.mark.parametrize(
    "weights, means, stds",
    [
        ((0.5, 0.4), ((0.0,), (1.0,)), ((1.0,), (1.0,))),
        ((1.0,), ((0.0,), (1.0,)), ((1.0,), (1.0,))),
        ((1.0,), ((0.0, 1.0),), ((1.0,),)),
        ((1.0,), ((0.0,),), ((0.0,),)),
        ((1.5, -0.5), ((0.0,), (1.0,)), ((1.0,), (1.0,))),
    ],
)
def test_what_is_no_mixture_is_refused(weights, means, stds):
    with pytest.raises(ValueError, match=r"weights|stds"):
        Mixture(weights, means, stds)


# The flow.

ENDS = {
    "ve": (level(1.0, 80.0), level(1.0, 0.0)),
    "ve, noisy end": (level(1.0, 10.0), level(1.0, 0.1)),
    "vp": (level(0.01, np.sqrt(1 - 1e-4)), level(1.0, 0.0)),
    "flow from pure noise": (level(0.0, 1.0), level(1.0, 0.0)),
    "flow, noisy end": (level(0.0, 1.0), level(0.9, 0.1)),
    "towards noise": (level(0.9, 0.1), level(0.2, 0.8)),
    "to pure noise": (level(0.9, 0.1), level(0.0, 1.0)),
}


@pytest.mark.parametrize("start, end", ENDS.values(), ids=ENDS)
def test_the_flow_of_one_gaussian_is_the_closed_form(start, end):
    x = np.linspace(-2.0, 2.0, 5)[:, None] * start.sigma
    exact = analytic.gaussian_flow(x, start, end, mean=0.4, std=0.3)
    solved = exact_flow(gaussian(0.4, 0.3), x, start, end)
    assert solved.dtype == np.float64
    np.testing.assert_allclose(solved, exact, rtol=0, atol=2e-9)


def test_the_flow_has_converged_and_fewer_steps_are_worse():
    """The error of the Runge-Kutta method falls as N⁻⁴ until rounding is all that is left."""
    start, end = ENDS["ve, noisy end"]
    x = points(32) * 10.0
    best = exact_flow(MIXTURE, x, start, end)
    error = {
        n: np.abs(exact_flow(MIXTURE, x, start, end, num_steps=n) - best).max()
        for n in (32, 64, 2048)
    }
    assert error[2048] < 1e-11
    assert 3.5 < np.log2(error[32] / error[64]) < 4.5


def test_the_flow_agrees_with_an_independent_solver():
    x = points(16) * 10.0
    other = analytic.ode_solution(MIXTURE, x, 10.0, 0.1)
    np.testing.assert_allclose(exact_flow(MIXTURE, x, *ENDS["ve, noisy end"]), other, atol=1e-7)


def test_the_flow_passes_through_its_own_points_and_comes_back():
    start, middle, end = level(0.05, 0.9), level(0.5, 0.6), level(0.9, 0.2)
    x = points(16)
    halfway = exact_flow(MIXTURE, x, start, middle)
    at_once, in_two = (exact_flow(MIXTURE, *a) for a in ((x, start, end), (halfway, middle, end)))
    np.testing.assert_allclose(in_two, at_once, rtol=0, atol=1e-10)
    np.testing.assert_allclose(exact_flow(MIXTURE, at_once, end, start), x, rtol=0, atol=1e-9)


def test_the_flow_does_not_depend_on_the_path():
    """Equal noise-to-signal ratios and equal x / α give equal points of the data."""
    x, start = points(16), level(1.0, 20.0)
    one = exact_flow(MIXTURE, 20.0 * x, start, level(1.0, 0.0))
    other = exact_flow(MIXTURE, 20.0 * 0.04 * x, level(0.04, 0.8), level(1.0, 0.0))
    np.testing.assert_allclose(other, one, rtol=0, atol=1e-12)


def test_the_flow_transports_the_density():
    """log p changes by minus the log volume, the determinant by central differences."""
    start, end, h = level(1.0, 2.0), level(1.0, 0.2), 1e-4
    x = points(6)
    moved = [exact_flow(MIXTURE, x + h * d, start, end) for d in (*np.eye(2), *-np.eye(2))]
    jacobian = np.stack([moved[0] - moved[2], moved[1] - moved[3]], -1) / (2 * h)
    volume = np.log(np.abs(np.linalg.det(jacobian)))
    end_density = MIXTURE.log_density(exact_flow(MIXTURE, x, start, end), end)
    np.testing.assert_allclose(
        end_density, MIXTURE.log_density(x, start) - volume, rtol=0, atol=1e-6
    )


def test_a_flow_without_a_start_is_refused():
    with pytest.raises(ValueError, match="sigma is 0"):
        exact_flow(MIXTURE, points(2), level(1.0, 0.0), level(1.0, 1.0))
    with pytest.raises(ValueError, match="num_steps"):
        exact_flow(MIXTURE, points(2), level(1.0, 1.0), level(1.0, 0.0), num_steps=0)
