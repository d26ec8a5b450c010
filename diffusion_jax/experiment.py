"""Experiment: everything that determines a run, as one frozen value."""

import importlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from diffusion_jax.configuration import from_dict, to_dict
from diffusion_jax.data import DATASETS
from diffusion_jax.io.files import write_text
from diffusion_jax.systems import SYSTEMS
from diffusion_jax.training.ema import EMA
from diffusion_jax.training.optimizer import Optimizer

# The experiments that ship with the package; a string names one of these or a file.
EXPERIMENTS = ("ddpm", "classifier_free")


@dataclass(frozen=True)
class Training:
    """How long and on what a stage is trained.

    Attributes:
      num_steps: optimizer steps.
      batch_size: examples a step, over all devices of this process.
      seed: of initial parameters, data order and noise.
      stage: which stage of the system.
      trainable: globs over parameter paths; everything else stays frozen.
      ema: averaging of the trainable parameters.
      accumulate: microbatches a step.
      flip: mirror images at random.
      log_every, eval_every, checkpoint_every: in steps; 0 turns the sample grids off.
      max_to_keep: checkpoints kept.
      tensorboard: also write TensorBoard events (needs the extra "logging").

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
    flip: bool = False
    log_every: int = 100
    eval_every: int = 0
    checkpoint_every: int = 1000
    max_to_keep: int = 2
    tensorboard: bool = False

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "accumulate", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.eval_every < 0:
            raise ValueError(f"eval_every must be at least 0, got {self.eval_every}")
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

    Raises:
      ValueError: if a number is out of range.
    """

    num_samples: int = 0
    scales: tuple[float, ...] = (1.0,)
    batch_size: int = 512
    seed: int = 1

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


def find(name: str, *, tiny: bool = False) -> Experiment:
    """The experiment with that name, in that file, or of that working directory.

    Args:
      name: one of EXPERIMENTS; a .py file that defines CONFIG (and TINY); a .json file; or a
        directory with a config.json.
      tiny: TINY instead of CONFIG.

    Raises:
      ValueError: if there is no such experiment.
    """
    path = Path(name)
    if path.is_dir() and (path / "config.json").exists():
        path = path / "config.json"
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


__all__ = [
    "DATASETS",
    "EXPERIMENTS",
    "SYSTEMS",
    "Evaluation",
    "Experiment",
    "Training",
    "find",
    "load",
    "save",
]
