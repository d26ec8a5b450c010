"""Latent diffusion's training options in our terms: noise schedules, averages, learning rates."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusion_jax.core.schedules import Cosine, DiscreteSchedule, Linear, ScaledLinear, root_betas
from diffusion_jax.io.tables.options import UnsupportedOption
from diffusion_jax.training.ema import EMA
from diffusion_jax.training.rates import Cycle

# Names of beta_schedule. "linear" is linear in √β there, and "sqrt_linear" in β.
_BETAS: dict[str, Callable[[int, float, float], DiscreteSchedule]] = {
    "linear": ScaledLinear,
    "sqrt_linear": Linear,
    "sqrt": root_betas,
}
BETA_SCHEDULES = (*_BETAS, "cosine")


def noise_schedule(
    beta_schedule: str = "linear",
    timesteps: int = 1000,
    *,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> DiscreteSchedule:
    """The noise schedule of a configuration's model.params, under their names and defaults.

    Args:
      beta_schedule: "linear" (β_t linear in the root, `ScaledLinear`), "sqrt_linear" (linear in
        β_t, `Linear`), "sqrt" (`root_betas`) or "cosine" (`Cosine`).
      timesteps: T.
      linear_start, linear_end: first and last β, of "sqrt" their squares; not for "cosine".
      cosine_s: offset of "cosine"; not for the others.

    Raises:
      UnsupportedOption: if the name is unknown.
      ValueError: if a number is out of range.

    Source: Rombach et al. 2022 (arXiv:2112.10752), released code.
    """
    if beta_schedule == "cosine":
        return Cosine(timesteps, cosine_s)
    if beta_schedule not in _BETAS:
        raise UnsupportedOption(
            f"beta_schedule {beta_schedule!r}; there are {', '.join(BETA_SCHEDULES)}"
        )
    return _BETAS[beta_schedule](timesteps, linear_start, linear_end)


def average(decay: float = 0.9999, use_num_upates: bool = True) -> EMA:
    """The average of ldm.modules.ema.LitEma, whose misspelt option means the warm-up.

    Raises:
      ValueError: if `decay` is outside [0, 1).

    Source: Rombach et al. 2022 (arXiv:2112.10752), released code.
    """
    return EMA(decay, warmup=use_num_upates)


def learning_rate_cycles(
    name: str, arguments: Mapping[str, Any] | Sequence[Any]
) -> tuple[Cycle, ...]:
    """The cycles of a class of ldm.lr_scheduler, for `Optimizer(schedule="cycles")`.

    Args:
      name: "LambdaWarmUpCosineScheduler", "LambdaWarmUpCosineScheduler2" or
        "LambdaLinearScheduler", with or without the module before it.
      arguments: of its constructor, by name or in its order.

    Raises:
      UnsupportedOption: if the class or an argument is unknown.
      ValueError: if an argument is missing, the lists differ in length or a number is out of
        range.

    Source: Rombach et al. 2022 (arXiv:2112.10752), released code.
    """
    name = name.rpartition(".")[2]
    if name not in _ARGUMENTS:
        raise UnsupportedOption(f"learning-rate class {name!r}; there are {', '.join(_ARGUMENTS)}")
    names = _ARGUMENTS[name]
    if not isinstance(arguments, Mapping):
        arguments = dict(zip((*names, _PRINTED), arguments, strict=False))
    unknown = sorted(set(arguments) - {*names, _PRINTED})
    if unknown:
        raise UnsupportedOption(f"{name} has no {unknown}; it has {', '.join(names)}")
    missing = [argument for argument in names if argument not in arguments]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}, got {sorted(arguments)}")
    columns = [arguments[argument] for argument in names]
    if name == "LambdaWarmUpCosineScheduler":
        columns = [[column] for column in columns]
    if len({len(column) for column in columns}) != 1:
        lengths = {n: len(column) for n, column in zip(names, columns, strict=True)}
        raise ValueError(f"{name}: lists must have one length, got {lengths}")
    shape = "linear" if name == "LambdaLinearScheduler" else "cosine"
    return tuple(
        Cycle(length, warmup, start=start, peak=peak, floor=floor, shape=shape)
        for warmup, floor, peak, start, length in zip(*columns, strict=True)
    )


# How often the factor is printed, which changes nothing.
_PRINTED = "verbosity_interval"
_LISTS = ("warm_up_steps", "f_min", "f_max", "f_start", "cycle_lengths")
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "LambdaWarmUpCosineScheduler": (
        "warm_up_steps", "lr_min", "lr_max", "lr_start", "max_decay_steps",
    ),
    "LambdaWarmUpCosineScheduler2": _LISTS,
    "LambdaLinearScheduler": _LISTS,
}  # fmt: skip
