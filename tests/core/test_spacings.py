"""Spacings of noise-to-signal ratios and shifts of flow times: closed forms, scipy, refusals."""

import functools

import numpy as np
import pytest
from scipy import stats

from diffusion_jax.core.schedules import EDM, Cosine, FlowMatching, Linear, ScaledLinear
from diffusion_jax.core.schedules import ZeroTerminalSNR as ZeroSNR
from diffusion_jax.core.shifts import (
    dynamic_shift_times,
    mu_of_tokens,
    shift_times,
    stretch_to_terminal,
)
from diffusion_jax.core.spacings import beta, beta_quantiles, exponential, from_sigmas, log_linear
from diffusion_jax.core.timesteps import Steps, from_times, karras


def ratios(grid):
    alpha, sigma = (np.asarray(f, np.float64) for f in (grid.levels.alpha, grid.levels.sigma))
    return (sigma / alpha)[: int(grid.stop) + 1]


@pytest.mark.parametrize("schedule", [ScaledLinear(), EDM(), FlowMatching(3.0), Cosine()])
def test_exponential_is_uniform_in_log_snr(schedule):
    options = {"sigma_max": 50.0} if isinstance(schedule, FlowMatching) else {}
    grid = exponential(schedule, 9, max_steps=12, **options)
    found = ratios(grid)
    assert found[-1] == 0.0
    steps = np.diff(np.log(found[:-1]))
    np.testing.assert_allclose(steps, steps[0], rtol=2e-3)
    if not options:
        level = schedule(np.asarray([schedule.t_max, schedule.t_min]))
        np.testing.assert_allclose(found[[0, -2]], level.sigma / level.alpha, rtol=1e-3)
    narrow = ratios(exponential(EDM(), 3, max_steps=3, sigma_min=0.5, sigma_max=8.0))
    np.testing.assert_allclose(narrow, [8.0, 2.0, 0.5, 0.0], rtol=1e-6)


def test_log_linear_ends_at_its_last_ratio():
    """N steps through N + 1 ratios; the network may be told other times."""
    grid = log_linear(EDM(), 4, max_steps=6, sigma_min=0.5, sigma_max=8.0)
    np.testing.assert_allclose(ratios(grid), [8, 4, 2, 1, 0.5], rtol=1e-6)
    told = log_linear(ScaledLinear(), 4, max_steps=6, times=np.asarray([9, 7, 3, 1.0]))
    np.testing.assert_array_equal(told.levels.t[:4], [9, 7, 3, 1])
    table = ScaledLinear().alphas_cumprod()
    ends = np.sqrt((1 - table[[-1, 0]]) / table[[-1, 0]])
    np.testing.assert_allclose(ratios(told), np.geomspace(*ends, 5), rtol=1e-5)


@pytest.mark.parametrize("a, b", [(0.6, 0.6), (0.3, 2.5), (5.0, 1.2), (30.0, 45.0)])
def test_beta_quantiles_are_those_of_scipy(a, b):
    p = np.concatenate([np.linspace(0.0, 1.0, 201), [1e-9, 1e-4, 1 - 1e-4]])
    np.testing.assert_allclose(beta_quantiles(p, a, b), stats.beta.ppf(p, a, b), rtol=0, atol=1e-9)


def test_beta_spacing():
    q = stats.beta.ppf(np.linspace(1.0, 0.0, 7), 0.6, 0.6)
    grid = beta(Linear(), 7, max_steps=9)
    np.testing.assert_allclose(grid.levels.t[:7], 999 * q, rtol=1e-6, atol=1e-6)
    rounded = beta(Linear(), 7, max_steps=9, round_t=True)
    np.testing.assert_array_equal(rounded.levels.t[:7], np.round(999 * q))
    table = Linear().alphas_cumprod()[int(np.round(999 * q[2]))]
    np.testing.assert_allclose(rounded.levels.alpha[2] ** 2, table, rtol=1e-6)
    of_ratio = beta(EDM(1.0, 5.0), 7, max_steps=7, of="ratio", a=0.6, b=0.9)
    q = stats.beta.ppf(np.linspace(1.0, 0.0, 7), 0.6, 0.9)
    np.testing.assert_allclose(of_ratio.levels.sigma[:7], 1 + 4 * q, rtol=1e-6)


