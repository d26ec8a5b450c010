"""A run: what the commands share of an experiment and its working directory."""

import contextlib
import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import diffusion_jax
from diffusion_jax.core.types import Logger, Params
from diffusion_jax.experiment import Experiment, load
from diffusion_jax.io.checkpoint import Checkpoints
from diffusion_jax.io.checkpoint_errors import CheckpointMissingError
from diffusion_jax.io.loggers import (
    JSONLLogger,
    StdoutLogger,
    TensorBoardLogger,
    Tolerant,
    WandbLogger,
)
from diffusion_jax.systems import Stage, System
from diffusion_jax.training.parallel import to_host
from diffusion_jax.training.processes import agree_from_writer, check_shared

GRID_COLUMNS = 10


def provenance() -> dict[str, str]:
    """When, on what and with which libraries numbers are measured."""
    names = ("jax", "flax", "optax", "numpy")
    versions = [
        f"Python {platform.python_version()}",
        *(f"{name} {metadata.version(name)}" for name in names),
        f"diffusion_jax {diffusion_jax.__version__}",
    ]
    device = jax.devices()[0]
    hardware = f"{jax.device_count()} x {device.device_kind}"
    if device.platform == "cpu":
        hardware = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware,
        "versions": ", ".join(versions),
    }


def num_classes(experiment: Experiment) -> int | None:
    """Classes that the system is told, or None."""
    return getattr(experiment.system, "num_classes", None)


def trained_stage(experiment: Experiment, system: System) -> Stage:
    """The stage that the experiment trains.

    Raises:
      ValueError: if the system has no stage of that name.
    """
    stages = system.stages
    if experiment.training.stage not in stages:
        raise ValueError(
            f"stage must be one of {sorted(stages)}, got {experiment.training.stage!r}"
        )
    return stages[experiment.training.stage]


def checkpoints(workdir: Path, **options: Any) -> Checkpoints:
    """The checkpoints of a working directory; options as for `Checkpoints`."""
    return Checkpoints(workdir / "checkpoints", **options)


@contextlib.contextmanager
def open_loggers(
    workdir: Path, *, tensorboard: bool, wandb: str | None, values: Mapping[str, Any]
) -> Iterator[list[Logger]]:
    """The loggers of a run, none of which can stop it; only process 0 has any.

    Args:
      tensorboard: whether to write TensorBoard events.
      wandb: project of Weights & Biases, or None.
      values: the configuration, for W&B.
    """
    loggers: list[Logger] = []

    def add(make: Callable[[], Logger]) -> None:
        try:
            loggers.append(Tolerant(make()))
        except ImportError:
            raise
        # A service that cannot be reached must not keep a run from starting again.
        except Exception as error:
            warnings.warn(f"a logger is left out, {type(error).__name__}: {error}", stacklevel=4)

    def make_all() -> None:
        add(StdoutLogger)
        add(lambda: JSONLLogger(workdir / "metrics.jsonl"))
        if tensorboard:
            add(lambda: TensorBoardLogger(workdir / "tensorboard"))
        if wandb is not None:
            add(lambda: WandbLogger(workdir, project=wandb, config=values))

    agree_from_writer(make_all)
    try:
        yield loggers
    finally:
        for logger in loggers:
            logger.close()


def check_workdir(workdir: Path) -> None:
    """Checks that a working directory is a local one, and the same for every process.

    Raises:
      ValueError: if it is an address such as gs://bucket/run, or a process does not see it.
    """
    if re.match("[a-z0-9]+:/", str(workdir)):
        raise ValueError(
            f"the working directory must be a local or mounted folder, got {workdir}; mount the "
            "bucket, or use io.checkpoint.Checkpoints, which takes addresses, from Python"
        )
    check_shared(workdir)


def readable(params: Params) -> Params:
    """Parameters that this process can use alone; every process must call it."""
    return params if jax.process_count() == 1 else to_host(params)


def stage_dir(workdir: Path, system: System, stage: str) -> Path:
    """Where a stage of a run lives: the working directory, or a folder in it if it has several."""
    return workdir if len(system.stages) == 1 else workdir / stage


# What a network was trained as; sampler, steps, guidance and threshold may be exchanged after.
MODEL = (
    "image_size",
    "channels",
    "network",
    "schedule",
    "parameterization",
    "time_input",
    "num_classes",
    "class_conditional",
    "classifier",
)


def check_same_model(experiment: Experiment, workdir: Path) -> None:
    """Checks that an experiment means the networks that a working directory holds.

    Raises:
      ValueError: naming what differs, or if the directory does not hold every stage.
    """
    system = experiment.system.build()
    for stage in system.stages:
        path = stage_dir(workdir, system, stage) / "config.json"
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
        if trained.loss.learned_variance != experiment.system.loss.learned_variance:
            changed.append("loss (what the variance channels mean)")
        if changed:
            raise ValueError(
                f"{path.parent} was trained with other values of {', '.join(changed)}; name the "
                "directory itself, not an experiment, or repeat the options of its training"
            )


def restore_stage(folder: Path, kind: str = "ema") -> tuple[int, Params]:
    """(step, parameters) of the newest good checkpoint of one stage.

    Args:
      kind: "ema" for the averaged weights, "raw" for those of the last step.

    Raises:
      ValueError: if there is no checkpoint.
    """
    with checkpoints(folder) as checkpointer:
        try:
            params = checkpointer.restore_params(kind=kind)
        except CheckpointMissingError as error:
            raise ValueError(
                f"{folder} has no checkpoint; train first: diffusion-jax train NAME --workdir DIR"
            ) from error
        assert checkpointer.restored_step is not None
        return checkpointer.restored_step, params


def restore_params(
    workdir: Path, system: System, kind: str = "ema"
) -> tuple[dict[str, int], dict[str, Params]]:
    """Steps and parameters of the newest checkpoint of every stage, by name.

    Raises:
      ValueError: if a stage has no checkpoint.
    """
    restored = {
        stage: restore_stage(stage_dir(workdir, system, stage), kind) for stage in system.stages
    }
    steps = {stage: step for stage, (step, _) in restored.items()}
    return steps, {stage: params for stage, (_, params) in restored.items()}
