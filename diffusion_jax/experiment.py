"""Experiment: everything that determines a run, as one frozen value."""

import importlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from diffusion_jax.configuration import from_dict, to_dict
from diffusion_jax.data import DATASETS
from diffusion_jax.features import FeaturesPart, PixelFeatures
from diffusion_jax.io.files import write_text
from diffusion_jax.systems import SYSTEMS
from diffusion_jax.training.ema import EMA
from diffusion_jax.training.guard import Guard
from diffusion_jax.training.optimizer import Optimizer

# The experiments that ship with the package; a string names one of these or a file.
EXPERIMENTS = ("ddpm", "improved_ddpm", "classifier_guidance", "classifier_free")


@dataclass(frozen=True)
class Training:
    """How long and on what a stage is trained.

    Attributes:
      num_steps: optimizer steps.
      batch_size: examples a step, over all devices of all processes.
      seed: of initial parameters, data order and noise.
      stage: which stage of the system.
      trainable: globs over parameter paths; everything else stays frozen.
      ema: averaging of the trainable parameters.
      accumulate: microbatches a step.
      guard: which updates are bad, and how many of them may be skipped.
      flip: mirror images at random.
      on_bad_example: "raise" stops at a picture that cannot be read, "skip" takes the next one.
      num_workers: processes that read data, in every process that trains; 0 reads in threads.
      fsdp: devices that parameters, averages and optimizer moments are split over.
      log_every, eval_every, checkpoint_every: in steps; 0 turns the sample grids off.
      max_to_keep: checkpoints kept.
      tensorboard: also write TensorBoard events (needs the extra "logging").
      wandb: also log to this project of Weights & Biases (needs the extra "logging").

    Raises:
      ValueError: if a number is out of range.
    """

    num_steps: int = 1000
    batch_size: int = 128
    seed: int = 0
    stage: str = "base"
    trainable: tuple[str, ...] = ("**",)
    ema: EMA = EMA()
    accumulate: int = 1
    guard: Guard = Guard()
    flip: bool = False
    on_bad_example: Literal["raise", "skip"] = "raise"
    num_workers: int = 0
    fsdp: int = 1
    log_every: int = 100
    eval_every: int = 0
    checkpoint_every: int = 1000
    max_to_keep: int = 2
    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self):
        positive = ("num_steps", "batch_size", "accumulate", "log_every", "checkpoint_every")
        for name in (*positive, "max_to_keep", "fsdp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("eval_every", "num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}"
            )


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` draws and compares.

    Attributes:
      num_samples: images per guidance scale; 0 means as many as there are training images.
      scales: guidance scales; ignored by systems without guidance, which are drawn once.
      batch_size: images drawn at once.
      seed: of the samples.
      features: what images are compared by.
      reference: statistics of real data in a file that `metrics.save_reference` wrote, for one
        more Fréchet distance, or None.

    Raises:
      ValueError: if a number is out of range.
    """

    num_samples: int = 0
    scales: tuple[float, ...] = (1.0,)
    batch_size: int = 512
    seed: int = 1
    features: FeaturesPart = PixelFeatures()
    reference: str | None = None

    def __post_init__(self):
        if self.num_samples < 0 or self.batch_size < 1 or not self.scales:
            raise ValueError(
                "expected num_samples >= 0, batch_size >= 1 and at least one scale, got "
                f"{self.num_samples}, {self.batch_size} and {self.scales}"
            )


@dataclass(frozen=True)
class Experiment:
    """A run: what is built, on which data, how it is trained and what it should score.

    Attributes:
      system: a value out of SYSTEMS.
      data: a value out of DATASETS.
      optimizer, training, evaluation: see their classes.
      expected: score -> [low, high], checked by `evaluate`.
    """

    system: Any
    data: Any
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    expected: Annotated[Mapping[str, tuple[float, float]], tyro.conf.Suppress] = field(
        default_factory=dict
    )


def save(experiment: Experiment, path: Path) -> None:
    """Writes an experiment as JSON."""
    write_text(path, json.dumps(to_dict(experiment), indent=2) + "\n")


def load(path: Path) -> Experiment:
    """Reads an experiment that `save` wrote.

    Raises:
      ValueError: if it is no JSON, or says something that no experiment can mean.
    """
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return from_dict(Experiment, values, str(path))


def find_stages(name: str, *, tiny: bool = False) -> dict[str, Experiment]:
    """What trains each stage of the experiment with that name, in that file or directory.

    Args:
      name: one of EXPERIMENTS; a .py file that defines CONFIG (and TINY), an Experiment or one
        for every stage by name; a .json file; or a working directory.
      tiny: TINY instead of CONFIG.

    Returns:
      stage -> experiment, in the order of training; most systems have one stage, "base".

    Raises:
      ValueError: if there is no such experiment.
    """
    found = _find(name, tiny)
    return dict(found) if isinstance(found, Mapping) else {found.training.stage: found}


def find(name: str, *, tiny: bool = False, stage: str | None = None) -> Experiment:
    """One experiment of `find_stages`: that of a stage, or the first.

    Raises:
      ValueError: if there is no such experiment or stage.
    """
    stages = find_stages(name, tiny=tiny)
    if stage is not None and stage not in stages:
        raise ValueError(f"{name} has no stage {stage!r}, only {list(stages)}")
    return stages[stage or next(iter(stages))]


def _find(name: str, tiny: bool) -> Experiment | Mapping[str, Experiment]:
    path = Path(name)
    if path.is_dir() and (configs := run_configs(path)):
        if tiny:
            raise ValueError(f"--tiny chooses within an experiment script; {path} is a run")
        return {stage: load(config) for stage, config in configs.items()}
    if path.suffix == ".json" and path.exists():
        if tiny:
            raise ValueError(f"--tiny chooses within an experiment script; {path} is one value")
        return load(path)
    if path.suffix == ".py" and path.exists():
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    elif name in EXPERIMENTS:
        module = importlib.import_module(f"diffusion_jax.experiments.{name}")
    else:
        raise ValueError(
            f"no experiment {name!r}: expected one of {list(EXPERIMENTS)}, a .py file with CONFIG, "
            "a .json file, or a directory with config.json"
        )
    wanted = "TINY" if tiny else "CONFIG"
    if not hasattr(module, wanted):
        raise ValueError(f"{name} defines no {wanted}")
    return getattr(module, wanted)


def run_configs(workdir: Path) -> dict[str, Path]:
    """The config.json of every stage that was trained in a working directory, by stage.

    A system of one stage has its files in the directory itself, one of several in a folder
    for each.
    """
    if (workdir / "config.json").exists():
        return {"base": workdir / "config.json"}
    paths = {path.parent.name: path for path in sorted(workdir.glob("*/config.json"))}
    return {name: path for name, path in paths.items() if _is_stage(path, name)}


def _is_stage(path: Path, name: str) -> bool:
    """Whether a configuration trains the stage of its folder's name, and is no run of its own."""
    experiment = load(path)
    return experiment.training.stage == name and len(experiment.system.build().stages) > 1


__all__ = [
    "DATASETS",
    "EXPERIMENTS",
    "SYSTEMS",
    "Evaluation",
    "Experiment",
    "Training",
    "find",
    "find_stages",
    "load",
    "run_configs",
    "save",
]
