"""Checkpoints: durable training states with the position of their data, through orbax."""

import functools
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict

from diffusion_jax.core.params import merge
from diffusion_jax.core.types import Params

KINDS = {"ema": "ema", "raw": "trainable"}

Leaves = dict[tuple[str, ...], Any]


class CheckpointMismatchError(ValueError):
    """A checkpoint and the state that it should fill differ.

    Attributes:
      differences: one line for every leaf: its path, what was saved, what is wanted.
    """

    def __init__(self, where: str, differences: list[str]):
        self.differences = differences
        super().__init__(
            f"{where} does not fit, {len(differences)} leaves differ; was it written with another "
            "model, optimizer, loss or choice of trainable leaves?\n  " + "\n  ".join(differences)
        )


def _name(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    raise ValueError(f"cannot name the tree entry {entry!r}; use dicts, dataclasses or tuples")


def _leaves(tree: Any) -> Leaves:
    """Leaves by path, whatever the containers; orbax would turn tuples into lists."""
    with_paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {tuple(_name(entry) for entry in path): leaf for path, leaf in with_paths}


def _empty_nodes(tree: Any) -> list[list[str]]:
    """Paths of the empty dicts in the parameter subtrees, which have no leaf to be saved by."""
    paths = []
    for part in ("trainable", "frozen"):
        flat = flatten_dict(dict(getattr(tree, part, {})), keep_empty_nodes=True)
        paths += [[part, *path] for path, leaf in flat.items() if leaf is empty_node]
    return paths


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    # What metadata calls a sharding is a description of the devices of the writer.
    if not isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _describe(leaf: Any) -> str:
    return "nothing" if leaf is None else f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _check(where: str, saved: Leaves, wanted: Leaves) -> None:
    differences = []
    for path in sorted(saved.keys() | wanted.keys()):
        old, new = _describe(saved.get(path)), _describe(wanted.get(path))
        if old != new:
            differences.append(f"{'/'.join(path)}: saved {old}, wanted {new}")
    if differences:
        raise CheckpointMismatchError(where, differences)


def resolve(directory: str | PathLike) -> str:
    """An absolute path, `~` expanded; addresses such as gs://bucket/run stay as they are."""
    text = str(directory)
    return text if "://" in text else str(Path(text).expanduser().resolve())


class Checkpoints:
    """Checkpoints of one run in one directory; a context manager that waits for its writes.

    A checkpoint is a folder named after its step with a tree of arrays (`state`), and JSON
    (`data`, `layout`). It appears under that name only when it is complete.

    Attributes:
      directory: absolute path.
      max_to_keep: older checkpoints are deleted.

    Raises:
      ValueError: if `max_to_keep` < 1 or the directory is a file.
    """

    def __init__(self, directory: str | PathLike, *, max_to_keep: int = 3):
        if max_to_keep < 1:
            raise ValueError(f"max_to_keep must be at least 1, got {max_to_keep}")
        self.directory, self.max_to_keep = resolve(directory), max_to_keep
        if Path(self.directory).is_file():
            raise ValueError(f"checkpoints need a directory, but {self.directory} is a file")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    @functools.cached_property
    def _manager(self) -> Any:
        # Made at the first use, so that looking into a wrong path does not create it.
        import orbax.checkpoint as ocp

        return ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=self.max_to_keep),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "layout": ocp.JsonCheckpointHandler(),
            },
        )

    def steps(self) -> tuple[int, ...]:
        """Steps of the complete checkpoints, ascending; one being written is not among them."""
        import orbax.checkpoint as ocp
        from etils import epath

        if not epath.Path(self.directory).exists():
            return ()
        # The manager's own answer includes checkpoints that are not written yet.
        return tuple(sorted(ocp.utils.checkpoint_steps(self.directory)))

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        steps = self.steps()
        return steps[-1] if steps else None

    def save(self, step: int, state: Any, data_state: Mapping[str, Any]) -> None:
        """Starts to write a checkpoint and returns; `wait` or the next save reports failures.

        The arrays may be donated as soon as this returns.

        Args:
          step: number of updates done; above that of every earlier checkpoint.
          state: any pytree of arrays.
          data_state: position of the data, JSON-serialisable.

        Raises:
          ValueError: if the step is not above the newest one, or `data_state` is not JSON.
        """
        import orbax.checkpoint as ocp

        newest = self._manager.latest_step()
        if newest is not None and step <= newest:
            raise ValueError(
                f"step {step} is not above step {newest}, the newest in {self.directory}; resume "
                "from that checkpoint or use another directory"
            )
        try:
            # A copy, because the write goes on while the owner of the dict does.
            position = json.loads(json.dumps(data_state))
        except TypeError as error:
            raise ValueError(f"data_state must be JSON-serialisable: {error}") from error
        arrays = unflatten_dict(_leaves(state))
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays),
            data=ocp.args.JsonSave(position),
            layout=ocp.args.JsonSave({"version": 1, "empty": _empty_nodes(state)}),
        )
        self._manager.save(step, args=items)

    def restore(self, state: Any, step: int | None = None) -> tuple[Any, Mapping[str, Any]]:
        """Reads a checkpoint into the structure of `state`.

        Args:
          state: tree of arrays or of `jax.ShapeDtypeStruct` (from `jax.eval_shape`); shapes
            and dtypes must be those saved, shardings are those of `state`.
          step: which one; None for the newest complete one.

        Returns:
          (state, data_state).

        Raises:
          FileNotFoundError: if there is no such checkpoint.
          CheckpointMismatchError: listing every leaf that differs.
        """
        import orbax.checkpoint as ocp

        step = self._existing(step)
        wanted = {path: _abstract(leaf) for path, leaf in _leaves(state).items()}
        _check(self._where(step), self._saved_leaves(step), wanted)
        restored = flatten_dict(self._read(step, wanted))
        leaves = [restored[path] for path in wanted]
        data_state = self._manager.restore(
            step, args=ocp.args.Composite(data=ocp.args.JsonRestore())
        )["data"]
        return jax.tree.unflatten(jax.tree.structure(state), leaves), data_state

    def restore_params(
        self, *, kind: str = "ema", step: int | None = None, like: Params | None = None
    ) -> Params:
        """Reads the parameters of a saved TrainState, without optimizer or training code.

        Args:
          kind: "ema" for the averaged trainable leaves, "raw" for the last ones.
          step: which checkpoint; None for the newest complete one.
          like: parameter tree, for example from `jax.eval_shape`, that the result must
            agree with in paths, shapes and dtypes; it gives the shardings. None to take
            what was saved, on the first device.

        Returns:
          whole parameter tree, trainable and frozen leaves merged.

        Raises:
          ValueError: if `kind` is unknown, or the checkpoint is not of a TrainState.
          FileNotFoundError: if there is no such checkpoint.
          CheckpointMismatchError: listing every leaf that differs from `like`.
        """
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}; there are {sorted(KINDS)}")
        step = self._existing(step)
        parts = (KINDS[kind], "frozen")
        everything = self._saved_leaves(step)
        saved = {path: leaf for path, leaf in everything.items() if path[0] in parts}
        if not any(path[0] == "ema" for path in everything):
            top = sorted({path[0] for path in everything})
            raise ValueError(f"{self._where(step)} is not of a TrainState, it holds {top}")
        wanted = {path: _abstract(leaf) for path, leaf in saved.items()}
        if like is not None:
            target = _leaves(like)
            _check(self._where(step), {path[1:]: leaf for path, leaf in saved.items()}, target)
            wanted = {path: _abstract(target[path[1:]]) for path in saved}
        tree = self._read(step, wanted)
        return merge(*(tree.get(part, {}) for part in parts), self._empty(step, parts))

    def wait(self) -> None:
        """Returns when everything is written; raises what went wrong with it."""
        if "_manager" in self.__dict__:
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases what orbax holds."""
        if "_manager" in self.__dict__:
            self.wait()
            self._manager.close()
            del self._manager

    def _where(self, step: int) -> str:
        return f"the checkpoint of step {step} in {self.directory}"

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if step is None and steps:
            return steps[-1]
        if step not in steps:
            which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise FileNotFoundError(f"{which} in {self.directory}; complete are {list(steps)}")
        return step

    def _saved_leaves(self, step: int) -> Leaves:
        return flatten_dict(self._manager.item_metadata(step)["state"].tree)

    def _read(self, step: int, wanted: Leaves) -> dict[str, Any]:
        import orbax.checkpoint as ocp

        tree = unflatten_dict(wanted)
        arguments = ocp.args.PyTreeRestore(
            tree,
            restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
            partial_restore=True,
        )
        return self._manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]

    def _empty(self, step: int, parts: tuple[str, ...]) -> Params:
        import orbax.checkpoint as ocp

        arguments = ocp.args.Composite(layout=ocp.args.JsonRestore())
        layout = self._manager.restore(step, args=arguments)["layout"]
        return unflatten_dict({tuple(path[1:]): {} for path in layout["empty"]})
