"""The variance of a reverse step: fixed, interpolated or learned, finite at the clean end."""

import jax.numpy as jnp

from diffusion_jax.core.arrays import per_example
from diffusion_jax.core.forward import posterior_std, transition
from diffusion_jax.core.types import Array, NoiseLevel, Prediction

VARIANCES = ("small", "large", "interpolated", "learned_range", "learned")


def check_variance(variance: str) -> None:
    """Raises ValueError unless the kind of variance is known.

    Source: none; a convention of this library.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance must be one of {VARIANCES}, got {variance!r}")


def posterior_log_variance(
    level: NoiseLevel,
    next_level: NoiseLevel,
    *,
    noisier: NoiseLevel | None = None,
    least: float | None = None,
) -> Array:
    """log β̃, the log variance of q(x_s | x_t, x0), with a finite stand-in where s is clean.

    There β̃ is 0. As in the released code the β̃ of the step before takes its place: that of the
    step from `noisier` to `level`. Without such a step the forward variance does.

    Args:
      level, next_level: t and s, fields [] or [B].
      noisier: where the step before started; read only where next_level.sigma is 0.
      least: a variance that stands in instead, for code that clips β̃ from below.

    Returns:
      [] or [B], in nats.

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 7; the stand-in: Nichol & Dhariwal 2021
    (arXiv:2102.09672), released code ("posterior_log_variance_clipped"); clipped at 1e-20:
    Rombach et al. 2022 (arXiv:2112.10752), released code.
    """
    _, forward = transition(level, next_level)
    std, stand_in = posterior_std(level, next_level), forward
    if least is not None:
        stand_in = jnp.full_like(forward, least**0.5)
    elif noisier is not None:
        before = posterior_std(noisier, level)
        stand_in = jnp.where(before > 0.0, before, forward)
    return _log_variance(jnp.where(next_level.sigma == 0.0, stand_in, std))


def _log_variance(std: Array) -> Array:
    """-inf where the std is 0, with a gradient of 0 there."""
    positive = std > 0.0
    return jnp.where(positive, 2.0 * jnp.log(jnp.where(positive, std, 1.0)), -jnp.inf)


def reverse_log_variance(
    prediction: Prediction,
    level: NoiseLevel,
    next_level: NoiseLevel,
    *,
    variance: str,
    fraction: Array | float | None = None,
    noisier: NoiseLevel | None = None,
    least: float | None = None,
) -> Array:
    """Log variance of p(x_s | x_t), s = next_level.

    small:         log β̃
    large:         log β, with β = σ²_{t|s}; log β̃ where s is clean
    interpolated:  v log β + (1 - v) log β̃, v = fraction
    learned_range: the same with v = prediction.var_frac, which may leave [0, 1]
    learned:       prediction.log_var as it is, which is meant for steps of the training chain

    In a step of no length, from t to t, all but the last are -inf.

    Args:
      prediction: of the denoiser at x_t.
      level, next_level: t and s, fields [] or [B].
      variance: a kind in VARIANCES.
      fraction: v, with "interpolated" only.
      noisier, least: what stands for β̃ where s is clean, see `posterior_log_variance`.

    Returns:
      [] or [B, 1, ...] or [B, ...], such that it broadcasts to prediction.x0; in nats.

    Raises:
      ValueError: if the kind is unknown, or what it needs was not given or not predicted.

    Source: Ho et al. 2020 (arXiv:2006.11239), section 3.2; learned: Nichol & Dhariwal 2021
    (arXiv:2102.09672), eq. 15 and released code; interpolated: Ho & Salimans 2022
    (arXiv:2207.12598), section 2.
    """
    check_variance(variance)
    if variance == "learned":
        return _predicted(prediction.log_var, variance, "log_var", "log")
    small = posterior_log_variance(level, next_level, noisier=noisier, least=least)
    _, forward = transition(level, next_level)
    large, x0 = _log_variance(forward), prediction.x0
    if variance == "small":
        return per_example(small, x0)
    if variance == "large":
        # The released code's choice: a decoder as wide as β_0 has the worse likelihood.
        return per_example(jnp.where(next_level.sigma == 0.0, small, large), x0)
    if variance == "learned_range":
        fraction = _predicted(prediction.var_frac, variance, "var_frac", "range")
    elif fraction is None:
        raise ValueError("variance 'interpolated' needs a fraction in [0, 1], got None")
    # Where nothing happens in the step both are -inf, and 0 · inf is not a number.
    moves = jnp.isfinite(large) & jnp.isfinite(small)
    large, small = (per_example(jnp.where(moves, value, 0.0), x0) for value in (large, small))
    mixed = fraction * large + (1.0 - fraction) * small
    return jnp.where(per_example(moves, x0), mixed, -jnp.inf)


def _predicted(value: Array | None, variance: str, field: str, learned: str) -> Array:
    if value is None:
        raise ValueError(
            f"variance {variance!r} needs a denoiser that predicts {field}; build it with "
            f"learned_variance={learned!r} or choose 'small' or 'large'"
        )
    return value
