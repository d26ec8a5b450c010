"""Parameterizations: what the network's output means, as two functions each."""

from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp

from diffusion_jax.core.arrays import per_example
from diffusion_jax.core.types import Array, NoiseLevel


class Parameterization(Protocol):
    """Two functions between the network's output and x0, and the scale of its input."""

    def to_x0(self, output: Array, x: Array, level: NoiseLevel) -> Array:
        """(network output, x_t, level) -> x0, all [B, ...]."""
        ...

    def target(self, x0: Array, eps: Array, level: NoiseLevel) -> Array:
        """(x0, eps, level) -> what the network should say, [B, ...]."""
        ...

    def scale_input(self, x: Array, level: NoiseLevel) -> Array:
        """(x_t, level) -> what the network is shown, [B, ...]."""
        ...


def _rates(level: NoiseLevel, x: Array) -> tuple[Array, Array]:
    return per_example(level.alpha, x), per_example(level.sigma, x)


@dataclass(frozen=True)
class Eps:
    """The network predicts the noise: x0 = (x_t - σ ε) / α.

    Undefined where alpha = 0; use V, X0 or FlowVelocity with zero terminal SNR. Rounding errors
    of x0 grow as 1 / α.

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 15.
    """

    def to_x0(self, output: Array, x: Array, level: NoiseLevel) -> Array:
        alpha, sigma = _rates(level, x)
        return (x - sigma * output) / alpha

    def target(self, x0: Array, eps: Array, level: NoiseLevel) -> Array:
        del x0, level
        return eps

    def scale_input(self, x: Array, level: NoiseLevel) -> Array:
        del level
        return x


@dataclass(frozen=True)
class X0:
    """The network predicts the clean data.

    Source: Ho et al. 2020 (arXiv:2006.11239), section 3.2.
    """

    def to_x0(self, output: Array, x: Array, level: NoiseLevel) -> Array:
        del x, level
        return output

    def target(self, x0: Array, eps: Array, level: NoiseLevel) -> Array:
        del eps, level
        return x0

    def scale_input(self, x: Array, level: NoiseLevel) -> Array:
        del level
        return x


@dataclass(frozen=True)
class V:
    """The network predicts v = α ε - σ x0, hence x0 = (α x_t - σ v) / (α² + σ²).

    Source: Salimans & Ho 2022 (arXiv:2202.00512), section 4.
    """

    def to_x0(self, output: Array, x: Array, level: NoiseLevel) -> Array:
        alpha, sigma = _rates(level, x)
        return (alpha * x - sigma * output) / (alpha**2 + sigma**2)

    def target(self, x0: Array, eps: Array, level: NoiseLevel) -> Array:
        alpha, sigma = _rates(level, x0)
        return alpha * eps - sigma * x0

    def scale_input(self, x: Array, level: NoiseLevel) -> Array:
        del level
        return x


@dataclass(frozen=True)
class Score:
    """The network predicts the score ∇ log p_t(x_t) = -ε / σ: x0 = (x_t + σ² s) / α.

    Undefined where alpha = 0, and the target where sigma = 0. Rounding errors of x0 grow as
    1 / α, as with Eps.

    Source: Song et al. 2021 (arXiv:2011.13456), eq. 7.
    """

    def to_x0(self, output: Array, x: Array, level: NoiseLevel) -> Array:
        alpha, sigma = _rates(level, x)
        return (x + sigma**2 * output) / alpha

    def target(self, x0: Array, eps: Array, level: NoiseLevel) -> Array:
        del x0
        return -eps / per_example(level.sigma, eps)

    def scale_input(self, x: Array, level: NoiseLevel) -> Array:
        del level
        return x


@dataclass(frozen=True)
class FlowVelocity:
    """The network predicts u = ε - x0, hence x0 = (x_t - σ u) / (α + σ).

    u is the velocity dx_t/dt of the straight path α = 1 - t, σ = t; on another path it is the
    same target, not that path's own velocity. Defined at every level.

    Attributes:
      towards_data: the network says -u instead, for models whose time runs from noise to data.

    Source: Liu et al. 2022 (arXiv:2209.03003), eq. 1; Esser et al. 2024 (arXiv:2403.03206),
    section 2, with their direction of time.
    """

    towards_data: bool = False

    def to_x0(self, output: Array, x: Array, level: NoiseLevel) -> Array:
        alpha, sigma = _rates(level, x)
        return (x - sigma * (-output if self.towards_data else output)) / (alpha + sigma)

    def target(self, x0: Array, eps: Array, level: NoiseLevel) -> Array:
        del level
        return x0 - eps if self.towards_data else eps - x0

    def scale_input(self, x: Array, level: NoiseLevel) -> Array:
        del level
        return x


