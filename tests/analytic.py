"""Closed forms that samplers, guidance and losses are held against: Gaussian data, exactly."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import NoiseLevel, Prediction
from diffusion_jax.samplers.base import StepInfo


def _numpy_like(x: Any) -> Any:
    return jnp if isinstance(x, jax.Array) else np


def _column(xp: Any, rate: Any, x: Any) -> Any:
    return xp.broadcast_to(xp.asarray(rate, x.dtype), x.shape[:1])[:, None]


@dataclass(frozen=True)
class Mixture:
    """A mixture of axis-aligned Gaussians in D dimensions; its components are the classes.

    Attributes:
      weights: [K], summing to one.
      means, stds: [K][D].
    """

    weights: tuple[float, ...]
    means: tuple[tuple[float, ...], ...]
    stds: tuple[tuple[float, ...], ...]

    def _log_joint(self, x, level):
        """log w_k N(x; α μ_k, α² s_k² + σ²) [B, K] and the variance [B, K, D]."""
        xp = _numpy_like(x)
        alpha, sigma = _column(xp, level.alpha, x), _column(xp, level.sigma, x)
        mean, std = xp.asarray(self.means, x.dtype)[None], xp.asarray(self.stds, x.dtype)[None]
        variance = alpha[..., None] ** 2 * std**2 + sigma[..., None] ** 2
        residual = x[:, None, :] - alpha[..., None] * mean
        log_density = -0.5 * (residual**2 / variance + xp.log(2 * np.pi * variance)).sum(-1)
        return xp.log(xp.asarray(self.weights, x.dtype))[None] + log_density, residual, variance

    def class_probability(self, x, level):
        """p(k | x_t) [B, K], by Bayes' rule."""
        xp = _numpy_like(x)
        log_joint, _, _ = self._log_joint(x, level)
        joint = xp.exp(log_joint - log_joint.max(-1, keepdims=True))
        return joint / joint.sum(-1, keepdims=True)

    def log_density(self, x, level):
        """log p(x_t), [B]."""
        xp = _numpy_like(x)
        log_joint, _, _ = self._log_joint(x, level)
        top = log_joint.max(-1)
        return top + xp.log(xp.exp(log_joint - top[:, None]).sum(-1))

    def log_class(self, x, level, labels):
        """log p(k_b | x_t) of each example's own class k_b, [B], by Bayes' rule."""
        xp = _numpy_like(x)
        log_joint, _, _ = self._log_joint(x, level)
        wanted = xp.take_along_axis(log_joint, xp.asarray(labels)[:, None], axis=1)[:, 0]
        return wanted - self.log_density(x, level)

    def x0(self, x, level, allowed=None):
        """E[x0 | x_t], [B, D], given that the class is one of those `allowed` [B, K] (0 or 1)."""
        xp = _numpy_like(x)
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

    def denoise(self, x, level, cond=None):
        """The exact denoiser; cond.vector [B, K] says which classes are possible."""
        return Prediction(self.x0(x, level, None if cond is None else cond.vector))

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Samples of the data, [count, D]."""
        component = rng.choice(len(self.weights), count, p=self.weights)
        noise = rng.standard_normal((count, len(self.means[0])))
        return np.asarray(self.means)[component] + np.asarray(self.stds)[component] * noise

    def classes(self, labels: Any) -> Condition:
        """The condition "class k" for each label, [B]."""
        return Condition(vector=jnp.eye(len(self.weights))[jnp.asarray(labels)])

    def any_class(self, count: int) -> Condition:
        """The null condition."""
        return Condition(vector=jnp.ones((count, len(self.weights))))


MIXTURE = Mixture(
    weights=(0.3, 0.5, 0.2),
    means=((-1.2, 0.3), (0.8, -0.6), (0.2, 1.1)),
    stds=((0.35, 0.25), (0.3, 0.4), (0.25, 0.3)),
)


def gaussian(mean: float, std: float) -> Mixture:
    """One Gaussian in one dimension."""
    return Mixture((1.0,), ((mean,),), ((std,),))


def gaussian_flow(x, level: NoiseLevel, next_level: NoiseLevel, *, mean: float, std: float):
    """The exact probability-flow map of Gaussian data from one level to another.

    x_s = α_s m + √((α_s² Λ + σ_s²) / (α_t² Λ + σ_t²)) (x_t - α_t m).
    """
    before = level.alpha**2 * std**2 + level.sigma**2
    after = next_level.alpha**2 * std**2 + next_level.sigma**2
    return next_level.alpha * mean + np.sqrt(after / before) * (x - level.alpha * mean)


def ode_solution(mixture: Mixture, x, sigma_max: float, sigma_min: float, steps: int = 512):
    """The probability flow from sigma_max to sigma_min at alpha = 1, by RK4 in log sigma."""

    def slope(x, log_sigma):
        level = NoiseLevel(np.asarray(0.0), np.asarray(1.0), np.exp(log_sigma))
        return x - mixture.x0(x, level)

    grid = np.linspace(np.log(sigma_max), np.log(sigma_min), steps + 1)
    for here, there in zip(grid[:-1], grid[1:], strict=True):
        h, middle = there - here, (here + there) / 2
        k1 = slope(x, here)
        k2 = slope(x + h / 2 * k1, middle)
        k3 = slope(x + h / 2 * k2, middle)
        k4 = slope(x + h * k3, there)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def optimal_var_frac(level: NoiseLevel, next_level: NoiseLevel, data_variance: float):
    """Where the exact reverse variance of Gaussian data lies between log β̃ (0) and log β (1).

    With numpy levels in float64, with jax levels inside of a traced step.

    Var(x_s | x_t) = β̃ + (α_s σ²_{t|s} / σ_t²)² Λ σ_t² / (α_t² Λ + σ_t²).
    """
    forward = level.sigma**2 - (level.alpha / next_level.alpha * next_level.sigma) ** 2
    small = forward * next_level.sigma**2 / level.sigma**2
    towards_x0 = next_level.alpha * forward / level.sigma**2
    of_x0 = data_variance * level.sigma**2 / (level.alpha**2 * data_variance + level.sigma**2)
    best = small + towards_x0**2 * of_x0
    xp = _numpy_like(best)
    return xp.log(best / small) / xp.log(forward / small)


def in_vp(grid: Any) -> Any:
    """The same noise-to-signal ratios on a variance-preserving path."""
    t, alpha, sigma = grid.levels
    norm = jnp.sqrt(alpha**2 + sigma**2)
    return grid._replace(levels=NoiseLevel(t, alpha / norm, sigma / norm))


@functools.partial(jax.jit, static_argnames=("sampler", "denoise"))
def _probe(sampler, denoise, here, there):
    probes = jnp.asarray([[0.0], [1.0], [0.0]])
    keys = jax.random.split(jax.random.key(0), 3)

    def one(level, next_level):
        state = sampler.step(
            keys,
            lambda x, here: denoise(x, here, level, next_level),
            sampler.init(probes),
            level,
            next_level,
            StepInfo(0, 0, 1),
        )
        return state.x[:, 0]

    return jax.vmap(one)(here, there)


def affine_steps(sampler: Any, denoise: Callable, grid: Any) -> tuple[np.ndarray, ...]:
    """Every step of a sampler without memory as x_s = a x_t + b z + c, for affine denoisers.

    The caller must have replaced the sampler's noise by [0, 0, 1] for the three probes.

    Args:
      denoise: (x [3, 1], level, start and end of the step) -> Prediction.

    Returns:
      a, b, c, each [N].
    """
    here = NoiseLevel(*(field[:-1] for field in grid.levels))
    there = NoiseLevel(*(field[1:] for field in grid.levels))
    out = np.asarray(_probe(sampler, denoise, here, there))[: int(grid.stop)]
    return out[:, 1] - out[:, 0], out[:, 2] - out[:, 0], out[:, 0]


def propagate_variance(a: np.ndarray, b: np.ndarray, variance: float) -> float:
    """Variance after the affine steps x <- a x + b z + c."""
    for gain, noise in zip(a, b, strict=True):
        variance = gain**2 * variance + noise**2
    return variance
