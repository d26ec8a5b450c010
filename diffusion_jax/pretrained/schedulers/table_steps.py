"""Where diffusers' schedulers put their steps: times of a table, as data.

A `ReferenceSteps` is what `set_timesteps` does, without its object: options in, a grid out. Numbers
follow diffusers 0.42.1 to the last bit where a time is rounded or cut to an integer (there the
float32 of its tables decides), and to float32 elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.grid import Grid, check_num_steps, jumps
from diffusion_jax.core.repaint_grid import single_step_jumps
from diffusion_jax.core.schedules import DiscreteSchedule, Linear, NoiseSchedule
from diffusion_jax.core.types import Array, NoiseLevel
from diffusion_jax.pretrained.schedulers.tables import alphas_cumprod32

SPACINGS = ("linspace", "leading", "trailing")


class Published(NamedTuple):
    """What a diffusers scheduler shows after `set_timesteps`.

    Attributes:
      timesteps: [N] what the network is told at the start of each step.
      sigmas: [N + 1] the ratios σ/α (σ on a flow path) of the steps and of the last one's end, or
        None where the scheduler has none.
    """

    timesteps: np.ndarray
    sigmas: np.ndarray | None = None


class ReferenceSteps(Protocol):
    """The steps of a diffusers scheduler: frozen options, and the grid that they make."""

    def published(
        self,
        schedule: NoiseSchedule,
        num_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> Published:
        """What the scheduler shows after `set_timesteps` with these arguments."""
        ...

    def grid(
        self,
        schedule: NoiseSchedule,
        num_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        max_steps: int = 1000,
    ) -> Grid:
        """The grid that `set_timesteps` with these arguments stands for."""
        ...


def refuse(steps: "ReferenceSteps", **given: object) -> None:
    """Raises ValueError for arguments of `grid` that these steps have no use for."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{type(steps).__name__} takes no {name}, got {value!r}")


def count_steps(
    num_steps: int | None, given: Sequence[float] | None, *, most: int | None = None
) -> int:
    """How many steps are asked for, by their number or one by one.

    Raises:
      ValueError: if both or neither are given, or there are more than `most`.
    """
    if (num_steps is None) == (given is None):
        raise ValueError(
            "give either num_steps or the timesteps (or sigmas) themselves, got num_steps = "
            f"{num_steps} and {given}"
        )
    count = len(given) if num_steps is None and given is not None else num_steps
    check_num_steps(count, max(1, int(count)) if most is None else most)
    return int(count)


def make_grid(
    levels: NoiseLevel, ends: NoiseLevel, max_steps: int, middle: NoiseLevel | None = None
) -> Grid:
    """A padded grid of levels [N] and the ends of their steps [N], which chain where they can."""
    levels, ends = (NoiseLevel(*np.broadcast_arrays(*each)) for each in (levels, ends))
    count = len(levels.t)
    check_num_steps(count, max_steps)

    def padded(fields, length):
        wide = (np.asarray(f, np.float64) for f in fields)
        pads = ((f, [(0, length - len(f))] + [(0, 0)] * (f.ndim - 1)) for f in wide)
        return NoiseLevel(*(jnp.asarray(np.pad(f, pad, "edge")) for f, pad in pads))

    final = (np.append(level, end[-1]) for level, end in zip(levels, ends, strict=True))
    chains = all(
        np.array_equal(getattr(levels, name)[1:], getattr(ends, name)[:-1])
        for name in NoiseLevel._fields
    )
    return Grid(
        padded(final, max_steps + 1),
        jnp.asarray(0, jnp.int32),
        jnp.asarray(count, jnp.int32),
        None if middle is None else padded(middle, max_steps),
        None if chains else padded(ends, max_steps),
    )


def _clean(levels: NoiseLevel, where: Array) -> NoiseLevel:
    return NoiseLevel(
        levels.t, np.where(where, 1.0, levels.alpha), np.where(where, 0.0, levels.sigma)
    )


def _shifted(levels: NoiseLevel, final: NoiseLevel) -> NoiseLevel:
    """The ends of steps that chain: levels 1 … N - 1, and the final one."""
    return NoiseLevel(*(np.append(f[1:], end) for f, end in zip(levels, final, strict=True)))


