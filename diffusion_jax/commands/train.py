"""train: runs an experiment in a working directory, or goes on with it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.commands.run import (
    GRID_COLUMNS,
    check_workdir,
    checkpoints,
    num_classes,
    open_loggers,
    readable,
    stage_dir,
    trained_stage,
)
from diffusion_jax.commands.sample import make_sampler
from diffusion_jax.configuration import to_dict
from diffusion_jax.core.params import by_glob
from diffusion_jax.core.types import AdaptiveLoss, Key, Logger, Params
from diffusion_jax.data.bad_examples import SkipBad
from diffusion_jax.data.batching import batches
from diffusion_jax.data.sources import Source
from diffusion_jax.data.transforms import check_images, check_labels, image_grid
from diffusion_jax.experiment import Experiment, load, save
from diffusion_jax.systems import Stage
from diffusion_jax.training.guard import Guard
from diffusion_jax.training.loop import LoopConfig, fit
from diffusion_jax.training.parallel import check_batch_size, init_state, make_mesh, mesh_train
from diffusion_jax.training.processes import agree_from_writer, check_agreement, is_writer
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.step import make_train_step, step_keys


def check_fit(experiment: Experiment, source: Source, mesh: Mesh) -> None:
    """Checks, before anything is compiled, that data, system and devices fit.

    Raises:
      ValueError: if there is no data, an image is not what the system draws, a label is out
        of range or missing, the learning rate ends before the training does, or the batch does
        not split over the devices.
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
    optimizer, num_steps = experiment.optimizer, experiment.training.num_steps
    if optimizer.total_steps is not None and num_steps > optimizer.total_steps:
        raise ValueError(
            f"the learning rate is 0 after optimizer.total_steps = {optimizer.total_steps} updates "
            f"but training.num_steps = {num_steps}; raise --optimizer.total-steps too"
        )
    training = experiment.training
    check_batch_size(training.batch_size, mesh, accumulate=training.accumulate)


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


def _check_config(workdir: Path, experiment: Experiment) -> None:
    """Refuses a directory that belongs to another experiment."""
    path = workdir / "config.json"
    if path.exists():
        old, new = (_flat(_determining(run)) for run in (load(path), experiment))
        changed = sorted(key for key in old | new if old.get(key) != new.get(key))
        if changed:
            raise ValueError(
                f"{workdir} holds a run with other values of {', '.join(changed)}; choose another "
                "--workdir, or run with the old values (num_steps, intervals, the guard and how "
                "the work is spread may change)"
            )


def _determining(experiment: Experiment) -> dict:
    """What a run's numbers depend on, step by step."""
    training = replace(
        experiment.training,
        num_steps=1,
        log_every=1,
        eval_every=0,
        checkpoint_every=1,
        max_to_keep=1,
        guard=Guard(),
        on_bad_example="raise",
        num_workers=0,
        fsdp=1,
        tensorboard=False,
        wandb=None,
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
    # Every process has the parameters, process 0 draws.
    sampler = make_sampler(stage, make_mesh(devices=jax.local_devices()))
    classes = num_classes(experiment)
    columns = min(classes or GRID_COLUMNS, GRID_COLUMNS)
    row = np.arange(columns) if classes else np.zeros(columns)
    labels = np.tile(row, 4).astype(np.int32)

    def on_eval(step: int, state: TrainState) -> None:
        params = readable(state.ema_params)
        if not is_writer():
            return
        images = sampler(
            params,
            {"label": labels},
            seed=experiment.evaluation.seed,
            batch_size=len(labels),
        )
        picture = image_grid(np.clip(images, -1.0, 1.0), columns)
        for logger in loggers:
            logger.image(step, "samples", picture)

    return on_eval


def train(experiment: Experiment, workdir: Path, *, trace: bool = False) -> TrainState:
    """Trains one stage, going on from its newest good checkpoint in `workdir`.

    Writes config.json, checkpoints/, metrics.jsonl with sample grids, TensorBoard events if asked
    for, and a profiler's trace; into a folder named as the stage where the system has several
    stages. In a job of several processes each calls it, and process 0 alone writes.

    Args:
      experiment: what to train.
      workdir: a directory that every process sees.
      trace: trace five updates with `jax.profiler`, into the folder trace.

    Returns:
      the last state.

    Raises:
      ValueError: if experiment, data, devices or directory do not fit, or the processes of the
        job disagree.
      CheckpointError, BadUpdateError, TrainingInterrupted, SystemExit: see `fit`.
    """
    config = experiment.training
    mesh = make_mesh(fsdp=config.fsdp)
    system = experiment.system.build()
    stage = trained_stage(experiment, system)
    workdir = stage_dir(workdir, system, config.stage)
    check_workdir(workdir)
    # Process 0 prepares the data set first, if that is to be done.
    sources: list[Source] = []
    agree_from_writer(lambda: sources.append(experiment.data.source()))
    source = sources[0] if sources else experiment.data.source()
    source = SkipBad(source) if config.on_bad_example == "skip" else source
    check_fit(experiment, source, mesh)
    key = jax.random.key(config.seed)
    shapes = jax.eval_shape(stage.init, key)
    by_glob(shapes, *config.trainable)
    classes = num_classes(experiment)
    data = batches(
        source,
        batch_size=config.batch_size // jax.process_count(),
        seed=config.seed,
        flip=config.flip,
        keys=("image",) if classes is None else ("image", "label"),
        num_classes=classes,
        num_workers=config.num_workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    check_loss(stage, shapes, experiment)
    values = to_dict(experiment)
    steps = checkpoints(workdir).steps()
    check_agreement({**_flat(values), "data": data.get_state(), "checkpoints": steps})
    agree_from_writer(lambda: _check_config(workdir, experiment))
    tx = experiment.optimizer.build()
    step = make_train_step(
        stage.loss,
        tx,
        ema=config.ema,
        accumulate=config.accumulate,
        guard=config.guard,
        learning_rate=experiment.optimizer.learning_rate_at,
    )
    key_init, key_train = jax.random.split(key)

    def create(key: Key) -> TrainState:
        params = stage.init(key)
        return TrainState.create(params, tx, trainable=config.trainable, loss=stage.loss)

    with (
        closing(data),
        checkpoints(workdir, max_to_keep=config.max_to_keep, configuration=values) as checkpointer,
    ):
        # Before anything is written, since another run may be under way here.
        checkpointer.claim()
        agree_from_writer(lambda: save(experiment, workdir / "config.json"))
        with open_loggers(
            workdir, tensorboard=config.tensorboard, wandb=config.wandb, values=values
        ) as loggers:
            return fit(
                init_state(create, mesh, key_init),
                mesh_train(step, mesh),
                data,
                key=key_train,
                config=LoopConfig(
                    num_steps=config.num_steps,
                    batch_size=config.batch_size,
                    log_every=config.log_every,
                    eval_every=config.eval_every or None,
                    checkpoint_every=config.checkpoint_every,
                    max_skipped=config.guard.max_skipped,
                    trace_dir=str(workdir / "trace") if trace else None,
                ),
                checkpointer=checkpointer,
                loggers=loggers,
                on_eval=_eval_hook(experiment, stage, loggers) if stage.sample else None,
            )
