"""Spacings of noise-to-signal ratios: Karras, log-uniform, Beta quantiles, explicit ones."""

import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.grid import Grid, check_num_steps, from_levels, from_times
from diffusion_jax.core.ratios import level_of_ratio
from diffusion_jax.core.schedules import NoiseSchedule
from diffusion_jax.core.types import Array

BETA_VALUES = ("time", "ratio")


def rounded_times(schedule: NoiseSchedule, times: Array) -> Array:
    """Times rounded to the integers of a discrete schedule.

    Raises:
      ValueError: if the schedule is continuous.

    Source: none; a convention of this library.
    """
    if schedule.num_timesteps is None:
        raise ValueError(
            f"round_t rounds to discrete timesteps; {type(schedule).__name__} is continuous with "
            f"times from {schedule.t_min} to {schedule.t_max}, so leave round_t off"
        )
    return np.round(times)


def _ratio(schedule: NoiseSchedule, t: float) -> float:
    level = schedule(np.asarray(t))
    with np.errstate(divide="ignore"):
        return float(level.sigma / level.alpha)


def _check_ratios(schedule: NoiseSchedule, low: float, high: float) -> None:
    least, most = _ratio(schedule, schedule.t_min), _ratio(schedule, schedule.t_max)
    if low < least * (1 - 1e-6) or high > most * (1 + 1e-6):
        raise ValueError(
            f"the schedule has noise-to-signal ratios from {least} to {most}, got sigma_min = "
            f"{low} and sigma_max = {high}"
        )


def _ends(
    schedule: NoiseSchedule, sigma_min: float | None, sigma_max: float | None
) -> tuple[float, float]:
    """The least and the largest ratio of a grid, the schedule's own where None."""
    low = _ratio(schedule, schedule.t_min) if sigma_min is None else sigma_min
    high = _ratio(schedule, schedule.t_max) if sigma_max is None else sigma_max
    if not 0.0 < low < high < np.inf:
        raise ValueError(
            f"expected 0 < sigma_min < sigma_max < inf, got {low} and {high}; a schedule without "
            "signal at its end (zero terminal SNR, flow matching) needs sigma_max or another "
            "spacing"
        )
    _check_ratios(schedule, low, high)
    return low, high


def _grid(
    schedule: NoiseSchedule, ratios: Array, *, round_t: bool, final: str, max_steps: int
) -> Grid:
    grid = from_sigmas(schedule, ratios, final=final, max_steps=max_steps)
    if round_t:
        told = rounded_times(schedule, np.asarray(grid.levels.t))
        grid = grid._replace(levels=grid.levels._replace(t=jnp.asarray(told)))
    return grid


def karras(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    max_steps: int = 1000,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    round_t: bool = False,
    final: str = "clean",
) -> Grid:
    """Noise-to-signal ratios that are uniform after taking the rho-th root.

    (σ/α)_i = (σ_max^{1/ρ} + i/(N-1) · (σ_min^{1/ρ} - σ_max^{1/ρ}))^ρ, i = 0 … N-1.

    Args:
      num_steps: N.
      max_steps: length that the grid is padded to.
      rho: ρ; larger puts more steps at low noise.
      sigma_min, sigma_max: ends of the grid; the schedule's own where None.
      round_t: tell the network rounded times; the rates stay exact.
      final: see `from_times`.

    Raises:
      ValueError: if num_steps is out of range, if the ends are not ordered or lie outside
        of the schedule, if rho is not positive, or if times of a continuous schedule are to be
        rounded.

    Source: Karras et al. 2022 (arXiv:2206.00364), eq. 5.
    """
    check_num_steps(num_steps, max_steps)
    if not 0.0 < rho < np.inf:
        raise ValueError(f"rho must be positive, got {rho}")
    low, high = _ends(schedule, sigma_min, sigma_max)
    ramp = np.linspace(0.0, 1.0, num_steps)
    ratios = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return _grid(schedule, ratios, round_t=round_t, final=final, max_steps=max_steps)


