"""Consistency samplers on Gaussian data, whose consistency function is a closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.denoiser import make_denoiser
from diffusion_jax.core.grid import Grid
from diffusion_jax.core.parameterization import ConsistencyPreconditioning
from diffusion_jax.core.schedules import EDM, Cosine, FlowMatching, Linear, ZeroTerminalSNR
from diffusion_jax.core.timesteps import from_times, karras, trailing
from diffusion_jax.core.types import NoiseLevel, Prediction
from diffusion_jax.samplers import DDIM, LCM, TCD, ConsistencyMultistep, StepInfo, fit_grid, sample
from tests import analytic
from tests.noise import drawn_by

MEAN, STD, SIGMA_MIN = 0.4, 0.7, 0.05
DATA = analytic.gaussian(MEAN, STD)
SCHEDULE = Cosine(1000)
LEAST = NoiseLevel(0.0, 1.0, SIGMA_MIN)


def level_of(t, alpha, sigma):
    return NoiseLevel(*(jnp.asarray(value) for value in (t, alpha, sigma)))


def consistency(x, level, end=LEAST):
    """Where the exact flow from x arrives at another level, at σ/α = SIGMA_MIN unless told."""
    return analytic.gaussian_flow(x, level, end, mean=MEAN, std=STD)


def to_the_end(x, level, here=None, there=None):
    """A consistency model that is exact."""
    del here, there
    return Prediction(consistency(x, level))


@functools.partial(jax.jit, static_argnames=("sampler", "denoise"))
def _probes(sampler, denoise, grid):
    """Every step at x = 0, 1, 0 and noise 0, 0, 1, [MAX, 3]."""
    keys = image_keys(0, jnp.arange(3))
    x, noise = jnp.asarray([[0.0], [1.0], [0.0]]), jnp.asarray([[0.0], [0.0], [1.0]])

    def one(level, next_level, middle):
        info = StepInfo(0, 0, 1, middle)
        with drawn_by(lambda keys, x: noise.astype(x.dtype)):
            state = sampler.step(
                keys,
                lambda x, here: denoise(x, here, level, middle),
                sampler.init(x),
                level,
                next_level,
                info,
            )
        return state.x[:, 0]

    levels = (NoiseLevel(*(f[i : len(f) - 1 + i] for f in grid.levels)) for i in (0, 1))
    return jax.vmap(one)(*levels, grid.middle)


def moments_after(sampler, denoise, grid):
    """Mean and variance after every step from the exact law at the start, exactly."""
    out = np.asarray(_probes(sampler, denoise, grid))[: int(grid.stop)]
    start = grid.level(0)
    mean, variance = start.alpha * MEAN, start.alpha**2 * STD**2 + start.sigma**2
    record = []
    for at_0, at_1, noisy in out:
        mean, variance = (at_1 - at_0) * mean + at_0, (at_1 - at_0) ** 2 * variance
        variance = variance + (noisy - at_0) ** 2
        record.append((float(mean), float(variance)))
    return np.asarray(record)


def exact_moments(levels, extra=0.0):
    """Of x on the exact path, where the data's variance is STD² + extra."""
    alpha, sigma = np.asarray(levels.alpha), np.asarray(levels.sigma)
    return np.stack([alpha * MEAN, alpha**2 * (STD**2 + extra) + sigma**2], axis=-1)


def test_the_consistency_function_is_one(x64):
    """f(x, ε) = x, and f does not change along the exact flow: the oracle of this file."""
    x, level = np.asarray([[-3.0], [0.2], [7.0]]), NoiseLevel(0.0, 0.8, 4.0)
    np.testing.assert_allclose(consistency(x, LEAST), x, rtol=1e-14)
    between = NoiseLevel(0.0, 0.3, 0.2)
    moved = analytic.gaussian_flow(x, level, between, mean=MEAN, std=STD)
    np.testing.assert_allclose(consistency(moved, between), consistency(x, level), atol=1e-13)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("vp", [False, True])
def test_multistep_consistency_sampling_returns_the_exact_law(num_steps, vp, x64):
    """After every step x has the marginal of its level, for any number of steps, on any path."""
    grid = karras(EDM(SIGMA_MIN, 10.0), 6, max_steps=6)
    grid = grid._replace(stop=jnp.asarray(num_steps, jnp.int32))
    grid = analytic.in_vp(grid) if vp else grid
    got = moments_after(ConsistencyMultistep(SIGMA_MIN), to_the_end, grid)
    exact = exact_moments(NoiseLevel(*(f[1 : num_steps + 1] for f in grid.levels)))
    np.testing.assert_allclose(got, exact, rtol=1e-12)


