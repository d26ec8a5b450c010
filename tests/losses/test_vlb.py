"""The variational bound: decoder, Gaussian divergences, and the true likelihood of known data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from diffusion_jax.core.arrays import fold_in_each, image_keys, per_image_normal
from diffusion_jax.core.schedules import EDM, Cosine, CosineLogSNR, Linear
from diffusion_jax.core.timesteps import linspace, trailing
from diffusion_jax.core.types import NoiseLevel, Prediction
from diffusion_jax.losses.vlb import (
    bits_per_dim,
    discretized_gaussian_log_likelihood,
    normal_kl,
    prior_bits,
    vlb_term,
)
from tests.analytic import optimal_var_frac

IMAGE, DIGITS = 1 / 255, 1 / 16
LOG_2 = np.log(2.0)


def grey_levels(half_bin):
    return np.linspace(-1.0, 1.0, round(1 / half_bin) + 1)


def probabilities(half_bin, std):
    """Of the grey levels under N(0, std²), in float64."""
    edges = grey_levels(half_bin)[:-1] + half_bin
    return np.diff(stats.norm.cdf(np.concatenate([[-np.inf], edges, [np.inf]]), scale=std))


# The decoder.

_compiled_decoder = jax.jit(
    discretized_gaussian_log_likelihood, static_argnames=("half_bin", "cdf")
)


def decoder(x, mean, log_std, *, half_bin=IMAGE, cdf="exact"):
    """The decoder's log-likelihood; of one length, so that few sizes are compiled."""
    shape = np.broadcast_shapes(np.shape(x), np.shape(mean), np.shape(log_std))
    flat = [np.broadcast_to(np.float32(v), shape).ravel() for v in (x, mean, log_std)]
    padded = [jnp.pad(v, (0, 4000 - v.size)) for v in flat]
    out = _compiled_decoder(*padded, half_bin=half_bin, cdf=cdf)
    return np.asarray(out)[: flat[0].size].reshape(shape)


@pytest.mark.parametrize("cdf", ["exact", "tanh"])
@pytest.mark.parametrize("half_bin", [IMAGE, DIGITS])
def test_the_grey_levels_share_all_of_the_probability(half_bin, cdf):
    """Wherever the mean is, also outside of [-1, 1], and however wide the Gaussian."""
    mean, std = np.meshgrid([-1.4, -0.3, 0.0, 0.97, 1.2], [0.01, 0.3, 2.0])
    mean, log_std = (v.reshape(-1, 1) for v in (mean, np.log(std)))
    log_p = decoder(grey_levels(half_bin), mean, log_std, half_bin=half_bin, cdf=cdf)
    np.testing.assert_allclose(np.exp(np.asarray(log_p, np.float64)).sum(axis=1), 1.0, atol=2e-5)


def test_exact_decoder_against_scipy_far_into_the_tails():
    """In float64 by differences of log Φ, from the mean to 200 standard deviations away."""
    std, half_bin = 0.01, IMAGE
    x = grey_levels(half_bin)
    edge = np.where(x < 0, x + half_bin, x - half_bin)
    upper, lower = special.log_ndtr(-(x - half_bin) / std), special.log_ndtr(-(x + half_bin) / std)
    inner = np.where(x < 0, upper[::-1], upper), np.where(x < 0, lower[::-1], lower)
    expected = inner[0] + np.log(-np.expm1(inner[1] - inner[0]))
    expected[[0, -1]] = special.log_ndtr(-np.abs(edge[[0, -1]]) / std)
    ours = decoder(x, 0.0, np.log(std))
    assert expected.min() < -4900.0
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5)


