"""Discrete noise schedules: variance-preserving paths given by a table of ᾱ_t."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.types import Array, Key, NoiseLevel


def numpy_like(t: Any) -> Any:
    """jax.numpy for a jax array, else numpy: schedules trace, or compute in float64.

    Source: none; a convention of this library.
    """
    return jnp if isinstance(t, jax.Array) else np


@functools.lru_cache(maxsize=64)
def _tables(schedule: "DiscreteSchedule") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    alphas_cumprod = schedule.alphas_cumprod()
    with np.errstate(divide="ignore"):
        log_snr = np.log(alphas_cumprod) - np.log1p(-alphas_cumprod)
    return np.sqrt(alphas_cumprod), np.sqrt(1.0 - alphas_cumprod), log_snr


@dataclass(frozen=True)
class DiscreteSchedule:
    """A variance-preserving schedule given by a table ᾱ_0 … ᾱ_{T-1}.

    alpha = √ᾱ_t, sigma = √(1 - ᾱ_t) at integer times; between two of them log-SNR is
    linear in t, so that `inverse` undoes `__call__`.

    Attributes:
      num_timesteps: T. The network is told integer times 0 … T-1.

    Raises:
      ValueError: if `num_timesteps` < 2.

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 4.
    """

    num_timesteps: int = 1000

    def __post_init__(self):
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps must be at least 2, got {self.num_timesteps}")

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_max(self) -> float:
        return float(self.num_timesteps - 1)

    def prior_std(self, level: NoiseLevel) -> float:
        """1: sampling starts from N(0, I) whatever the level."""
        del level
        return 1.0

    def alphas_cumprod(self) -> np.ndarray:
        """ᾱ_t for every integer time, [T] float64, from clean to noisy."""
        return np.cumprod(1.0 - self.betas())

    def betas(self) -> np.ndarray:
        """β_t = 1 - ᾱ_t / ᾱ_{t-1} with ᾱ_{-1} = 1, [T] float64."""
        alphas_cumprod = self.alphas_cumprod()
        return 1.0 - alphas_cumprod / np.concatenate([[1.0], alphas_cumprod[:-1]])

    def __call__(self, t: Array) -> NoiseLevel:
        xp = numpy_like(t)
        # Copies, because jax remembers what an array object became: float32 for ever after a
        # first use without jax_enable_x64.
        alphas, sigmas, log_snrs = (xp.asarray(table.copy()) for table in _tables(self))
        t = xp.clip(xp.asarray(t, alphas.dtype), self.t_min, self.t_max)
        below = xp.floor(t).astype(xp.int32)
        above = xp.minimum(below + 1, self.num_timesteps - 1)
        fraction = t - below
        # Exactly on the table nothing is interpolated: ᾱ may be 0 there and log-SNR infinite.
        on_table = fraction == 0
        between = xp.where(on_table, 0.5, fraction)
        log_snr = (1 - between) * log_snrs[below] + between * log_snrs[above]
        # logaddexp keeps the small one of the two rates accurate, which 1 - sigmoid would not.
        alpha = xp.exp(-0.5 * xp.logaddexp(xp.zeros_like(log_snr), -log_snr))
        sigma = xp.exp(-0.5 * xp.logaddexp(xp.zeros_like(log_snr), log_snr))
        return NoiseLevel(
            t,
            xp.where(on_table, alphas[below], alpha),
            xp.where(on_table, sigmas[below], sigma),
        )

    def inverse(self, log_snr: Array) -> Array:
        xp = numpy_like(log_snr)
        # The largest finite number stands for infinite log-SNR: interp makes NaN of inf - inf.
        table = np.maximum(_tables(self)[2][::-1], -1e4)
        times = np.arange(self.num_timesteps - 1, -1, -1, dtype=np.float64)
        return xp.interp(log_snr, xp.asarray(table), xp.asarray(times))

    def sample_t(self, keys: Key) -> Array:
        draw = jax.vmap(lambda key: jax.random.randint(key, (), 0, self.num_timesteps))
        return draw(keys).astype(jnp.float32)


def _check_betas(beta_start: float, beta_end: float) -> None:
    if not 0.0 < beta_start <= beta_end < 1.0:
        raise ValueError(
            f"expected 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}"
        )


@dataclass(frozen=True)
class Linear(DiscreteSchedule):
    """Linear noise schedule of DDPM: β_t runs linearly from `beta_start` to `beta_end`.

    The end points are those of T = 1000; see `adm_linear` for other T.

    Attributes:
      beta_start: β_0.
      beta_end: β_{T-1}.

    Raises:
      ValueError: unless 0 < beta_start <= beta_end < 1.

    Source: Ho et al. 2020 (arXiv:2006.11239), section 4.
    """

    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self):
        super().__post_init__()
        _check_betas(self.beta_start, self.beta_end)

    def betas(self) -> np.ndarray:
        return np.linspace(self.beta_start, self.beta_end, self.num_timesteps, dtype=np.float64)


def adm_linear(num_timesteps: int) -> Linear:
    """The linear schedule with end points scaled by 1000 / T, as improved DDPM and ADM use it.

    Raises:
      ValueError: if T is so small (below 21) that β reaches 1.

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672), section 3.2.
    """
    return Linear(num_timesteps, 1e-4 * 1000 / num_timesteps, 0.02 * 1000 / num_timesteps)


@dataclass(frozen=True)
class ScaledLinear(DiscreteSchedule):
    """Schedule that is linear in √β. Latent diffusion's code calls this one "linear".

    √β_t runs linearly from √beta_start to √beta_end. The defaults are Stable Diffusion's.

    Attributes:
      beta_start: β_0.
      beta_end: β_{T-1}.

    Raises:
      ValueError: unless 0 < beta_start <= beta_end < 1.

    Source: Rombach et al. 2022 (arXiv:2112.10752), released configurations.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012

    def __post_init__(self):
        super().__post_init__()
        _check_betas(self.beta_start, self.beta_end)

    def betas(self) -> np.ndarray:
        start, end = np.sqrt(self.beta_start), np.sqrt(self.beta_end)
        return np.linspace(start, end, self.num_timesteps, dtype=np.float64) ** 2