def test_the_last_jump_adds_no_noise(x64):
    """Steps to sigma_min and to sigma = 0 return f, whose variance is that at sigma_min."""
    for final in ("clean", "t_min"):
        grid = karras(EDM(SIGMA_MIN, 10.0), 3, max_steps=3, final=final)
        got = moments_after(ConsistencyMultistep(SIGMA_MIN), to_the_end, grid)[-1]
        np.testing.assert_allclose(got, [MEAN, STD**2 + SIGMA_MIN**2], rtol=1e-12)
    scaled = moments_after(ConsistencyMultistep(SIGMA_MIN, s_noise=2.0), to_the_end, grid)
    sigma = float(grid.levels.sigma[1])
    exact = STD**2 + SIGMA_MIN**2 + 4.0 * (sigma**2 - SIGMA_MIN**2)
    np.testing.assert_allclose(scaled[0, 1], exact, rtol=1e-12)


def test_preconditioning_keeps_the_boundary(x64):
    """At σ/α = sigma_min the network is not asked; far above, the coefficients are EDM's."""
    network = lambda params, x, t, cond, keys=None: jnp.full_like(x, 1e3)  # noqa: E731
    make = make_denoiser(network, ConsistencyPreconditioning(0.5, SIGMA_MIN))
    x = jnp.asarray([[-3.0], [0.2]])
    level = level_of(0.0, 0.8, 0.8 * SIGMA_MIN)
    np.testing.assert_allclose(make({})(x, level, None).x0, x / 0.8, rtol=1e-5)
    parameterization, level = ConsistencyPreconditioning(0.5, SIGMA_MIN), level_of(0.0, 0.6, 1.2)
    c_skip, c_out = 0.25 / (1.95**2 + 0.25), 1.95 * 0.5 / np.sqrt(4.25)
    out = parameterization.to_x0(jnp.ones_like(x), x, level)
    np.testing.assert_allclose(out, c_skip * x / 0.6 + c_out, rtol=1e-12)
    np.testing.assert_allclose(
        parameterization.scale_input(x, level), x / 0.6 / np.sqrt(4.25), rtol=1e-12
    )
    eps = jnp.asarray([[0.7], [-0.3]])
    target = parameterization.target(x, eps, level)
    back = parameterization.to_x0(target, 0.6 * x + 1.2 * eps, level)
    np.testing.assert_allclose(back, x, rtol=1e-12)


@pytest.mark.parametrize("options", [{"sigma_data": 0.0}, {"sigma_min": -0.1}])
def test_preconditioning_refuses_what_has_no_meaning(options):
    with pytest.raises(ValueError, match="sigma_data > 0 and sigma_min >= 0"):
        ConsistencyPreconditioning(**options)


def clean_end(x, level, here=None, there=None):
    """A latent consistency model that is exact: the flow's end at t = 0, without its boundary."""
    del here, there
    return Prediction(consistency(x, level, NoiseLevel(0.0, 1.0, 0.0)))


def test_lcm_returns_the_exact_law(x64):
    """The boundary is out of sight at these times: c_skip is below 1e-7."""
    grid = from_times(SCHEDULE, [999.0, 700.0, 400.0, 150.0], max_steps=4)
    got = moments_after(LCM(), clean_end, grid)
    exact = exact_moments(NoiseLevel(*(field[1:] for field in grid.levels)))
    np.testing.assert_allclose(got, exact, rtol=1e-5)
    np.testing.assert_allclose(
        moments_after(LCM(sigma_data=0.0), clean_end, grid), exact, rtol=1e-12
    )


def test_boundary_of_lcm(x64):
    """f = x at t = 0; the coefficients of the paper elsewhere."""
    x, x0 = jnp.asarray([[2.0]]), jnp.asarray([[-1.0]])
    at_zero = LCM().consistency(x, x0, level_of(0.0, 0.999, 0.01))
    np.testing.assert_array_equal(at_zero, x)
    np.testing.assert_array_equal(
        LCM(sigma_data=0.0).consistency(x, x0, level_of(0.0, 1.0, 0.1)), x
    )
    value = LCM(0.5, 0.3).consistency(x, x0, level_of(0.8, 0.9, 0.4))
    np.testing.assert_allclose(value, [[0.09 / 0.25 * 2.0 - 0.4 / 0.5]], rtol=1e-14)


