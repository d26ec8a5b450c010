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
from diffusion_jax.core.parameterization import (
    ConsistencyPreconditioning,
    EDMPreconditioning,
    Eps,
    Parameterization,
    Score,
)
from diffusion_jax.core.schedules import EDM, NoiseSchedule
from diffusion_jax.core.timesteps import Grid
from diffusion_jax.core.types import AdaptiveLoss, Array, Batch, Key, LossFn, NoiseLevel, Params
from diffusion_jax.guidance import Guide, Unguided
from diffusion_jax.losses import Loss, ScheduleTimes, Simple, Times
from diffusion_jax.losses.importance import AdaptiveDiffusionLoss
from diffusion_jax.samplers import Sampler, fit_grid, initial_noise, sample
from diffusion_jax.samplers.base import Denoise
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
    """One trainable model.

    Attributes:
      init: key -> params; of a diffusion model {"network", "conditioner", "codec"}.
      loss: training loss on a batch with "image".
      sample: draws one image per key; None for a model that draws nothing, a classifier.
      denoiser: (params, batch, guide=None) -> (x, level) -> Prediction with the conditions
        bound, for samplers and likelihoods of one's own; None where there is no `sample`.
      guide, sampler, grid: what `sample` uses where nothing is given.
    """

    init: Callable[[Key], Params]
    loss: LossFn | AdaptiveLoss
    sample: SampleFn | None = None
    denoiser: Callable[..., Denoise] | None = None
    guide: Guide | None = None
    sampler: Sampler | None = None
    grid: Grid | None = None


def ends_without_signal(schedule: NoiseSchedule) -> bool:
    """Whether alpha is 0 at the noisiest time (zero terminal SNR, flow matching)."""
    return float(schedule(np.asarray(schedule.t_max)).alpha) == 0.0


def _check_path(
    schedule: NoiseSchedule, parameterization: Parameterization, time_input: Callable
) -> None:
    """Refuses combinations that divide by zero or hide the time from the network."""
    no_signal = ends_without_signal(schedule)
    divides = Eps | Score | EDMPreconditioning | ConsistencyPreconditioning
    if no_signal and isinstance(parameterization, divides):
        raise ValueError(
            f"{type(parameterization).__name__} divides by alpha, which is 0 at the end of this "
            "schedule (zero terminal SNR); choose the parameterization 'v', 'flow' or 'x0'"
        )
    if isinstance(schedule, EDM):
        fits = (edm_time,)
    else:
        fits = (network_time if schedule.num_timesteps else scaled_time,)
        # log-SNR is infinite where there is no signal.
        fits += () if no_signal else (edm_time,)
    if time_input in (network_time, scaled_time, edm_time) and time_input not in fits:
        names = [name for name, function in TIME_INPUTS.items() if function in fits]
        raise ValueError(
            f"time_input must be one of {names} with the schedule {type(schedule).__name__}, whose "
            f"times run from {schedule.t_min} to {schedule.t_max}; got {time_input.__name__}"
        )


def _check_variance(sampler: Sampler, learned_variance: str | None) -> None:
    needed = {"learned_range": "range", "learned": "log"}.get(getattr(sampler, "variance", ""))
    if needed is not None and needed != learned_variance:
        raise ValueError(
            f"the sampler's variance {sampler.variance!r} needs a loss that learns the variance as "
            f"{needed!r}, such as 'hybrid'; choose that loss, or the variance 'small' or 'large'"
        )


def validate(*parts: object) -> None:
    """Checks the continuous knobs of samplers and guides where the user gives them."""
    for part in parts:
        if hasattr(part, "validate"):
            part.validate()


def check_image(image: Array, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the images [B, ...] have the system's shape."""
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
    loss: Loss = Simple(),
    times: Times = ScheduleTimes(),
    time_input: Callable[[NoiseLevel], Array] = network_time,
) -> Stage:
    """Assembles a stage; the only place where the parts meet.

    Args:
      network: linen module called as (x, t, cond, *, keys=None).
      shape: of one x0, for example (32, 32, 3).
      loss: what the network is trained with; it says whether the variance is learned.
      times: how times are drawn in training.

    Raises:
      ValueError: if schedule, parameterization, time input and sampler do not fit each
        other, or a knob is out of range.
    """
    _check_path(schedule, parameterization, time_input)
    _check_variance(sampler, loss.learned_variance)
    validate(sampler, guide)

    def apply(params, x, t, cond, *, keys=None):
        return network.apply({"params": params}, x, t, cond, keys=keys)

    x0_loss = times.wrap(
        loss.per_example(apply, schedule, parameterization, time_input=time_input), schedule
    )
    denoiser = make_denoiser(
        apply, parameterization, time_input=time_input, learned_variance=loss.learned_variance
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

    def prepared(params: Params, batch: Batch, keys: Key):
        """The arguments of the loss on x0: network params, x0, condition, keys."""
        x0 = codec.encode(params["codec"], batch["image"], fold_in_each(keys, 0))
        check_image(x0, shape)
        cond = conditioner.apply(params["conditioner"], batch, fold_in_each(keys, 1))
        return params["network"], x0, cond, fold_in_each(keys, 2)

    if isinstance(x0_loss, AdaptiveDiffusionLoss):
        adaptive = x0_loss

        def apply_with_memory(params, batch, keys, memory):
            network_params, x0, cond, loss_keys = prepared(params, batch, keys)
            return adaptive.apply(network_params, x0, cond, loss_keys, memory)

        stage_loss = AdaptiveLoss(adaptive.init, apply_with_memory, adaptive.update)
    else:
        plain = x0_loss

        def stage_loss(params, batch, keys):
            return plain(*prepared(params, batch, keys))

    def stage_denoiser(params: Params, batch: Batch, guide: Guide | None = None) -> Denoise:
        chosen: Guide = as_arrays(default_guide if guide is None else guide)
        cond = conditioner.apply(params["conditioner"], batch, None)
        null = conditioner.null(params["conditioner"], batch)
        denoise = chosen(denoiser(params["network"]), null)
        return lambda x, level: denoise(x, level, cond)

    def stage_sample(params, batch, keys, *, guide=None, sampler=None, grid=None):
        sampler = as_arrays(default_sampler if sampler is None else sampler)
        grid = fit_grid(sampler, default_grid if grid is None else grid, schedule)
        std = schedule.prior_std(grid.level(grid.start))
        denoise = stage_denoiser(params, batch, guide)
        x0, _ = sample(sampler, denoise, grid, initial_noise(keys, shape, std), keys)
        return codec.decode(params["codec"], x0)

    return Stage(init, stage_loss, stage_sample, stage_denoiser, guide, sampler, grid)
