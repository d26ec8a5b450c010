"""Stage: the one function that assembles network, path, condition and sampler."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffusion_jax.conditioners import Conditioner
from diffusion_jax.core.arrays import as_arrays, fold_in_each
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.denoiser import (
    TIME_INPUTS,
    edm_time,
    make_denoiser,
    network_time,
    scaled_time,
)
from diffusion_jax.core.parameterization import EDMPreconditioning, Eps, Parameterization
from diffusion_jax.core.schedules import EDM, NoiseSchedule
from diffusion_jax.core.timesteps import Grid
from diffusion_jax.core.types import Array, Batch, Key, LossFn, NoiseLevel, Params
from diffusion_jax.guidance import Guide, Unguided
from diffusion_jax.losses import simple
from diffusion_jax.samplers import Sampler, initial_noise, sample
from diffusion_jax.systems.codec import PIXELS, Codec


class SampleFn(Protocol):
    """(params, batch, keys [B]) -> images; guide, sampler and grid replace the stage's own.

    Everything is an argument of the compiled function: other knobs, steps, seeds and prompts
    reuse one compilation. Sampling starts from pure noise, so a grid that starts later than its
    step 0 does not belong here; run `samplers.sample` from a noised image for that.
    """

    def __call__(
        self,
        params: Params,
        batch: Batch,
        keys: Key,
        *,
        guide: Guide | None = None,
        sampler: Sampler | None = None,
        grid: Grid | None = None,
    ) -> Array: ...


class Stage(NamedTuple):
    """One trainable diffusion model.

    Attributes:
      init: key -> params {"network", "conditioner", "codec"}.
      loss: training loss on a batch with "image".
      sample: draws one image per key.
      guide, sampler, grid: what `sample` uses where nothing is given.
    """

    init: Callable[[Key], Params]
    loss: LossFn
    sample: SampleFn
    guide: Guide
    sampler: Sampler
    grid: Grid


def _check_path(
    schedule: NoiseSchedule, parameterization: Parameterization, time_input: Callable
) -> None:
    """Refuses combinations that divide by zero or hide the time from the network."""
    no_signal = float(schedule(np.asarray(schedule.t_max)).alpha) == 0.0
    if no_signal and isinstance(parameterization, Eps | EDMPreconditioning):
        raise ValueError(
            f"{type(parameterization).__name__} divides by alpha, which is 0 at the end of this "
            "schedule (zero terminal SNR); choose the parameterization 'v' or 'x0'"
        )
    if isinstance(schedule, EDM) or no_signal:
        fits = (edm_time,) if isinstance(schedule, EDM) else (network_time,)
    else:
        fits = (edm_time, network_time if schedule.num_timesteps else scaled_time)
    if time_input in (network_time, scaled_time, edm_time) and time_input not in fits:
        names = [name for name, function in TIME_INPUTS.items() if function in fits]
        raise ValueError(
            f"time_input must be one of {names} with the schedule {type(schedule).__name__}, whose "
            f"times run from {schedule.t_min} to {schedule.t_max}; got {time_input.__name__}"
        )


def _check_variance(sampler: Sampler, learned_variance: bool) -> None:
    if getattr(sampler, "variance", None) == "learned_range" and not learned_variance:
        raise ValueError(
            "the sampler's variance 'learned_range' needs a network that learns the variance; "
            "choose 'small' or 'large'"
        )


def validate(*parts: object) -> None:
    """Checks the continuous knobs of samplers and guides where the user gives them."""
    for part in parts:
        if hasattr(part, "validate"):
            part.validate()


def _check_image(image: Array, shape: tuple[int, ...]) -> None:
    if tuple(image.shape[1:]) != tuple(shape):
        raise ValueError(
            f"expected images of shape [B, {', '.join(map(str, shape))}], got "
            f"{list(image.shape)}; set the system's image size or the data's"
        )


def diffusion_stage(
    *,
    network: nn.Module,
    schedule: NoiseSchedule,
    parameterization: Parameterization,
    conditioner: Conditioner,
    sampler: Sampler,
    grid: Grid,
    shape: tuple[int, ...],
    codec: Codec = PIXELS,
    guide: Guide = Unguided(),
    loss: Callable = simple,
    time_input: Callable[[NoiseLevel], Array] = network_time,
    learned_variance: bool = False,
) -> Stage:
    """Assembles a stage; the only place where the parts meet.

    Args:
      network: linen module called as (x, t, cond, *, keys=None).
      shape: of one x0, for example (32, 32, 3).
      loss: (network, schedule, parameterization, *, time_input) -> loss on x0.

    Raises:
      ValueError: if schedule, parameterization, time input and sampler do not fit each
        other, or a knob is out of range.
    """
    _check_path(schedule, parameterization, time_input)
    _check_variance(sampler, learned_variance)
    validate(sampler, guide)

    def apply(params, x, t, cond, *, keys=None):
        return network.apply({"params": params}, x, t, cond, keys=keys)

    x0_loss = loss(apply, schedule, parameterization, time_input=time_input)
    denoiser = make_denoiser(
        apply, parameterization, time_input=time_input, learned_variance=learned_variance
    )
    default_guide, default_sampler, default_grid = guide, sampler, grid

    def init(key: Key) -> Params:
        key_network, key_conditioner, key_codec = jax.random.split(key, 3)
        conditioning = conditioner.init(key_conditioner)
        batch = {"image": jnp.zeros((1, *shape)), "label": jnp.zeros(1, jnp.int32)}
        cond: Condition = conditioner.apply(conditioning, batch, None)
        variables = network.init(key_network, jnp.zeros((1, *shape)), jnp.zeros(1), cond)
        return {
            "network": variables["params"],
            "conditioner": conditioning,
            "codec": codec.init(key_codec),
        }

    def stage_loss(params: Params, batch: Batch, keys: Key):
        x0 = codec.encode(params["codec"], batch["image"], fold_in_each(keys, 0))
        _check_image(x0, shape)
        cond = conditioner.apply(params["conditioner"], batch, fold_in_each(keys, 1))
        return x0_loss(params["network"], x0, cond, fold_in_each(keys, 2))

    def stage_sample(params, batch, keys, *, guide=None, sampler=None, grid=None):
        guide = as_arrays(default_guide if guide is None else guide)
        sampler = as_arrays(default_sampler if sampler is None else sampler)
        cond = conditioner.apply(params["conditioner"], batch, None)
        null = conditioner.null(params["conditioner"], batch)
        denoise = guide(denoiser(params["network"]), null)
        grid = default_grid if grid is None else grid
        std = schedule.prior_std(grid.level(grid.start))
        x0, _ = sample(
            sampler,
            lambda x, level: denoise(x, level, cond),
            grid,
            initial_noise(keys, shape, std),
            keys,
        )
        return codec.decode(params["codec"], x0)

    return Stage(init, stage_loss, stage_sample, guide, sampler, grid)