@dataclass(frozen=True)
class EDMPreconditioning:
    """The network predicts F of D(x) = c_skip x + c_out F(c_in x), x = x_t / α.

    With σ = σ_t / α_t and the data's standard deviation σ_d:
    c_skip = σ_d² / (σ² + σ_d²), c_out = σ σ_d / √(σ² + σ_d²), c_in = 1 / √(σ² + σ_d²).
    Input and target of F then have unit variance at every level. Undefined where alpha = 0, and
    the target where sigma = 0.

    Attributes:
      sigma_data: σ_d.
      negated: the network predicts -F instead, which at σ_d = 1 is v.

    Raises:
      ValueError: if sigma_data is not positive.

    Source: Karras et al. 2022 (arXiv:2206.00364), eq. 7 and table 1.
    """

    sigma_data: float = 0.5
    negated: bool = False

    def __post_init__(self):
        if self.sigma_data <= 0.0:
            raise ValueError(f"sigma_data must be positive, got {self.sigma_data}")

    def _coefficients(self, level: NoiseLevel, x: Array) -> tuple[Array, Array, Array]:
        alpha, sigma = _rates(level, x)
        ratio = sigma / alpha
        total = ratio**2 + self.sigma_data**2
        c_out = ratio * self.sigma_data / jnp.sqrt(total)
        return self.sigma_data**2 / total, -c_out if self.negated else c_out, alpha

    def to_x0(self, output: Array, x: Array, level: NoiseLevel) -> Array:
        c_skip, c_out, alpha = self._coefficients(level, x)
        return c_skip * (x / alpha) + c_out * output

    def target(self, x0: Array, eps: Array, level: NoiseLevel) -> Array:
        c_skip, c_out, alpha = self._coefficients(level, x0)
        noisy = x0 + per_example(level.sigma, x0) / alpha * eps
        return (x0 - c_skip * noisy) / c_out

    def scale_input(self, x: Array, level: NoiseLevel) -> Array:
        alpha, sigma = _rates(level, x)
        # 1 / (α √(σ²/α² + σ_d²)), written so that α = 0 is no special case.
        return x / jnp.sqrt(sigma**2 + (alpha * self.sigma_data) ** 2)


@dataclass(frozen=True)
class ConsistencyPreconditioning:
    """The network predicts F of f(x) = c_skip x + c_out F(c_in x), x = x_t / α, with f(x) = x at ε.

    EDM's coefficients moved to the least noise ε = sigma_min, with σ = σ_t / α_t:
    c_skip = σ_d² / ((σ - ε)² + σ_d²), c_out = (σ - ε) σ_d / √(σ² + σ_d²), c_in = 1 / √(σ² + σ_d²).
    f is what a consistency model says: where the flow through x arrives at ε. Undefined where
    alpha = 0, and the target where σ = ε.

    Attributes:
      sigma_data: σ_d.
      sigma_min: ε.

    Raises:
      ValueError: if sigma_data is not positive or sigma_min is negative.

    Source: Song et al. 2023 (arXiv:2303.01469), appendix C.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002

    def __post_init__(self):
        if self.sigma_data <= 0.0 or self.sigma_min < 0.0:
            raise ValueError(
                "expected sigma_data > 0 and sigma_min >= 0, got "
                f"{self.sigma_data} and {self.sigma_min}"
            )

    def _coefficients(self, level: NoiseLevel, x: Array) -> tuple[Array, Array, Array]:
        alpha, sigma = _rates(level, x)
        ratio, data = sigma / alpha, self.sigma_data
        above = ratio - self.sigma_min
        return data**2 / (above**2 + data**2), above * data / jnp.sqrt(ratio**2 + data**2), alpha

    def to_x0(self, output: Array, x: Array, level: NoiseLevel) -> Array:
        c_skip, c_out, alpha = self._coefficients(level, x)
        return c_skip * (x / alpha) + c_out * output

    def target(self, x0: Array, eps: Array, level: NoiseLevel) -> Array:
        c_skip, c_out, alpha = self._coefficients(level, x0)
        noisy = x0 + per_example(level.sigma, x0) / alpha * eps
        return (x0 - c_skip * noisy) / c_out

    def scale_input(self, x: Array, level: NoiseLevel) -> Array:
        return EDMPreconditioning(self.sigma_data).scale_input(x, level)


PARAMETERIZATIONS = {
    "eps": Eps,
    "x0": X0,
    "v": V,
    "score": Score,
    "flow": FlowVelocity,
    "edm": EDMPreconditioning,
    "consistency": ConsistencyPreconditioning,
}