def test_tanh_decoder_is_the_released_approximation():
    x, mean, std = grey_levels(IMAGE), 0.2, 0.05

    def cdf(value):
        z = (value - mean) / std
        return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

    p = cdf(x + IMAGE) - cdf(x - IMAGE)
    p[0], p[-1] = cdf(x[0] + IMAGE), 1 - cdf(x[-1] - IMAGE)
    ours = decoder(x, mean, np.log(std), cdf="tanh")
    probable = p > 1e-3
    np.testing.assert_allclose(np.exp(ours), np.maximum(p, 1e-12), atol=2e-6)
    np.testing.assert_allclose(ours[probable], np.log(p[probable]), atol=2e-3)
    np.testing.assert_allclose(ours.min(), np.log(1e-12), rtol=1e-6)
    difference = np.abs(np.exp(ours) - np.exp(decoder(x, mean, np.log(std)))).max()
    assert 1e-6 < difference < 4e-4


@pytest.mark.parametrize("half_bin, inside, outside", [(IMAGE, 0.9985, 0.9995), (DIGITS, 0.98, 1)])
def test_tails_open_at_the_last_grey_level_only(half_bin, inside, outside):
    """Beside the edge a bin is closed: its probability falls when the mean moves out."""
    for sign in (-1.0, 1.0):
        x = np.asarray([sign * inside, sign * outside])
        closed, opened = decoder(x, sign * 3.0, np.log(0.1), half_bin=half_bin)
        np.testing.assert_allclose(opened, 0.0, atol=1e-6)
        assert closed < -100.0


@pytest.mark.parametrize("cdf", ["exact", "tanh"])
def test_the_decoder_has_finite_gradients_for_outliers(cdf):
    x = jnp.asarray([-1.0, 0.1, 0.1, 0.1, 1.0], jnp.float32)

    @jax.jit
    @jax.grad
    def gradient(mean_and_log_std):
        mean, log_std = mean_and_log_std
        return jnp.sum(discretized_gaussian_log_likelihood(x, mean, log_std, cdf=cdf))

    for mean in ([5.0, 0.1, 5.0, 0.1, -5.0], [-5.0, 0.1, -5.0, 0.1, 5.0]):
        log_std = jnp.asarray([-6.0, -12.0, -4.0, 6.0, -6.0])
        of_mean, of_log_std = gradient((jnp.asarray(mean, jnp.float32), log_std))
        assert np.all(np.isfinite(of_mean)) and np.all(np.isfinite(of_log_std))
        if cdf == "exact":
            # An outlier pulls the mean by its distance in units of the variance.
            np.testing.assert_allclose(of_mean[2], (0.1 - mean[2]) / np.exp(-8.0), rtol=0.01)


# Gaussian divergences.


def test_divergence_of_two_gaussians_by_integration():
    mean, std, other_mean, other_std = 0.3, 0.4, -0.2, 0.7
    x = np.linspace(-6, 6, 20001)
    p, q = stats.norm(mean, std), stats.norm(other_mean, other_std)
    integral = np.trapezoid(p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), x)
    ours = normal_kl(
        jnp.float32(mean),
        jnp.float32(2 * np.log(std)),
        other_mean=jnp.float32(other_mean),
        other_log_variance=jnp.float32(2 * np.log(other_std)),
    )
    np.testing.assert_allclose(ours, integral, rtol=1e-5)


def test_divergence_keeps_its_digits_for_nearly_equal_variances():
    d = np.asarray([0.0, 1e-3, -1e-2, 0.1])
    ours = normal_kl(
        jnp.zeros(4), jnp.zeros(4), other_mean=jnp.zeros(4), other_log_variance=jnp.float32(d)
    )
    np.testing.assert_allclose(ours, 0.5 * (d + np.expm1(-d)), rtol=1e-3, atol=1e-11)


