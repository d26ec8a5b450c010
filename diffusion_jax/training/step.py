"""The training step: a pure function of state, batch and keys that knows no device."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.params import merge
from diffusion_jax.core.types import AdaptiveLoss, Array, Batch, Key, LossFn, Metrics, Params
from diffusion_jax.training.ema import EMA
from diffusion_jax.training.guard import Guard
from diffusion_jax.training.state import TrainState

RESERVED_METRICS = ("loss", "grad_norm", "learning_rate", "skipped", "skipped_in_a_row")


@functools.partial(jax.jit, static_argnames="batch_size")
def _step_keys(key, step, offset, *, batch_size):
    indices = offset + jnp.arange(batch_size, dtype=jnp.uint32)
    return image_keys(jax.random.fold_in(key, step), indices)


def step_keys(key: Key, step: int, batch_size: int, *, offset: int = 0) -> Key:
    """One key per example of a training step, [B].

    keys[i] = fold_in(fold_in(key, step), offset + i), so that an example's noise depends on
    its place in the global batch and never on the devices that the batch is split over.
    Called outside of the step, before the keys are split over devices.

    Args:
      key: [] key of the run.
      step: number of updates done.
      batch_size: B.
      offset: place of the first example in the global batch.

    Raises:
      ValueError: if `batch_size` < 1, or `step` or `offset` is negative.
    """
    if batch_size < 1 or step < 0 or offset < 0:
        raise ValueError(
            "step_keys needs batch_size >= 1, step >= 0 and offset >= 0, got "
            f"batch_size={batch_size}, step={step}, offset={offset}"
        )
    return _step_keys(key, jnp.uint32(step), jnp.uint32(offset), batch_size=batch_size)


def _check_batch(batch: Batch, keys: Key, accumulate: int) -> None:
    size = keys.shape[0]
    shapes = {name: [x.shape for x in jax.tree.leaves(value)] for name, value in batch.items()}
    wrong = {name: s for name, s in shapes.items() if any(x[:1] != (size,) for x in s)}
    if wrong:
        raise ValueError(f"{size} keys need batches with leading axis {size}, got shapes {wrong}")
    if size % accumulate:
        raise ValueError(f"a batch of {size} does not split into {accumulate} equal microbatches")


def _microbatches(x: jax.Array, count: int) -> jax.Array:
    # Microbatch i holds the examples i, i + count, …: each device keeps its own examples.
    return jnp.swapaxes(x.reshape((x.shape[0] // count, count) + x.shape[1:]), 0, 1)


def _in_order(x: jax.Array) -> jax.Array:
    # The inverse of _microbatches.
    return jnp.swapaxes(x, 0, 1).reshape((x.shape[0] * x.shape[1],) + x.shape[2:])


def _describe(memory: Any) -> str:
    shapes = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(memory)]
    return ", ".join(shapes) or "none"


def _check_memory(loss: LossFn | AdaptiveLoss, memory: Any) -> None:
    wanted = jax.eval_shape(loss.init) if isinstance(loss, AdaptiveLoss) else ()
    same = jax.tree.structure(wanted) == jax.tree.structure(memory)
    if not same or _describe(wanted) != _describe(memory):
        raise ValueError(
            f"the loss needs a memory of {_describe(wanted)}, but the state's loss_state has "
            f"{_describe(memory)}; make the state with TrainState.create(..., loss=loss), loss "
            "being the one that the step is made with"
        )


# Compared by identity, since a loss may hold arrays, whose comparison is no truth value.
@dataclass(frozen=True, eq=False)
class TrainStep:
    """What `make_train_step` returns; called as step(state, batch, keys).

    Attributes:
      loss, tx, ema, accumulate, axis_name, learning_rate, guard: the arguments of
        `make_train_step`.
    """

    loss: LossFn | AdaptiveLoss
    tx: optax.GradientTransformation
    ema: EMA
    accumulate: int = 1
    axis_name: str | None = None
    learning_rate: Callable[[Array], Array] | None = None
    guard: Guard = Guard()

    def _loss(
        self, params: Params, batch: Batch, keys: Key, *, memory: Any
    ) -> tuple[Array, Metrics, Any]:
        if isinstance(self.loss, AdaptiveLoss):
            return self.loss.apply(params, batch, keys, memory)
        return *self.loss(params, batch, keys), ()

    def _gradient(
        self, state: TrainState, batch: Batch, keys: Key
    ) -> tuple[tuple[Params, Metrics], Any]:
        def objective(trainable):
            params = merge(trainable, state.frozen)
            loss, metrics, observations = self._loss(params, batch, keys, memory=state.loss_state)
            return loss, (metrics, observations)

        (loss, (metrics, observations)), grads = jax.value_and_grad(objective, has_aux=True)(
            state.trainable
        )
        taken = sorted(set(RESERVED_METRICS) & set(metrics))
        if taken:
            raise ValueError(f"the loss function may not name its own metrics {taken}; rename them")
        return (grads, {"loss": loss, **metrics}), observations

    def _accumulated(
        self, state: TrainState, batch: Batch, keys: Key
    ) -> tuple[tuple[Params, Metrics], Any]:
        parts = jax.tree.map(lambda x: _microbatches(x, self.accumulate), (batch, keys))
        first = jax.tree.map(lambda x: x[0], parts)
        shapes, _ = jax.eval_shape(self._gradient, state, *first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def add(total, part):
            result, observations = self._gradient(state, *part)
            return jax.tree.map(jnp.add, total, result), observations

        total, observations = jax.lax.scan(add, zeros, parts)
        mean = jax.tree.map(lambda x: x / self.accumulate, total)
        return mean, jax.tree.map(_in_order, observations)

    def _remembered(self, memory: Any, observations: Any) -> Any:
        if not isinstance(self.loss, AdaptiveLoss):
            return memory
        if self.axis_name is not None:
            # Device d holds the d-th part of the batch, so gathering keeps the global order.
            observations = jax.lax.all_gather(observations, self.axis_name, tiled=True)
        return self.loss.update(memory, observations)

    def __call__(self, state: TrainState, batch: Batch, keys: Key) -> tuple[TrainState, Metrics]:
        """One update.

        Args:
          state: state before the update.
          batch: arrays [B, ...].
          keys: [B], see `step_keys`.

        Returns:
          (state, metrics): the next state, and means over the batch: the loss, the global norm
          of the gradient before clipping, and the loss function's own, all at the old parameters.
          With `learning_rate` also the rate of this update, and with a guard that watches
          `skipped`, 1 if the update was left out and else 0, and `skipped_in_a_row`, the number
          left out up to here.

        Raises:
          ValueError: if batch and keys differ in length, the batch does not split into
            microbatches, the state has no memory that fits the loss, or the loss
            function names a metric of `RESERVED_METRICS`.
        """
        _check_batch(batch, keys, self.accumulate)
        _check_memory(self.loss, state.loss_state)
        gradient = self._gradient if self.accumulate == 1 else self._accumulated
        (grads, metrics), observations = gradient(state, batch, keys)
        if self.axis_name is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), self.axis_name)
        metrics = {**metrics, "grad_norm": optax.tree.norm(grads)}
        if self.learning_rate is not None:
            metrics["learning_rate"] = self.learning_rate(state.applied)
        after = self._updated(state, grads, observations)
        if self.guard.watches:
            return self._guarded(state, after, metrics)
        return after, metrics

    def _updated(self, state: TrainState, grads: Params, observations: Any) -> TrainState:
        updates, opt_state = self.tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return state.replace(
            step=state.step + 1,
            trainable=trainable,
            ema=self.ema.update(state.ema, trainable, state.applied + 1),
            opt_state=opt_state,
            loss_state=self._remembered(state.loss_state, observations),
        )

    def _guarded(
        self, before: TrainState, after: TrainState, metrics: Metrics
    ) -> tuple[TrainState, Metrics]:
        """`after`, or `before` with one step more if the update is bad."""
        # Loss and gradient are means over all devices by now, so that they decide alike.
        norm = metrics["grad_norm"]
        bad = self.guard.is_bad(before.guard_state, metrics["loss"], norm)
        kept = {
            name: jax.tree.map(
                lambda old, new: jnp.where(bad, old, new),
                getattr(before, name),
                getattr(after, name),
            )
            for name in ("trainable", "ema", "opt_state", "loss_state")
        }
        memory = self.guard.update(before.guard_state, norm, bad)
        skipped = {"skipped": bad.astype(jnp.float32), "skipped_in_a_row": memory.in_a_row}
        return after.replace(guard_state=memory, **kept), {**metrics, **skipped}


def make_train_step(
    loss: LossFn | AdaptiveLoss,
    tx: optax.GradientTransformation,
    *,
    ema: EMA,
    accumulate: int = 1,
    axis_name: str | None = None,
    learning_rate: Callable[[Array], Array] | None = None,
    guard: Guard = Guard(),
) -> TrainStep:
    """A pure step (state, batch, keys [B]) -> (state, metrics); only trainable leaves move.

    Args:
      loss: mean over the examples of a batch, with metrics that are means too, or a `Ratio`
        of two. The memory of an `AdaptiveLoss` is in the state; all microbatches and devices use
        it as it was before the step, and it is updated once, with the whole batch in order.
      tx: optimizer, the one that the state was created with.
      ema: moving average of the trainable leaves.
      accumulate: microbatches that a batch is split into; the gradient is that of the whole
        batch up to rounding, and memory for activations falls by this factor.
      axis_name: axis to average gradients and metrics over, for `pmap_train`; None on a mesh.
      learning_rate: [] int32 number of updates that were applied -> [] rate of the next one, to
        be reported, for example `Optimizer.learning_rate_at`; None to report none.
      guard: which updates are left out.

    Raises:
      ValueError: if `accumulate` < 1.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    return TrainStep(
        loss=loss,
        tx=tx,
        ema=ema,
        accumulate=accumulate,
        axis_name=axis_name,
        learning_rate=learning_rate,
        guard=guard,
    )
