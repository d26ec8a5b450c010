"""Exponential integrators in the half log-SNR: what all DPM-Solvers and UniPC have in common.

With λ = log(α/σ) and m the prediction that a solver integrates, a step from λ_t over h ends at

    x_s = linear · x_t + gain · ∫₀ʰ exp(rate · (h - τ)) m(λ_t + τ) dτ + std · z

| algorithm        | m | linear           | gain   | rate | std              |
|------------------|---|------------------|--------|------|------------------|
| dpmsolver++      | x̂0 | σ_s/σ_t         | α_s    | -1   | 0                |
| dpmsolver        | ε̂ | α_s/α_t          | -σ_s   | 1    | 0                |
| sde-dpmsolver++  | x̂0 | σ_s/σ_t e^(-h)  | 2 α_s  | -2   | σ_s √(1 - e^-2h) |
| sde-dpmsolver    | ε̂ | α_s/α_t          | -2 σ_s | 1    | σ_s √(e^2h - 1)  |

Solvers differ in the polynomial that stands for m, and in nothing else.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from diffusion_jax.core.types import Array, NoiseLevel
from diffusion_jax.samplers.base import noise_from_x0

# Of every algorithm: m is x̂0, factor of the gain, rate.
_ALGORITHMS = {
    "dpmsolver++": (True, 1.0, -1.0),
    "dpmsolver": (False, 1.0, 1.0),
    "sde-dpmsolver++": (True, 2.0, -2.0),
    "sde-dpmsolver": (False, 2.0, 1.0),
}
ALGORITHMS = tuple(_ALGORITHMS)

# Enough for float64 where |z| < 1: 1 / 17! is 3e-15.
_NUM_TERMS = 17


SOLVER_TYPES = ("midpoint", "heun")
VARIANTS = ("default", "reference")


class FirstStep(NamedTuple):
    """The step with m held constant, as x_s = of_x · x + of_x0 · x̂0 + std · z, every field [].

    Attributes:
      of_x, of_x0, std: finite at both ends of a path.
      linear: the factor of x_t when m is held fixed; 0 where it is infinite.
    """

    of_x: Array
    of_x0: Array
    std: Array
    linear: Array


def is_sde(algorithm: str) -> bool:
    """Whether the algorithm draws noise in every step.

    Source: none; a convention of this library.
    """
    return algorithm.startswith("sde-")


def half_log_snr(level: NoiseLevel) -> Array:
    """λ = log(α/σ); +inf for clean data, -inf for pure noise.

    Source: Lu et al. 2022 (arXiv:2206.00927), section 3.1.
    """
    return jnp.log(level.alpha) - jnp.log(level.sigma)


def integrand(algorithm: str, x: Array, x0: Array, level: NoiseLevel) -> Array:
    """What the algorithm integrates: x̂0, or the ε̂ that follows from it, [B, ...].

    Source: Lu et al. 2022 (arXiv:2211.01095), section 4.
    """
    return x0 if _ALGORITHMS[algorithm][0] else noise_from_x0(x, x0, level)


def first_step(algorithm: str, level: NoiseLevel, next_level: NoiseLevel) -> FirstStep:
    """The first-order step; without noise it is DDIM's.

    Where α_t = 0, and with "sde-dpmsolver" where σ_s = 0, ε̂ cannot be held constant: the step
    holds x̂0 there, which ends at x̂0 if σ_s = 0.

    Source: Lu et al. 2022 (arXiv:2211.01095), eq. 9, and appendix B for the SDE.
    """
    alpha, sigma, next_alpha, next_sigma = *level[1:], *next_level[1:]
    ratio = next_sigma / sigma
    if not is_sde(algorithm):
        finite = alpha > 0
        of_noise = jnp.where(finite, next_alpha / jnp.where(finite, alpha, 1.0), 0.0)
        linear = ratio if _ALGORITHMS[algorithm][0] else of_noise
        return FirstStep(ratio, next_alpha - alpha * ratio, jnp.zeros_like(ratio), linear)
    shrink = alpha * ratio / next_alpha  # e^(-h)
    held_x0 = FirstStep(
        ratio * shrink,
        next_alpha * (1.0 - shrink) * (1.0 + shrink),
        next_sigma * jnp.sqrt(jnp.maximum((1.0 - shrink) * (1.0 + shrink), 0.0)),
        ratio * shrink,
    )
    if _ALGORITHMS[algorithm][0]:
        return held_x0
    finite = (alpha > 0) & (next_sigma > 0)
    linear = next_alpha / jnp.where(finite, alpha, 1.0)
    # Both branches of a where are differentiated: no root of zero in the one that is not taken.
    variance = jnp.where(finite, jnp.maximum((linear * sigma) ** 2 - next_sigma**2, 0.0), 1.0)
    held_eps = FirstStep(
        2.0 * ratio - linear, 2.0 * (next_alpha - alpha * ratio), jnp.sqrt(variance), linear
    )
    return FirstStep(*(jnp.where(finite, e, d) for e, d in zip(held_eps, held_x0, strict=True)))


def phi(z: Array, count: int) -> tuple[Array, ...]:
    """φ_1(z) … φ_count(z) with φ_k(z) = ∫₀¹ exp((1 - θ) z) θ^(k-1) / (k-1)! dθ.

    φ_1 = (e^z - 1) / z and φ_(k+1) = (φ_k - 1/k!) / z, which cancels near z = 0: the power series
    Σ z^j / (j + k)! stands in there.

    Args:
      z: [] finite.

    Source: Hochbruck & Ostermann 2010 (Acta Numerica 19), eqs. 2.5-2.6.
    """
    small = jnp.abs(z) < 1.0
    near, far = jnp.where(small, z, 0.0), jnp.where(small, 1.0, z)
    series = 1.0 / math.factorial(count + _NUM_TERMS)
    for j in range(_NUM_TERMS - 1, -1, -1):
        series = series * near + 1.0 / math.factorial(count + j)
    downwards, upwards = [series], [jnp.expm1(far) / far]
    for k in range(1, count):
        downwards.append(downwards[-1] * near + 1.0 / math.factorial(count - k))
        upwards.append((upwards[-1] - 1.0 / math.factorial(k)) / far)
    return tuple(jnp.where(small, n, f) for n, f in zip(downwards[::-1], upwards, strict=True))


def moments(algorithm: str, h: Array, next_level: NoiseLevel, count: int) -> tuple[Array, ...]:
    """gain · ∫₀ʰ exp(rate · (h - τ)) (τ/h)^i dτ for i = 0 … count, every one [].

    Args:
      h: [] finite.

    Source: Hochbruck & Ostermann 2010 (Acta Numerica 19), eq. 2.5, with the integrals of Lu et
    al. 2022 (arXiv:2211.01095), eq. 8.
    """
    of_x0, factor, rate = _ALGORITHMS[algorithm]
    gain = factor * h * (next_level.alpha if of_x0 else -next_level.sigma)
    values = phi(rate * h, count + 1)
    return tuple(math.factorial(i) * gain * value for i, value in enumerate(values))


def difference_weights(nodes: Sequence[Array], moments: Sequence[Array]) -> tuple[Array, ...]:
    """Weights c_j of m(r_j) - m(0) that integrate every polynomial of degree n exactly.

    Σ_j c_j r_j^i is the i-th moment for i = 1 … n: m is replaced by its interpolation at 0 and
    the n nodes.

    Args:
      nodes: n different numbers [] other than 0, in units of the step.
      moments: n numbers [], i = 1 … n.

    Source: Zhao et al. 2023 (arXiv:2302.04867), eq. 8, solved by Lagrange's formula.
    """
    weights = []
    for j, node in enumerate(nodes):
        # The coefficients of Π (t - r) over the other nodes, lowest power first.
        product, denominator = [1.0], node
        for other in (*nodes[:j], *nodes[j + 1 :]):
            shifted, same = [0.0, *product], [*product, 0.0]
            product = [a - other * b for a, b in zip(shifted, same, strict=True)]
            denominator = denominator * (node - other)
        weights.append(sum(c * m for c, m in zip(product, moments, strict=True)) / denominator)
    return tuple(weights)


def is_finite_step(start: Array, end: Array) -> Array:
    """Whether λ goes from a finite value to another one: no end of a path, no pause.

    Source: none; a convention of this library.
    """
    return jnp.isfinite(start) & jnp.isfinite(end) & (start != end)


def known(lambdas: Sequence[Array], here: Array, end: Array) -> tuple[Array, ...]:
    """Which earlier predictions, the latest first, can be used in a step from λ; [] bool each.

    All back to the first that is missing, or from which the next was reached against the
    direction of this step. So histories serve sampling and encoding, and none survives a jump
    back to noisier levels.

    Args:
      here, end: [] λ where the step starts and where it ends, which may be infinite.

    Source: none; a convention of this library.
    """
    usable, before = [], here
    for at in lambdas:
        along = jnp.where(end < here, before < at, before > at)
        good = is_finite_step(at, before) & along
        usable.append(good if not usable else usable[-1] & good)
        before = at
    return tuple(usable)


def past_nodes(
    lambdas: Sequence[Array], here: Array, h: Array, usable: Sequence[Array]
) -> tuple[Array, ...]:
    """(λ_j - λ) / h of earlier predictions, the latest first, negative and decreasing.

    Those that are not usable, [] bool each, get numbers that keep every weight finite.

    Source: Zhao et al. 2023 (arXiv:2302.04867), section 3.1.
    """
    nodes, last = [], 0.0
    for at, ok in zip(lambdas, usable, strict=True):
        distance = jnp.where(ok, at, 0.0) - jnp.where(ok, here, 0.0)
        last = jnp.where(ok, distance / h, last - 1.0)
        nodes.append(last)
    return tuple(nodes)