@pytest.mark.parametrize("schedule", [Cosine(), Linear(100), EDM(0.002, 80.0)])
def test_prior_term(schedule):
    """½ (α² x0² / s² + σ² / s² - 1 - log σ² / s²) with s the std of the prior."""
    level = schedule(np.asarray(schedule.t_max))
    std = float(schedule.prior_std(level))
    x0 = np.asarray([[0.5, -1.0], [0.0, 0.2]])
    ratio = level.sigma**2 / std**2
    nats = 0.5 * (level.alpha**2 * x0**2 / std**2 + ratio - 1 - np.log(ratio))
    traced = NoiseLevel(*(jnp.float32(field) for field in level))
    ours = prior_bits(jnp.float32(x0), traced, prior_std=std)
    np.testing.assert_allclose(ours, nats.mean(axis=1) / LOG_2, rtol=1e-4, atol=2e-7)


# One term.


def test_a_term_is_a_divergence_or_at_the_end_the_decoder():
    """Both in one batch, against Gaussian formulas in ᾱ and β of a schedule in float64."""
    table = Linear(10).alphas_cumprod()
    x0, x = np.asarray([[0.2, -0.6], [0.2, -0.6]]), np.asarray([[0.5, -0.5], [0.21, -0.59]])
    guess = np.asarray([[0.1, -0.4], [0.19, -0.6]])
    at, before = np.asarray([table[6], table[0]]), np.asarray([table[5], 1.0])

    def level(alphas_cumprod, t):
        fields = (t, np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod))
        return NoiseLevel(*(jnp.float32(field) for field in fields))

    beta = 1 - table[6] / table[5]
    small = (1 - table[5]) / (1 - table[6]) * beta
    shift = np.sqrt(table[5]) * beta / (1 - table[6]) * (guess[0] - x0[0])
    kl = 0.5 * (np.log(beta / small) + small / beta - 1 + shift**2 / beta)
    first = (1 - table[0]) / (1 - table[1]) * (1 - table[1] / table[0])
    z = np.stack([x0[1] + IMAGE - guess[1], x0[1] - IMAGE - guess[1]]) / np.sqrt(first)
    decoder = -np.log(stats.norm.cdf(z[0]) - stats.norm.cdf(z[1]))
    ours = vlb_term(
        Prediction(jnp.float32(guess)),
        jnp.float32(x0),
        jnp.float32(x),
        level=level(at, [6, 0]),
        next_level=level(before, [5, 0]),
        noisier=level(table[[7, 1]], [7, 1]),
        variance="large",
    )
    expected = [kl.mean() / LOG_2, decoder.mean() / LOG_2]
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


# The whole bound, for data whose likelihood is known.

STD, COUNT, WIDTH, MAX_STEPS = 0.25, 100, 24, 1000
TRACES = []


def data(half_bin=IMAGE):
    """Discretised Gaussian data and -log2 of their probabilities, [B, D] and [B]."""
    p = probabilities(half_bin, STD)
    index = np.random.default_rng(0).choice(len(p), (COUNT, WIDTH), p=p)
    return jnp.float32(grey_levels(half_bin)[index]), -np.log2(p[index]).mean(axis=1)


@functools.partial(jax.jit, static_argnames=("variance", "half_bin"))
def bound(chain, x0, keys, *, variance, half_bin=IMAGE):
    """The bound of the exact denoiser of N(0, STD²) with the optimal or a fixed variance."""
    TRACES.append(variance)

    def denoise(x, level):
        ends_at = chain.level(jnp.argmin(jnp.abs(chain.levels.sigma - level.sigma)) + 1)
        # Where the chain ends, the posterior of x0 itself is nearly as wide as σ.
        clean = ends_at.sigma == 0.0
        safe = ends_at._replace(sigma=jnp.where(clean, 0.5 * level.sigma, ends_at.sigma))
        fraction = jnp.where(clean, 1.0, optimal_var_frac(level, safe, STD**2))
        total = level.alpha**2 * STD**2 + level.sigma**2
        return Prediction(level.alpha * STD**2 / total * x, jnp.broadcast_to(fraction, x.shape))

    return bits_per_dim(denoise, chain, x0, keys=keys, variance=variance, half_bin=half_bin)


