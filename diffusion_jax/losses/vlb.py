"""The variational bound on the likelihood, term by term in bits per dimension."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from diffusion_jax.core.arrays import fold_in_each, per_example, per_image_normal
from diffusion_jax.core.forward import add_noise, posterior_mean
from diffusion_jax.core.timesteps import Grid
from diffusion_jax.core.types import Array, Key, NoiseLevel, Prediction
from diffusion_jax.core.variance import (
    check_variance,
    posterior_log_variance,
    reverse_log_variance,
)

Denoise = Callable[[Array, NoiseLevel], Prediction]

CDFS = ("exact", "tanh")
# 256 grey levels on [-1, 1].
IMAGE_HALF_BIN = 1.0 / 255.0
_LEAST_PROBABILITY = 1e-12


def check_decoder(half_bin: float, cdf: str) -> None:
    """Raises ValueError unless half_bin lies in (0, 1] and the form of the CDF is known.

    Source: none; a convention of this library.
    """
    if not 0.0 < half_bin <= 1.0:
        raise ValueError(
            f"half_bin is half the distance of two grey levels on [-1, 1], in (0, 1], for example "
            f"1/255 for 256 levels; got {half_bin}"
        )
    if cdf not in CDFS:
        raise ValueError(f"cdf must be one of {CDFS}, got {cdf!r}")


def _log_probabilities_exact(centred: Array, half_width: Array) -> tuple[Array, Array, Array]:
    """log Φ(c + w), log (1 - Φ(c - w)) and log (Φ(c + w) - Φ(c - w)).

    All of them from the lower tail, where no digits are lost, by Φ(-z) = 1 - Φ(z).
    """
    distance = jnp.abs(centred)
    near, far = log_ndtr(jnp.stack([half_width - distance, -half_width - distance]))
    beyond_far = jnp.log1p(-jnp.exp(far))
    # Rounding could make the difference 0 or positive for bins that are far too narrow.
    ratio = jnp.minimum(far - near, -_LEAST_PROBABILITY)
    below = jnp.where(centred > 0.0, beyond_far, near)
    above = jnp.where(centred < 0.0, beyond_far, near)
    return below, above, near + jnp.log(-jnp.expm1(ratio))


def _tanh_cdf(z: Array) -> Array:
    u = math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)
    # XLA's tanh is several float32 steps off near ±1, and there the difference of two values is
    # few steps: 16 bits lie between none and one. So tanh is written out.
    e = jnp.exp(-2.0 * jnp.where(u < 0.0, -u, u))
    tail = 2.0 * e / (1.0 + e)
    return 0.5 * (1.0 + jnp.where(u < 0.0, tail - 1.0, 1.0 - tail))


def _log_probabilities_tanh(centred: Array, half_width: Array) -> tuple[Array, Array, Array]:
    plus, minus = _tanh_cdf(centred + half_width), _tanh_cdf(centred - half_width)
    probabilities = (plus, 1.0 - minus, plus - minus)
    first, second, third = (jnp.log(jnp.maximum(p, _LEAST_PROBABILITY)) for p in probabilities)
    return first, second, third


def discretized_gaussian_log_likelihood(
    x: Array,
    mean: Array,
    log_std: Array,
    *,
    half_bin: float = IMAGE_HALF_BIN,
    cdf: str = "exact",
) -> Array:
    """log ∫ N(u; mean, std²) du over the grey level that x is in.

    A level takes x ± half_bin; the lowest one (x = -1) begins at -∞, the highest ends at +∞. A
    value counts as such from half_bin / 4 before ±1 on (|x| > 0.999 for 256 levels).

    Args:
      x: data in [-1, 1] on grey levels 2 · half_bin apart.
      mean, log_std: of the Gaussian; they broadcast to x without a change of rank.
      half_bin: 1/255 for 256 grey levels, 1/16 for the 17 of the digits.
      cdf: "exact": the normal distribution, in logarithms, so that no outlier is ever beyond
        the range of numbers. "tanh": the approximation of the released code, off by up to 2e-4,
        with probabilities below 1e-12 raised to 1e-12 (39.9 bits at most, and no gradient).

    Returns:
      Of x's shape, in nats.

    Raises:
      ValueError: if half_bin or cdf is out of range.

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 13; tanh: released code of that paper.
    """
    check_decoder(half_bin, cdf)
    per_std = jnp.exp(-log_std)
    function = _log_probabilities_exact if cdf == "exact" else _log_probabilities_tanh
    centred = (x - mean) * per_std
    below, above, inside = function(centred, jnp.broadcast_to(half_bin * per_std, centred.shape))
    edge = 1.0 - half_bin / 4.0
    return jnp.where(x < -edge, below, jnp.where(x > edge, above, inside))


def normal_kl(
    mean: Array, log_variance: Array, *, other_mean: Array, other_log_variance: Array
) -> Array:
    """KL( N(mean, exp log_variance) ‖ N(other_mean, exp other_log_variance) ), elementwise.

    ½ (d + e^{-d} - 1 + (mean - other_mean)² / other variance), d the difference of log variances,
    other minus own.

    Returns:
      Of the arguments' common shape, in nats.

    Source: Kingma & Welling 2014 (arXiv:1312.6114), appendix B, for two Gaussians.
    """
    d = other_log_variance - log_variance
    squared = (mean - other_mean) ** 2 * jnp.exp(-other_log_variance)
    # expm1 keeps the digits of d + e^-d - 1 where the two variances are nearly equal.
    return 0.5 * (d + jnp.expm1(-d) + squared)


def _bits_per_dimension(nats: Array, x: Array) -> Array:
    nats = jnp.broadcast_to(nats, x.shape)
    return jnp.mean(nats, axis=tuple(range(1, x.ndim))) / math.log(2.0)


def prior_bits(x0: Array, level: NoiseLevel, *, prior_std: Array | float = 1.0) -> Array:
    """KL( q(x_T | x0) ‖ N(0, prior_std²) ), the price of starting from noise.

    Args:
      x0: [B, ...].
      level: T, fields [] or [B].
      prior_std: of the noise that sampling starts from, the schedule's `prior_std`.

    Returns:
      [B] in bits per dimension.

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 5, L_T.
    """
    mean = per_example(level.alpha, x0) * x0
    log_variance = per_example(2.0 * jnp.log(level.sigma), x0)
    kl = normal_kl(
        mean,
        log_variance,
        other_mean=jnp.zeros_like(x0),
        other_log_variance=2.0 * jnp.log(jnp.asarray(prior_std, x0.dtype)),
    )
    return _bits_per_dimension(kl, x0)


def vlb_term(
    prediction: Prediction,
    x0: Array,
    x: Array,
    *,
    level: NoiseLevel,
    next_level: NoiseLevel,
    noisier: NoiseLevel | None,
    variance: str,
    fraction: Array | float | None = None,
    half_bin: float = IMAGE_HALF_BIN,
    cdf: str = "exact",
) -> Array:
    """One step's term of the bound: KL( q(x_s | x_t, x0) ‖ p(x_s | x_t) ), s = next_level.

    Where s is clean: -log p(x0 | x_t) of the discretised Gaussian instead.

    Args:
      prediction: of the denoiser at x.
      x0: [B, ...] data in [-1, 1].
      x: [B, ...] x_t, drawn from q(x_t | x0).
      level, next_level: t and s, fields [] or [B].
      noisier: where the step before started, or None, see `posterior_log_variance`.
      variance, fraction: of p, see `reverse_log_variance`.
      half_bin, cdf: see `discretized_gaussian_log_likelihood`.

    Returns:
      [B] in bits per dimension.

    Raises:
      ValueError: if an option is unknown, or the variance is neither given nor predicted.

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 5, L_{t-1} and L_0; in bits as in Nichol &
    Dhariwal 2021 (arXiv:2102.09672), section 3.
    """
    mean = posterior_mean(x, prediction.x0, level, next_level)
    log_variance = reverse_log_variance(
        prediction, level, next_level, variance=variance, fraction=fraction, noisier=noisier
    )
    true_mean = posterior_mean(x, x0, level, next_level)
    true_log_variance = posterior_log_variance(level, next_level, noisier=noisier)
    kl = normal_kl(
        true_mean,
        per_example(true_log_variance, x0),
        other_mean=mean,
        other_log_variance=log_variance,
    )
    decoder = -discretized_gaussian_log_likelihood(
        x0, mean, 0.5 * log_variance, half_bin=half_bin, cdf=cdf
    )
    ends_clean = jnp.broadcast_to(next_level.sigma == 0.0, x0.shape[:1])
    return jnp.where(ends_clean, _bits_per_dimension(decoder, x0), _bits_per_dimension(kl, x0))


class BitsPerDim(NamedTuple):
    """The variational bound of every example, and what it is made of.

    Attributes:
      total: [B] bits per dimension; the standard error of a data set is that of their mean.
      prior: [B] its part that no network can change.
      vlb: [B, MAX] its term for every step of the chain, from noisy to clean; 0 after the last.
      x0_mse: [B, MAX] mean squared error of x̂0 in every step.
      eps_mse: [B, MAX] mean squared error of ε̂ = (x_t - α x̂0) / σ.

    Source: none; a convention of this library.
    """

    total: Array
    prior: Array
    vlb: Array
    x0_mse: Array
    eps_mse: Array


def _check_chain(chain: Grid) -> None:
    """Refuses a chain without a decoder; inside of jit only the result can say so, as NaN."""
    end = chain.level(chain.stop).sigma
    if not isinstance(end, jax.core.Tracer) and float(end) != 0.0:
        raise ValueError(
            f"the bound needs a chain that ends at clean data, this one ends at sigma = {end}; "
            "make the grid with final='clean'"
        )


def bits_per_dim(
    denoise: Denoise,
    chain: Grid,
    x0: Array,
    *,
    keys: Key,
    variance: str,
    fraction: Array | float | None = None,
    prior_std: Array | float = 1.0,
    half_bin: float = IMAGE_HALF_BIN,
    cdf: str = "exact",
) -> BitsPerDim:
    """An unbiased estimate of the variational bound on -log p(x0), with one noise for each term.

    total = L_T + Σ_t L_t in nats, divided by the number of dimensions and ln 2. Every step of
    the chain is evaluated, in one loop: data, seeds, parameters and the number of steps share one
    compilation. The chain may be the one of training, a respaced one, or any grid of a continuous
    schedule. `denoise` is bounded as it is: to clip x̂0, as the released evaluation does by
    default, pass a denoiser that clips; a guided one gives no likelihood.

    Args:
      denoise: (x, level) -> Prediction, conditions bound.
      chain: levels from noisy to clean, ending at sigma = 0.
      x0: [B, ...] float32 data on grey levels in [-1, 1].
      keys: [B] one key per example, see `image_keys`.
      variance, fraction: of the reverse steps, see `reverse_log_variance`.
      prior_std: the schedule's `prior_std` at the chain's first level.
      half_bin, cdf: the decoder, see `discretized_gaussian_log_likelihood`.

    Raises:
      ValueError: if an option is unknown, the variance is neither given nor predicted, or the
        chain does not end at clean data (inside of jit the totals are NaN then).

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 5; Nichol & Dhariwal 2021
    (arXiv:2102.09672), section 3.
    """
    check_variance(variance)
    check_decoder(half_bin, cdf)
    _check_chain(chain)
    axes = tuple(range(1, x0.ndim))
    start = jnp.asarray(chain.start, jnp.int32)

    def term(index: Array, columns: tuple[Array, ...]) -> tuple[Array, ...]:
        level, next_level = chain.level(index), chain.level(index + 1)
        noisier = chain.level(jnp.maximum(index - 1, start))
        eps = per_image_normal(fold_in_each(keys, index), x0)
        x = add_noise(x0, eps, level)
        prediction = denoise(x, level)
        vlb = vlb_term(
            prediction,
            x0,
            x,
            level=level,
            next_level=next_level,
            noisier=noisier,
            variance=variance,
            fraction=fraction,
            half_bin=half_bin,
            cdf=cdf,
        )
        eps_error = (x - level.alpha * prediction.x0) / level.sigma - eps
        values = (vlb, *(jnp.mean(e**2, axis=axes) for e in (prediction.x0 - x0, eps_error)))
        return tuple(c.at[:, index].set(v) for c, v in zip(columns, values, strict=True))

    empty = jnp.zeros((x0.shape[0], chain.levels.t.shape[0] - 1), x0.dtype)
    vlb, x0_mse, eps_mse = jax.lax.fori_loop(start, chain.stop, term, (empty,) * 3)
    prior = prior_bits(x0, chain.level(start), prior_std=prior_std)
    complete = chain.level(chain.stop).sigma == 0.0
    total = jnp.where(complete, prior + jnp.sum(vlb, axis=1), jnp.nan)
    return BitsPerDim(total, prior, vlb, x0_mse, eps_mse)