@dataclass(frozen=True)
class SigmoidBeta(DiscreteSchedule):
    """Schedule whose β_t is a logistic curve: β_t = start + (end - start) · sigmoid(u).

    u runs linearly from -6 to 6.

    Attributes:
      beta_start: lower asymptote of β.
      beta_end: upper asymptote of β.

    Raises:
      ValueError: unless 0 < beta_start <= beta_end < 1.

    Source: Xu et al. 2022 (arXiv:2203.02923), released code; called "sigmoid" in diffusers.
    """

    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self):
        super().__post_init__()
        _check_betas(self.beta_start, self.beta_end)

    def betas(self) -> np.ndarray:
        u = np.linspace(-6.0, 6.0, self.num_timesteps, dtype=np.float64)
        return self.beta_start + (self.beta_end - self.beta_start) / (1.0 + np.exp(-u))


def _betas_from_signal(signal: np.ndarray, max_beta: float) -> np.ndarray:
    # β is clipped and ᾱ rebuilt from it, because the curve itself reaches zero signal at T.
    return np.minimum(1.0 - signal[1:] / signal[:-1], max_beta)


def _check_max_beta(max_beta: float) -> None:
    if not 0.0 < max_beta < 1.0:
        raise ValueError(f"max_beta must lie in (0, 1), got {max_beta}")


@dataclass(frozen=True)
class Cosine(DiscreteSchedule):
    """Cosine noise schedule of improved DDPM.

    ᾱ_t = f(t + 1) / f(0),  f(t) = cos²((t / T + s) / (1 + s) · π / 2), for t = 0 … T-1.

    Attributes:
      offset: s, keeps β_0 away from zero.
      max_beta: upper bound on every β_t.

    Raises:
      ValueError: if `max_beta` is outside (0, 1) or `offset` is negative.

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17.
    """

    offset: float = 0.008
    max_beta: float = 0.999

    def __post_init__(self):
        super().__post_init__()
        _check_max_beta(self.max_beta)
        if self.offset < 0.0:
            raise ValueError(f"offset must be at least 0, got {self.offset}")

    def betas(self) -> np.ndarray:
        time = np.arange(self.num_timesteps + 1, dtype=np.float64) / self.num_timesteps
        signal = np.cos((time + self.offset) / (1.0 + self.offset) * np.pi / 2.0) ** 2
        return _betas_from_signal(signal, self.max_beta)


@dataclass(frozen=True)
class Sigmoid(DiscreteSchedule):
    """Schedule whose ᾱ is a logistic curve in time, rescaled to run from 1 to 0.

    ᾱ(u) = (S(end) - S(start + u (end - start))) / (S(end) - S(start)) with
    S(v) = sigmoid(v / temperature), u = (t + 1) / T.

    Attributes:
      start: argument of the logistic curve at the clean end.
      end: argument at the noisy end.
      temperature: larger is closer to linear.
      max_beta: upper bound on every β_t.

    Raises:
      ValueError: unless start < end, temperature > 0 and max_beta lies in (0, 1).

    Source: Jabri et al. 2022 (arXiv:2212.11972), algorithm 3.
    """

    start: float = -3.0
    end: float = 3.0
    temperature: float = 1.0
    max_beta: float = 0.999

    def __post_init__(self):
        super().__post_init__()
        _check_max_beta(self.max_beta)
        if not (self.start < self.end and self.temperature > 0.0):
            raise ValueError(
                "expected start < end and temperature > 0, got "
                f"{self.start}, {self.end} and {self.temperature}"
            )

    def betas(self) -> np.ndarray:
        def logistic(v):
            return 1.0 / (1.0 + np.exp(-v / self.temperature))

        time = np.arange(self.num_timesteps + 1, dtype=np.float64) / self.num_timesteps
        curve = logistic(self.start + time * (self.end - self.start))
        signal = (logistic(self.end) - curve) / (logistic(self.end) - logistic(self.start))
        return _betas_from_signal(signal, self.max_beta)


