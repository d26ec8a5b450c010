"""Optimizer: a configuration that builds an optax chain with its learning-rate schedule."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import jax.numpy as jnp
import optax

from diffusion_jax.core.types import Array
from diffusion_jax.training.rates import Cycle, factor_at

Rate = Callable[[Array], Array]


class OptimizerRow(NamedTuple):
    """One named optimizer: how to build it and which options it understands."""

    build: Callable[["Optimizer", Rate], optax.GradientTransformation]
    options: tuple[str, ...]


def _adam(config: "Optimizer", rate: Rate) -> optax.GradientTransformation:
    return optax.adam(rate, b1=config.b1, b2=config.b2, eps=config.eps)


def _adamw(config: "Optimizer", rate: Rate) -> optax.GradientTransformation:
    decay = config.weight_decay
    return optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=decay)


def _sgd(config: "Optimizer", rate: Rate) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=config.b1)


def _adafactor(config: "Optimizer", rate: Rate) -> optax.GradientTransformation:
    return optax.adafactor(rate, weight_decay_rate=config.weight_decay)


OPTIMIZERS: dict[str, OptimizerRow] = {
    "adam": OptimizerRow(_adam, ("b1", "b2", "eps")),
    "adamw": OptimizerRow(_adamw, ("b1", "b2", "eps", "weight_decay")),
    "sgd": OptimizerRow(_sgd, ("b1",)),
    "adafactor": OptimizerRow(_adafactor, ("weight_decay",)),
}

SCHEDULES: dict[str, Callable[[Array], Array]] = {
    "constant": jnp.ones_like,
    "cosine": lambda progress: 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
}
# The schedule that is given by its cycles instead of a function of progress.
CYCLES = "cycles"


@dataclass(frozen=True)
class Optimizer:
    """Optimizer, learning-rate schedule and gradient clipping.

    rate(n) = learning_rate · min(1, (n + 1) / W) · f((n - W) / (T - W)),  n = 0, 1, …,
    W = warmup_steps, T = total_steps; f is 1 (constant), the half cosine from 1 to 0
    (cosine) or the line from 1 to 0 (linear), with its argument clipped to [0, 1]. With the
    schedule "cycles" rate(n) = learning_rate · the cycles' factor, see `rates.factor_at`.

    Attributes:
      name: a name of `OPTIMIZERS`.
      learning_rate: largest rate of the schedule, above 0.
      schedule: a name of `SCHEDULES`, or "cycles".
      warmup_steps: updates until the full rate, 0 for none; cycles have their own.
      total_steps: updates until the rate is 0; None with the constant schedule and with cycles.
      cycles: warm-ups and decays that follow each other; () with the other schedules.
      b1: decay of the first moment in [0, 1); the momentum of sgd.
      b2: decay of the second moment in [0, 1).
      eps: added to the root of the second moment.
      weight_decay: decoupled decay of every trainable leaf, at least 0; adamw multiplies
        it by the rate, adafactor does not.
      clip_norm: largest global norm of the gradient, above 0; None for no clipping.

    Raises:
      ValueError: if a name is unknown, a number is out of range, or an option is changed
        that the named optimizer or schedule does not have.
    """

    name: str = "adam"
    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    cycles: tuple[Cycle, ...] = ()
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.name!r}; there are {sorted(OPTIMIZERS)}")
        if self.schedule not in (*SCHEDULES, CYCLES):
            known = sorted((*SCHEDULES, CYCLES))
            raise ValueError(f"unknown schedule {self.schedule!r}; there are {known}")
        self._check_options()
        self._check_steps()
        for name in ("b1", "b2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("learning_rate", "eps", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if not self.weight_decay >= 0.0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")

    def _check_options(self):
        understood = OPTIMIZERS[self.name].options
        default = {field.name: field.default for field in fields(self)}
        for name in ("b1", "b2", "eps", "weight_decay"):
            value = getattr(self, name)
            if name not in understood and value != default[name]:
                raise ValueError(
                    f"{self.name} has no {name}, got {name}={value}; leave it at {default[name]} "
                    f"or take one of {[n for n, row in OPTIMIZERS.items() if name in row.options]}"
                )

    def _check_steps(self):
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {self.warmup_steps}")
        if (self.schedule == CYCLES) != bool(self.cycles):
            raise ValueError(
                f"the schedule {CYCLES!r} and cycles go together, got schedule = {self.schedule!r} "
                f"and {len(self.cycles)} cycles"
            )
        if self.schedule == CYCLES:
            if self.warmup_steps or self.total_steps is not None:
                raise ValueError(
                    "cycles have warm-ups and lengths of their own, got warmup_steps = "
                    f"{self.warmup_steps} and total_steps = {self.total_steps}; leave both out"
                )
        elif self.schedule == "constant":
            if self.total_steps is not None:
                raise ValueError(
                    f"the constant schedule never ends, got total_steps={self.total_steps}; "
                    "leave it None or take another schedule"
                )
        elif self.total_steps is None or self.total_steps <= self.warmup_steps:
            raise ValueError(
                f"the {self.schedule} schedule needs total_steps above warmup_steps="
                f"{self.warmup_steps}, got {self.total_steps}"
            )

    def learning_rate_at(self, step: Array | int) -> Array:
        """Learning rate of the update that follows `step` updates, [] float32."""
        n = jnp.asarray(step, jnp.float32)
        rate = jnp.float32(self.learning_rate)
        if self.schedule == CYCLES:
            return rate * factor_at(self.cycles, n).astype(jnp.float32)
        if self.warmup_steps:
            rate = rate * jnp.minimum(1.0, (n + 1.0) / self.warmup_steps)
        length = 1 if self.total_steps is None else self.total_steps - self.warmup_steps
        progress = jnp.clip((n - self.warmup_steps) / length, 0.0, 1.0)
        return rate * SCHEDULES[self.schedule](progress)

    def build(self) -> optax.GradientTransformation:
        """The optax transformation: clipping, then the optimizer at the scheduled rate."""
        optimizer = OPTIMIZERS[self.name].build(self, self.learning_rate_at)
        if self.clip_norm is None:
            return optimizer
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), optimizer)
