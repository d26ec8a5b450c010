"""What a loss is: a value per example at given times, and how times are drawn and averaged."""

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_jax.core.condition import Condition
from diffusion_jax.core.denoiser import network_time
from diffusion_jax.core.parameterization import Parameterization
from diffusion_jax.core.part_mean import Ratio
from diffusion_jax.core.schedules import EDM, NoiseSchedule
from diffusion_jax.core.types import Array, Key, Metrics, Network, NoiseLevel, Params

# One value per example, [B] each.
ExampleMetrics = Mapping[str, Array]
# (params, x0 [B, ...], t [B], cond, keys [B, 2]) -> (loss [B], metrics [B] each); the first key
# of an example is for its noise, the second for dropout.
ExampleLoss = Callable[[Params, Array, Array, Condition, Key], tuple[Array, ExampleMetrics]]
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


def quarter_of_time(schedule: NoiseSchedule, t: Array) -> Array:
    """Which quarter of the schedule's times t lies in, 0 the least noisy.

    k = min(⌊4 u⌋, 3) with u = t / T for discrete schedules and u = (t - t_min) / (t_max - t_min)
    for continuous ones. The time of EDM is σ itself, which spans decades and is drawn by its
    logarithm: there u = log(t / t_min) / log(t_max / t_min). Times outside belong to the end.

    Args:
      t: [B].

    Returns:
      [B] int32.

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672), the released code; continuous schedules
    are a convention of this library.
    """
    if schedule.num_timesteps is not None:
        # In integers, since a rounded t / T may fall short of the edge it lies on.
        return jnp.clip(4 * t.astype(jnp.int32) // schedule.num_timesteps, 0, 3)
    if isinstance(schedule, EDM):
        u = jnp.log(t / schedule.t_min) / math.log(schedule.t_max / schedule.t_min)
    else:
        u = (t - schedule.t_min) / (schedule.t_max - schedule.t_min)
    return jnp.clip(jnp.floor(4.0 * u), 0, 3).astype(jnp.int32)


def mean_metrics(
    metrics: ExampleMetrics, weight: Array | float, *, loss: Array, quarter: Array
) -> Metrics:
    """What a batch reports: weighted means, and the plain loss of every quarter of time.

    A sampler of times that favours some changes how often a quarter is seen, so its loss is
    reported before the importance weight.

    Args:
      metrics: [B] each.
      weight: [B] or a number, multiplies them.
      loss: [B], without a weight.
      quarter: [B] int32, see `quarter_of_time`.

    Returns:
      metrics [] each, and a Ratio under each of loss_q0 … loss_q3.

    Raises:
      ValueError: if a metric has one of these names.

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672), the released code, which multiplies the
    losses by the weight.
    """
    parts = {f"loss_q{k}": quarter == k for k in range(4)}
    taken = sorted(parts.keys() & metrics.keys())
    if taken:
        raise ValueError(f"a loss may not name its own metrics {taken}; rename them")
    means = {name: jnp.mean(weight * value) for name, value in metrics.items()}
    quarters = {
        # Not a product, in which a value that is not finite would reach every quarter.
        name: Ratio(jnp.mean(jnp.where(part, loss, 0.0)), jnp.mean(part, dtype=jnp.float32))
        for name, part in parts.items()
    }
    return {**means, **quarters}


def averaged(example_loss: ExampleLoss, schedule: NoiseSchedule) -> DiffusionLoss:
    """E_t [loss]: one time per example, drawn as the schedule does, and the mean over examples.

    Returns:
      (params, x0 [B, ...], cond, keys [B]) -> (loss [], metrics [] each, see `mean_metrics`);
      example i depends on keys[i] alone.

    Source: Ho et al. 2020 (arXiv:2006.11239), algorithm 1.
    """

    def loss(params: Params, x0: Array, cond: Condition, keys: Key) -> tuple[Array, Metrics]:
        keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
        t = schedule.sample_t(keys[:, 0])
        values, metrics = example_loss(params, x0, t, cond, keys[:, 1:])
        quarter = quarter_of_time(schedule, t)
        return jnp.mean(values), mean_metrics(metrics, 1.0, loss=values, quarter=quarter)

    return loss
