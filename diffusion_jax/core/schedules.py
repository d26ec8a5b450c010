"""Noise schedules: the path from clean data to noise as a function of time."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from diffusion_jax.core.continuous import EDM, CosineLogSNR, FlowMatching, Laplace
from diffusion_jax.core.discrete import (
    Betas,
    Cosine,
    DiscreteSchedule,
    LaplaceBeta,
    Linear,
    ScaledLinear,
    Sigmoid,
    SigmoidBeta,
    ZeroTerminalSNR,
    adm_linear,
    numpy_like,
    root_betas,
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
        """The level at time t, [] or [B]; its own `t` is what the network is told."""
        ...

    def inverse(self, log_snr: Array) -> Array:
        """The time t in [t_min, t_max] at which log(alpha² / sigma²) is nearest to `log_snr`."""
        ...

    def sample_t(self, keys: Key) -> Array:
        """One training time per key, [B]."""
        ...


@dataclass(frozen=True)
class ShiftedLogSNR:
    """Adds a constant to the log-SNR of another variance-preserving schedule.

    log-SNR'(t) = log-SNR(t) + shift, so alpha / sigma is multiplied by exp(shift / 2). For
    images d times larger than those that the base was tuned for, shift = -2 log d.

    Attributes:
      base: a schedule with alpha² + sigma² = 1.
      shift: added to log-SNR, in nats.

    Raises:
      ValueError: if the base does not preserve variance.

    Source: Hoogeboom et al. 2023 (arXiv:2301.11093), eq. 5.
    """

    base: DiscreteSchedule | CosineLogSNR | Laplace = Cosine()
    shift: float = 0.0

    def __post_init__(self):
        if isinstance(self.base, EDM):
            raise ValueError("EDM keeps alpha = 1; change its sigma_min and sigma_max instead")
        if isinstance(self.base, FlowMatching):
            raise ValueError(
                "FlowMatching keeps alpha + sigma = 1; set its own shift to exp(-shift / 2) = "
                f"{np.exp(-0.5 * self.shift):.6g} instead"
            )

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
    "laplace_beta": LaplaceBeta,
    "betas": Betas,
    "zero_terminal_snr": ZeroTerminalSNR,
    "cosine_log_snr": CosineLogSNR,
    "laplace": Laplace,
    "edm": EDM,
    "flow_matching": FlowMatching,
    "shifted_log_snr": ShiftedLogSNR,
}

__all__ = [
    "EDM",
    "SCHEDULES",
    "Betas",
    "Cosine",
    "CosineLogSNR",
    "DiscreteSchedule",
    "FlowMatching",
    "Laplace",
    "LaplaceBeta",
    "Linear",
    "NoiseSchedule",
    "ScaledLinear",
    "ShiftedLogSNR",
    "Sigmoid",
    "SigmoidBeta",
    "ZeroTerminalSNR",
    "adm_linear",
    "root_betas",
]