def towards_the_middle(x, level, here, middle):
    """A trajectory consistency model that is exact: α_m x̂0 + σ_m ε̂ is on the flow through x.

    At alpha_m x0 + sigma_m (x - alpha x0) / sigma = wanted, solved for x0.
    """
    del here
    wanted = consistency(x, level, middle)
    ratio = middle.sigma / level.sigma
    return Prediction((wanted - ratio * x) / (middle.alpha - ratio * level.alpha))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd_returns_the_exact_law(eta, x64):
    """For any eta: exact jumps beyond the next level, and the exact noise back to it."""
    grid = from_times(SCHEDULE, [990.0, 700.0, 400.0, 150.0], max_steps=5)
    sampler = TCD(eta)
    grid = fit_grid(sampler, grid, SCHEDULE)
    # At eta = 0 the middle is the end, and the last step goes to clean data.
    got = moments_after(sampler, towards_the_middle, grid)
    exact = exact_moments(NoiseLevel(*(field[1:5] for field in grid.levels)))
    np.testing.assert_allclose(got, exact, rtol=1e-10)


@pytest.mark.parametrize("schedule", [SCHEDULE, FlowMatching(), EDM(0.01, 10.0)], ids=str)
def test_tcd_jumps_to_a_fraction_of_the_next_time(schedule):
    grid = trailing(schedule, 4, max_steps=6, final="t_min")
    fitted = fit_grid(TCD(0.25), grid, schedule)
    t = np.asarray(grid.levels.t[1:], np.float64) - schedule.t_min
    expected = schedule(jnp.asarray(schedule.t_min + 0.75 * t, jnp.float32))
    for got, want in zip(fitted.middle, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    clean = fit_grid(TCD(0.25), trailing(schedule, 4, max_steps=4), schedule)
    assert float(clean.middle.sigma[3]) == 0.0 and float(clean.middle.alpha[3]) == 1.0


@pytest.mark.parametrize(
    "schedule, spacing",
    [
        (ZeroTerminalSNR(1000, Cosine()), trailing),
        (FlowMatching(shift=3.0), trailing),
        (Linear(), functools.partial(karras, round_t=True)),
    ],
    ids=["zero signal", "shifted flow", "rounded times"],
)
def test_tcd_without_noise_is_ddim(schedule, spacing, x64):
    """eta = 0, also where the network is told other times than the schedule's own."""
    grid = spacing(schedule, 4, max_steps=4)
    x, keys = jnp.asarray([[0.3], [-2.0]]), image_keys(0, range(2))
    tcd = sample(TCD(0.0), DATA.denoise, fit_grid(TCD(0.0), grid, schedule), x, keys)[0]
    np.testing.assert_allclose(tcd, sample(DDIM(), DATA.denoise, grid, x, keys)[0], atol=1e-12)


def test_a_shift_is_not_applied_twice(x64):
    """Times of the schedule are scaled, not the noise rates that the network is told."""
    schedule = FlowMatching(shift=3.0)
    times = np.asarray([0.9, 0.6, 0.3])
    middle = fit_grid(TCD(0.25), from_times(schedule, times, max_steps=3), schedule).middle
    t = schedule.t_min + 0.75 * (times[1:] - schedule.t_min)
    np.testing.assert_allclose(middle.sigma[:2], 3.0 * t / (1.0 + 2.0 * t), rtol=1e-12)


def test_tcd_needs_the_levels_that_it_jumps_to():
    grid = trailing(SCHEDULE, 2, max_steps=2)
    with pytest.raises(ValueError, match="fit_grid"):
        sample(TCD(), DATA.denoise, grid, jnp.ones((1, 1)), image_keys(0, range(1)))


def test_published_ends_are_where_tcd_jumps_from(x64):
    """A grid whose steps end elsewhere: the jump is measured from there."""
    grid = from_times(SCHEDULE, [900.0, 500.0], max_steps=2)
    ends = SCHEDULE(jnp.asarray([520.0, 20.0]))
    middle = fit_grid(TCD(0.5), Grid(*grid[:3], ends=ends), SCHEDULE).middle
    np.testing.assert_allclose(middle.t, [260.0, 10.0])


@pytest.mark.parametrize(
    "sampler, words",
    [
        (TCD(1.5), r"eta must lie in \[0, 1\], got 1.5"),
        (LCM(timestep_scaling=0.0), "timestep_scaling must be positive, got 0.0"),
        (LCM(sigma_data=-1.0), "sigma_data must be at least 0, got -1.0"),
        (ConsistencyMultistep(sigma_min=-1.0), "sigma_min must be at least 0"),
        (ConsistencyMultistep(s_noise=float("nan")), "s_noise must be at least 0"),
    ],
)
def test_knobs_out_of_range_are_refused(sampler, words):
    with pytest.raises(ValueError, match=words):
        sampler.validate()
