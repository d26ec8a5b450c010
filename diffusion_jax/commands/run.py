"""A run: what the commands share of an experiment and its working directory."""

from pathlib import Path

from diffusion_jax.core.types import Params
from diffusion_jax.experiment import Experiment, load
from diffusion_jax.io.checkpoint import Checkpoints
from diffusion_jax.systems import Stage

GRID_COLUMNS = 10


def num_classes(experiment: Experiment) -> int | None:
    """Classes that the system is told, or None."""
    return getattr(experiment.system, "num_classes", None)


def build_stage(experiment: Experiment) -> Stage:
    """The stage that the experiment trains.

    Raises:
      ValueError: if the system has no stage of that name, or its parts do not fit.
    """
    stages = experiment.system.build().stages
    if experiment.training.stage not in stages:
        raise ValueError(
            f"stage must be one of {sorted(stages)}, got {experiment.training.stage!r}"
        )
    return stages[experiment.training.stage]


def checkpoints(workdir: Path, max_to_keep: int = 2) -> Checkpoints:
    """The checkpoints of a working directory."""
    return Checkpoints(workdir / "checkpoints", max_to_keep=max_to_keep)


# What a network was trained as; sampler, steps, guidance and threshold may be exchanged after.
MODEL = (
    "image_size",
    "channels",
    "network",
    "schedule",
    "parameterization",
    "time_input",
    "num_classes",
)


def check_same_model(experiment: Experiment, workdir: Path) -> None:
    """Checks that an experiment means the network that a working directory holds.

    Raises:
      ValueError: naming what differs, or if the directory holds no run.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise ValueError(f"{workdir} holds no run: there is no {path}")
    trained = load(path).system
    if type(trained) is not type(experiment.system):
        raise ValueError(
            f"{workdir} was trained as {type(trained).__name__}, not as "
            f"{type(experiment.system).__name__}; name the directory itself, not an experiment"
        )
    changed = [
        name
        for name in MODEL
        if getattr(trained, name, None) != getattr(experiment.system, name, None)
    ]
    if changed:
        raise ValueError(
            f"{workdir} was trained with other values of {', '.join(changed)}; name the directory "
            "itself, not an experiment, or repeat the options of its training"
        )


def restore_params(workdir: Path, kind: str = "ema") -> tuple[int, Params]:
    """(step, parameters) of the newest checkpoint in a working directory.

    Args:
      kind: "ema" for the averaged weights, "raw" for those of the last step.

    Raises:
      ValueError: if there is no checkpoint.
    """
    with checkpoints(workdir) as checkpointer:
        step = checkpointer.latest_step()
        if step is None:
            raise ValueError(
                f"{workdir} has no checkpoint; train first: diffusion-jax train NAME "
                f"--workdir {workdir}"
            )
        return step, checkpointer.restore_params(kind=kind, step=step)