@dataclass(frozen=True)
class LaplaceBeta(DiscreteSchedule):
    """Table called "laplace" in diffusers: ᾱ follows the root of a Laplace schedule's signal.

    β_t = 1 - f((t + 1) / T) / f(t / T),  f(u) = √sigmoid(λ(u)),
    λ(u) = -½ sign(½ - u) log(1 - 2 |u - ½| + 1e-6). The root makes every level less noisy than
    the paper's ᾱ = sigmoid(λ), and the signal does not end near 0; the schedule of the paper is
    `Laplace`. This one exists to read configurations that name it.

    Attributes:
      max_beta: upper bound on every β_t.

    Raises:
      ValueError: if `max_beta` is outside (0, 1).

    Source: diffusers' DDPM scheduler, beta_schedule "laplace", after Hang et al. 2024
    (arXiv:2407.03297).
    """

    max_beta: float = 0.999

    def __post_init__(self):
        super().__post_init__()
        _check_max_beta(self.max_beta)

    def betas(self) -> np.ndarray:
        centred = np.arange(self.num_timesteps + 1, dtype=np.float64) / self.num_timesteps - 0.5
        log_snr = 0.5 * np.sign(centred) * np.log(1.0 - 2.0 * np.abs(centred) + 1e-6)
        return _betas_from_signal(np.sqrt(1.0 / (1.0 + np.exp(-log_snr))), self.max_beta)


@dataclass(frozen=True)
class Betas(DiscreteSchedule):
    """A schedule given by its β_t one by one.

    Attributes:
      values: β_0 … β_{T-1}, each in (0, 1].

    Raises:
      ValueError: if the number of values is not `num_timesteps` or one is out of range.

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 2.
    """

    num_timesteps: int = 2
    values: tuple[float, ...] = (0.5, 0.5)

    def __post_init__(self):
        super().__post_init__()
        if len(self.values) != self.num_timesteps:
            raise ValueError(
                f"expected num_timesteps = {self.num_timesteps} values, got {len(self.values)}"
            )
        if not all(0.0 < beta <= 1.0 for beta in self.values):
            raise ValueError("every β must lie in (0, 1]")

    def betas(self) -> np.ndarray:
        return np.asarray(self.values, np.float64)


def root_betas(num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Betas:
    """The table called "sqrt" in latent diffusion's code: β_t is the root of a linear one.

    β_t² runs linearly from `beta_start` to `beta_end`, so that β is 0.01 to 0.14 with the defaults,
    and no signal is left long before T = 1000. No released model uses it.

    Raises:
      ValueError: unless 0 < beta_start <= beta_end < 1, or if T < 2.

    Source: Rombach et al. 2022 (arXiv:2112.10752), released code.
    """
    betas = np.sqrt(Linear(num_timesteps, beta_start, beta_end).betas())
    return Betas(num_timesteps, tuple(betas.tolist()))


@dataclass(frozen=True)
class ZeroTerminalSNR(DiscreteSchedule):
    """Shifts and scales √ᾱ of another schedule so that the last one is exactly 0.

    √ᾱ'_t = (√ᾱ_t - √ᾱ_{T-1}) · √ᾱ_0 / (√ᾱ_0 - √ᾱ_{T-1}). The first one is unchanged. At
    the last time eps says nothing about x0: train and sample with v or x0.

    Attributes:
      base: the schedule to rescale; `num_timesteps` follows it.
      last: ᾱ of the last time, in [0, 1). Released samplers that divide by α put a small number
        there, such as 2^-24, instead of 0.

    Raises:
      ValueError: if `num_timesteps` is not the base's, or `last` is out of range.

    Source: Lin et al. 2023 (arXiv:2305.08891), algorithm 1.
    """

    num_timesteps: int = 1000
    base: DiscreteSchedule = Linear()
    last: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.num_timesteps != self.base.num_timesteps:
            raise ValueError(
                f"num_timesteps must be the base's {self.base.num_timesteps}, "
                f"got {self.num_timesteps}"
            )
        if not 0.0 <= self.last < 1.0:
            raise ValueError(f"last must lie in [0, 1), got {self.last}")

    def alphas_cumprod(self) -> np.ndarray:
        root = np.sqrt(self.base.alphas_cumprod())
        table = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return np.append(table[:-1], self.last)
