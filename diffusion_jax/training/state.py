"""TrainState: everything that a training step reads and writes."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffusion_jax.core import struct
from diffusion_jax.core.params import by_glob, merge, partition
from diffusion_jax.core.types import AdaptiveLoss, Array, LossFn, Params
from diffusion_jax.training.guard import GuardState


@struct.dataclass
class TrainState:
    """State of a run; average and optimizer moments exist for the trainable leaves only.

    Attributes:
      step: [] int32, number of updates done, those that a guard left out included.
      trainable: subtree of the parameters that is optimized.
      frozen: the other parameters; no step changes them.
      ema: moving average, a tree like `trainable`.
      opt_state: state of the optimizer for `trainable`.
      loss_state: memory of an `AdaptiveLoss`, empty for other losses.
      guard_state: memory of the guard; it stays as it is without one that watches.
    """

    step: Array
    trainable: Params
    frozen: Params
    ema: Params
    opt_state: Any
    guard_state: GuardState
    loss_state: Any = ()

    @classmethod
    def create(
        cls,
        params: Params,
        tx: optax.GradientTransformation,
        *,
        trainable: tuple[str, ...] = ("**",),
        loss: LossFn | AdaptiveLoss | None = None,
    ) -> "TrainState":
        """A state at step 0 whose average equals the parameters.

        The state takes `params` over: a step that donates its state deletes the arrays in it.

        Args:
          params: whole parameter tree.
          tx: optimizer.
          trainable: globs of the leaves to train, see `core.params.by_glob`.
          loss: gives the memory to start from if it is an `AdaptiveLoss`; others have none.

        Raises:
          ValueError: if a pattern matches no leaf.
        """
        selected, frozen = partition(jax.tree.map(jnp.asarray, params), by_glob(params, *trainable))
        memory = loss.init() if isinstance(loss, AdaptiveLoss) else ()
        return cls(
            step=jnp.zeros((), jnp.int32),
            trainable=selected,
            frozen=frozen,
            # One buffer cannot be donated twice, so the average needs arrays of its own.
            ema=jax.tree.map(jnp.copy, selected),
            opt_state=tx.init(selected),
            loss_state=jax.tree.map(jnp.array, memory),
            guard_state=GuardState.start(),
        )

    @property
    def applied(self) -> Array:
        """Number of updates that were applied, [] int32."""
        return self.step - self.guard_state.skipped

    @property
    def params(self) -> Params:
        """The whole tree with the raw trainable leaves."""
        return merge(self.trainable, self.frozen)

    @property
    def ema_params(self) -> Params:
        """The whole tree with the averaged trainable leaves, the one to sample with."""
        return merge(self.ema, self.frozen)
