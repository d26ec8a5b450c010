"""The parts that a scheduler_config.json describes, and the config of these parts."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.arrays import per_example
from diffusion_jax.core.denoiser import network_time
from diffusion_jax.core.grid import Grid
from diffusion_jax.core.parameterization import Parameterization
from diffusion_jax.core.schedules import EDM, DiscreteSchedule, NoiseSchedule
from diffusion_jax.core.types import Array, NoiseLevel
from diffusion_jax.guidance import Unguided
from diffusion_jax.pretrained.schedulers.chains import CHAINS
from diffusion_jax.pretrained.schedulers.continuous import CONTINUOUS
from diffusion_jax.pretrained.schedulers.options import Kind, Options, Threshold, schedule_of
from diffusion_jax.pretrained.schedulers.ratios import RATIOS
from diffusion_jax.pretrained.schedulers.solvers import SOLVERS
from diffusion_jax.pretrained.schedulers.table_steps import PNDMSteps, ReferenceSteps
from diffusion_jax.samplers.base import Sampler, fit_grid

# What diffusers writes beside the options.
PRIVATE = ("_class_name", "_diffusers_version", "_use_default_values")

CLASSES: dict[str, Kind] = {**CHAINS, **RATIOS, **SOLVERS, **CONTINUOUS}
_OPTIONS_OF_ANY = frozenset(name for kind in CLASSES.values() for name in kind.defaults)


@dataclass(frozen=True)
class Scheduler:
    """What one scheduler_config.json says, part by part.

    Attributes:
      class_name: the class in diffusers.
      options: every option of the class with its value, defaults filled in, and what the config
        has of other classes' options, which say nothing here.
      call: arguments of diffusers' `set_timesteps` and `step` that were given and that no
        config holds, such as eta.
      schedule: of training.
      parameterization: what the network says.
      sampler: what the class does in `step`. RePaint's is to be wrapped with the known pixels:
        `RePaint(scheduler.sampler, known, mask, share_noise=True)`.
      steps: what it does in `set_timesteps`; see `grid`.
      threshold: what is done to x̂0.
      learned_variance: what the second half of the network's channels means, or None.
      time_input: what the network is told about a level.
      scaled: the class keeps x / α where this library keeps x; see `to_reference`.
      noise: the std of the noise that the class starts from: "unit", "largest" (the largest σ/α)
        or "hypot" (√(1 + that²)).
    """

    class_name: str
    options: tuple[tuple[str, Any], ...]
    call: tuple[tuple[str, Any], ...]
    schedule: NoiseSchedule
    parameterization: Parameterization
    sampler: Sampler
    steps: ReferenceSteps
    threshold: Threshold = Unguided()
    learned_variance: str | None = None
    time_input: Callable[[NoiseLevel], Array] = network_time
    scaled: bool = False
    noise: str = "unit"

    def grid(
        self,
        num_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        max_steps: int = 1000,
    ) -> Grid:
        """The grid that `set_timesteps` makes of these arguments.

        Args:
          num_steps: N; or the steps one by one:
          timesteps, sigmas: where the class takes them.
          mu: the shift of a flow-matching path that the image's size asks for.
          max_steps: length that the grid is padded to.

        Raises:
          ValueError: if the class takes no such argument, or a value is out of range.
        """
        given = {"timesteps": timesteps, "sigmas": sigmas, "mu": mu}
        grid = self.steps.grid(self.schedule, num_steps, **given, max_steps=max_steps)
        return fit_grid(self.sampler, grid, self.schedule)

    def grid_for_image(
        self,
        num_steps: int | None = None,
        *,
        strength: float,
        max_steps: int = 1000,
        **given: Any,
    ) -> Grid:
        """The grid of image-to-image: the last int(strength · N) of N steps, as in diffusers.

        PNDM without Runge-Kutta has its own way to begin in the middle, with one call more.

        Args:
          num_steps, max_steps: as of `grid`.
          strength: in [0, 1].
          given: further arguments of `grid`.

        Raises:
          ValueError: if no step is left, or the class cannot begin in the middle.
        """
        whole = self.grid(num_steps, max_steps=max_steps, **given)
        total = int(whole.stop)
        skipped = total - min(int(total * strength), total)
        if skipped == total:
            raise ValueError(
                f"a strength of {strength} leaves none of {total} steps; take more of either"
            )
        if not isinstance(self.steps, PNDMSteps) or not skipped:
            return whole.starting_at(skipped)
        if self.steps.runge_kutta:
            raise ValueError(
                "PNDM with Runge-Kutta cannot begin in the middle; choose skip_prk_steps, or "
                "another scheduler"
            )
        times = self.steps.published(self.schedule, num_steps, **given).timesteps
        called = np.insert(times, 1, times[1])[skipped:]
        if len(called) < 2:
            raise ValueError("PNDM's start needs at least 2 calls; take a larger strength")
        stride = self.schedule.num_timesteps // total
        return self.steps.grid_from(self.schedule, called, stride, max_steps)

    def init_noise_sigma(self, grid: Grid) -> float:
        """The std of the noise that the class starts from, in its own units."""
        if self.noise == "unit":
            return 1.0
        if isinstance(self.schedule, EDM):
            largest = self.schedule.sigma_max
        else:
            alpha, sigma = (np.asarray(f, np.float64) for f in grid.levels[1:])
            largest = float(np.max(sigma / alpha))
        return largest if self.noise == "largest" else math.hypot(largest, 1.0)

    def x_T(self, unit_noise: Array, grid: Grid) -> Array:
        """Where the class starts: unit normal noise [B, ...] brought to the grid's first level."""
        level = grid.level(0)
        return self.from_reference(self.init_noise_sigma(grid) * jnp.asarray(unit_noise), level)

    def from_reference(self, x: Array, level: NoiseLevel) -> Array:
        """This library's x_t [B, ...] of the class's sample."""
        return x * per_example(level.alpha, x) if self.scaled else x

    def to_reference(self, x: Array, level: NoiseLevel) -> Array:
        """The class's sample of this library's x_t [B, ...]."""
        return x / per_example(level.alpha, x) if self.scaled else x


