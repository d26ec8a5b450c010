"""Weights of the simple loss: how much every noise level counts."""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_jax.core.parameterization import Parameterization
from diffusion_jax.core.types import Array, NoiseLevel

# Rates are kept this far from 0, so that a weight takes its limit there instead of 0 · inf; the
# square and its inverse are still float32 numbers.
_LEAST_RATE = 1e-8


class Weight(Protocol):
    """(level [B], parameterization) -> weight [B] of the squared error of the network's target.

    A paper's weight belongs to the error of one target, of x0 or of eps. The classes below convert
    it to the network's own: an error e of the output is an error (∂x0/∂output) · e of x0, and
    α/σ times that of eps, so the loss is the same whatever the network predicts.

    Source: none; a convention of this library.
    """

    def __call__(self, level: NoiseLevel, parameterization: Parameterization) -> Array: ...


def _away_from_zero(level: NoiseLevel) -> NoiseLevel:
    alpha, sigma = (jnp.maximum(rate, _LEAST_RATE) for rate in (level.alpha, level.sigma))
    return level._replace(alpha=alpha, sigma=sigma)


def _squared_slope(level: NoiseLevel, parameterization: Parameterization) -> Array:
    """(∂x0/∂output)² at a level, [B]: to_x0 is linear in the output."""
    zero = jnp.zeros_like(level.alpha)
    one = jnp.ones_like(level.alpha)
    to_x0 = parameterization.to_x0
    return (to_x0(one, zero, level) - to_x0(zero, zero, level)) ** 2


def _snr(level: NoiseLevel) -> Array:
    return (level.alpha / level.sigma) ** 2


@dataclass(frozen=True)
class Uniform:
    """Weight 1 at every level of whatever the network predicts: with Eps DDPM's L_simple.

    The one weight that is another loss for another parameterization.

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 14.
    """

    def __call__(self, level: NoiseLevel, parameterization: Parameterization) -> Array:
        del parameterization
        return jnp.ones_like(level.alpha)


@dataclass(frozen=True)
class MinSNR:
    """min(SNR, γ) of the squared x0 error, SNR = α²/σ².

    That is min(SNR, γ) / SNR with Eps and, where α² + σ² = 1, min(SNR, γ) / (SNR + 1) with V.

    Attributes:
      gamma: γ > 0.

    Raises:
      ValueError: if gamma is not positive.

    Source: Hang et al. 2023 (arXiv:2303.09556), Min-SNR-γ.
    """

    gamma: float = 5.0

    def __post_init__(self):
        if not self.gamma > 0.0:
            raise ValueError(f"gamma must be positive, got {self.gamma}")

    def __call__(self, level: NoiseLevel, parameterization: Parameterization) -> Array:
        level = _away_from_zero(level)
        return jnp.minimum(_snr(level), self.gamma) * _squared_slope(level, parameterization)


@dataclass(frozen=True)
class P2:
    """1 / (k + SNR)^γ of the squared eps error, SNR = α²/σ²: less weight on nearly clean images.

    Attributes:
      gamma: γ ≥ 0; 0 is L_simple.
      k: k > 0.

    Raises:
      ValueError: if gamma is negative or k not positive.

    Source: Choi et al. 2022 (arXiv:2204.00227), P2 weighting.
    """

    gamma: float = 1.0
    k: float = 1.0

    def __post_init__(self):
        if not (self.gamma >= 0.0 and self.k > 0.0):
            raise ValueError(f"expected gamma >= 0 and k > 0, got {self.gamma} and {self.k}")

    def __call__(self, level: NoiseLevel, parameterization: Parameterization) -> Array:
        level = _away_from_zero(level)
        snr = _snr(level)
        of_eps = (self.k + snr) ** -self.gamma
        return of_eps * (snr * _squared_slope(level, parameterization))


@dataclass(frozen=True)
class SigmoidWeight:
    """sigmoid(b - λ) of the squared eps error, λ = log(α²/σ²), natural logarithm.

    The same as e^b · sigmoid(λ - b) of the squared x0 error. It multiplies the error of the times
    that the schedule draws. The papers write ∫ sigmoid(b - λ) E‖eps error‖² dλ, that is with a
    further factor -dλ/dt for uniform t; here the schedule's density of λ takes that part.

    Attributes:
      bias: b, in nats of log-SNR: levels noisier than λ = b count fully.

    Source: Kingma & Gao 2023 (arXiv:2303.00848) and Hoogeboom et al. 2024 (arXiv:2410.19324),
    sigmoid weighting.
    """

    bias: float = 0.0

    def __call__(self, level: NoiseLevel, parameterization: Parameterization) -> Array:
        level = _away_from_zero(level)
        log_snr = 2.0 * (jnp.log(level.alpha) - jnp.log(level.sigma))
        of_eps = jax.nn.sigmoid(self.bias - log_snr)
        return of_eps * (_snr(level) * _squared_slope(level, parameterization))


@dataclass(frozen=True)
class EDMWeight:
    """(σ² + σ_d²) / (σ σ_d)² of the squared x0 error, σ = σ_t / α_t.

    With EDMPreconditioning of the same σ_d it is 1 at every level, since it undoes c_out².

    Attributes:
      sigma_data: σ_d, the data's standard deviation.

    Raises:
      ValueError: if sigma_data is not positive.

    Source: Karras et al. 2022 (arXiv:2206.00364), table 1.
    """

    sigma_data: float = 0.5

    def __post_init__(self):
        if not self.sigma_data > 0.0:
            raise ValueError(f"sigma_data must be positive, got {self.sigma_data}")

    def __call__(self, level: NoiseLevel, parameterization: Parameterization) -> Array:
        level = _away_from_zero(level)
        # 1/σ_d² + 1/σ², which is the same and does not square a large σ.
        of_x0 = self.sigma_data**-2 + _snr(level)
        return of_x0 * _squared_slope(level, parameterization)


WEIGHTS = {
    "uniform": Uniform,
    "min_snr": MinSNR,
    "p2": P2,
    "sigmoid": SigmoidWeight,
    "edm": EDMWeight,
}

# What a configuration may hold.
WeightPart = Uniform | MinSNR | P2 | SigmoidWeight | EDMWeight
