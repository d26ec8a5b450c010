"""train: runs an experiment in a working directory, or goes on with it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.commands.run import (
    GRID_COLUMNS,
    checkpoints,
    num_classes,
    stage_dir,
    trained_stage,
)
from diffusion_jax.commands.sample import make_sampler
from diffusion_jax.configuration import to_dict
from diffusion_jax.core.params import by_glob
from diffusion_jax.core.types import AdaptiveLoss, Logger, Params
from diffusion_jax.data.pipeline import batches
from diffusion_jax.data.sources import Source
from diffusion_jax.data.transforms import check_images, check_labels, image_grid
from diffusion_jax.experiment import Experiment, load, save
from diffusion_jax.io.loggers import JSONLLogger, StdoutLogger, TensorBoardLogger
from diffusion_jax.systems import Stage
from diffusion_jax.training.loop import LoopConfig, fit
from diffusion_jax.training.parallel import make_mesh, mesh_train
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.step import make_train_step, step_keys


def check_fit(experiment: Experiment, source: Source) -> None:
    """Checks, before anything is compiled, that data, system and devices fit.

    Raises:
      ValueError: if there is no data, an image is not what the system draws, a label is out
        of range or missing, the learning rate ends before the training does, there are several
        processes, or the batch does not split over the devices.
    """
    if len(source) == 0:
        raise ValueError(f"{source!r} has no examples")
    example, system = source[0], experiment.system
    check_images(np.asarray(example["image"])[None])
    shape = (system.image_size, system.image_size, system.channels)
    if example["image"].shape != shape:
        raise ValueError(
            f"the data's images are {example['image'].shape}, the system's {shape}; set "
            "--system.image-size and --system.channels, or the data's image size"
        )
    classes = num_classes(experiment)
    if classes is not None:
        if "label" not in example:
            raise ValueError(f"the system needs labels, the data has only {sorted(example)}")
        check_labels(np.asarray([example["label"]]), classes)
        of_data = getattr(experiment.data, "num_classes", None)
        if of_data is not None and of_data != classes:
            raise ValueError(
                f"the data has {of_data} classes, the system {classes}; set --system.num-classes"
            )
    if jax.process_count() > 1:
        raise ValueError("training runs in one process; this job has several")
    optimizer, num_steps = experiment.optimizer, experiment.training.num_steps
    if optimizer.total_steps is not None and num_steps > optimizer.total_steps:
        raise ValueError(
            f"the learning rate is 0 after optimizer.total_steps = {optimizer.total_steps} updates "
            f"but training.num_steps = {num_steps}; raise --optimizer.total-steps too"
        )
    count, batch_size = jax.device_count(), experiment.training.batch_size
    if batch_size % (count * experiment.training.accumulate):
        raise ValueError(
            f"batch_size {batch_size} does not split over {count} devices x "
            f"{experiment.training.accumulate} microbatches; choose a multiple"
        )


def check_loss(stage: Stage, shapes: Params, experiment: Experiment) -> None:
    """Traces the loss without compiling it, so that parts that do not fit show at once.

    Raises:
      ValueError: if shapes inside of the stage do not fit, such as the network's output.
    """
    system, size = experiment.system, experiment.training.batch_size
    image = (size, system.image_size, system.image_size, system.channels)
    batch = {
        "image": jax.ShapeDtypeStruct(image, jnp.float32),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    keys = jax.eval_shape(lambda: step_keys(jax.random.key(0), 0, size))
    if isinstance(stage.loss, AdaptiveLoss):
        jax.eval_shape(stage.loss.apply, shapes, batch, keys, jax.eval_shape(stage.loss.init))
    else:
        jax.eval_shape(stage.loss, shapes, batch, keys)


def _claim(workdir: Path, experiment: Experiment) -> None:
    """Writes config.json, or refuses a directory that belongs to another experiment."""
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    if path.exists():
        old, new = (_flat(_determining(run)) for run in (load(path), experiment))
        changed = sorted(key for key in old | new if old.get(key) != new.get(key))
        if changed:
            raise ValueError(
                f"{workdir} holds a run with other values of {', '.join(changed)}; choose another "
                "--workdir, or run with the old values (num_steps and intervals may change)"
            )
    save(experiment, path)


def _determining(experiment: Experiment) -> dict:
    """What a run's numbers depend on, step by step."""
    training = replace(
        experiment.training,
        num_steps=1,
        log_every=1,
        eval_every=0,
        checkpoint_every=1,
        max_to_keep=1,
        tensorboard=False,
    )
    values = to_dict(replace(experiment, training=training))
    return {key: values[key] for key in ("system", "data", "optimizer", "training")}


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping):
        items: Any = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    else:
        return {path: tree}
    flat = {}
    for key, value in items:
        flat.update(_flat(value, f"{path}.{key}" if path else str(key)))
    return flat