@pytest.mark.slow
def test_the_bound_of_the_exact_model_is_the_true_likelihood():
    """Within 1 % at T = 1000; fixed variances are above by what the theory says, 3 s.e. and more.

    With the same noises in all of them, the differences have little noise left.
    """
    x0, nll = data()
    keys, chain = image_keys(1, range(COUNT)), trailing(Cosine(1000), 1000, max_steps=MAX_STEPS)
    result = {name: bound(chain, x0, keys, variance=name) for name in VARIANCES}
    totals = {name: np.asarray(r.total, np.float64) for name, r in result.items()}
    best = totals["learned_range"]
    assert abs(best.mean() - nll.mean()) < 0.01 * nll.mean()
    for name in ("small", "large"):
        excess = totals[name] - best
        assert excess.mean() > 3 * excess.std() / np.sqrt(COUNT), name
        assert totals[name].mean() > nll.mean()
        steps = np.asarray(result[name].vlb - result["learned_range"].vlb)[:, :-1].sum(axis=1)
        np.testing.assert_allclose(steps.mean(), excess_of(name), rtol=0.15)
    parts = result["learned_range"]
    np.testing.assert_allclose(parts.total, parts.prior + parts.vlb.sum(axis=1), rtol=1e-5)
    level = Cosine(1000)(np.arange(1000.0)[::-1])
    of_x0 = STD**2 * level.sigma**2 / (level.alpha**2 * STD**2 + level.sigma**2)
    of_eps = (level.alpha / level.sigma) ** 2 * of_x0
    for ours, exact in ((parts.x0_mse, of_x0), (parts.eps_mse, of_eps)):
        ratio = np.asarray(ours).mean(axis=0) / exact
        np.testing.assert_allclose(ratio[:980], 1.0, atol=0.15)


VARIANCES = ("learned_range", "small", "large")


def excess_of(variance):
    """Divergence of the exact reverse steps but the last from fixed variances, in bits."""
    after = Cosine(1000).alphas_cumprod()
    at, before = after[1:], after[:-1]
    beta = 1 - at / before
    small = (1 - before) / (1 - at) * beta
    of_x0 = STD**2 * (1 - at) / (at * STD**2 + 1 - at)
    best = small + (np.sqrt(before) * beta / (1 - at)) ** 2 * of_x0
    ratio = best / {"small": small, "large": beta}[variance]
    return 0.5 * (ratio - 1 - np.log(ratio)).sum() / LOG_2


@pytest.mark.slow
def test_chains_of_other_lengths_and_continuous_time_share_one_compilation():
    """Fewer steps bound less tightly, never below the truth; steps after the last are 0."""
    x0, nll = data()
    keys = image_keys(1, range(COUNT))
    totals = {}
    before = len(TRACES)
    for name, schedule, steps in (
        ("10", Cosine(1000), 10),
        ("100", Cosine(1000), 100),
        ("continuous", CosineLogSNR(-12.0, 9.0), 300),
    ):
        chain = trailing(schedule, steps, max_steps=MAX_STEPS)
        result = bound(chain, x0, keys, variance="large")
        totals[name] = np.asarray(result.total).mean()
        assert result.vlb.shape == (COUNT, MAX_STEPS)
        np.testing.assert_array_equal(result.vlb[:, steps:], 0.0)
        assert np.all(np.isfinite(result.vlb)) and np.all(result.vlb.mean(axis=0)[:steps] != 0.0)
    assert len(TRACES) - before <= 1
    assert totals["10"] > totals["100"] > nll.mean()
    assert nll.mean() < totals["continuous"] < 1.1 * nll.mean()


X0 = jnp.asarray([[0.2, -0.6], [0.4, 0.0], [1.0, -1.0]])
KEYS = image_keys(0, range(3))