def _frozen(value: Any) -> Any:
    return tuple(_frozen(each) for each in value) if isinstance(value, list | tuple) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _filled(what: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise ValueError(
            f"{what} has no {', '.join(unknown)}; it has {', '.join(sorted(defaults)) or 'none'}"
        )
    for name, value in given.items():
        if _is_number(defaults[name]) and not _is_number(value):
            raise ValueError(f"{name} of {what} must be a number, got {value!r}")
    return {name: _frozen(given.get(name, default)) for name, default in defaults.items()}


def from_config(config: Mapping[str, Any], **call: Any) -> Scheduler:
    """The parts that a scheduler_config.json of diffusers describes.

    Args:
      config: the file's content. Options that it does not have stand at diffusers' defaults.
        Options of other classes alone say nothing about this one, in diffusers neither: released
        files have them where a scheduler took another's place. They are kept for `to_config`.
      call: arguments of diffusers' `step` and `set_timesteps` that change what is computed and are
        no numbers of steps, times or noise levels, such as eta, s_churn or jump_length;
        CLASSES[name].call lists them. UnCLIP's prev_timestep is "next" for the next time of the
        grid, as its pipelines pass it, or "previous" for t - 1, as `step` does without it.

    Raises:
      ValueError: if the class, an option or a value of one is not supported.
    """
    name = config.get("_class_name")
    if name not in CLASSES:
        raise ValueError(
            f"_class_name = {name!r} is not supported; expected one of {list(CLASSES)}"
        )
    kind = CLASSES[name]
    given = {key: value for key, value in config.items() if key not in PRIVATE}
    others = _OPTIONS_OF_ANY - set(kind.defaults)
    foreign = {key: _frozen(given.pop(key)) for key in list(given) if key in others}
    options = _filled(name, given, kind.defaults)
    arguments = _filled(f"a call of {name}", call, kind.call)
    reader = Options(name, options, arguments, kind.defaults)
    parts = kind.build(reader)
    for part in (parts["sampler"], parts.get("threshold")):
        if hasattr(part, "validate"):
            part.validate()
    left = reader.unread - set(kind.inert)
    if left:
        raise AssertionError(f"{name} reads nothing from {', '.join(sorted(left))}")
    changed = {k: v for k, v in arguments.items() if v != kind.call[k]}
    written = tuple({**options, **foreign}.items())
    return Scheduler(name, written, tuple(changed.items()), **parts)


def beta_schedule(scheduler: Scheduler) -> DiscreteSchedule:
    """The schedule of the β that a config names, also where its class takes a straight path.

    Raises:
      ValueError: if the class has none.
    """
    if isinstance(scheduler.schedule, DiscreteSchedule):
        return scheduler.schedule
    defaults = CLASSES[scheduler.class_name].defaults
    options = {key: value for key, value in scheduler.options if key in defaults}
    if "beta_schedule" not in options:
        raise ValueError(f"{scheduler.class_name} has no table of β")
    return schedule_of(Options(scheduler.class_name, options, {}, defaults))


def to_config(scheduler: Scheduler) -> dict[str, Any]:
    """The scheduler_config.json of a scheduler, with every option of its class.

    `from_config(to_config(s), **dict(s.call))` is s again.

    Raises:
      ValueError: if a part was replaced since `from_config`, so that no config describes it.
    """

    def thawed(value):
        return [thawed(each) for each in value] if isinstance(value, tuple) else value

    options = {name: thawed(value) for name, value in scheduler.options}
    config = {"_class_name": scheduler.class_name, **options}
    if from_config(config, **dict(scheduler.call)) != scheduler:
        raise ValueError(
            f"parts of this scheduler are not those of its {scheduler.class_name} options; build "
            "it with from_config, and pass what diffusers passes to step as arguments there"
        )
    return config
