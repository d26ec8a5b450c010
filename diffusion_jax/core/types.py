"""The vocabulary: the records and function types that the whole library speaks."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import numpy as np

from diffusion_jax.core.part_mean import Ratio

if TYPE_CHECKING:
    from diffusion_jax.core.condition import Condition

Array = jax.Array | np.ndarray
Key = jax.Array
Params = Mapping[str, Any]
Batch = Mapping[str, Array]
# Means over a batch, [] each; a `Ratio` of two where a mean is over part of it.
Metrics = Mapping[str, Array | Ratio]


class NoiseLevel(NamedTuple):
    """One point of the path x_t = alpha · x0 + sigma · eps.

    A sampler reads alpha and sigma only; `t` is what the network is told. All three
    have the shape [] (one level for the whole batch) or [B].

    Attributes:
      t: the time in the unit that the network was trained with.
      alpha: signal rate, in [0, 1].
      sigma: noise rate, at least 0; alpha² + sigma² = 1 for variance-preserving schedules.
    """

    t: Array
    alpha: Array
    sigma: Array


class Prediction(NamedTuple):
    """What a denoiser says about x_t.

    Attributes:
      x0: [B, ...] float32 estimate of the clean data.
      var_frac: [B, ...] position of the log variance between log β̃ (0) and log β (1), or
        None where the network learned no such range.
      log_var: [B, ...] log variance of the reverse step of the training chain, or None where
        the network learned none.
      raw_x0: [B, ...] x0 before it was thresholded, or None where it was not. Only the variants of
        samplers that reproduce published code read it.
    """

    x0: Array
    var_frac: Array | None = None
    log_var: Array | None = None
    raw_x0: Array | None = None


class DenoiseFn(Protocol):
    """A network bound to its parameters, as a function of x_t."""

    def __call__(self, x: Array, level: NoiseLevel, cond: "Condition") -> Prediction: ...


# (x_t [B, ...], level, condition) -> log p(y | x_t) [B], the labels or the text y bound.
LogProb = Callable[[Array, NoiseLevel, "Condition"], Array]


class Network(Protocol):
    """A linen module's apply with the module bound and the parameters free.

    `keys` [B] are given in training only and switch dropout on: example i loses the same
    units whatever the batch size or the number of devices.
    """

    def __call__(
        self, params: Params, x: Array, t: Array, cond: "Condition", *, keys: Key | None = None
    ) -> Array: ...


class LossFn(Protocol):
    """(params, batch, keys [B]) -> (mean loss [], metrics [] each); keys are one per example."""

    def __call__(self, params: Params, batch: Batch, keys: Key) -> tuple[Array, Metrics]: ...


class AdaptiveLoss(NamedTuple):
    """A loss with a memory of the examples that it has seen, such as importance sampling.

    A training step calls `apply` with the memory as it was before the step, and `update` once,
    with the observations of the whole global batch in the order of its examples.

    Attributes:
      init: () -> memory, a pytree of arrays.
      apply: (params, batch, keys [B], memory) -> (mean loss [], metrics [] each, observations:
        a pytree of arrays [B]).
      update: (memory, observations) -> memory.
    """

    init: Callable[[], Any]
    apply: Callable[[Params, Batch, Key, Any], tuple[Array, Metrics, Any]]
    update: Callable[[Any, Any], Any]


PathPredicate = Callable[[tuple[str, ...]], bool]


class DataIterator(Protocol):
    """Batches that can be left and taken up again."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> Mapping[str, Any]:
        """JSON-serialisable position, to be stored in a checkpoint."""
        ...

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Moves to a position that `get_state` returned."""
        ...


class Checkpointer(Protocol):
    """Durable storage of a training state and the position of its data."""

    def claim(self) -> None:
        """Becomes the only writer, and deletes what a killed one left half done."""
        ...

    def release(self) -> None:
        """Ends the claim."""
        ...

    @property
    def last_committed_step(self) -> int | None:
        """The newest step that is completely written, None if there is none."""
        ...

    @property
    def restored_step(self) -> int | None:
        """The step that was read last, None before."""
        ...

    def save(self, step: int, state: Any, data_state: Mapping[str, Any]) -> None: ...

    def restore(self, state: Any, step: int | None = None) -> tuple[Any, Mapping[str, Any]]: ...

    def wait(self) -> None:
        """Returns when everything is durable; raises what went wrong."""
        ...


class Logger(Protocol):
    """Where numbers and pictures of a run go."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, image: np.ndarray) -> None: ...

    def truncate_after(self, step: int) -> None:
        """Drops what was logged for later steps, which a resumed run will repeat."""
        ...

    def close(self) -> None: ...