def tiny(chain, x0=X0, keys=KEYS, **options):
    def denoise(x, level):
        return Prediction(0.5 * x, jnp.full(x.shape, 0.3), jnp.full(x.shape, -4.0))

    return bits_per_dim(denoise, chain, x0, keys=keys, **options)


compiled = jax.jit(tiny, static_argnames=("variance", "half_bin", "cdf"))


def short(num_steps):
    return trailing(Linear(4), num_steps, max_steps=4)


def test_every_example_is_bounded_by_itself_and_by_its_key():
    whole = compiled(short(4), X0, KEYS, variance="learned_range")
    turned = compiled(short(4), X0[::-1], KEYS[::-1], variance="learned_range")
    np.testing.assert_allclose(turned.total[::-1], whole.total, rtol=1e-6)
    other = compiled(short(4), X0, KEYS[::-1], variance="learned_range")
    assert np.abs(other.total - whole.total)[0] > 1e-3
    np.testing.assert_allclose(other.total[1], whole.total[1], rtol=1e-6)


def test_the_last_step_of_a_chain_is_as_wide_as_the_one_before():
    """-log2 p(x0 | x) at std² = β̃_1, from the table, with the noise of that step."""
    ours = compiled(short(4), variance="small").vlb[:, 3]
    first, second = Linear(4).alphas_cumprod()[:2]
    variance = (1 - first) / (1 - second) * (1 - second / first)
    eps = np.asarray(per_image_normal(fold_in_each(KEYS, 3), X0), np.float64)
    mean = 0.5 * (np.sqrt(first) * np.asarray(X0, np.float64) + np.sqrt(1 - first) * eps)
    bits = -decoder(X0, mean, 0.5 * np.log(variance)) / LOG_2
    np.testing.assert_allclose(ours, bits.mean(axis=1), rtol=1e-4)


@pytest.mark.slow
def test_other_variances_reach_the_terms():
    """A given fraction is the predicted one, 0.3, and a predicted log variance is of its own."""
    ranged = compiled(short(4), variance="learned_range").vlb
    given = compiled(short(4), variance="interpolated", fraction=0.3).vlb
    np.testing.assert_allclose(given, ranged, rtol=1e-5)
    other = compiled(short(4), variance="interpolated", fraction=0.6).vlb
    own = compiled(short(4), variance="learned").vlb
    for vlb in (other, own):
        assert np.all(np.isfinite(vlb)) and np.all(np.abs(vlb - ranged) > 1e-4)


@pytest.mark.parametrize("variance", ["small", "learned_range"])
def test_a_chain_of_one_step_is_finite(variance):
    """Without a step before, whose β̃ stands in for that of the last one."""
    result = compiled(short(1), variance=variance)
    assert np.all(np.isfinite(result.total)) and np.all(result.vlb[:, 0] != 0.0)


def test_a_chain_without_a_decoder_is_refused():
    """It would be a bound on something else; compiled it says so by NaN."""
    chain = linspace(Linear(4), 3, max_steps=4, final="t_min")
    with pytest.raises(ValueError, match="ends at sigma = .*final='clean'"):
        tiny(chain, variance="small")
    assert np.all(np.isnan(compiled(chain, variance="small").total))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"variance": "medium"}, "'medium'"),
        ({"variance": "interpolated"}, "fraction in .0, 1., got None"),
        ({"variance": "small", "half_bin": 2.0}, "half_bin.*got 2.0"),
        ({"variance": "small", "cdf": "erf"}, "'exact', 'tanh'.*'erf'"),
    ],
)
def test_bits_per_dim_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(short(2), **options)


@pytest.mark.parametrize("variance, field", [("learned_range", "var_frac"), ("learned", "log_var")])
def test_a_variance_that_is_not_predicted_is_refused(variance, field):
    with pytest.raises(ValueError, match=f"predicts {field}"):
        bits_per_dim(lambda x, level: Prediction(x), short(2), X0, keys=KEYS, variance=variance)
