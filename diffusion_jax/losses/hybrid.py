"""Losses that learn the variance: the hybrid of L_simple and the bound, and the bound alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from diffusion_jax.core.arrays import per_image_normal
from diffusion_jax.core.chain import check_discrete, following_level, previous_level
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.denoiser import (
    apply_network,
    network_time,
    split_output,
    variance_fields,
)
from diffusion_jax.core.forward import add_noise
from diffusion_jax.core.parameterization import Parameterization
from diffusion_jax.core.schedules import NoiseSchedule
from diffusion_jax.core.types import (
    Array,
    Key,
    Network,
    NoiseLevel,
    Params,
    Prediction,
)
from diffusion_jax.losses.base import ExampleLoss, ExampleMetrics
from diffusion_jax.losses.vlb import IMAGE_HALF_BIN, check_decoder, vlb_term
from diffusion_jax.losses.weights import Uniform, WeightPart

# Kind of variance -> meaning of the second half of the network's channels.
_LEARNED = {"learned_range": "range", "learned": "log"}
RESCALINGS = ("steps", "none")
# The T at which both rescalings are the same.
_REFERENCE_STEPS = 1000.0


def _check(variance: str, variances: tuple[str, ...], rescaling: str) -> None:
    if variance not in variances:
        raise ValueError(f"variance must be one of {variances}, got {variance!r}")
    if rescaling not in RESCALINGS:
        raise ValueError(f"rescaling must be one of {RESCALINGS}, got {rescaling!r}")


def _bound(schedule: NoiseSchedule, *, variance: str, half_bin: float, cdf: str) -> Callable:
    """(prediction, x0, x, level) -> the bound's term for the step of training from level, [B]."""

    def bound(prediction: Prediction, x0: Array, x: Array, level: NoiseLevel) -> Array:
        return vlb_term(
            prediction,
            x0,
            x,
            level=level,
            next_level=previous_level(schedule, level.t),
            noisier=following_level(schedule, level.t),
            variance=variance,
            half_bin=half_bin,
            cdf=cdf,
        )

    return bound