def _eval_hook(experiment: Experiment, stage: Stage, loggers: Sequence[Logger]) -> Callable:
    """Draws four rows of samples, a column per class where there are classes."""
    sampler = make_sampler(stage)
    classes = num_classes(experiment)
    columns = min(classes or GRID_COLUMNS, GRID_COLUMNS)
    row = np.arange(columns) if classes else np.zeros(columns)
    labels = np.tile(row, 4).astype(np.int32)

    def on_eval(step: int, state: TrainState) -> None:
        images = sampler(
            state.ema_params,
            {"label": labels},
            seed=experiment.evaluation.seed,
            batch_size=len(labels),
        )
        picture = image_grid(np.clip(images, -1.0, 1.0), columns)
        for logger in loggers:
            logger.image(step, "samples", picture)

    return on_eval


def train(experiment: Experiment, workdir: Path) -> TrainState:
    """Trains one stage, going on from its newest checkpoint in `workdir`.

    Writes config.json, checkpoints/, metrics.jsonl with sample grids, and TensorBoard events if
    asked for; into a folder named as the stage where the system has several stages.

    Returns:
      the last state.

    Raises:
      ValueError: if experiment, data, devices or directory do not fit.
    """
    config = experiment.training
    system = experiment.system.build()
    stage = trained_stage(experiment, system)
    workdir = stage_dir(workdir, system, config.stage)
    source = experiment.data.source()
    check_fit(experiment, source)
    key = jax.random.key(config.seed)
    shapes = jax.eval_shape(stage.init, key)
    by_glob(shapes, *config.trainable)
    data = batches(
        source,
        batch_size=config.batch_size,
        seed=config.seed,
        flip=config.flip,
        keys=("image",) if num_classes(experiment) is None else ("image", "label"),
    )
    check_loss(stage, shapes, experiment)
    _claim(workdir, experiment)
    loggers = [StdoutLogger(), JSONLLogger(workdir / "metrics.jsonl")]
    if config.tensorboard:
        loggers.append(TensorBoardLogger(workdir / "tensorboard"))

    tx = experiment.optimizer.build()
    step = make_train_step(stage.loss, tx, ema=config.ema, accumulate=config.accumulate)
    key_init, key_train = jax.random.split(key)
    state = TrainState.create(
        jax.jit(stage.init)(key_init), tx, trainable=config.trainable, loss=stage.loss
    )
    try:
        with checkpoints(workdir, config.max_to_keep) as checkpointer:
            return fit(
                state,
                mesh_train(step, make_mesh()),
                data,
                key=key_train,
                config=LoopConfig(
                    num_steps=config.num_steps,
                    batch_size=config.batch_size,
                    log_every=config.log_every,
                    eval_every=config.eval_every or None,
                    checkpoint_every=config.checkpoint_every,
                ),
                checkpointer=checkpointer,
                loggers=loggers,
                on_eval=_eval_hook(experiment, stage, loggers) if stage.sample else None,
            )
    finally:
        for logger in loggers:
            logger.close()
