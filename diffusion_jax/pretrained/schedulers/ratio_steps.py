"""Where diffusers' schedulers put their steps: ratios σ/α of a table, as data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffusion_jax.core.grid import Grid
from diffusion_jax.core.schedules import (
    DiscreteSchedule,
    NoiseSchedule,
    ZeroTerminalSNR,
)
from diffusion_jax.core.spacings import beta_quantiles
from diffusion_jax.core.types import NoiseLevel
from diffusion_jax.pretrained.schedulers.table_steps import (
    Published,
    count_steps,
    make_grid,
    refuse,
    spaced_times,
)
from diffusion_jax.pretrained.schedulers.tables import alphas_cumprod32

RESPACINGS = ("karras", "exponential", "beta", "lu", "log_linear")
_RHO = 7.0
# Zero terminal SNR ends at this ᾱ where a scheduler needs a finite σ/α.
LEAST_ALPHAS_CUMPROD = 2.0**-24


def ratios32(schedule: DiscreteSchedule) -> np.ndarray:
    """σ/α of every time [T] in float32, made in the order of operations that diffusers uses."""
    alphas_cumprod = alphas_cumprod32(schedule)
    if isinstance(schedule, ZeroTerminalSNR):
        alphas_cumprod[-1] = np.float32(LEAST_ALPHAS_CUMPROD)
    return np.sqrt((np.float32(1.0) - alphas_cumprod) / alphas_cumprod)


def times_of_ratios(sigmas: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The times, linear in log σ between the entries of a float32 table, at which σ/α is so large.

    Source: k-diffusion's DiscreteSchedule.sigma_to_t.
    """
    logs = np.log(table)
    wanted = np.log(np.maximum(np.asarray(sigmas, np.float64), 1e-10))
    below = np.cumsum(wanted - logs[:, None] >= 0, axis=0).argmax(axis=0)
    below = below.clip(max=len(logs) - 2)
    low, high = logs[below], logs[below + 1]
    weight = np.clip((low - wanted) / (low - high), 0.0, 1.0)
    return (1 - weight) * below + weight * (below + 1)


def respaced(kind: str, low: float, high: float, count: int) -> np.ndarray:
    """[count] ratios from high to low: "karras", "exponential", "lu" or "beta".

    Source: "karras": Karras et al. 2022 (arXiv:2206.00364), eq. 5, ρ = 7; "exponential" and "lu":
    uniform in log σ, Lu et al. 2022 (arXiv:2211.01095); "beta": quantiles of Beta(0.6, 0.6), Lee et
    al. 2024 (arXiv:2407.12173).
    """
    ramp = np.linspace(0.0, 1.0, count)
    if kind == "karras":
        least, most = low ** (1 / _RHO), high ** (1 / _RHO)
        return (most + ramp * (least - most)) ** _RHO
    if kind == "exponential":
        return np.exp(np.linspace(math.log(high), math.log(low), count))
    if kind == "lu":
        # Its λ are taken from a float32 table of logarithms.
        least, most = float(np.log(np.float32(low))), float(np.log(np.float32(high)))
        return np.exp(most + ramp * (least - most))
    if kind == "beta":
        return low + beta_quantiles(1.0 - ramp, 0.6, 0.6) * (high - low)
    raise ValueError(f"respacing must be one of {RESPACINGS}, got {kind!r}")


