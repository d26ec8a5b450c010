"""What a loss is: a value per example at given times, and how times are drawn and averaged."""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_jax.core.condition import Condition
from diffusion_jax.core.denoiser import network_time
from diffusion_jax.core.parameterization import Parameterization
from diffusion_jax.core.schedules import NoiseSchedule
from diffusion_jax.core.types import Array, Key, Metrics, Network, NoiseLevel, Params

# (params, x0 [B, ...], t [B], cond, keys [B, 2]) -> (loss [B], metrics [B] each); the first key
# of an example is for its noise, the second for dropout.
ExampleLoss = Callable[[Params, Array, Array, Condition, Key], tuple[Array, Metrics]]
# (params, x0 [B, ...], cond, keys [B]) -> (mean loss [], mean metrics [] each).
DiffusionLoss = Callable[[Params, Array, Condition, Key], tuple[Array, Metrics]]


class Loss(Protocol):
    """What a network is trained with. Implementations are frozen dataclasses.

    Attributes:
      learned_variance: None, or what the second half of the network's output channels
        means, see `make_denoiser`.

    Source: none; a convention of this library.
    """

    @property
    def learned_variance(self) -> str | None: ...

    def per_example(
        self,
        network: Network,
        schedule: NoiseSchedule,
        parameterization: Parameterization,
        *,
        time_input: Callable[[NoiseLevel], Array] = network_time,
    ) -> ExampleLoss:
        """The loss of every example at given times."""
        ...


def averaged(example_loss: ExampleLoss, schedule: NoiseSchedule) -> DiffusionLoss:
    """E_t [loss]: one time per example, drawn as the schedule does, and the mean over examples.

    Returns:
      (params, x0 [B, ...], cond, keys [B]) -> (loss [], metrics [] each); example i depends on
      keys[i] alone.

    Source: Ho et al. 2020 (arXiv:2006.11239), algorithm 1.
    """

    def loss(params: Params, x0: Array, cond: Condition, keys: Key) -> tuple[Array, Metrics]:
        keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
        t = schedule.sample_t(keys[:, 0])
        values, metrics = example_loss(params, x0, t, cond, keys[:, 1:])
        return jnp.mean(values), {name: jnp.mean(value) for name, value in metrics.items()}

    return loss