def exponential(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    max_steps: int = 1000,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    round_t: bool = False,
    final: str = "clean",
) -> Grid:
    """Noise-to-signal ratios that are uniform in log σ/α, so uniform in log-SNR.

    log (σ/α)_i = log σ_max + i/(N-1) · (log σ_min - log σ_max), i = 0 … N-1. These are
    the "lambdas" of DPM-Solver too, which published code has under a second name.

    Args:
      num_steps: N.
      max_steps: length that the grid is padded to.
      sigma_min, sigma_max: ends of the grid; the schedule's own where None.
      round_t: tell the network rounded times; the rates stay exact.
      final: see `from_times`.

    Raises:
      ValueError: if num_steps is out of range, if the ends are not ordered or lie outside
        of the schedule, or if times of a continuous schedule are to be rounded.

    Source: Lu et al. 2022 (arXiv:2206.00927), section 3.3 ("uniform λ").
    """
    check_num_steps(num_steps, max_steps)
    low, high = _ends(schedule, sigma_min, sigma_max)
    ratios = np.exp(np.linspace(np.log(high), np.log(low), num_steps))
    # exp(log) may leave the range of the schedule by rounding.
    ratios = np.clip(ratios, low, high)
    return _grid(schedule, ratios, round_t=round_t, final=final, max_steps=max_steps)


def beta_quantiles(probabilities: Array, a: float, b: float) -> np.ndarray:
    """The x at which a Beta(a, b) variable is at most x with the given probabilities.

    Args:
      probabilities: [N] in [0, 1].
      a, b: shape parameters, positive.

    Raises:
      ValueError: if a, b or a probability is out of range.

    Source: Lee et al. 2024 (arXiv:2407.12173), section 4; computed by scipy.
    """
    # jax itself needs scipy; it takes a while to import, for one spacing.
    from scipy.special import betaincinv

    p = np.asarray(probabilities, np.float64)
    if not (a > 0.0 and b > 0.0):
        raise ValueError(f"the parameters of a Beta distribution must be positive, got {a}, {b}")
    if np.any((p < 0.0) | (p > 1.0)):
        raise ValueError(f"probabilities must lie in [0, 1], got {p}")
    return betaincinv(a, b, p)


def beta(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    max_steps: int = 1000,
    a: float = 0.6,
    b: float = 0.6,
    of: str = "time",
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    round_t: bool = False,
    final: str = "clean",
) -> Grid:
    """Quantiles of a Beta distribution, so that both ends of the path get more steps.

    t_i = t_min + q(1 - i/(N-1)) · (t_max - t_min), i = 0 … N-1, q the quantile of Beta(a, b).

    Args:
      num_steps: N.
      max_steps: length that the grid is padded to.
      a, b: parameters of the distribution; below 1 the ends are denser.
      of: "time", the paper's, or "ratio" for σ/α in the place of t, as diffusers has it: then
        almost all steps lie at high noise.
      sigma_min, sigma_max: ends of the grid with "ratio" only; the schedule's own where None.
      round_t: tell the network rounded times. With "time" the rates are those of the rounded
        times, with "ratio" they stay exact.
      final: see `from_times`.

    Raises:
      ValueError: if an option is out of range or given in vain, or if times of a continuous
        schedule are to be rounded, or if rounding makes two times one.

    Source: Lee et al. 2024 (arXiv:2407.12173), section 4.
    """
    check_num_steps(num_steps, max_steps)
    if of not in BETA_VALUES:
        raise ValueError(f"of must be one of {BETA_VALUES}, got {of!r}")
    quantiles = beta_quantiles(1.0 - np.linspace(0.0, 1.0, num_steps), a, b)
    if of == "ratio":
        low, high = _ends(schedule, sigma_min, sigma_max)
        ratios = low + quantiles * (high - low)
        return _grid(schedule, ratios, round_t=round_t, final=final, max_steps=max_steps)
    if sigma_min is not None or sigma_max is not None:
        raise ValueError(
            f"sigma_min and sigma_max go with of='ratio', got {sigma_min} and {sigma_max} with "
            "of='time'"
        )
    times = schedule.t_min + quantiles * (schedule.t_max - schedule.t_min)
    times = rounded_times(schedule, times) if round_t else times
    return from_times(schedule, times, final=final, max_steps=max_steps)


