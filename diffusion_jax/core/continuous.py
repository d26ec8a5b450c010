"""Continuous noise schedules: paths given by a formula in t, and how training draws t."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.discrete import numpy_like
from diffusion_jax.core.types import Array, Key, NoiseLevel


def _check_range(log_snr_min: float, log_snr_max: float) -> None:
    if not log_snr_min < log_snr_max:
        raise ValueError(f"expected log_snr_min < log_snr_max, got {log_snr_min}, {log_snr_max}")


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
        _check_range(self.log_snr_min, self.log_snr_max)

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
class Laplace:
    """Continuous schedule whose log-SNR has a Laplace distribution when t is uniform.

    log-SNR = μ - b · sign(½ - u) · log(1 - 2 |u - ½|), where u runs from P(log-SNR > max) to
    1 - P(log-SNR < min) as t runs from 0 to 1: the distribution is cut to a range, as both of
    its ends are infinite. Training then sees mostly levels near μ. So does a grid that is uniform
    in t, whose first and last steps are too long to be accurate: sample on the spacing "karras",
    which covers the range whatever the training density is.

    Attributes:
      mean: μ, in nats of log-SNR.
      scale: b > 0, in nats of log-SNR.
      log_snr_min: log-SNR at t = 1. The default ends are close to those of DDPM.
      log_snr_max: log-SNR at t = 0.

    Raises:
      ValueError: unless scale > 0 and log_snr_min < mean < log_snr_max.

    Source: Hang et al. 2024 (arXiv:2407.03297), section 2; cutting it is a choice of this library.
    """

    mean: float = 0.0
    scale: float = 0.5
    log_snr_min: float = -10.0
    log_snr_max: float = 10.0

    num_timesteps = None
    t_min = 0.0
    t_max = 1.0

    def __post_init__(self):
        if not self.scale > 0.0:
            raise ValueError(f"scale must be positive, got {self.scale}")
        if not self.log_snr_min < self.mean < self.log_snr_max:
            raise ValueError(
                "expected log_snr_min < mean < log_snr_max, got "
                f"{self.log_snr_min}, {self.mean} and {self.log_snr_max}"
            )

    def prior_std(self, level: NoiseLevel) -> float:
        del level
        return 1.0

    def _tails(self) -> tuple[float, float]:
        """Probabilities of log-SNR above and below the range."""
        above = 0.5 * np.exp((self.mean - self.log_snr_max) / self.scale)
        below = 0.5 * np.exp((self.log_snr_min - self.mean) / self.scale)
        return float(above), float(below)

    def __call__(self, t: Array) -> NoiseLevel:
        xp = numpy_like(t)
        t = xp.asarray(t)
        above, below = self._tails()
        inside = 1.0 - above - below
        # Each half counts from its own end: near u = 1 float32 keeps the digits of 1 - u only.
        u, complement = above + inside * t, below + inside * (1.0 - t)
        with np.errstate(divide="ignore"):
            distance = self.scale * xp.log(2.0 * xp.minimum(u, complement))
        log_snr = xp.where(u < complement, self.mean - distance, self.mean + distance)
        log_snr = xp.clip(log_snr, self.log_snr_min, self.log_snr_max)
        # logaddexp keeps the small one of the two rates accurate, which 1 - sigmoid would not.
        zero = xp.zeros_like(log_snr)
        return NoiseLevel(
            t,
            xp.exp(-0.5 * xp.logaddexp(zero, -log_snr)),
            xp.exp(-0.5 * xp.logaddexp(zero, log_snr)),
        )

    def inverse(self, log_snr: Array) -> Array:
        xp = numpy_like(log_snr)
        above, below = self._tails()
        inside = 1.0 - above - below
        tail = 0.5 * xp.exp(-xp.abs(xp.asarray(log_snr) - self.mean) / self.scale)
        clean, noisy = (tail - above) / inside, 1.0 - (tail - below) / inside
        return xp.clip(xp.where(xp.asarray(log_snr) >= self.mean, clean, noisy), 0.0, 1.0)

    def sample_t(self, keys: Key) -> Array:
        return jax.vmap(jax.random.uniform)(keys)


@dataclass(frozen=True)
class FlowMatching:
    """Straight path of rectified flow: alpha = 1 - τ, sigma = τ, τ = s t / (1 + (s - 1) t).

    The path does not preserve variance (alpha² + sigma² < 1 inside) and has no signal at t = 1,
    so Eps, Score and EDMPreconditioning are undefined there: train FlowVelocity, V or X0. The
    network is told τ, the noise rate itself, so that s can be changed after training.

    Attributes:
      shift: s > 0; above 1 it moves times, of training and of grids, to the noisy end, as
        larger images need. 1 is the plain path.
      logit_normal: None draws t uniformly in [t_min, 1]; (m, std) draws logit t ~ N(m, std²),
        brought into that range.
      t_min: least noisy time that is trained or that a grid may visit, in (0, 1).

    Raises:
      ValueError: if the shift or the std is not positive, or t_min outside (0, 1).

    Source: Liu et al. 2022 (arXiv:2209.03003), eq. 1 (path); Esser et al. 2024
    (arXiv:2403.03206), eq. 19 (logit-normal) and 23 (shift).
    """

    shift: float = 1.0
    logit_normal: tuple[float, float] | None = None
    t_min: float = 1e-3

    num_timesteps = None
    t_max = 1.0

    def __post_init__(self):
        if not self.shift > 0.0:
            raise ValueError(f"shift must be positive, got {self.shift}")
        if not 0.0 < self.t_min < 1.0:
            raise ValueError(
                f"t_min must lie in (0, 1), got {self.t_min}; at t = 0 there is no noise left"
            )
        if self.logit_normal is None:
            return
        if len(self.logit_normal) != 2 or not self.logit_normal[1] > 0.0:
            raise ValueError(
                f"logit_normal must be None or (mean, std) with std > 0, got {self.logit_normal}"
            )

    def prior_std(self, level: NoiseLevel) -> Array:
        """Standard deviation of x_t for data of unit variance; 1 where the signal is gone."""
        return numpy_like(level.sigma).sqrt(level.alpha**2 + level.sigma**2)

    def __call__(self, t: Array) -> NoiseLevel:
        t = numpy_like(t).asarray(t)
        scale = 1.0 + (self.shift - 1.0) * t
        sigma = self.shift * t / scale
        # 1 - sigma would lose the digits of a small alpha.
        return NoiseLevel(sigma, (1.0 - t) / scale, sigma)

    def inverse(self, log_snr: Array) -> Array:
        xp = numpy_like(log_snr)
        # t / (1 - t) = sigma / (s alpha); logaddexp stands for log(1 + exp) without overflow.
        logit = -0.5 * xp.asarray(log_snr) - float(np.log(self.shift))
        t = xp.exp(-xp.logaddexp(xp.zeros_like(logit), -logit))
        return xp.clip(t, self.t_min, self.t_max)

    def sample_t(self, keys: Key) -> Array:
        if self.logit_normal is None:
            return self.t_min + (1.0 - self.t_min) * jax.vmap(jax.random.uniform)(keys)
        mean, std = self.logit_normal
        t = jax.nn.sigmoid(mean + std * jax.vmap(jax.random.normal)(keys))
        return jnp.clip(t, self.t_min, self.t_max)
