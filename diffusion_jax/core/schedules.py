"""Noise schedules: the path from clean data to noise as a function of time."""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.discrete import (
    Betas,
    Cosine,
    DiscreteSchedule,
    Linear,
    ScaledLinear,
    Sigmoid,
    SigmoidBeta,
    ZeroTerminalSNR,
    adm_linear,
    numpy_like,
)
from diffusion_jax.core.types import Array, Key, NoiseLevel


class NoiseSchedule(Protocol):
    """What every schedule offers. Given numpy it computes in float64, given jax it traces.

    Attributes:
      num_timesteps: T, or None where t is continuous.
      t_min: the least noisy time.
      t_max: the noisiest time.
    """

    @property
    def num_timesteps(self) -> int | None: ...
    @property
    def t_min(self) -> float: ...
    @property
    def t_max(self) -> float: ...

    def prior_std(self, level: NoiseLevel) -> Array | float:
        """Standard deviation of the noise that sampling starts from at a level."""
        ...

    def __call__(self, t: Array) -> NoiseLevel:
        """The level at time t, [] or [B]."""
        ...

    def inverse(self, log_snr: Array) -> Array:
        """The time t in [t_min, t_max] at which log(alpha² / sigma²) is nearest to `log_snr`."""
        ...

    def sample_t(self, keys: Key) -> Array:
        """One training time per key, [B]."""
        ...


@dataclass(frozen=True)
class CosineLogSNR:
    """Continuous cosine schedule with log-SNR cut to a range.

    log-SNR(t) = -2 log tan(a t + b), so alpha = cos(a t + b), sigma = sin(a t + b), for t
    in [0, 1]; b and a follow from the range.

    Attributes:
      log_snr_min: log-SNR at t = 1.
      log_snr_max: log-SNR at t = 0.

    Raises:
      ValueError: unless log_snr_min < log_snr_max.

    Source: Ho & Salimans 2022 (arXiv:2207.12598), section 2; Salimans & Ho 2022
    (arXiv:2202.00512), appendix B.
    """

    log_snr_min: float = -20.0
    log_snr_max: float = 20.0

    num_timesteps = None
    t_min = 0.0
    t_max = 1.0

    def __post_init__(self):
        if not self.log_snr_min < self.log_snr_max:
            raise ValueError(
                f"expected log_snr_min < log_snr_max, got {self.log_snr_min}, {self.log_snr_max}"
            )

    def prior_std(self, level: NoiseLevel) -> float:
        del level
        return 1.0

    def _range(self) -> tuple[float, float]:
        b = float(np.arctan(np.exp(-0.5 * self.log_snr_max)))
        return float(np.arctan(np.exp(-0.5 * self.log_snr_min))) - b, b

    def __call__(self, t: Array) -> NoiseLevel:
        xp = numpy_like(t)
        a, b = self._range()
        t = xp.asarray(t)
        angle = a * t + b
        # Near the noisy end cos loses its digits in float32; the complement does not.
        complement = a * (1.0 - t) + float(np.pi / 2 - a - b)
        return NoiseLevel(t, xp.sin(complement), xp.sin(angle))

    def inverse(self, log_snr: Array) -> Array:
        xp = numpy_like(log_snr)
        a, b = self._range()
        return xp.clip((xp.arctan(xp.exp(-0.5 * log_snr)) - b) / a, 0.0, 1.0)

    def sample_t(self, keys: Key) -> Array:
        return jax.vmap(jax.random.uniform)(keys)


@dataclass(frozen=True)
class EDM:
    """Variance-exploding path of EDM: alpha = 1, sigma = t.

    Training draws log t ~ N(p_mean, p_std²).

    Attributes:
      sigma_min: least noise at which a grid may evaluate the network.
      sigma_max: noise at which sampling starts.
      p_mean: mean of log sigma in training.
      p_std: standard deviation of log sigma in training.

    Raises:
      ValueError: unless 0 < sigma_min < sigma_max and p_std > 0.

    Source: Karras et al. 2022 (arXiv:2206.00364), table 1.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    p_mean: float = -1.2
    p_std: float = 1.2

    num_timesteps = None

    def __post_init__(self):
        if not 0.0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"expected 0 < sigma_min < sigma_max, got {self.sigma_min}, {self.sigma_max}"
            )
        if self.p_std <= 0.0:
            raise ValueError(f"p_std must be positive, got {self.p_std}")

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def prior_std(self, level: NoiseLevel) -> Array:
        return level.sigma

    def __call__(self, t: Array) -> NoiseLevel:
        xp = numpy_like(t)
        t = xp.asarray(t)
        return NoiseLevel(t, xp.ones_like(t), t)

    def inverse(self, log_snr: Array) -> Array:
        xp = numpy_like(log_snr)
        return xp.clip(xp.exp(-0.5 * xp.asarray(log_snr)), self.sigma_min, self.sigma_max)

    def sample_t(self, keys: Key) -> Array:
        return jnp.exp(self.p_mean + self.p_std * jax.vmap(jax.random.normal)(keys))


@dataclass(frozen=True)
class ShiftedLogSNR:
    """Adds a constant to the log-SNR of another variance-preserving schedule.

    log-SNR'(t) = log-SNR(t) + shift, so alpha / sigma is multiplied by exp(shift / 2). For
    images d times larger than those that the base was tuned for, shift = -2 log d.

    Attributes:
      base: a schedule with alpha² + sigma² = 1.
      shift: added to log-SNR, in nats.

    Raises:
      ValueError: if the base is variance exploding.

    Source: Hoogeboom et al. 2023 (arXiv:2301.11093), eq. 5.
    """

    base: DiscreteSchedule | CosineLogSNR = Cosine()
    shift: float = 0.0

    def __post_init__(self):
        if isinstance(self.base, EDM):
            raise ValueError("EDM keeps alpha = 1; change its sigma_min and sigma_max instead")

    @property
    def num_timesteps(self) -> int | None:
        return self.base.num_timesteps

    @property
    def t_min(self) -> float:
        return self.base.t_min

    @property
    def t_max(self) -> float:
        return self.base.t_max

    def prior_std(self, level: NoiseLevel) -> Array | float:
        return self.base.prior_std(level)

    def __call__(self, t: Array) -> NoiseLevel:
        t, alpha, sigma = self.base(t)
        xp = numpy_like(t)
        alpha = alpha * float(np.exp(0.5 * self.shift))
        norm = xp.sqrt(alpha**2 + sigma**2)
        return NoiseLevel(t, alpha / norm, sigma / norm)

    def inverse(self, log_snr: Array) -> Array:
        return self.base.inverse(log_snr - self.shift)

    def sample_t(self, keys: Key) -> Array:
        return self.base.sample_t(keys)


SCHEDULES = {
    "linear": Linear,
    "scaled_linear": ScaledLinear,
    "cosine": Cosine,
    "sigmoid": Sigmoid,
    "sigmoid_beta": SigmoidBeta,
    "betas": Betas,
    "zero_terminal_snr": ZeroTerminalSNR,
    "cosine_log_snr": CosineLogSNR,
    "edm": EDM,
    "shifted_log_snr": ShiftedLogSNR,
}

__all__ = [
    "EDM",
    "SCHEDULES",
    "Betas",
    "Cosine",
    "CosineLogSNR",
    "DiscreteSchedule",
    "Linear",
    "NoiseSchedule",
    "ScaledLinear",
    "ShiftedLogSNR",
    "Sigmoid",
    "SigmoidBeta",
    "ZeroTerminalSNR",
    "adm_linear",
]
