"""How training times are drawn: as the schedule does, or where the loss has been large."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from diffusion_jax.core.condition import Condition
from diffusion_jax.core.schedules import NoiseSchedule
from diffusion_jax.core.types import Array, Key, Metrics, Params
from diffusion_jax.losses.base import (
    DiffusionLoss,
    ExampleLoss,
    averaged,
    mean_metrics,
    quarter_of_time,
)

Observations = dict[str, Array]

# Probabilities are whole numbers of tickets out of about this many: sums of integers are exact,
# whereas in a float32 cumulative sum the rarest of 4000 times would vanish.
_TICKETS = 2**30


class LossMemory(NamedTuple):
    """The last losses of every timestep.

    Attributes:
      history: [T, H] float32, a ring of losses for every t; 0 where there is none yet.
      count: [T] int32, how many losses of t were recorded in all.
    """

    history: Array
    count: Array


class AdaptiveDiffusionLoss(NamedTuple):
    """An `AdaptiveLoss` of clean data: `apply` has the arguments of a DiffusionLoss and a memory.

    Attributes:
      init: () -> memory.
      apply: (params, x0 [B, ...], cond, keys [B], memory) -> (loss [], metrics [] each,
        observations {"t": [B] int32, "loss": [B] unweighted}).
      update: (memory, observations) -> memory.
    """

    init: Callable[[], LossMemory]
    apply: Callable[
        [Params, Array, Condition, Key, LossMemory], tuple[Array, Metrics, Observations]
    ]
    update: Callable[[LossMemory, Observations], LossMemory]


class Times(Protocol):
    """How times are drawn in training. Implementations are frozen dataclasses.

    Source: none; a convention of this library.
    """

    def wrap(
        self, example_loss: ExampleLoss, schedule: NoiseSchedule
    ) -> DiffusionLoss | AdaptiveDiffusionLoss:
        """E_t [loss] over batches, estimated with one time per example."""
        ...


@dataclass(frozen=True)
class ScheduleTimes:
    """Times as the schedule draws them, for discrete schedules uniformly.

    Source: Ho et al. 2020 (arXiv:2006.11239), algorithm 1.
    """

    def wrap(self, example_loss: ExampleLoss, schedule: NoiseSchedule) -> DiffusionLoss:
        """The mean over examples, see `averaged`."""
        return averaged(example_loss, schedule)


@dataclass(frozen=True)
class LossAware:
    """Importance sampling of timesteps by the root mean square of their last losses.

    p_t = (1 - f) · √E[L_t²] / Σ_s √E[L_s²] + f / T,  loss = mean_i L_i / (T p_{t_i}),
    so that the expectation is that of uniform times; were E[L_t²] known, f = 0 would give
    the least variance that any p can. E runs over the last `history` losses of t, and times
    are uniform until every t has so many. Made for the variational bound, whose terms
    differ by orders of magnitude.

    A batch is drawn with the memory as it was before the step. A loss that is not finite
    is never recorded, since it would stay for long; the mean that it belongs to shows it.

    Attributes:
      history: H, losses remembered for every t.
      uniform_fraction: f in (0, 1], keeps times alive whose loss was zero.

    Raises:
      ValueError: if `history` < 1 or `uniform_fraction` is outside (0, 1].

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672), section 3.3 and eq. 18; f is that of the
    released code, which records after every microbatch and not once a step.
    """

    history: int = 10
    uniform_fraction: float = 0.001

    def __post_init__(self):
        if self.history < 1:
            raise ValueError(f"history must be at least 1, got {self.history}")
        if not 0.0 < self.uniform_fraction <= 1.0:
            raise ValueError(
                f"uniform_fraction must lie in (0, 1], got {self.uniform_fraction}; at 0 a time "
                "whose losses were zero would never be drawn again"
            )

    def wrap(self, example_loss: ExampleLoss, schedule: NoiseSchedule) -> AdaptiveDiffusionLoss:
        """The importance-weighted mean over examples, and of every metric.

        Args:
          example_loss: the loss of every example at given times.
          schedule: must be discrete.

        Returns:
          functions for a training step; example i's time depends on keys[i] and the memory
          alone, and noise and dropout on keys[i] as with `ScheduleTimes`.

        Raises:
          ValueError: if the schedule is continuous.
        """
        if schedule.num_timesteps is None:
            raise ValueError(
                "loss-aware times need a discrete schedule, since every timestep has a history; "
                f"{type(schedule).__name__} is continuous. Choose a discrete schedule, or let the "
                "schedule draw the times"
            )
        shape = (schedule.num_timesteps, self.history)

        def init() -> LossMemory:
            return LossMemory(jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:1], jnp.int32))

        def apply(params: Params, x0: Array, cond: Condition, keys: Key, memory: LossMemory):
            keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
            t, weight = _draw(keys[:, 0], self._tickets(memory))
            values, metrics = example_loss(params, x0, t.astype(jnp.float32), cond, keys[:, 1:])
            quarter = quarter_of_time(schedule, t)
            metrics = mean_metrics(metrics, weight, loss=values, quarter=quarter)
            return jnp.mean(weight * values), metrics, {"t": t, "loss": values}

        return AdaptiveDiffusionLoss(init, apply, _record)

    def probabilities(self, memory: LossMemory) -> Array:
        """p_t, [T] float32."""
        tickets = self._tickets(memory)
        return tickets / jnp.sum(tickets)

    def _tickets(self, memory: LossMemory) -> Array:
        """[T] int32, at least 1, with p_t = tickets_t / Σ tickets exactly."""
        largest = jnp.max(jnp.abs(memory.history))
        # Relative to the largest, so that no square overflows; losses may all be zero.
        relative = memory.history / jnp.where(largest > 0.0, largest, 1.0)
        rms = jnp.sqrt(jnp.mean(relative**2, axis=1))
        total = jnp.sum(rms)
        uniform = 1.0 / memory.count.shape[0]
        by_loss = jnp.where(total > 0.0, rms / jnp.where(total > 0.0, total, 1.0), uniform)
        p = (1.0 - self.uniform_fraction) * by_loss + self.uniform_fraction * uniform
        tickets = jnp.maximum(jnp.round(_TICKETS * p).astype(jnp.int32), 1)
        # One ticket each makes warm-up draw the very times that the schedule draws.
        return jnp.where(jnp.all(memory.count >= self.history), tickets, 1)


def _draw(keys: Key, tickets: Array) -> tuple[Array, Array]:
    """Times [B] int32 with p_t ∝ tickets_t, and importance weights 1 / (T p_t), [B]."""
    ends = jnp.cumsum(tickets, dtype=jnp.int32)
    draw = jax.vmap(lambda key: jax.random.randint(key, (), 0, ends[-1]))
    t = jnp.searchsorted(ends, draw(keys), side="right").astype(jnp.int32)
    drawn = tickets[t].astype(jnp.float32)
    return t, ends[-1].astype(jnp.float32) / (tickets.shape[0] * drawn)


def _record(memory: LossMemory, observations: Observations) -> LossMemory:
    """The memory after the losses of a batch, as if recorded one by one in the order given."""
    num_timesteps, size = memory.history.shape
    t, loss = observations["t"], observations["loss"].astype(jnp.float32)
    # The row after the last does not exist, and writes to it are dropped.
    row = jnp.where(jnp.isfinite(loss), t, num_timesteps)
    order = jnp.argsort(row, stable=True)
    row, loss = row[order], loss[order]
    index = jnp.arange(row.shape[0])
    earlier = index - jnp.searchsorted(row, row, side="left")
    later = jnp.searchsorted(row, row, side="right") - 1 - index
    before = memory.count.at[row].get(mode="fill", fill_value=0)
    # Of more losses than a ring holds the last remain; writing all would leave any of them.
    lasting = jnp.where(later < size, row, num_timesteps)
    history = memory.history.at[lasting, (before + earlier) % size].set(loss, mode="drop")
    return LossMemory(history, memory.count.at[row].add(1, mode="drop"))
