"""Mixtures of Gaussians, whose denoiser, density and probability flow are known exactly."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.condition import Condition
from diffusion_jax.core.discrete import numpy_like
from diffusion_jax.core.types import Array, NoiseLevel, Prediction

# Noise-to-signal ratios that stand for infinity and 0. A flow that starts at the one or ends at
# the other misses the limit by about 1e-12 and 1e-9 of the data's scale.
_NO_SIGNAL, _CLEAN = 1e6, 1e-5


def _column(xp: Any, rate: Any, x: Any) -> Any:
    return xp.broadcast_to(xp.asarray(rate, x.dtype), x.shape[:1])[:, None]


@dataclass(frozen=True)
class Mixture:
    """A mixture of axis-aligned Gaussians in D dimensions; its components are the classes.

    p(x_t) = Σ_k w_k N(α μ_k, α² s_k² + σ²) on every path, so the exact denoiser is
    x̂0 = Σ_k p(k | x_t) (μ_k + α s_k² / (α² s_k² + σ²) (x_t - α μ_k)). Every method takes numpy
    (and computes in float64) or jax arrays, x [B, D] and rates [] or [B].

    Attributes:
      weights: [K], summing to one.
      means, stds: [K][D].

    Raises:
      ValueError: if the shapes do not fit, a std is not positive, or the weights are no
        probabilities.

    Source: Bayes' rule for Gaussians; Karras et al. 2022 (arXiv:2206.00364), appendix B.3, for
    the denoiser of a finite mixture.
    """

    weights: tuple[float, ...]
    means: tuple[tuple[float, ...], ...]
    stds: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        shapes = [np.shape(self.weights), np.shape(self.means)[:1], np.shape(self.stds)[:1]]
        if len(set(shapes)) > 1 or np.shape(self.means) != np.shape(self.stds):
            raise ValueError(
                "expected weights [K], means [K][D] and stds [K][D], got shapes "
                f"{np.shape(self.weights)}, {np.shape(self.means)} and {np.shape(self.stds)}"
            )
        if not (np.min(self.weights) > 0.0 and np.isclose(np.sum(self.weights), 1.0)):
            raise ValueError(f"weights must be positive and sum to 1, got {self.weights}")
        if not np.min(self.stds) > 0.0:
            raise ValueError(f"stds must be positive, got {self.stds}")

    @property
    def dim(self) -> int:
        """D."""
        return len(self.means[0])

    def mean(self) -> np.ndarray:
        """Mean of the data, [D]."""
        return np.asarray(self.weights) @ np.asarray(self.means)

    def _log_joint(self, x, level):
        """log w_k N(x; α μ_k, α² s_k² + σ²) [B, K] and the variance [B, K, D]."""
        xp = numpy_like(x)
        alpha, sigma = _column(xp, level.alpha, x), _column(xp, level.sigma, x)
        mean, std = xp.asarray(self.means, x.dtype)[None], xp.asarray(self.stds, x.dtype)[None]
        variance = alpha[..., None] ** 2 * std**2 + sigma[..., None] ** 2
        residual = x[:, None, :] - alpha[..., None] * mean
        log_density = -0.5 * (residual**2 / variance + xp.log(2 * np.pi * variance)).sum(-1)
        return xp.log(xp.asarray(self.weights, x.dtype))[None] + log_density, residual, variance

    def class_probability(self, x: Array, level: NoiseLevel) -> Array:
        """p(k | x_t) [B, K], by Bayes' rule."""
        xp = numpy_like(x)
        log_joint, _, _ = self._log_joint(x, level)
        joint = xp.exp(log_joint - log_joint.max(-1, keepdims=True))
        return joint / joint.sum(-1, keepdims=True)

    def log_density(self, x: Array, level: NoiseLevel) -> Array:
        """log p(x_t), [B]."""
        xp = numpy_like(x)
        log_joint, _, _ = self._log_joint(x, level)
        top = log_joint.max(-1)
        return top + xp.log(xp.exp(log_joint - top[:, None]).sum(-1))

    def log_class(self, x: Array, level: NoiseLevel, labels: Array) -> Array:
        """log p(k_b | x_t) of each example's own class k_b, [B], by Bayes' rule."""
        xp = numpy_like(x)
        log_joint, _, _ = self._log_joint(x, level)
        wanted = xp.take_along_axis(log_joint, xp.asarray(labels)[:, None], axis=1)[:, 0]
        return wanted - self.log_density(x, level)

    def x0(self, x: Array, level: NoiseLevel, allowed: Array | None = None) -> Array:
        """E[x0 | x_t], [B, D], given that the class is one of those `allowed` [B, K] (0 or 1)."""
        xp = numpy_like(x)
        log_joint, residual, variance = self._log_joint(x, level)
        joint = xp.exp(log_joint - log_joint.max(-1, keepdims=True))
        if allowed is not None:
            # Classes that are not allowed must not set the scale: far away they would swallow it.
            masked = xp.where(allowed > 0, log_joint, -np.inf)
            joint = xp.exp(masked - masked.max(-1, keepdims=True))
        responsibility = joint / joint.sum(-1, keepdims=True)
        mean, std = xp.asarray(self.means, x.dtype)[None], xp.asarray(self.stds, x.dtype)[None]
        alpha = _column(xp, level.alpha, x)[..., None]
        posterior = mean + alpha * std**2 / variance * residual
        return (responsibility[..., None] * posterior).sum(-2)

    def denoise(self, x: Array, level: NoiseLevel, cond: Condition | None = None) -> Prediction:
        """The exact denoiser; cond.vector [B, K] says which classes are possible."""
        return Prediction(self.x0(x, level, None if cond is None else cond.vector))

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Samples of the data, [count, D] float64."""
        component = rng.choice(len(self.weights), count, p=self.weights)
        noise = rng.standard_normal((count, self.dim))
        return np.asarray(self.means)[component] + np.asarray(self.stds)[component] * noise

    def classes(self, labels: Any) -> Condition:
        """The condition "class k" for each label, [B]."""
        return Condition(vector=jnp.eye(len(self.weights))[jnp.asarray(labels)])

    def any_class(self, count: int) -> Condition:
        """The null condition."""
        return Condition(vector=jnp.ones((count, len(self.weights))))


# What samplers and schedules are compared on: three classes in the plane, of unequal shape.
MIXTURE = Mixture(
    weights=(0.3, 0.5, 0.2),
    means=((-1.2, 0.3), (0.8, -0.6), (0.2, 1.1)),
    stds=((0.35, 0.25), (0.3, 0.4), (0.25, 0.3)),
)


def gaussian(mean: float, std: float) -> Mixture:
    """One Gaussian in one dimension.

    Source: none; a convention of this library.
    """
    return Mixture((1.0,), ((mean,),), ((std,),))


@functools.partial(jax.jit, static_argnames=("mixture", "num_steps"))
def _flow(mixture: Mixture, x: Array, log_start: Array, log_end: Array, num_steps: int) -> Array:
    h = (log_end - log_start) / num_steps
    one = jnp.ones((), x.dtype)

    def slope(x, log_sigma):
        return x - mixture.x0(x, NoiseLevel(log_sigma, one, jnp.exp(log_sigma)))

    def step(i, x):
        here = log_start + i * h
        k1 = slope(x, here)
        k2 = slope(x + h / 2 * k1, here + h / 2)
        k3 = slope(x + h / 2 * k2, here + h / 2)
        k4 = slope(x + h * k3, here + h)
        return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    return jax.lax.fori_loop(0, num_steps, step, x)


def exact_flow(
    mixture: Mixture,
    x: np.ndarray,
    level: NoiseLevel,
    next_level: NoiseLevel,
    *,
    num_steps: int = 4096,
) -> np.ndarray:
    """Where the probability flow takes x_t: its solution from one level to another, in float64.

    With u = x / α and r = σ / α the flow of every path is du / d log r = u - x̂0(u, r), solved by
    the classical Runge-Kutta method with equal steps in log r. From a level without signal it
    starts at r = 1e6, where the flow is still a straight line, and at a level without noise it
    ends with x̂0 at r = 1e-5.

    Args:
      x: [B, D] at `level`.
      level, next_level: [] each, from noisier to cleaner or back.
      num_steps: N; the error falls as N⁻⁴. 4096 leave nothing but rounding, about 1e-12.

    Returns:
      [B, D] float64 at `next_level`.

    Raises:
      ValueError: if num_steps is below 1 or the start has no noise, from where no flow is unique.

    Source: Song et al. 2021 (arXiv:2011.13456), eq. 13; Karras et al. 2022 (arXiv:2206.00364),
    eq. 1, for the coordinates.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    alpha, sigma, next_alpha, next_sigma = (
        float(rate) for rate in (level.alpha, level.sigma, next_level.alpha, next_level.sigma)
    )
    if sigma == 0.0:
        raise ValueError(
            "the flow cannot start where sigma is 0; start at the cleanest noisy level"
        )
    x = np.asarray(x, np.float64)
    if alpha > 0.0:
        start, u = sigma / alpha, x / alpha
    else:
        start, u = _NO_SIGNAL, mixture.mean() + _NO_SIGNAL / sigma * x
    end = next_sigma / next_alpha if next_alpha > 0.0 else _NO_SIGNAL
    end = max(end, _CLEAN)
    with jax.enable_x64(True):
        args = (jnp.asarray(value, jnp.float64) for value in (u, np.log(start), np.log(end)))
        u = np.asarray(_flow(mixture, *args, num_steps=num_steps))
    if next_sigma == 0.0:
        last = NoiseLevel(np.asarray(end), np.asarray(1.0), np.asarray(end))
        return next_alpha * np.asarray(mixture.x0(u, last))
    if next_alpha == 0.0:
        return (u - mixture.mean()) * (next_sigma / _NO_SIGNAL)
    return next_alpha * u