@pytest.mark.parametrize("schedule", [ScaledLinear(), EDM(), FlowMatching(2.0)])
def test_explicit_ratios_are_met_on_the_path(schedule):
    given = np.asarray([11.0, 3.0, 0.7, 0.05])
    grid = from_sigmas(schedule, given, max_steps=6)
    np.testing.assert_allclose(ratios(grid), [*given, 0.0], rtol=1e-6)
    levels = schedule(schedule.inverse(-2 * np.log(given)))
    for name in ("t", "alpha", "sigma"):
        expected = getattr(levels, name)
        np.testing.assert_allclose(np.asarray(getattr(grid.levels, name))[:4], expected, rtol=1e-5)
    ends = from_sigmas(schedule, given, final=0.04, max_steps=6)
    np.testing.assert_allclose(ratios(ends)[-1], 0.04, rtol=1e-6)
    least = schedule(np.asarray(schedule.t_min))
    noisy = from_sigmas(schedule, given, final="t_min", max_steps=6)
    np.testing.assert_allclose(ratios(noisy)[-1], least.sigma / least.alpha, rtol=1e-6)


def test_explicit_ratios_beyond_a_table_that_ends_without_signal():
    """Between its last two entries the ratio goes to infinity; σ/α = 4096 is met all the same."""
    grid = from_sigmas(ZeroSNR(1000, ScaledLinear()), [4096.0, 5.0], max_steps=3)
    np.testing.assert_allclose(ratios(grid), [4096.0, 5.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(
        grid.levels.alpha[:2] ** 2 + grid.levels.sigma[:2] ** 2, 1.0, rtol=1e-6
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda *args, **options: karras(*args, **options, round_t=True),
        exponential,
        functools.partial(beta, of="ratio"),
    ],
    ids=["karras", "exponential", "beta"],
)
def test_spacings_meet_their_ratios_beyond_a_table_that_ends_without_signal(make):
    """The last finite ratio of the table is about 4096; a first level beyond has signal left."""
    grid = make(ZeroSNR(1000, ScaledLinear()), 5, sigma_min=0.5, sigma_max=23109.0, max_steps=6)
    np.testing.assert_allclose(ratios(grid)[[0, 4]], [23109.0, 0.5], rtol=1e-6)
    assert float(grid.levels.alpha[0]) > 0.0
    np.testing.assert_allclose(
        grid.levels.alpha[:5] ** 2 + grid.levels.sigma[:5] ** 2, 1.0, rtol=1e-6
    )
    assert 998.0 <= float(grid.levels.t[0]) <= 999.0


def test_a_final_ratio_below_the_schedule_lies_on_its_path():
    """Of straight paths alpha + sigma is 1 there too, and 0 is clean data."""
    low = from_sigmas(FlowMatching(t_min=0.1), [3.0, 0.7], final=0.04, max_steps=3)
    np.testing.assert_allclose(low.levels.alpha[2:] + low.levels.sigma[2:], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratios(low)[-1], 0.04, rtol=1e-6)
    clean = from_sigmas(FlowMatching(t_min=0.1), [3.0, 0.7], final=0.0, max_steps=3)
    assert (float(clean.levels.alpha[2]), float(clean.levels.sigma[2])) == (1.0, 0.0)


def test_shifts_of_flow_times():
    """By the odds of noise to signal, which a shift multiplies."""
    t = np.asarray([1.0, 0.75, 0.2, 0.01])
    for shifted, factor in (
        (shift_times(t, 3.0), 3.0),
        (dynamic_shift_times(t, 0.8), np.exp(0.8)),
        (dynamic_shift_times(t, 1.7, kind="linear"), 1.7),
    ):
        np.testing.assert_allclose((1 / shifted - 1) * factor, 1 / t - 1, rtol=1e-12)
    squared = dynamic_shift_times(t, 0.8, power=2.0)
    np.testing.assert_allclose((1 / squared - 1) * np.exp(0.8), (1 / t - 1) ** 2, rtol=1e-12)
    np.testing.assert_allclose(shift_times(t, 3.0), FlowMatching(3.0)(t).sigma, rtol=1e-12)
    stretched = stretch_to_terminal(t, 0.1)
    np.testing.assert_allclose(stretched[[0, -1]], [1.0, 0.1], rtol=1e-12)
    np.testing.assert_allclose(np.diff(stretched) / np.diff(t), 0.9 / 0.99, rtol=1e-12)
    assert mu_of_tokens(256) == 0.5 and abs(mu_of_tokens(4096) - 1.15) < 1e-12
    assert abs(mu_of_tokens(2176) - 0.825) < 1e-12
    grid = from_times(FlowMatching(), shift_times(t, 3.0), max_steps=5)
    np.testing.assert_allclose(grid.levels.sigma[:4], FlowMatching(3.0)(t).sigma, rtol=1e-6)


def test_steps_pass_ends_and_the_final_level_on():
    grid = Steps("exponential", 3, 5, sigma_min=0.5, sigma_max=8.0, final="t_min").grid(EDM())
    np.testing.assert_allclose(ratios(grid), [8.0, 2.0, 0.5, 0.002], rtol=1e-6)
    flow = Steps("karras", 3, 5, sigma_max=20.0).grid(FlowMatching())
    np.testing.assert_allclose(ratios(flow)[0], 20.0, rtol=1e-5)
    assert float(Steps("sections", sections="5", final="t_min").grid(Linear()).levels.sigma[5]) > 0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: exponential(ZeroSNR(1000, Linear()), 5), "zero terminal SNR, .* needs sigma_max"),
        (lambda: exponential(ScaledLinear(), 5, sigma_max=16.0), "from 0.029.* to 14.6"),
        (lambda: exponential(EDM(), 5, round_t=True), "EDM is continuous"),
        (lambda: beta(Linear(), 5, of="sigma"), r"\('time', 'ratio'\), got 'sigma'"),
        (lambda: beta(Linear(), 5, sigma_max=3.0), "go with of='ratio', got None and 3.0"),
        (lambda: beta(Linear(), 5, a=0.0), "must be positive, got 0.0, 0.6"),
        (lambda: beta(Linear(10, 0.1, 0.2), 10, round_t=True), "strictly decreasing"),
        (lambda: beta_quantiles([0.5, 1.5], 1.0, 1.0), r"\[0, 1\], got"),
        (lambda: from_sigmas(EDM(), [1.0, 2.0]), "decreasing finite sequence"),
        (lambda: from_sigmas(EDM(), [np.inf, 2.0]), "decreasing finite sequence"),
        (lambda: from_sigmas(EDM(), [90.0, 2.0]), "got sigma_min = 2.0 and sigma_max = 90.0"),
        (lambda: from_sigmas(EDM(), [9.0, 2.0], times=[1.0]), r"expected 2 times, .* got \(1,\)"),
        (lambda: from_sigmas(EDM(), [9.0], times=[np.nan]), r"finite, got \[nan\]"),
        (lambda: karras(EDM(), 5, rho=np.nan), "rho must be positive, got nan"),
        (lambda: from_sigmas(EDM(), [9.0, 2.0], final=2.0), r"\[0, 2.0\), got 2.0"),
        (lambda: from_sigmas(EDM(), [9.0, 2.0], final="zero"), "'zero'"),
        (lambda: shift_times([0.5], 0.0), "shift must be positive, got 0.0"),
        (lambda: shift_times([0.5, 0.0], 2.0), r"lie in \(0, 1\]"),
        (lambda: dynamic_shift_times([0.5], 1.0, kind="log"), "got 'log'"),
        (lambda: dynamic_shift_times([0.5], -1.0, kind="linear"), "mu = -1.0"),
        (lambda: mu_of_tokens(1, base_tokens=4, max_tokens=4), "must differ, both are 4"),
        (lambda: stretch_to_terminal([1.0, 0.5], 1.0), "got 1.0 and 0.5"),
        (lambda: Steps(final="zero"), r"\('clean', 't_min'\), got 'zero'"),
        (lambda: Steps(sigma_max=3.0), "got None and 3.0 with 'trailing'"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