@dataclass(frozen=True)
class RatioSteps:
    """Ratios σ/α between the entries of a discrete schedule's table, and the times of these.

    Attributes:
      spacing: one of SPACINGS.
      offset: added to the times of "leading".
      integers: times are rounded first and one more is spaced out than is used, as multistep
        solvers have it; else "linspace" keeps times between integers.
      respacing: one of RESPACINGS or None for the ratios of the spaced times.
      told: times of respaced ratios are told "exact", "rounded" or "cut" to integers.
      final: where the last step ends: "zero", "sigma_min" (the table's first ratio) or "last" (the
        last ratio of a respacing, else as "sigma_min").
      sigma_min, sigma_max: ends of a respacing; those of the spaced times, or with `integers` of
        the table, where None.
      half_log_snr_min: the noisiest time is the first with log(α/σ) above this.
      custom: what may be given one by one: "timesteps", "sigmas".
      middle: a level inside of each step: None, "mean" for the geometric mean of both ratios,
        or "next" for the next level, at exact times both.
    """

    spacing: str = "linspace"
    offset: int = 0
    integers: bool = False
    respacing: str | None = None
    told: str = "exact"
    final: str = "zero"
    sigma_min: float | None = None
    sigma_max: float | None = None
    half_log_snr_min: float = -math.inf
    custom: tuple[str, ...] = ()
    middle: str | None = None

    def _spaced_times(self, table: np.ndarray, count: int) -> np.ndarray:
        total = len(table)
        if not self.integers:
            return spaced_times(total, count, self.spacing, self.offset)
        last = total - int(np.searchsorted(-np.log(table[::-1]), self.half_log_snr_min))
        if self.spacing == "trailing":
            return np.round(np.arange(last, 0, -total / count))[:count] - 1.0
        # One time more than is needed, and the least noisy one left out.
        return np.round(spaced_times(last, count + 1, self.spacing, self.offset))[:-1]

    def _respaced(self, ratios: np.ndarray, table: np.ndarray, count: int) -> np.ndarray:
        low, high = (
            (float(table[0]), float(table[-1])) if self.integers else (ratios[-1], ratios[0])
        )
        low = low if self.sigma_min is None else self.sigma_min
        high = high if self.sigma_max is None else self.sigma_max
        return respaced(self.respacing, low, high, count)

    def _told(self, sigmas: np.ndarray, table: np.ndarray) -> np.ndarray:
        times = times_of_ratios(sigmas, table)
        if self.told == "exact":
            return times
        return np.round(times) if self.told == "rounded" else np.trunc(times)

    def published(
        self,
        schedule: NoiseSchedule,
        num_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> Published:
        """Times and ratios; with "log_linear" one ratio more than there are ends of steps."""
        given = {"timesteps": timesteps, "sigmas": sigmas}
        refuse(self, mu=mu, **{k: v for k, v in given.items() if k not in self.custom})
        table = ratios32(schedule)
        if sigmas is not None:
            refuse(self, num_steps=num_steps, timesteps=timesteps)
            ratios = np.asarray(sigmas, np.float32).astype(np.float64)
            return Published(times_of_ratios(ratios[:-1], table), ratios)
        count = count_steps(num_steps, timesteps, most=schedule.num_timesteps)
        if timesteps is None:
            times = self._spaced_times(table, count)
        elif self.respacing not in (None, "log_linear"):
            raise ValueError(f"timesteps cannot be given with {self.respacing} sigmas")
        else:
            kind = np.int64 if self.integers else np.float32
            times = np.asarray(timesteps, kind).astype(np.float64)
        if times[0] > schedule.t_max or times[-1] < 0:
            raise ValueError(
                f"the times {times.tolist()} leave the schedule's 0 … {schedule.t_max:g}; change "
                "the number of steps, steps_offset or timesteps"
            )
        ratios = np.interp(times, np.arange(len(table)), table)
        if self.respacing == "log_linear":
            ratios = np.exp(np.linspace(np.log(table[-1]), np.log(table[0]), count + 1))
        elif self.respacing is not None:
            ratios = self._respaced(ratios, table, count)
            times = self._told(ratios, table)
        last = {"zero": 0.0, "sigma_min": float(table[0]), "last": float(table[0])}[self.final]
        if self.final == "last" and self.respacing is not None:
            last = ratios[-1]
        # Rounded as the scheduler keeps them: a bound of churn may be one of them.
        return Published(times, np.append(ratios, last).astype(np.float32).astype(np.float64))

    def grid(self, schedule, num_steps=None, *, max_steps=1000, **given) -> Grid:
        times, ratios = self.published(schedule, num_steps, **given)
        count, table = len(times), ratios32(schedule)

        def level(t, ratio):
            alpha = 1.0 / np.sqrt(1.0 + ratio**2)
            return NoiseLevel(t, alpha, alpha * ratio)

        here, there = ratios[:count], ratios[1 : count + 1]
        middle = None
        if self.middle is not None:
            inside = np.sqrt(here * there) if self.middle == "mean" else there
            middle = level(times_of_ratios(inside, table), inside)
        levels, ends = level(times, here), level(np.append(times[1:], times[-1]), there)
        return make_grid(levels, ends, max_steps, middle)