def spaced_times(total: int, count: int, spacing: str, offset: int) -> np.ndarray:
    """[count] times, descending; those of "linspace" may lie between integers."""
    if spacing == "linspace":
        return np.linspace(0, total - 1, count)[::-1]
    if spacing == "leading":
        return np.arange(count)[::-1] * (total // count) + float(offset)
    if spacing == "trailing":
        # The last bit decides whether such a range has one entry more.
        return np.round(np.arange(total, 0, -total / count))[:count] - 1.0
    raise ValueError(f"timestep_spacing must be one of {SPACINGS}, got {spacing!r}")


def check_custom(times: np.ndarray, total: int) -> None:
    if np.any(np.diff(times) >= 0) or times[0] >= total or times[-1] < 0:
        raise ValueError(
            f"timesteps must descend and lie in [0, {total - 1}], got {times.tolist()}"
        )


# --- steps on the times of a table


@dataclass(frozen=True)
class _Tabulated(DiscreteSchedule):
    """Another schedule with its ᾱ in float32."""

    base: DiscreteSchedule = Linear()

    def alphas_cumprod(self) -> np.ndarray:
        return alphas_cumprod32(self.base).astype(np.float64)


@dataclass(frozen=True)
class TableSteps:
    """Integer times of a discrete schedule, for schedulers that work on x itself.

    Attributes:
      spacing: one of SPACINGS.
      offset: added to the times of "leading".
      end: where a step ends. "next": where the next one starts, the last one at clean data.
        "stride": at t - ⌊T/N⌋, wherever the next one starts. "previous": at t - 1.
      clean: a step that ends below time 0 ends at clean data; if not, at the table's first level.
      custom: the times may be given one by one.
      inverse: steps upwards, from t - ⌊T/N⌋ to t, where the network is told t.
      float32: the levels are those of the table in float32, rounded as published. It shows where
        a sampler adds noise next to clean data, as ancestral sampling does.
    """

    spacing: str = "leading"
    offset: int = 0
    end: str = "next"
    clean: bool = True
    custom: bool = False
    inverse: bool = False
    float32: bool = False

    def published(
        self,
        schedule: NoiseSchedule,
        num_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> Published:
        """The integer times, in the order in which they are visited."""
        refuse(self, sigmas=sigmas, mu=mu)
        if not self.custom:
            refuse(self, timesteps=timesteps)
        total = schedule.num_timesteps
        count = count_steps(num_steps, timesteps, most=total)
        if timesteps is not None:
            times = np.asarray(timesteps, np.int64).astype(np.float64)
            check_custom(times, total)
            return Published(times)
        times = np.round(spaced_times(total, count, self.spacing, self.offset))
        if times[0] >= total:
            raise ValueError(
                f"steps_offset = {self.offset} moves the time {times[0]:g} out of the schedule's "
                f"{total} times with {count} steps"
            )
        return Published(times[::-1] if self.inverse else times)

    def grid(self, schedule, num_steps=None, *, max_steps=1000, **given) -> Grid:
        times = self.published(schedule, num_steps, **given).timesteps
        if self.float32:
            schedule = _Tabulated(schedule.num_timesteps, schedule)
        if self.end == "next":
            levels = schedule(times)
            final = schedule(np.asarray(0.0))._replace(alpha=np.asarray(1.0), sigma=np.asarray(0.0))
            return make_grid(levels, _shifted(levels, final), max_steps)
        stride = 1 if self.end == "previous" else schedule.num_timesteps // len(times)
        earlier = times - stride
        others = schedule(np.clip(earlier, 0.0, schedule.t_max))
        if self.clean:
            others = _clean(others, earlier < 0)
        here = schedule(times)
        if self.inverse:
            return make_grid(others._replace(t=times), here, max_steps)
        return make_grid(here, others, max_steps)


@dataclass(frozen=True)
class DistilledSteps:
    """The times of a latent consistency model: some of those that it was distilled at.

    Attributes:
      original_steps: how many of the training times it was distilled at.
      strength: the share of these that is used, from the clean end, in (0, 1].
      clean: the last step ends at clean data; if not, at the table's first level.
      every: choose among all training times rather than the distilled ones.
      stage: None, or γ: a level inside of each step at the time ⌊(1 - γ) s⌋ of its end s (TCD).
    """

    original_steps: int = 50
    strength: float = 1.0
    clean: bool = True
    every: bool = False
    stage: float | None = None

    def published(
        self,
        schedule: NoiseSchedule,
        num_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> Published:
        """The integer times, descending."""
        refuse(self, sigmas=sigmas, mu=mu)
        total = schedule.num_timesteps
        count = count_steps(num_steps, timesteps, most=total)
        if timesteps is not None:
            times = np.asarray(timesteps, np.int64).astype(np.float64)
            check_custom(times, total)
            return Published(times[max(count - min(int(count * self.strength), count), 0) :])
        if not 1 <= self.original_steps <= total:
            raise ValueError(
                f"original_inference_steps must lie in [1, {total}], got {self.original_steps}"
            )
        if self.every:
            trained = np.arange(int(total * self.strength))
        else:
            stride = total // self.original_steps
            trained = np.arange(1, int(self.original_steps * self.strength) + 1) * stride - 1
        if count > min(len(trained), self.original_steps):
            raise ValueError(
                f"num_steps = {count} exceeds the {len(trained)} times of original_inference_steps "
                f"= {self.original_steps} with strength = {self.strength}"
            )
        index = np.floor(np.linspace(0, len(trained), count, endpoint=False)).astype(np.int64)
        return Published(trained[::-1][index].astype(np.float64))

    def grid(self, schedule, num_steps=None, *, max_steps=1000, **given) -> Grid:
        levels = schedule(self.published(schedule, num_steps, **given).timesteps)
        final = schedule(np.asarray(0.0))
        if self.clean:
            final = final._replace(alpha=np.asarray(1.0), sigma=np.asarray(0.0))
        ends = _shifted(levels, final)
        if self.stage is None:
            return make_grid(levels, ends, max_steps)
        # In float32, as the product of a tensor of times with a number.
        stage = np.floor(np.float32(1.0 - self.stage) * ends.t.astype(np.float32))
        return make_grid(levels, ends, max_steps, schedule(stage.astype(np.float64)))


@dataclass(frozen=True)
class PNDMSteps:
    """The times of a pseudo numerical method, with the levels that its stages land on.

    A step ends at t - ⌊T/N⌋ wherever the next one starts, but for those of the start. The stages
    of those land beside the times that the network is told, see `samplers.PNDM`.

    Attributes:
      spacing: one of SPACINGS.
      offset: added to the times of "leading".
      clean: a step that ends below time 0 ends at clean data; if not, at the table's first level.
      runge_kutta: the first three steps have four stages; if not, the first one has two.
    """

    spacing: str = "leading"
    offset: int = 0
    clean: bool = False
    runge_kutta: bool = True

    def published(
        self,
        schedule: NoiseSchedule,
        num_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> Published:
        """The time that each step starts at."""
        refuse(self, timesteps=timesteps, sigmas=sigmas, mu=mu)
        least = 4 if self.runge_kutta else 2
        if count_steps(num_steps, None, most=schedule.num_timesteps) < least:
            raise ValueError(f"PNDM's start needs at least {least} steps, got {num_steps}")
        return Published(
            np.round(spaced_times(schedule.num_timesteps, num_steps, self.spacing, self.offset))
        )

    def grid(self, schedule, num_steps=None, *, max_steps=1000, **given) -> Grid:
        times = self.published(schedule, num_steps, **given).timesteps
        stride = schedule.num_timesteps // num_steps
        if not self.runge_kutta:
            return self.grid_from(schedule, np.insert(times, 1, times[1]), stride, max_steps)
        following = np.append(times[1:], times[-1] - stride)
        ends = self._at(schedule, np.where(np.arange(num_steps) < 3, following, times - stride))
        lands = self._at(schedule, times - stride // 2)
        called = self._at(schedule, following + stride // 2)
        middle = NoiseLevel(*(np.stack(f, axis=1) for f in zip(lands, called, strict=True)))
        return make_grid(self._at(schedule, times), ends, max_steps, middle)

    def grid_from(
        self, schedule: NoiseSchedule, called: np.ndarray, stride: int, max_steps: int = 1000
    ) -> Grid:
        """The grid of a run without Runge-Kutta, by the times of its calls.

        The first two calls make its first step, whatever their times are: diffusers begins
        image-to-image in the middle of its list of calls, where the first time is not doubled.

        Args:
          schedule: of training.
          called: times in the order of the calls, at least two.
          stride: what a step is long.
          max_steps: length that the grid is padded to.
        """
        times = np.delete(called, 1)
        ends = np.append(called[1], times[1:] - stride)
        lands = self._at(schedule, times - stride)._replace(t=np.append(called[1], times[1:]))
        origin = self._at(schedule, np.append(called[1], times[1:]) + stride)
        middle = NoiseLevel(*(np.stack(f, axis=1) for f in zip(lands, origin, strict=True)))
        at = self._at(schedule, times), self._at(schedule, ends)
        return make_grid(*at, max_steps, middle)

    def _at(self, schedule: NoiseSchedule, t: np.ndarray) -> NoiseLevel:
        levels = schedule(np.clip(t, 0.0, schedule.t_max))
        return _clean(levels, t < 0) if self.clean else levels


@dataclass(frozen=True)
class RepaintSteps:
    """Times that go down and up again.

    Attributes:
      jump_length: steps down after which the path goes up again, and as many up.
      jump_n_sample: how often each stretch is descended.
    """

    jump_length: int = 10
    jump_n_sample: int = 10

    def published(
        self,
        schedule: NoiseSchedule,
        num_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> Published:
        """The times of all calls of `step` and `undo_step`, fewer than the grid has steps."""
        refuse(self, timesteps=timesteps, sigmas=sigmas, mu=mu)
        count = min(count_steps(num_steps, None), schedule.num_timesteps)
        index = np.arange(count, -1.0, -1.0)
        here, there = (NoiseLevel(t, 0.5, 0.5) for t in (index[:-1], index[1:]))
        plain = make_grid(here, there, count)
        path = jumps(plain, jump_length=self.jump_length, num_resamples=self.jump_n_sample)
        rows = np.asarray(path.levels.t, np.float64)[:-1] - 1.0
        return Published(rows * (schedule.num_timesteps // count))

    def grid(self, schedule, num_steps=None, *, max_steps=1000, **given) -> Grid:
        refuse(self, **given)
        return single_step_jumps(
            schedule,
            min(count_steps(num_steps, None), schedule.num_timesteps),
            jump_length=self.jump_length,
            num_resamples=self.jump_n_sample,
            max_steps=max_steps,
        )