@dataclass(frozen=True)
class Hybrid:
    """L_simple for the mean plus a little of the variational bound for the variance.

    loss_t = weight · mean_pixels (network - target)² + factor · L_t, with L_t the term of the
    bound in bits per dimension and no gradient from L_t to what predicts the mean. For uniform t
    with factor = λ T the expectation is L_simple + λ L_vlb, L_vlb the whole sum over T steps.

    Two conventions of the factor are in use, the same at T = 1000:
      "steps": λ T, as in the paper and in improved-diffusion with rescale_learned_sigmas on
        (loss type RESCALED_MSE);
      "none":  1000 λ whatever T is, as in guided-diffusion and with rescale_learned_sigmas off
        (loss type MSE), how the released ADM models were trained.

    Attributes:
      variance: "learned_range" (between log β̃ and log β) or "learned" (the log variance itself);
        the sampler's must be the same.
      vlb_weight: λ.
      rescaling: "steps" or "none".
      weight: of the squared error, as in the simple loss.
      half_bin, cdf: the decoder of the last step, see `discretized_gaussian_log_likelihood`.

    Raises:
      ValueError: if an option is unknown or out of range.

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 16 and section 3.1.
    """

    variance: str = "learned_range"
    vlb_weight: float = 1e-3
    rescaling: str = "steps"
    weight: WeightPart = Uniform()
    half_bin: float = IMAGE_HALF_BIN
    cdf: str = "exact"

    def __post_init__(self):
        _check(self.variance, tuple(_LEARNED), self.rescaling)
        check_decoder(self.half_bin, self.cdf)
        if not (math.isfinite(self.vlb_weight) and self.vlb_weight > 0.0):
            raise ValueError(
                f"vlb_weight must be positive, got {self.vlb_weight}; without the bound nothing "
                "teaches the variance, use the simple loss instead"
            )

    @property
    def learned_variance(self) -> str:
        """What the second half of the network's channels means, for `make_denoiser`."""
        return _LEARNED[self.variance]

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
          network: (params, x, t, cond, keys) -> output with twice x's channels.
          schedule: a discrete one; its neighbouring times are the steps of the bound.
          parameterization: what the first half of the output means.
          time_input: what the network is told about the level.

        Returns:
          (params, x0 [B, ...], t [B], cond, keys [B, 2]) -> (loss [B], {"mse": [B] unweighted,
          "vb": [B] L_t in bits per dimension, without its factor}).

        Raises:
          ValueError: if the schedule is continuous, or the output has not twice x0's channels.
        """
        check_discrete(schedule)
        apply = apply_network(network, parameterization, time_input)
        bound = _bound(schedule, variance=self.variance, half_bin=self.half_bin, cdf=self.cdf)
        steps = schedule.num_timesteps if self.rescaling == "steps" else _REFERENCE_STEPS

        def loss(
            params: Params, x0: Array, t: Array, cond: Condition, keys: Key
        ) -> tuple[Array, ExampleMetrics]:
            level = schedule(t)
            eps = per_image_normal(keys[:, 0], x0)
            x = add_noise(x0, eps, level)
            output = apply(params, x, level, cond, keys[:, 1])
            output, raw = split_output(output, x, self.learned_variance)
            error = output - parameterization.target(x0, eps, level)
            mse = jnp.mean(error**2, axis=tuple(range(1, x0.ndim)))
            prediction = Prediction(
                parameterization.to_x0(jax.lax.stop_gradient(output), x, level),
                **variance_fields(raw, self.learned_variance),
            )
            vb = bound(prediction, x0, x, level)
            total = self.weight(level, parameterization) * mse + self.vlb_weight * steps * vb
            return total, {"mse": mse, "vb": vb}

        return loss


@dataclass(frozen=True)
class VLB:
    """The variational bound alone: loss_t = L_t in bits per dimension, or T L_t.

    The prior term is left out, since nothing of it can be learned. Its terms differ by orders of
    magnitude: draw the times by importance.

    Two scales are in use:
      "none":  L_t, for uniform t a T-th of the bound (loss type KL);
      "steps": T L_t, for uniform t the bound itself (loss type RESCALED_KL).

    Attributes:
      variance: "learned_range", "learned", "small" or "large", see `reverse_log_variance`.
      rescaling: "none" or "steps".
      half_bin, cdf: the decoder of the last step, see `discretized_gaussian_log_likelihood`.

    Raises:
      ValueError: if an option is unknown or out of range.

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 5; Nichol & Dhariwal 2021
    (arXiv:2102.09672), section 3.3.
    """

    variance: str = "learned_range"
    rescaling: str = "none"
    half_bin: float = IMAGE_HALF_BIN
    cdf: str = "exact"

    def __post_init__(self):
        _check(self.variance, (*_LEARNED, "small", "large"), self.rescaling)
        check_decoder(self.half_bin, self.cdf)

    @property
    def learned_variance(self) -> str | None:
        """What the second half of the network's channels means, for `make_denoiser`."""
        return _LEARNED.get(self.variance)

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
          network: (params, x, t, cond, keys) -> output with x's channels, or twice as many
            where the variance is learned.
          schedule: a discrete one; its neighbouring times are the steps of the bound.
          parameterization: what the (first half of the) output means.
          time_input: what the network is told about the level.

        Returns:
          (params, x0 [B, ...], t [B], cond, keys [B, 2]) -> (loss [B], {"vb": [B] L_t in bits per
          dimension}).

        Raises:
          ValueError: if the schedule is continuous, or the output's channels do not fit.
        """
        check_discrete(schedule)
        apply = apply_network(network, parameterization, time_input)
        bound = _bound(schedule, variance=self.variance, half_bin=self.half_bin, cdf=self.cdf)
        factor = schedule.num_timesteps if self.rescaling == "steps" else 1.0

        def loss(
            params: Params, x0: Array, t: Array, cond: Condition, keys: Key
        ) -> tuple[Array, ExampleMetrics]:
            level = schedule(t)
            x = add_noise(x0, per_image_normal(keys[:, 0], x0), level)
            output = apply(params, x, level, cond, keys[:, 1])
            output, raw = split_output(output, x, self.learned_variance)
            fields = variance_fields(raw, self.learned_variance)
            prediction = Prediction(parameterization.to_x0(output, x, level), **fields)
            vb = bound(prediction, x0, x, level)
            return factor * vb, {"vb": vb}

        return loss
