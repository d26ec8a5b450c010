"""Levels of a schedule by their noise-to-signal ratio, exactly."""

from diffusion_jax.core.discrete import numpy_like
from diffusion_jax.core.schedules import EDM, FlowMatching, NoiseSchedule
from diffusion_jax.core.types import Array, NoiseLevel


def level_of_ratio(schedule: NoiseSchedule, ratio: Array) -> NoiseLevel:
    """The levels on the path of a schedule that have exactly the given σ/α.

    The network is told the nearest time that the schedule has, while the rates are exact wherever
    its times end, and where its table jumps to an infinite ratio. Where time is the noise itself
    (EDM's σ, the σ/(α + σ) of flow matching) it is told that, beyond the schedule's ends too.

    Args:
      ratio: σ/α, finite and positive; numpy in float64, or jax.

    Returns:
      Every field of the ratio's shape.

    Source: none; a convention of this library.
    """
    xp = numpy_like(ratio)
    if isinstance(schedule, EDM):
        return NoiseLevel(ratio, xp.ones_like(ratio), ratio)
    if isinstance(schedule, FlowMatching):
        alpha = 1.0 / (1.0 + ratio)
        return NoiseLevel(ratio * alpha, alpha, ratio * alpha)
    t, alpha, sigma = schedule(schedule.inverse(-2.0 * xp.log(ratio)))
    # Of levels with one norm, that with the ratio.
    scale = xp.sqrt((alpha**2 + sigma**2) / (1.0 + ratio**2))
    return NoiseLevel(t, scale, scale * ratio)
