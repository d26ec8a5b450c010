"""Linear multistep steps: a polynomial through past noise predictions, integrated exactly."""

from collections.abc import Sequence

import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.types import Array, NoiseLevel
from diffusion_jax.samplers.base import Denoise, noise_from_x0

STARTS = ("euler", "runge_kutta")
# ∫_0^1 τ^k dτ for k = 1, 2, 3.
UNIFORM_MOMENTS = (1.0 / 2.0, 1.0 / 3.0, 1.0 / 4.0)


@struct.dataclass
class NoiseHistory:
    """The sample and what was predicted before, newest first.

    Attributes:
      x: [B, ...] the sample.
      eps: past ε̂, [B, ...] each; zero where there is none yet.
      ratio: [] each, σ/α where they were made; infinite where there is none yet.

    Source: none; a convention of this library.
    """

    x: Array
    eps: tuple[Array, ...]
    ratio: tuple[Array, ...]


def no_history(x_T: Array, length: int) -> NoiseHistory:
    """The state before the first step.

    Source: none; a convention of this library.
    """
    missing = jnp.asarray(jnp.inf, x_T.dtype)
    return NoiseHistory(x_T, (jnp.zeros_like(x_T),) * length, (missing,) * length)


def remember(state: NoiseHistory, x: Array, eps: Array, ratio: Array) -> NoiseHistory:
    """The state after a step from σ/α = ratio, where ε̂ was eps, to x.

    Source: none; a convention of this library.
    """
    length = len(state.eps)
    ratio = jnp.asarray(ratio, state.x.dtype)
    return NoiseHistory(x, (eps, *state.eps)[:length], (ratio, *state.ratio)[:length])


def noise_to_signal(level: NoiseLevel) -> Array:
    """σ/α, infinite where alpha = 0.

    Source: none; the coordinate of Karras et al. 2022 (arXiv:2206.00364).
    """
    has_signal = level.alpha > 0
    return jnp.where(has_signal, level.sigma / jnp.where(has_signal, level.alpha, 1.0), jnp.inf)


def usable_nodes(nodes: Sequence[Array]) -> tuple[Array, ...]:
    """For each node of a history whether it and all newer ones are finite and distinct.

    Source: none; a convention of this library.
    """
    usable, newer, all_newer = [], 0.0, True
    for node in nodes:
        all_newer = all_newer & jnp.isfinite(node) & (node != newer)
        usable.append(all_newer)
        newer = node
    return tuple(usable)


def integral_beyond_euler(
    eps: Array,
    history: Sequence[Array],
    nodes: Sequence[Array],
    usable: Sequence[Array],
    moments: Sequence[Array | float],
) -> Array:
    """∫_0^1 w(τ) (P(τ) - ε̂) dτ, P the polynomial through ε̂ at τ = 0 and the history at its nodes.

    In Newton's form, P - ε̂ = Σ_k ε̂[0, τ_1 … τ_k] τ (τ - τ_1) … (τ - τ_{k-1}): divided differences
    of what is alike, so that float32 keeps its digits, and each further prediction one more term.

    Args:
      eps: [B, ...] at τ = 0.
      history: [B, ...] each, newest first.
      nodes: [] each, their τ in units of the step, hence negative.
      usable: [] bool each; the terms of the others are left out.
      moments: [] each, ∫_0^1 w(τ) τ^k dτ for k = 1, 2, …, at least as many as the history.

    Returns:
      [B, ...], to be multiplied by the step.

    Source: the Adams-Bashforth methods with variable steps, as in Liu et al. 2022
    (arXiv:2202.09778), eq. 12, for equal ones.
    """
    taus = [0.0]
    for i, (node, use) in enumerate(zip(nodes, usable, strict=True)):
        taus.append(jnp.where(use, node, -1.0 - i))
    differences = [eps, *history]
    # Coefficients of τ, τ², … in τ (τ - τ_1) … (τ - τ_{k-1}).
    basis: list[Array | float] = [1.0]
    total = jnp.zeros_like(eps)
    for k, use in enumerate(usable, start=1):
        differences = [
            (differences[i + 1] - differences[i]) / (taus[i + k] - taus[i])
            for i in range(len(differences) - 1)
        ]
        weight = sum(c * m for c, m in zip(basis, moments, strict=False))
        total = total + jnp.where(use, weight, 0.0) * differences[0]
        basis = [a - taus[k] * b for a, b in zip([0.0, *basis], [*basis, 0.0], strict=True)]
    return total


def runge_kutta_step(
    x: Array,
    eps: Array,
    denoise: Denoise,
    level: NoiseLevel,
    middle: NoiseLevel,
    next_level: NoiseLevel,
) -> Array:
    """One step of the classical Runge-Kutta method in log(σ/α), three more calls.

    With u = x/α and r = σ/α the ODE is du/d log r = r ε̂.

    Args:
      x, eps: [B, ...] at `level`, and ε̂ there.
      middle: halfway in log-SNR.
      next_level: the end; the log-SNR of all three levels is finite.

    Returns:
      x at the end of the step, [B, ...].

    Source: Kutta 1901, the method with weights 1/6, 1/3, 1/3, 1/6; in log-SNR as in Lu et al. 2022
    (arXiv:2206.00927), eq. 3.4.
    """
    ratio = noise_to_signal(level)
    h = jnp.log(noise_to_signal(next_level)) - jnp.log(ratio)

    def slope(u, level):
        at = level.alpha * u
        return noise_to_signal(level) * noise_from_x0(at, denoise(at, level).x0, level)

    u, k1 = x / level.alpha, ratio * eps
    k2 = slope(u + 0.5 * h * k1, middle)
    k3 = slope(u + 0.5 * h * k2, middle)
    k4 = slope(u + h * k3, next_level)
    return next_level.alpha * (u + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4))


def check_start(start: str) -> None:
    """Raises ValueError unless it names a way to begin.

    Source: none; a convention of this library.
    """
    if start not in STARTS:
        raise ValueError(f"start must be one of {STARTS}, got {start!r}")
