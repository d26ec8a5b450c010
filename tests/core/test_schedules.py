"""Noise schedules: published constants, closed forms, and the way back from log-SNR to time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.schedules import (
    EDM,
    Betas,
    Cosine,
    CosineLogSNR,
    DiscreteSchedule,
    FlowMatching,
    Laplace,
    LaplaceBeta,
    Linear,
    ScaledLinear,
    ShiftedLogSNR,
    Sigmoid,
    SigmoidBeta,
    ZeroTerminalSNR,
    adm_linear,
    root_betas,
)

# ᾱ at three times and σ/α at the last one, computed independently in float64 from the papers.
CONSTANTS = [
    (Linear(), (0.99990000, 0.07858724, 4.035830e-05), 157.4),
    (Cosine(), (0.99995872, 0.49384359, 2.428767e-09), 2.03e4),
    (ScaledLinear(), (0.99915000, 0.27766965, 4.660099e-03), 14.61),
    (ScaledLinear(1000, 0.0015, 0.0195), (0.99850000, 0.11584449, 1.423040e-04), 83.82),
    (ScaledLinear(1000, 0.0015, 0.0205), (0.99850000, 0.10857600, 9.691087e-05), 101.6),
    (ScaledLinear(1000, 0.0015, 0.0155), (0.99850000, 0.15107742, 6.686652e-04), 38.66),
    (ZeroTerminalSNR(1000, ScaledLinear()), (0.99915000, 0.24235917, 0.0), np.inf),
]


def log_snr(level):
    with np.errstate(divide="ignore"):
        return 2 * (np.log(level.alpha) - np.log(level.sigma))


@pytest.mark.parametrize("schedule, signal, ratio", CONSTANTS, ids=lambda v: type(v).__name__)
def test_published_constants(schedule, signal, ratio):
    table = schedule.alphas_cumprod()
    np.testing.assert_allclose(table[[0, 499]], signal[:2], rtol=0, atol=5.1e-9)
    np.testing.assert_allclose(table[999], signal[2], rtol=2e-7)
    level = schedule(np.asarray(999.0))
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(level.sigma / level.alpha, ratio, rtol=2.5e-3)


def test_cosine_of_4000_steps():
    table = Cosine(4000).alphas_cumprod()
    np.testing.assert_allclose(table[[0, 1999]], [0.99999013, 0.49384359], rtol=0, atol=5.1e-9)
    np.testing.assert_allclose(table[3999], 1.517980e-10, rtol=4e-7)


def test_cosine_is_the_papers_curve_where_beta_is_not_clipped():
    t = np.arange(900)
    f = np.cos(((t + 1) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    f0 = np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(Cosine().alphas_cumprod()[:900], f / f0, rtol=1e-12)
    assert np.isclose(Cosine().betas()[-1], 0.999)


def test_scaled_linear_is_linear_in_the_root_and_adm_linear_in_beta():
    roots = np.sqrt(ScaledLinear().betas())
    np.testing.assert_allclose(np.diff(roots, 2), 0.0, atol=1e-15)
    np.testing.assert_allclose(roots[[0, -1]] ** 2, [0.00085, 0.012], rtol=1e-12)
    np.testing.assert_allclose(adm_linear(250).betas()[[0, -1]], [4e-4, 0.08], rtol=1e-12)
    np.testing.assert_allclose(adm_linear(1000).betas(), Linear().betas(), rtol=1e-12)


def test_root_betas_are_linear_in_the_square():
    betas = root_betas(11, 0.01, 0.09).betas()
    np.testing.assert_allclose(betas**2, np.linspace(0.01, 0.09, 11), rtol=1e-12)
    with pytest.raises(ValueError, match="beta_start"):
        root_betas(11, 0.1, 0.01)


def test_sigmoid_curves():
    """Jabri's algorithm 3 with its default arguments, and the logistic β at its centre."""
    u = np.arange(1, 900) / 1000

    def logistic(v):
        return 1 / (1 + np.exp(-v))

    expected = (logistic(3) - logistic(-3 + 6 * u)) / (logistic(3) - logistic(-3))
    # ᾱ_0 is 1 at u = 0, so products of ratios give the curve itself.
    np.testing.assert_allclose(Sigmoid().alphas_cumprod()[:899], expected, rtol=1e-10)
    betas = SigmoidBeta(1001).betas()
    np.testing.assert_allclose(betas[500], (1e-4 + 0.02) / 2, rtol=1e-12)
    np.testing.assert_allclose(betas + betas[::-1], 1e-4 + 0.02, rtol=1e-12)


