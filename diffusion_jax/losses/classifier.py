"""Training a classifier of noisy data, and its log probability for guidance."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp

from diffusion_jax.core.arrays import per_image_normal
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.denoiser import apply_network, network_time
from diffusion_jax.core.forward import add_noise
from diffusion_jax.core.parameterization import Parameterization
from diffusion_jax.core.schedules import NoiseSchedule
from diffusion_jax.core.types import (
    Array,
    Key,
    LogProb,
    Metrics,
    Network,
    NoiseLevel,
    Params,
)
from diffusion_jax.losses.base import ExampleLoss, ExampleMetrics, averaged

# (params, x0 [B, ...], t [B], labels [B], keys [B, 2]) -> (loss [B], metrics [B] each); the
# first key of an example is for its noise, the second for dropout.
ClassifierLoss = Callable[[Params, Array, Array, Array, Key], tuple[Array, ExampleMetrics]]
# (params, x0 [B, ...], labels [B], keys [B]) -> (mean loss [], mean metrics [] each).
ClassifierMean = Callable[[Params, Array, Array, Key], tuple[Array, Metrics]]


def log_prob(logits: Array, labels: Array) -> Array:
    """log softmax(logits)_y of each example, in float32.

    A label outside of 0 … K - 1 gives NaN, since a traced value cannot be refused.

    Args:
      logits: [B, K].
      labels: [B] integers.

    Returns:
      [B] float32, at most 0.

    Raises:
      ValueError: if the shapes do not fit or the labels are no integers.

    Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), section 4.1.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape [B, K], got {logits.shape}")
    if labels.shape != logits.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers of shape {logits.shape[:1]}, one per row of the logits, "
            f"got {labels.dtype} {labels.shape}"
        )
    log_probs = jax.nn.log_softmax(logits.astype(jnp.promote_types(jnp.float32, logits.dtype)))
    # A negative index would be taken from the end.
    index = jnp.where(labels < 0, logits.shape[1], labels)
    return jnp.take_along_axis(log_probs, index[:, None], axis=1, mode="fill")[:, 0]


def classifier_log_prob(
    network: Network,
    parameterization: Parameterization,
    *,
    time_input: Callable[[NoiseLevel], Array] = network_time,
) -> Callable[[Params, Array], LogProb]:
    """log p(y | x_t) as guidance wants it, of a classifier that `NoisyCrossEntropy` trained.

    Args:
      network: (params, x, t, cond) -> logits [B, K].
      parameterization: of training; it may scale the input.
      time_input: of training.

    Returns:
      (params, labels [B]) -> (x, level, cond) -> [B]. The denoiser's condition is not read.
      Call it inside of the compiled function, so that params stay an argument.

    Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), section 4.1.
    """
    apply = apply_network(network, parameterization, time_input)

    def bind(params: Params, labels: Array) -> LogProb:
        def evaluate(x: Array, level: NoiseLevel, cond: Condition = Condition()) -> Array:
            del cond
            return log_prob(apply(params, x, level, Condition()), labels)

        return evaluate

    return bind


@dataclass(frozen=True)
class NoisyCrossEntropy:
    """E_{t, eps} [ -log p(y | x_t) ], in nats, on noisy data of the diffusion's own schedule.

    ADM also crops at random and decays the weights by 0.05, which are matters of the data and
    of the optimizer.

    Attributes:
      noisy: add noise. Without, the classifier is told the same times and sees x0 at all of
        them: a control, whose gradient guides badly.

    Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), section 4.1 and appendix I.
    """

    noisy: bool = True

    def per_example(
        self,
        network: Network,
        schedule: NoiseSchedule,
        parameterization: Parameterization,
        *,
        time_input: Callable[[NoiseLevel], Array] = network_time,
    ) -> ClassifierLoss:
        """The loss of every example at given times.

        Args:
          network: (params, x, t, cond, keys) -> logits [B, K].
          schedule: gives the level; the one that the guided network was trained with.
          parameterization: may scale the input; that of the guided network.
          time_input: what the network is told about the level.

        Returns:
          (params, x0 [B, ...], t [B], labels [B], keys [B, 2]) -> (loss [B],
          {"accuracy": [B] of 0 and 1}).
        """
        apply = apply_network(network, parameterization, time_input)

        def loss(
            params: Params, x0: Array, t: Array, labels: Array, keys: Key
        ) -> tuple[Array, ExampleMetrics]:
            level, x = schedule(t), x0
            if self.noisy:
                x = add_noise(x0, per_image_normal(keys[:, 0], x0), level)
            logits = apply(params, x, level, Condition(), keys[:, 1])
            correct = jnp.argmax(logits, axis=-1) == labels
            return -log_prob(logits, labels), {"accuracy": correct.astype(jnp.float32)}

        return loss


def averaged_over_times(example_loss: ClassifierLoss, schedule: NoiseSchedule) -> ClassifierMean:
    """E_t [loss]: one time per example, drawn as the schedule does, and the mean over examples.

    Returns:
      (params, x0 [B, ...], labels [B], keys [B]) -> (loss [], metrics [] each, those of
      `averaged`); example i depends on keys[i] alone.

    Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), section 4.1.
    """

    # The labels travel where a denoiser's loss has its condition.
    return cast(ClassifierMean, averaged(cast(ExampleLoss, example_loss), schedule))
