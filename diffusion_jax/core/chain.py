"""The training chain of a discrete schedule: neighbouring levels, and networks that predict one."""

from dataclasses import dataclass

from diffusion_jax.core.arrays import per_example
from diffusion_jax.core.discrete import DiscreteSchedule, numpy_like
from diffusion_jax.core.forward import add_noise, posterior_mean, transition
from diffusion_jax.core.schedules import NoiseSchedule, ShiftedLogSNR
from diffusion_jax.core.types import Array, NoiseLevel


def check_discrete(schedule: NoiseSchedule) -> None:
    """Raises ValueError unless the schedule has a chain of steps 0 … T - 1.

    Source: none; a convention of this library.
    """
    if schedule.num_timesteps is None:
        raise ValueError(
            f"{type(schedule).__name__} has continuous time and so no chain of training steps; "
            "choose a discrete schedule such as Cosine or Linear, or give the steps as a grid "
            "(`bits_per_dim` takes one)"
        )


def previous_level(schedule: NoiseSchedule, t: Array) -> NoiseLevel:
    """The cleaner neighbour t - 1; clean data (alpha 1, sigma 0) before the first step.

    Args:
      schedule: a discrete one.
      t: [] or [B] times in [0, T - 1].

    Raises:
      ValueError: if the schedule is continuous.

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 2, with zero-based t.
    """
    check_discrete(schedule)
    xp = numpy_like(t)
    before = schedule(xp.asarray(t) - 1)
    first = xp.asarray(t) < 1
    return before._replace(
        alpha=xp.where(first, xp.ones_like(before.alpha), before.alpha),
        sigma=xp.where(first, xp.zeros_like(before.sigma), before.sigma),
    )


def following_level(schedule: NoiseSchedule, t: Array) -> NoiseLevel:
    """The noisier neighbour t + 1; the last level itself after the last step.

    Args:
      schedule: a discrete one.
      t: [] or [B] times in [0, T - 1].

    Raises:
      ValueError: if the schedule is continuous.

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 2, with zero-based t.
    """
    check_discrete(schedule)
    return schedule(numpy_like(t).asarray(t) + 1)


@dataclass(frozen=True)
class PreviousX:
    """The network predicts the mean of x_{t-1}: x0 = (output - c_x x_t) / c_x0.

    c_x and c_x0 are the coefficients of the mean of q(x_{t-1} | x_t, x0) on the training chain at
    level.t, wherever the sampler goes.

    Attributes:
      schedule: the discrete schedule of training.

    Raises:
      ValueError: if the schedule is continuous.

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 7 and section 3.2.
    """

    schedule: DiscreteSchedule | ShiftedLogSNR

    def __post_init__(self):
        check_discrete(self.schedule)

    def to_x0(self, output: Array, x: Array, level: NoiseLevel) -> Array:
        here, before = self.schedule(level.t), previous_level(self.schedule, level.t)
        alpha, std = transition(here, before)
        towards_x = per_example(alpha * (before.sigma / here.sigma) ** 2, x)
        towards_x0 = per_example(before.alpha * (std / here.sigma) ** 2, x)
        return (output - towards_x * x) / towards_x0

    def target(self, x0: Array, eps: Array, level: NoiseLevel) -> Array:
        here, before = self.schedule(level.t), previous_level(self.schedule, level.t)
        return posterior_mean(add_noise(x0, eps, here), x0, here, before)

    def scale_input(self, x: Array, level: NoiseLevel) -> Array:
        del level
        return x
