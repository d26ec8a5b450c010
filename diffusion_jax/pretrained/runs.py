"""What `diffusion-jax train` left in a working directory: the system and its parameters."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from diffusion_jax.core.types import Params
from diffusion_jax.experiment import Experiment, load
from diffusion_jax.io.checkpoint_leaves import KINDS
from diffusion_jax.io.shards import read_json
from diffusion_jax.pretrained.networks import (
    CONFIG,
    Shardings,
    floating_dtype,
    sharding_of,
    with_dtype,
)
from diffusion_jax.systems import System


class Trained(NamedTuple):
    """A trained run.

    Attributes:
      experiment: what was trained, of the last stage where there are several.
      system: its functions: `system.sample(params, batch, keys)` draws.
      params: of every stage by name.
      steps: how many updates every stage had.
    """

    experiment: Experiment
    system: System
    params: Mapping[str, Params]
    steps: Mapping[str, int]


def is_run(folder: Path) -> bool:
    """Whether a folder holds a configuration of ours, or folders of stages that do."""
    configs = [folder / CONFIG] if (folder / CONFIG).exists() else folder.glob(f"*/{CONFIG}")
    return any({"system", "training"} <= read_json(path).keys() for path in configs)


def load_run(
    folder: Path,
    *,
    dtype: Any = None,
    weights: str = "ema",
    shardings: Shardings | None = None,
) -> Trained:
    """Reads the newest checkpoint of every stage of a working directory; see `from_pretrained`."""
    from diffusion_jax.commands.run import checkpoints, stage_dir
    from diffusion_jax.experiment import run_configs

    if weights not in KINDS:
        raise ValueError(f"weights must be one of {sorted(KINDS)}, got {weights!r}")
    experiments = {stage: load(path) for stage, path in run_configs(folder).items()}
    experiment = list(experiments.values())[-1]
    config = experiment.system
    if dtype is not None:
        config = dataclasses.replace(config, dtype=floating_dtype(dtype).name)
    system = config.build()
    params, steps = {}, {}
    for name, stage in system.stages.items():
        shapes = jax.eval_shape(stage.init, jax.random.key(0))
        placed = _placed(shapes, shardings, name if len(system.stages) > 1 else None)
        with checkpoints(stage_dir(folder, system, name)) as checkpointer:
            params[name] = checkpointer.restore_params(kind=weights, like=placed)
            steps[name] = checkpointer.restored_step
        if dtype is not None:
            wanted = with_dtype(shapes, floating_dtype(dtype))
            params[name] = jax.tree.map(lambda x, to: x.astype(to.dtype), params[name], wanted)
    return Trained(experiment, system, params, steps)


def _placed(shapes: Params, shardings: Shardings | None, stage: str | None) -> Params:
    """Shapes with the shardings that they are to be read with; paths of several stages begin
    with the stage."""
    if shardings is None:
        return shapes
    tree = {stage: shapes} if stage else shapes
    if stage and isinstance(shardings, Mapping):
        shardings = {stage: shardings.get(stage, {})}
    by_path = sharding_of(shardings, tree)
    prefix = f"{stage}/" if stage else ""

    def placed(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        key = prefix + "/".join(str(entry.key) for entry in path)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_path[key])

    return jax.tree_util.tree_map_with_path(placed, shapes)