def test_betas_and_alphas_cumprod_belong_together():
    for schedule in (Cosine(), ZeroTerminalSNR(1000, Linear()), Betas(3, (0.1, 0.2, 1.0))):
        rebuilt = np.cumprod(1 - schedule.betas())
        np.testing.assert_allclose(rebuilt, schedule.alphas_cumprod(), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("base", [Linear(), ScaledLinear(), Cosine(50)])
def test_zero_terminal_snr(base):
    schedule = ZeroTerminalSNR(base.num_timesteps, base)
    before, after = base.alphas_cumprod(), schedule.alphas_cumprod()
    assert after[-1] == 0.0
    np.testing.assert_allclose(after[0], before[0], rtol=1e-15)
    # √ᾱ is shifted and scaled, hence ratios of its differences stay.
    ratio = np.diff(np.sqrt(after)) / np.diff(np.sqrt(before))
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)
    last = schedule(jnp.float32(base.num_timesteps - 1))
    assert float(last.alpha) == 0.0 and float(last.sigma) == 1.0


def test_interpolation_is_linear_in_log_snr():
    schedule = Linear()
    whole = log_snr(schedule(np.asarray([400.0, 401.0])))
    between = log_snr(schedule(np.asarray([400.25])))
    np.testing.assert_allclose(between, 0.75 * whole[:1] + 0.25 * whole[1:], rtol=1e-12)


@pytest.mark.parametrize(
    "schedule",
    [
        Linear(),
        Cosine(),
        Sigmoid(),
        LaplaceBeta(),
        ShiftedLogSNR(Cosine(), -2.0),
        ShiftedLogSNR(Laplace(), 1.5),
        CosineLogSNR(),
        Laplace(),
        Laplace(1.0, 0.3, -6.0, 20.0),
        EDM(),
        FlowMatching(),
        FlowMatching(3.0),
        FlowMatching(0.5, t_min=0.2),
    ],
    ids=lambda s: type(s).__name__,
)
def test_inverse_undoes_the_schedule(schedule):
    t = np.linspace(schedule.t_min, schedule.t_max, 101)
    level = schedule(t)
    np.testing.assert_allclose(schedule.inverse(log_snr(level)), t, rtol=1e-7, atol=1e-7)
    if not isinstance(schedule, EDM | FlowMatching):
        np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1.0, rtol=1e-12)
    beyond = schedule.inverse(np.asarray([1e3, -1e3]))
    np.testing.assert_allclose(beyond, [schedule.t_min, schedule.t_max], rtol=1e-12)


def test_inverse_of_zero_terminal_snr_is_finite():
    schedule = ZeroTerminalSNR(1000, Linear())
    t = np.asarray([0.0, 500.0, 998.0, 999.0])
    np.testing.assert_allclose(schedule.inverse(log_snr(schedule(t))), t, atol=1e-7)


