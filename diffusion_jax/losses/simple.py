"""The simple denoising loss: weighted mean squared error of the network's own target."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp

from diffusion_jax.core.arrays import per_image_normal
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.denoiser import apply_network, network_time
from diffusion_jax.core.forward import add_noise
from diffusion_jax.core.parameterization import Parameterization
from diffusion_jax.core.schedules import NoiseSchedule
from diffusion_jax.core.types import Array, Key, Network, NoiseLevel, Params
from diffusion_jax.losses.base import ExampleLoss, ExampleMetrics
from diffusion_jax.losses.weights import Uniform, WeightPart


@dataclass(frozen=True)
class Simple:
    """E_{t, eps} [ weight(t) · mean_pixels (network - target)² ].

    The mean is over pixels and channels, as in the released code; the paper writes a sum.

    Attributes:
      weight: level [B] -> [B].

    Source: Ho et al. 2020 (arXiv:2006.11239), algorithm 1 and eq. 14.
    """

    weight: WeightPart = Uniform()

    learned_variance = None

    def per_example(
        self,
        network: Network,
        schedule: NoiseSchedule,
        parameterization: Parameterization,
        *,
        time_input: Callable[[NoiseLevel], Array] = network_time,
    ) -> ExampleLoss:
        """The loss of every example at given times.

        Args:
          network: (params, x, t, cond, keys) -> output of x's shape.
          schedule: gives the level.
          parameterization: gives the target.
          time_input: what the network is told about the level.

        Returns:
          (params, x0 [B, ...], t [B], cond, keys [B, 2]) -> (loss [B], {}). There are no
          metrics beside the loss.

        Raises:
          ValueError: if the network's output has not x0's shape.
        """
        apply = apply_network(network, parameterization, time_input)

        def loss(
            params: Params, x0: Array, t: Array, cond: Condition, keys: Key
        ) -> tuple[Array, ExampleMetrics]:
            level = schedule(t)
            eps = per_image_normal(keys[:, 0], x0)
            output = apply(params, add_noise(x0, eps, level), level, cond, keys[:, 1])
            if output.shape != x0.shape:
                raise ValueError(f"the network returned {output.shape} for x0 of {x0.shape}")
            error = output - parameterization.target(x0, eps, level)
            per_image = jnp.mean(error**2, axis=tuple(range(1, x0.ndim)))
            return self.weight(level, parameterization) * per_image, {}

        return loss
