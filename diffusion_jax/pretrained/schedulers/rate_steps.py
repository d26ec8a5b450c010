"""Where diffusers' schedulers put their steps: noise rates of EDM and flow matching, as data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffusion_jax.core.grid import Grid, check_num_steps
from diffusion_jax.core.schedules import DiscreteSchedule, NoiseSchedule
from diffusion_jax.core.types import NoiseLevel
from diffusion_jax.pretrained.schedulers.ratio_steps import ratios32, respaced
from diffusion_jax.pretrained.schedulers.table_steps import (
    Published,
    check_custom,
    count_steps,
    make_grid,
    refuse,
)


def _float32(rates: np.ndarray) -> np.ndarray:
    """Rounded as schedulers keep them: it decides at bounds of churn, and 1 - σ near 0."""
    return rates.astype(np.float32).astype(np.float64)


@dataclass(frozen=True)
class EDMSteps:
    """Noise rates of an EDM path from the schedule's sigma_max to its sigma_min.

    Attributes:
      respacing: "karras" or "exponential".
      rho: ρ of "karras".
      final: where the last step ends: "zero" or "sigma_min".
      training_steps: None, or how many rates the training had, of which some are taken, the
        noisiest first (consistency models).
    """

    respacing: str = "karras"
    rho: float = 7.0
    final: str = "zero"
    training_steps: int | None = None

    def _ramp(self, num_steps, timesteps) -> np.ndarray:
        if self.training_steps is None:
            refuse(self, timesteps=timesteps)
            return np.linspace(0.0, 1.0, count_steps(num_steps, None))
        total = self.training_steps
        count = count_steps(num_steps, timesteps, most=total)
        if timesteps is None:
            index = np.arange(count) * (total // count)
        else:
            given = np.asarray(timesteps, np.int64)
            check_custom(given, total)
            index = given[::-1]
        return index / (total - 1)

    def published(
        self,
        schedule: NoiseSchedule,
        num_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> Published:
        """Noise rates, descending, in both fields."""
        refuse(self, sigmas=sigmas, mu=mu)
        low, high = schedule.t_min, schedule.t_max
        ramp = self._ramp(num_steps, timesteps)
        if self.respacing == "exponential":
            rates = np.exp(np.linspace(math.log(high), math.log(low), len(ramp)))
        else:
            least, most = low ** (1 / self.rho), high ** (1 / self.rho)
            rates = (most + ramp * (least - most)) ** self.rho
        rates = _float32(rates)
        return Published(rates, np.append(rates, 0.0 if self.final == "zero" else low))

    def grid(self, schedule, num_steps=None, *, max_steps=1000, **given) -> Grid:
        rates = self.published(schedule, num_steps, **given).sigmas
        levels, ends = (NoiseLevel(rate, 1.0, rate) for rate in (rates[:-1], rates[1:]))
        return make_grid(levels, ends, max_steps)


def _time_shift(kind: str, mu: float, sigmas: np.ndarray) -> np.ndarray:
    shift = math.exp(mu) if kind == "exponential" else mu
    with np.errstate(divide="ignore"):
        return shift / (shift + (1.0 / sigmas - 1.0))


def _stretched(sigmas: np.ndarray, terminal: float) -> np.ndarray:
    """The rates moved linearly such that the last one is `terminal`, 1 staying 1."""
    rest = 1.0 - sigmas
    return 1.0 - rest / (rest[-1] / (1.0 - terminal))


@dataclass(frozen=True)
class FlowSteps:
    """Noise rates σ of a straight path with alpha = 1 - σ.

    Attributes:
      num_train_timesteps: T; the network is told T σ.
      shift: s of σ <- s σ / (1 + (s - 1) σ).
      dynamic: None, or the kind of shift by μ, given with the number of steps: "exponential"
        (s = e^μ) or "linear" (s = μ).
      mu_needed: a dynamic shift cannot do without μ; else `shift` stands in.
      terminal: the least noise rate before the final one, to which the others are stretched.
      respacing: None, "karras", "exponential" or "beta", between the first and the last rate.
      start: which rates are shifted. "shifted": uniform between those of training, which were
        shifted already. "unit": uniform from 1 to 1/T. "complement": 1 minus these, in reverse.
      final: the last step's end, a noise rate; None for the last rate itself.
      told: times are told "exact" or "cut" to integers.
      inverted: the network's time runs from 0 at pure noise to T at data.
      custom: what may be given one by one: "timesteps", "sigmas".
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    dynamic: str | None = None
    mu_needed: bool = True
    terminal: float | None = None
    respacing: str | None = None
    start: str = "shifted"
    final: float | None = 0.0
    told: str = "exact"
    inverted: bool = False
    custom: tuple[str, ...] = ()

    def _shifted(self, sigmas: np.ndarray, mu: float | None) -> np.ndarray:
        if self.dynamic is None or (mu is None and not self.mu_needed):
            return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)
        if self.mu_needed:
            return _time_shift(self.dynamic, mu, sigmas)
        return np.exp(mu) * sigmas / (1 + (np.exp(mu) - 1) * sigmas)

    def _check(self, num_steps, timesteps, sigmas, mu) -> int:
        given = {"timesteps": timesteps, "sigmas": sigmas}
        refuse(self, **{k: v for k, v in given.items() if k not in self.custom})
        if self.dynamic is None:
            refuse(self, mu=mu)
        elif mu is None and self.mu_needed:
            raise ValueError("use_dynamic_shifting needs mu, which the number of tokens decides")
        lengths = {len(v) for v in given.values() if v is not None}
        lengths |= set() if num_steps is None else {num_steps}
        if len(lengths) != 1:
            raise ValueError(
                f"give num_steps, timesteps or sigmas, of one length: got num_steps = {num_steps}, "
                f"timesteps = {timesteps} and sigmas = {sigmas}"
            )
        check_num_steps(count := lengths.pop(), max(1, int(count)) if count else 1)
        return count

    def _plain(self, count: int, timesteps, sigmas) -> np.ndarray:
        total = self.num_train_timesteps
        if sigmas is not None:
            return np.asarray(sigmas, np.float32).astype(np.float64)
        if timesteps is not None:
            return np.asarray(timesteps, np.float32).astype(np.float64) / total
        if self.start == "shifted":
            ends = np.asarray([1.0, 1.0 / total], np.float32)
            if self.dynamic is None:
                ends = self.shift * ends / (1 + (self.shift - 1) * ends)
            return np.linspace(float(ends[0]) * total, float(ends[1]) * total, count) / total
        return np.linspace(1, 1 / total, count + 1)

    def published(
        self,
        schedule: NoiseSchedule,
        num_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> Published:
        """Times of the network, and noise rates (with `inverted` 1 minus these)."""
        del schedule
        count = self._check(num_steps, timesteps, sigmas, mu)
        rates = self._plain(count, timesteps, sigmas)
        if self.start == "complement":
            rates = np.flip(self._shifted(1.0 - rates, mu))[:-1]
        else:
            rates = self._shifted(rates if len(rates) == count else rates[:-1], mu)
        if self.terminal:
            rates = _stretched(rates, self.terminal)
        if self.start == "unit" and abs(rates[0] - 1.0) < 1e-6:
            rates = np.append(rates[0] - 1e-6, rates[1:])
        if self.respacing is not None:
            rates = respaced(self.respacing, float(rates[-1]), float(rates[0]), count)
        rates = 1.0 - rates if self.inverted else rates
        last = rates[-1] if self.final is None else self.final
        times = rates * self.num_train_timesteps
        if timesteps is not None and not self.inverted:
            times = np.asarray(timesteps, np.float32).astype(np.float64)
        times = np.trunc(times) if self.told == "cut" else times
        return Published(times, _float32(np.append(rates, 1.0 - last if self.inverted else last)))

    def grid(self, schedule, num_steps=None, *, max_steps=1000, **given) -> Grid:
        times, rates = self.published(schedule, num_steps, **given)
        t = times / self.num_train_timesteps
        t = 1.0 - t if self.inverted else t
        sigma = 1.0 - rates if self.inverted else rates

        def level(t, rate):
            return NoiseLevel(t, 1.0 - rate, rate)

        ends = level(np.append(t[1:], t[-1]), sigma[1:])
        return make_grid(level(t, sigma[:-1]), ends, max_steps)


@dataclass(frozen=True)
class FlowKarrasSteps:
    """Karras spacing of a discrete schedule's ratios ρ, read as σ = ρ / (1 + ρ) of a flow path.

    Attributes:
      base: the schedule whose table it is.
      final: where the last step ends: "zero" or "last".
      sigma_min, sigma_max: ends of the spacing; those of the table where None.
    """

    base: DiscreteSchedule
    final: str = "zero"
    sigma_min: float | None = None
    sigma_max: float | None = None

    def published(self, schedule, num_steps=None, *, timesteps=None, sigmas=None, mu=None):
        """Times of the network and noise rates."""
        del schedule
        refuse(self, timesteps=timesteps, sigmas=sigmas, mu=mu)
        count, table = count_steps(num_steps, None), ratios32(self.base)
        low = float(table[0]) if self.sigma_min is None else self.sigma_min
        high = float(table[-1]) if self.sigma_max is None else self.sigma_max
        ratios = respaced("karras", low, high, count)
        rates = ratios / (ratios + 1.0)
        last = 0.0 if self.final == "zero" else rates[-1]
        times = np.trunc(rates * self.base.num_timesteps)
        return Published(times, _float32(np.append(rates, last)))

    def grid(self, schedule, num_steps=None, *, max_steps=1000, **given) -> Grid:
        times, rates = self.published(schedule, num_steps, **given)
        t = times / self.base.num_timesteps
        levels = NoiseLevel(t, 1.0 - rates[:-1], rates[:-1])
        ends = NoiseLevel(np.append(t[1:], t[-1]), 1.0 - rates[1:], rates[1:])
        return make_grid(levels, ends, max_steps)


@dataclass(frozen=True)
class SineSteps:
    """σ = sin²(π u / 2) for uniform u from 1 to 0: the steps of diffusers' IPNDM.

    The network is told the angle of the path in quarter turns, 2/π arctan(σ/α).

    Attributes:
      sigmas: rates given one by one instead, the last of which is the end.
    """

    sigmas: tuple[float, ...] | None = None

    def _rates(self, num_steps: int | None) -> np.ndarray:
        count = count_steps(num_steps, None)
        if self.sigmas is None:
            return np.sin(np.linspace(1.0, 0.0, count + 1) * np.pi / 2) ** 2
        if len(self.sigmas) != count + 1:
            raise ValueError(
                f"trained_betas fixes {len(self.sigmas) - 1} steps, got num_steps = {count}"
            )
        return np.asarray(self.sigmas, np.float64)

    def published(self, schedule, num_steps=None, *, timesteps=None, sigmas=None, mu=None):
        """The angles; this scheduler shows no sigmas."""
        del schedule
        refuse(self, timesteps=timesteps, sigmas=sigmas, mu=mu)
        return Published(np.arcsin(self._rates(num_steps)[:-1]) / np.pi * 2)

    def grid(self, schedule, num_steps=None, *, max_steps=1000, **given) -> Grid:
        self.published(schedule, num_steps, **given)
        sigma = self._rates(num_steps)
        t, alpha = np.arcsin(sigma) / np.pi * 2, np.sqrt((1.0 - sigma) * (1.0 + sigma))
        levels, ends = (NoiseLevel(t[s], alpha[s], sigma[s]) for s in (slice(-1), slice(1, None)))
        return make_grid(levels, ends, max_steps)