@pytest.mark.parametrize(
    "schedule",
    [
        Linear(),
        ZeroTerminalSNR(1000, Linear()),
        ShiftedLogSNR(Cosine(), 1.0),
        CosineLogSNR(),
        Laplace(),
        EDM(),
        FlowMatching(3.0),
    ],
    ids=lambda s: type(s).__name__,
)
def test_traced_float32_agrees_with_float64(schedule):
    t = np.linspace(schedule.t_min, schedule.t_max, 9)
    exact, traced = schedule(t), jax.jit(schedule)(jnp.float32(t))
    for name in ("alpha", "sigma"):
        value = getattr(traced, name)
        assert value.dtype == jnp.float32
        # A float32 t has 1e-5 relative slack on the noise-to-signal ratio at the steep ends.
        np.testing.assert_allclose(value, getattr(exact, name), rtol=1e-3, atol=1e-6)


def test_cosine_log_snr_is_its_closed_form():
    """log-SNR(t) = -2 log tan(a t + b), symmetric about t = 1/2, and 0 there."""
    schedule = CosineLogSNR()
    t = np.asarray([0.0, 0.25, 0.5, 0.75, 1.0])
    value = log_snr(schedule(t))
    b = np.arctan(np.exp(-10.0))
    a = np.arctan(np.exp(10.0)) - b
    np.testing.assert_allclose(value, -2 * np.log(np.tan(a * t + b)), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(value[[0, 2, 4]], [20.0, 0.0, -20.0], rtol=1e-8, atol=1e-8)
    noisy = schedule(jnp.float32(1.0))
    np.testing.assert_allclose(noisy.alpha, np.exp(-10.0) / np.sqrt(1 + np.exp(-20.0)), rtol=1e-3)


def test_shift_moves_log_snr_and_nothing_else():
    """For images d times larger the shift is -2 log d: alpha / sigma falls by the factor d."""
    base, d = Cosine(), 4.0
    schedule = ShiftedLogSNR(base, -2 * np.log(d))
    t = np.linspace(0.0, 990.0, 12)
    np.testing.assert_allclose(log_snr(schedule(t)) - log_snr(base(t)), -2 * np.log(d), rtol=1e-9)
    assert schedule.num_timesteps == 1000 and schedule.prior_std(schedule(np.asarray(500.0))) == 1.0


def test_edm_is_the_identity_with_lognormal_training_times():
    level = EDM()(np.asarray([0.01, 3.0]))
    np.testing.assert_array_equal(level.alpha, 1.0)
    np.testing.assert_array_equal(level.sigma, level.t)
    log_t = np.log(np.asarray(EDM().sample_t(jax.random.split(jax.random.key(0), 4000))))
    # Standard errors: 1.2 / √4000 = 0.019 for the mean, 0.013 for the deviation.
    assert abs(log_t.mean() + 1.2) < 0.08 and abs(log_t.std() - 1.2) < 0.06
    assert EDM().prior_std(EDM()(np.asarray(20.0))) == 20.0


def test_laplace_is_the_papers_formula():
    """Hang et al. 2024: λ(t) = μ - b sgn(1/2 - t) log(1 - 2 |t - 1/2|), inside of the cut."""
    schedule = Laplace(0.4, 0.7, -25.0, 25.0)
    t = np.asarray([0.01, 0.2, 0.5, 0.65, 0.999])
    expected = 0.4 - 0.7 * np.sign(0.5 - t) * np.log(1 - 2 * np.abs(t - 0.5))
    np.testing.assert_allclose(log_snr(schedule(t)), expected, rtol=1e-9)
    ends = log_snr(schedule(np.asarray([0.0, 1.0])))
    np.testing.assert_allclose(ends, [25.0, -25.0], rtol=1e-9)
    # float32 keeps the ends, too: 1 - t has few digits there, but the tail is counted from t = 1.
    traced = schedule(jnp.asarray([0.0, 1.0], jnp.float32))
    np.testing.assert_allclose(log_snr(traced), [25.0, -25.0], rtol=1e-5)


def test_laplace_makes_log_snr_laplace_distributed():
    """P(λ > μ + b log 2 · k) = 2^-(k + 1), cut or not, for uniform t."""
    t = np.linspace(0, 1, 100001)
    value = log_snr(Laplace(1.0, 0.5)(t))
    for k in (0, 1, 2, 3):
        above = np.mean(value > 1.0 + 0.5 * np.log(2) * k + 1e-12)
        below = np.mean(value < 1.0 - 0.5 * np.log(2) * k - 1e-12)
        np.testing.assert_allclose([above, below], 2.0 ** -(k + 1), atol=2e-5)
    # Cut to [0, 1] above μ = 0 and b = 1 the upper half keeps (1 - 1/e)/2 of its 1/2.
    cut = log_snr(Laplace(0.0, 1.0, -40.0, 1.0)(t))
    half = (1 - np.exp(-1)) / 2
    np.testing.assert_allclose(np.mean(cut > 0), half / (half + 0.5), atol=2e-5)


def test_laplace_beta_is_diffusers_table():
    """Values that diffusers' DDPMScheduler prints for beta_schedule "laplace" (float32)."""
    schedule = LaplaceBeta()
    np.testing.assert_allclose(
        schedule.betas()[[0, 1, 499, 500, 998, 999]],
        [0.021153757, 0.0087478133, 2.5015621e-4, 2.5003139e-4, 0.15162966, 0.84725261],
        rtol=1e-6,
        atol=2e-7,
    )
    np.testing.assert_allclose(
        schedule.alphas_cumprod()[[0, 499, 500, 999]],
        [0.97884625, 0.70746034, 0.70728344, 0.03162277],
        rtol=1e-5,
    )


def test_flow_matching_is_the_straight_path():
    t = np.asarray([0.001, 0.25, 0.5, 1.0])
    level = FlowMatching()(t)
    np.testing.assert_array_equal(level.sigma, t)
    np.testing.assert_array_equal(level.alpha, 1 - t)
    np.testing.assert_array_equal(level.t, t)
    assert FlowMatching().prior_std(FlowMatching()(np.asarray(1.0))) == 1.0
    np.testing.assert_allclose(FlowMatching().prior_std(level)[2], np.sqrt(0.5))


def test_shift_of_flow_matching():
    """Esser et al. 2024, eq. 23: σ' / α' = s σ / α, the end points stay, 1/2 goes to s/(s + 1)."""
    t = np.asarray([0.001, 0.25, 0.5, 0.999])
    plain, shifted = FlowMatching()(t), FlowMatching(3.0)(t)
    np.testing.assert_allclose(shifted.sigma / shifted.alpha, 3 * plain.sigma / plain.alpha)
    np.testing.assert_allclose(shifted.alpha + shifted.sigma, 1.0, rtol=1e-15)
    np.testing.assert_allclose(shifted.sigma[2], 0.75)
    end = FlowMatching(3.0)(np.asarray(1.0))
    assert (end.alpha, end.sigma) == (0.0, 1.0)
    # The network is told the noise rate, so that one network serves every shift.
    np.testing.assert_array_equal(shifted.t, shifted.sigma)


def test_training_times_of_flow_matching():
    keys = jax.random.split(jax.random.key(2), 4000)
    t = np.asarray(FlowMatching(t_min=0.2).sample_t(keys))
    assert t.min() >= 0.2 and t.max() <= 1.0
    # Uniform: mean 0.6 with standard error 0.8 / √12 / √4000 = 0.0037.
    assert abs(t.mean() - 0.6) < 0.015 and np.mean(t < 0.4) == pytest.approx(0.25, abs=0.03)
    t = np.asarray(FlowMatching(logit_normal=(0.5, 0.8)).sample_t(keys), np.float64)
    logit = np.log(t) - np.log1p(-t)
    # Standard errors: 0.8 / √4000 = 0.013 for the mean, 0.009 for the deviation.
    assert abs(logit.mean() - 0.5) < 0.055 and abs(logit.std() - 0.8) < 0.04
    ends = np.asarray(FlowMatching(logit_normal=(0.0, 50.0)).sample_t(keys))
    assert ends.min() == np.float32(1e-3) and ends.max() == 1.0


def test_training_times_are_uniform():
    keys = jax.random.split(jax.random.key(1), 3000)
    t = np.asarray(Cosine(10).sample_t(keys))
    counts = np.bincount(t.astype(int), minlength=10)
    # Binomial: 300 ± 16.4 each.
    assert t.dtype == np.float32 and counts.sum() == 3000 and len(counts) == 10
    assert np.abs(counts - 300).max() < 75
    for schedule in (CosineLogSNR(), Laplace()):
        u = np.asarray(schedule.sample_t(keys))
        assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.025
    shifted = np.asarray(ShiftedLogSNR(Cosine(10)).sample_t(keys))
    np.testing.assert_array_equal(shifted, t)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Linear(1), "num_timesteps.*got 1"),
        (lambda: Linear(1000, 0.0, 0.02), "beta_start"),
        (lambda: Linear(1000, 0.02, 1e-4), "got 0.02 and 0.0001"),
        (lambda: ScaledLinear(1000, 1e-4, 1.0), "beta_end"),
        (lambda: SigmoidBeta(1000, -0.1, 0.5), "beta_start"),
        (lambda: adm_linear(20), "beta_end"),
        (lambda: Cosine(max_beta=1.0), "max_beta"),
        (lambda: Cosine(offset=-0.1), "offset"),
        (lambda: Sigmoid(start=3.0, end=-3.0), "start < end"),
        (lambda: Sigmoid(temperature=0.0), "temperature"),
        (lambda: Sigmoid(max_beta=0.0), "max_beta"),
        (lambda: Betas(3, (0.1, 0.2)), "got 2"),
        (lambda: Betas(2, (0.0, 0.2)), r"\(0, 1\]"),
        (lambda: ZeroTerminalSNR(10, Linear()), "1000.*got 10"),
        (lambda: ZeroTerminalSNR(last=1.0), "last must lie in .*got 1.0"),
        (lambda: CosineLogSNR(5.0, -5.0), "log_snr_min"),
        (lambda: EDM(sigma_min=0.0), "sigma_min"),
        (lambda: EDM(sigma_min=2.0, sigma_max=1.0), "got 2.0, 1.0"),
        (lambda: EDM(p_std=0.0), "p_std"),
        (lambda: ShiftedLogSNR(EDM()), "alpha = 1"),
        (lambda: ShiftedLogSNR(FlowMatching(), -2 * np.log(3.0)), "alpha .* own shift .* = 3 "),
        (lambda: Laplace(scale=0.0), "scale must be positive, got 0.0"),
        (lambda: Laplace(mean=11.0), "got -10.0, 11.0 and 10.0"),
        (lambda: LaplaceBeta(max_beta=1.0), "max_beta"),
        (lambda: FlowMatching(shift=0.0), "shift must be positive, got 0.0"),
        (lambda: FlowMatching(t_min=0.0), "t_min .* got 0.0"),
        (lambda: FlowMatching(t_min=1.0), "t_min .* got 1.0"),
        (lambda: FlowMatching(logit_normal=(0.0, 0.0)), "std > 0, got"),
        (lambda: FlowMatching(logit_normal=(0.0,)), "std > 0, got"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_schedules_are_hashable_values():
    assert (
        Linear() == Linear() and hash(Cosine(10)) == hash(Cosine(10)) and Cosine(10) != Cosine(11)
    )
    assert issubclass(Sigmoid, DiscreteSchedule)


def test_the_end_of_zero_terminal_snr_can_be_kept_finite():
    """Only the last entry differs from the table that ends at 0."""
    kept, zero = ZeroTerminalSNR(last=2.0**-24).alphas_cumprod(), ZeroTerminalSNR().alphas_cumprod()
    assert (kept[-1], zero[-1]) == (2.0**-24, 0.0)
    np.testing.assert_array_equal(kept[:-1], zero[:-1])
