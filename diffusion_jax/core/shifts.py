"""Shifts of flow-matching times: towards noise, by resolution, and to a chosen last time."""

import numpy as np

from diffusion_jax.core.types import Array

SHIFTS = ("exponential", "linear")


def _check_times(times: Array) -> np.ndarray:
    times = np.asarray(times, np.float64)
    if np.any((times <= 0.0) | (times > 1.0)):
        raise ValueError(f"times of flow matching lie in (0, 1], got {times}")
    return times


def shift_times(times: Array, shift: float) -> np.ndarray:
    """s t / (1 + (s - 1) t): the odds of noise to signal, times s.

    `FlowMatching(shift)` does the same to every time that it is given; use one of the two.

    Args:
      times: [N] in (0, 1].
      shift: s > 0; above 1 it moves times to the noisy end.

    Raises:
      ValueError: if a time or the shift is out of range.

    Source: Esser et al. 2024 (arXiv:2403.03206), eq. 23.
    """
    if not shift > 0.0:
        raise ValueError(f"shift must be positive, got {shift}")
    times = _check_times(times)
    return shift * times / (1.0 + (shift - 1.0) * times)


def dynamic_shift_times(
    times: Array, mu: float, *, kind: str = "exponential", power: float = 1.0
) -> np.ndarray:
    """e^μ / (e^μ + (1/t - 1)^p) for "exponential", μ in the place of e^μ for "linear".

    With p = 1 this is `shift_times` by e^μ or μ.

    Args:
      times: [N] in (0, 1].
      mu: μ, such as `mu_of_tokens` gives; positive for "linear".
      kind: one of SHIFTS.
      power: p > 0.

    Raises:
      ValueError: if a value is out of range or the kind is unknown.

    Source: Black Forest Labs 2024, FLUX.1, released code (time_shift).
    """
    if kind not in SHIFTS:
        raise ValueError(f"kind must be one of {SHIFTS}, got {kind!r}")
    if not power > 0.0 or (kind == "linear" and not mu > 0.0):
        raise ValueError(
            f"power must be positive, and mu too with kind 'linear', got power = {power}, mu = {mu}"
        )
    scale = np.exp(mu) if kind == "exponential" else mu
    return scale / (scale + (1.0 / _check_times(times) - 1.0) ** power)


def mu_of_tokens(
    tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_mu: float = 0.5,
    max_mu: float = 1.15,
) -> float:
    """μ for an image of so many tokens, on the line through two known ones.

    Args:
      tokens: length of the sequence that the network sees.
      base_tokens, base_mu: one point of the line.
      max_tokens, max_mu: the other.

    Raises:
      ValueError: if both points have as many tokens.

    Source: Black Forest Labs 2024, FLUX.1, released code (get_lin_function).
    """
    if base_tokens == max_tokens:
        raise ValueError(f"base_tokens and max_tokens must differ, both are {max_tokens}")
    return base_mu + (tokens - base_tokens) * (max_mu - base_mu) / (max_tokens - base_tokens)


def stretch_to_terminal(times: Array, terminal: float) -> np.ndarray:
    """1 - (1 - t) (1 - terminal) / (1 - t_N): the last of the times becomes `terminal`.

    Args:
      times: [N] in (0, 1], decreasing, the last one below 1.
      terminal: in (0, 1).

    Raises:
      ValueError: if a value is out of range.

    Source: HaCohen et al. 2024 (arXiv:2501.00103), released code (stretch_shift_to_terminal).
    """
    times = _check_times(times)
    if not 0.0 < terminal < 1.0 or not times[-1] < 1.0:
        raise ValueError(
            f"terminal and the last time must lie in (0, 1), got {terminal} and {times[-1]}"
        )
    return 1.0 - (1.0 - times) * (1.0 - terminal) / (1.0 - times[-1])