def from_sigmas(
    schedule: NoiseSchedule,
    sigmas: Array,
    *,
    times: Array | None = None,
    final: str | float = "clean",
    max_steps: int = 1000,
) -> Grid:
    """The grid that evaluates the network at given noise-to-signal ratios σ/α.

    The rates are exactly these on the schedule's path, also where its own table jumps to an
    infinite ratio.

    Args:
      sigmas: [N] strictly decreasing, within the ratios of the schedule.
      times: [N] what the network is told; where the schedule has these ratios if None.
      final: where the last step ends: "clean", "t_min", or a ratio below the last one.
      max_steps: length that the grid is padded to.

    Raises:
      ValueError: if the ratios are no decreasing sequence inside of the schedule, or times or
        final do not fit them.

    Source: none; a convention of this library.
    """
    sigmas = np.asarray(sigmas, np.float64)
    if sigmas.ndim != 1 or np.any(np.diff(sigmas) >= 0.0) or not np.all(np.isfinite(sigmas)):
        raise ValueError(f"sigmas must be a strictly decreasing finite sequence, got {sigmas}")
    check_num_steps(len(sigmas), max_steps)
    _check_ratios(schedule, float(sigmas[-1]), float(sigmas[0]))
    if times is not None and np.shape(times) != sigmas.shape:
        raise ValueError(f"expected {len(sigmas)} times, one for each ratio, got {np.shape(times)}")
    if times is not None and not np.all(np.isfinite(np.asarray(times, np.float64))):
        raise ValueError(f"times must be finite, got {times}")
    if not isinstance(final, str) and not 0.0 <= final < sigmas[-1]:
        raise ValueError(
            f"final must be 'clean', 't_min' or a ratio in [0, {sigmas[-1]}), got {final}"
        )
    levels = level_of_ratio(schedule, sigmas)
    if times is not None:
        levels = levels._replace(t=np.asarray(times, np.float64))
    end = "clean" if final == 0.0 else final
    end = end if isinstance(end, str) else level_of_ratio(schedule, np.asarray(float(end)))
    return from_levels(schedule, levels, final=end, max_steps=max_steps)


def log_linear(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    max_steps: int = 1000,
    times: Array | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Grid:
    """N + 1 ratios that are uniform in log σ/α, the last of which is where sampling ends.

    Unlike `exponential`, whose last step goes from σ_min to `final`, no step is left at σ_min.
    diffusers' EulerDiscreteScheduler means this by interpolation_type="log_linear", but tells the
    network the times of its timestep_spacing, which are not those of the ratios: pass them as
    `times` for its numbers.

    Args:
      num_steps: N.
      max_steps: length that the grid is padded to.
      times: [N] what the network is told; where the schedule has these ratios if None.
      sigma_min, sigma_max: ends of the grid; the schedule's own where None.

    Raises:
      ValueError: as in `exponential` and `from_sigmas`.

    Source: Lu et al. 2022 (arXiv:2206.00927), section 3.3 ("uniform λ").
    """
    check_num_steps(num_steps, max_steps)
    low, high = _ends(schedule, sigma_min, sigma_max)
    ratios = np.clip(np.exp(np.linspace(np.log(high), np.log(low), num_steps + 1)), low, high)
    return from_sigmas(
        schedule, ratios[:-1], times=times, final=float(ratios[-1]), max_steps=max_steps
    )
