"""Checkpoints: durable training states with the position of their data, through orbax."""

import contextlib
import functools
import json
import platform
import shutil
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion_jax.core.params import merge
from diffusion_jax.core.types import Params
from diffusion_jax.io import digests
from diffusion_jax.io.checkpoint_errors import (
    CheckpointCorruptedError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointMissingError,
    CheckpointSaveError,
    CheckpointWarning,
)
from diffusion_jax.io.checkpoint_leaves import (
    KINDS,
    Leaves,
    abstract,
    check_fit,
    digests_of,
    empty_nodes,
    leaves_of,
    non_finite,
)
from diffusion_jax.io.locks import locked

_FORMAT = 2
_LIBRARIES = (
    *("jax", "jaxlib", "flax", "optax", "grain"),
    *("orbax-checkpoint", "numpy", "diffusion-jax"),
)
_DETERMINING = (
    *("jax", "jaxlib", "flax", "optax", "grain"),
    *("platform", "device", "devices", "processes"),
)
# Room for JSON and metadata beside the arrays.
_SPARE_BYTES = 2**20
_CORRUPTED = ".corrupted"


class Matching(NamedTuple):
    """What `Checkpoints.restore_matching` found.

    Attributes:
      params: the tree asked for, with the saved leaves in it.
      missing: paths that were not saved and keep the values they had.
      unexpected: paths that were saved and not asked for.
    """

    params: Params
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


class _Reading(NamedTuple):
    """What a process read for itself of a checkpoint, and what all of them make of it together."""

    layout: dict[str, Any]
    leaves: Leaves
    finish: Callable[[Leaves], Any]


def _brief(error: Exception) -> str:
    """An error in a line; those of tensorstore go on for pages."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {textwrap.shorten(first, 300)}"


def _anywhere(failed: bool) -> bool:
    """Whether it failed in any process; every process must ask."""
    if jax.process_count() == 1:
        return failed
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.bool_(failed))))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _conditions() -> dict[str, Any]:
    """What equal numbers need besides equal programs: libraries and devices."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _LIBRARIES},
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


def resolve(directory: str | PathLike) -> str:
    """An absolute path, `~` expanded; addresses such as gs://bucket/run stay as they are."""
    text = str(directory)
    return text if "://" in text else str(Path(text).expanduser().resolve())


class Checkpoints:
    """Checkpoints of one run in one directory; a context manager that waits for its writes.

    A checkpoint is a folder named after its step with a tree of arrays (`state`), and JSON
    (`data`, `layout`). It appears under that name only when it is complete. The layout holds a
    digest of every array and of the data's position, see `digests.digest`; they are compared
    whenever something is read.

    Attributes:
      directory: absolute path.
      max_to_keep: older checkpoints are deleted.
      frozen: whether the frozen leaves of a TrainState are saved. Without them a checkpoint is
        that of the trained leaves (an adapter, say), and restoring compares the frozen leaves of
        the state that it fills with those of the run.
      configuration: JSON that describes the run, kept in every checkpoint.
      restored_step: step of the checkpoint that was last read, None before.

    Raises:
      ValueError: if `max_to_keep` < 1 or the directory is a file.
    """

    def __init__(
        self,
        directory: str | PathLike,
        *,
        max_to_keep: int = 3,
        frozen: bool = True,
        configuration: Mapping[str, Any] | None = None,
    ):
        if max_to_keep < 1:
            raise ValueError(f"max_to_keep must be at least 1, got {max_to_keep}")
        self.directory, self.max_to_keep, self.frozen = resolve(directory), max_to_keep, frozen
        self.configuration = dict(configuration or {})
        self.restored_step: int | None = None
        self._writing: int | None = None
        self._claimed, self._lock = False, None
        if Path(self.directory).is_file():
            raise ValueError(f"checkpoints need a directory, but {self.directory} is a file")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    @functools.cached_property
    def _manager(self) -> Any:
        # Made for the first save: orbax's reading waits for all processes in the middle, where one
        # that cannot read its part does not come.
        import orbax.checkpoint as ocp

        class Manager(ocp.CheckpointManager):
            def reached_preemption(self, step: int) -> bool:
                # The host loop asks; orbax's questions would come between its own.
                return False

        return Manager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=self.max_to_keep),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "layout": ocp.JsonCheckpointHandler(),
            },
        )

    @property
    def _path(self) -> Any:
        from etils import epath

        return epath.Path(self.directory)

    def claim(self) -> None:
        """Makes this job the only writer, and deletes what a killed writer left half done.

        What is deleted is named by a `CheckpointWarning`. The claim ends with `release`, or with
        the process however it ends.

        Raises:
          CheckpointError: if another run writes into the directory.
        """
        self._in_process_0(self._claim, "claim the directory")
        self._claimed = True

    def _claim(self) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        if self._lock is None and "://" not in self.directory:
            self._lock = locked(Path(self.directory) / ".lock")
        if self._lock is None:
            # Another run may be writing them.
            return
        for path in self._path.iterdir():
            if ".orbax-checkpoint-tmp" in path.name:
                path.rmtree()
                warnings.warn(
                    f"deleted {path}, which a killed run left half written",
                    CheckpointWarning,
                    stacklevel=5,
                )

    def release(self) -> None:
        """Ends the claim, if there is one."""
        if self._lock is not None:
            self._lock.close()
        self._claimed, self._lock = False, None

    def _in_process_0(self, function: Callable[[], None], what: str) -> None:
        """Runs a function in process 0; if it raises, every process does."""
        error = None
        if jax.process_index() == 0:
            try:
                function()
            # The other processes wait for an answer, whatever it is.
            except Exception as found:
                error = found
        if _anywhere(error is not None):
            raise error or CheckpointError(f"process 0 could not {what} {self.directory}")

    def steps(self) -> tuple[int, ...]:
        """Steps of the complete checkpoints, ascending; one being written is not among them."""
        import orbax.checkpoint as ocp

        if not self._path.exists():
            return ()
        # The manager's own answer includes checkpoints that are not written yet, or never will be.
        return tuple(sorted(ocp.utils.checkpoint_steps(self.directory)))

    @property
    def last_committed_step(self) -> int | None:
        """Step of the newest checkpoint that is completely on disk, None if there is none."""
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
          CheckpointSaveError: if parameters or their averages are not finite, the disk has not
            the room, or this checkpoint or the one before could not be written.
        """
        import orbax.checkpoint as ocp

        self.wait()
        newest = self.last_committed_step
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
        leaves = leaves_of(state)
        keys = [p for p, x in leaves.items() if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
        if keys:
            raise ValueError(f"{'/'.join(keys[0])} is a typed key; save jax.random.key_data of it")
        wide = [p for p, x in leaves.items() if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype]
        if wide:
            raise ValueError(
                f"jax would restore {'/'.join(wide[0])} with 32 bits; save it with 32 bits, or "
                "enable x64"
            )
        bad = non_finite(leaves)
        if bad:
            raise CheckpointSaveError(step, newest, f"NaN or infinity in {', '.join(bad)}")
        body = {
            "version": _FORMAT,
            "empty": empty_nodes(state),
            "frozen": self.frozen,
            "digests": digests_of(leaves),
            "data": digests.of_json(position),
            "conditions": _conditions(),
            "configuration": self.configuration,
        }
        kept = {path: x for path, x in leaves.items() if self.frozen or path[0] != "frozen"}
        self._check_space(step, sum(leaf.nbytes for leaf in kept.values()))
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(unflatten_dict(kept)),
            data=ocp.args.JsonSave(position),
            layout=ocp.args.JsonSave({"body": body, "digest": digests.of_json(body)}),
        )
        self._writing = step
        try:
            if not self._manager.save(step, args=items):
                raise OSError("orbax declined to save it")
        except Exception as error:
            raise self._failed(error) from error

    def _check_space(self, step: int, size: int) -> None:
        def check() -> None:
            self._path.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.directory).free
            if free < size + _SPARE_BYTES:
                reason = f"it takes {size:,} bytes, {free:,} are free in {self.directory}"
                raise CheckpointSaveError(step, self.last_committed_step, reason)

        if "://" not in self.directory:
            self._in_process_0(check, f"save step {step} in")

    def _failed(self, error: Exception) -> CheckpointSaveError:
        """After a failure orbax believes in what is not there; the next use makes a new manager."""
        step, self._writing = self._writing, None
        manager = self.__dict__.pop("_manager")
        with contextlib.suppress(Exception):
            manager.close()
        reason = _brief(error)
        if "://" not in self.directory:
            reason += f" ({shutil.disk_usage(self.directory).free:,} bytes are free)"
        return CheckpointSaveError(step, self.last_committed_step, reason)

    def restore(self, state: Any, step: int | None = None) -> tuple[Any, Mapping[str, Any]]:
        """Reads a checkpoint into the structure of `state`.

        Args:
          state: tree of arrays or of `jax.ShapeDtypeStruct` (from `jax.eval_shape`); shapes
            and dtypes must be those saved, shardings are those of `state`. Frozen leaves that
            were not saved must be arrays.
          step: which one, and no other. None for the newest good one: a corrupted checkpoint is
            passed over with a `CheckpointWarning`, and renamed to STEP.corrupted by the run that
            has claimed the directory.

        Returns:
          (state, data_state).

        Raises:
          CheckpointMissingError: if there is no such checkpoint.
          CheckpointCorruptedError: if it, or every one, is not what was written.
          CheckpointMismatchError: listing every leaf that differs.
        """
        return self._newest_good(lambda number: self._restore(state, number), step)

    def _restore(self, state: Any, step: int) -> _Reading:
        wanted, layout = leaves_of(state), self._layout(step)
        fixed = {} if layout["frozen"] else {p: x for p, x in wanted.items() if p[0] == "frozen"}
        read = {path: abstract(leaf) for path, leaf in wanted.items() if path not in fixed}
        check_fit(self._where(step), self._saved_leaves(step), read)
        position = self._json(step, "data")
        if layout["data"] not in (None, digests.of_json(position)):
            raise self._corrupted(step, "the position of the data has changed")

        def finish(arrays: Leaves) -> tuple[Any, Mapping[str, Any]]:
            self._check_base(step, layout, fixed)
            self._compare_conditions(step, layout)
            leaves = [arrays[path] if path in arrays else fixed[path] for path in wanted]
            return jax.tree.unflatten(jax.tree.structure(state), leaves), position

        return _Reading(layout, self._read(step, read), finish)

    def restore_params(
        self,
        *,
        kind: str = "ema",
        step: int | None = None,
        like: Params | None = None,
        frozen: Params | None = None,
    ) -> Params:
        """Reads the parameters of a saved TrainState, without optimizer or training code.

        Args:
          kind: "ema" for the averaged trainable leaves, "raw" for the last ones.
          step: which checkpoint; None for the newest good one, see `restore`.
          like: parameter tree, for example from `jax.eval_shape`, that the result must
            agree with in paths, shapes and dtypes; it gives the shardings. None to take
            what was saved, on the first device.
          frozen: tree with the frozen leaves, for a checkpoint that leaves them out.

        Returns:
          whole parameter tree, trainable and frozen leaves merged.

        Raises:
          ValueError: if `kind` is unknown, the checkpoint is not of a TrainState, or it leaves
            the frozen leaves out and they are not given.
          CheckpointMissingError, CheckpointCorruptedError: see `restore`.
          CheckpointMismatchError: listing every leaf that differs from `like`, or every frozen
            leaf that has other values than those of the run.
        """
        return self._newest_good(lambda n: self._params(n, kind, like, frozen), step)

    def _params(self, step: int, kind: str, like: Params | None, frozen: Params | None) -> _Reading:
        layout, saved = self._layout(step), self._saved_params(step, kind)
        parts = (KINDS[kind], "frozen")
        fixed = self._frozen_leaves(step, layout, frozen)
        wanted = {path: abstract(leaf) for path, leaf in saved.items()}
        if like is not None:
            target = leaves_of(like)
            found = {path[1:]: leaf for path, leaf in (saved | fixed).items()}
            check_fit(self._where(step), found, target)
            wanted = {path: abstract(target[path[1:]]) for path in saved}

        def finish(arrays: Leaves) -> Params:
            self._check_base(step, layout, fixed)
            tree = unflatten_dict(arrays | fixed)
            empty = {tuple(path[1:]): {} for path in layout["empty"]}
            return merge(*(tree.get(part, {}) for part in parts), unflatten_dict(empty))

        return _Reading(layout, self._read(step, wanted), finish)

    def restore_matching(
        self, like: Params, *, kind: str = "ema", step: int | None = None
    ) -> Matching:
        """Reads those saved parameters that a tree has room for, and says which the others are.

        Args:
          like: whole parameter tree of arrays; where nothing was saved, its values stay.
          kind, step: as for `restore_params`.

        Raises:
          CheckpointMismatchError: if a leaf that both have differs in shape or dtype.
          ValueError, CheckpointMissingError, CheckpointCorruptedError: as `restore_params`.
        """
        return self._newest_good(lambda number: self._matching(number, like, kind), step)

    def _matching(self, step: int, like: Params, kind: str) -> _Reading:
        layout, saved = self._layout(step), self._saved_params(step, kind)
        target = leaves_of(like)
        both = {path: leaf for path, leaf in saved.items() if path[1:] in target}
        common = {path[1:]: leaf for path, leaf in both.items()}
        check_fit(self._where(step), common, {path: target[path] for path in common})
        wanted = {path: abstract(target[path[1:]]) for path in both}

        def finish(arrays: Leaves) -> Matching:
            read = {path[1:]: leaf for path, leaf in arrays.items()}
            leaves = [read.get(path, leaf) for path, leaf in target.items()]
            return Matching(
                jax.tree.unflatten(jax.tree.structure(like), leaves),
                tuple("/".join(path) for path in target if path not in common),
                tuple("/".join(path[1:]) for path in saved if path not in both),
            )

        return _Reading(layout, self._read(step, wanted), finish)

    def digest(self, step: int | None = None) -> str:
        """One digest of all arrays of a checkpoint; equal states have equal ones.

        Args:
          step: which checkpoint; None for the newest.

        Raises:
          ValueError: if it was written without digests.
          CheckpointMissingError, CheckpointCorruptedError: see `restore`.
        """
        step = self._existing(step)
        found = self._layout(step)["digests"]
        if not found:
            raise ValueError(f"{self._where(step)} was written without digests")
        return digests.of_json(found)

    def wait(self) -> None:
        """Returns when everything is written.

        Raises:
          CheckpointSaveError: if a checkpoint could not be written.
        """
        if "_manager" not in self.__dict__:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        self._writing = None

    def close(self) -> None:
        """Waits, then releases what orbax holds, and the claim."""
        try:
            self.wait()
        finally:
            if "_manager" in self.__dict__:
                self.__dict__.pop("_manager").close()
            self.release()

    def _where(self, step: int) -> str:
        return f"the checkpoint of step {step} in {self.directory}"

    def _corrupted(
        self, step: int, reason: str, leaves: tuple[str, ...] = ()
    ) -> CheckpointCorruptedError:
        return CheckpointCorruptedError(step, self._where(step), reason, leaves)

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if step is None and steps:
            return steps[-1]
        if step not in steps:
            which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise CheckpointMissingError(f"{which} in {self.directory}; complete are {list(steps)}")
        return step

    def _newest_good(self, read: Callable[[int], _Reading], step: int | None) -> Any:
        """Reads a step, or the newest one that is what was written.

        All processes take the same one. What each reads for itself comes first, then they agree,
        and only then what they do together.
        """
        explicit, step = step is not None, self._existing(step)
        self.wait()
        candidates = [number for number in self.steps() if number <= step]
        while True:
            candidate, reading, error = candidates.pop(), None, None
            try:
                reading = read(candidate)
            except CheckpointCorruptedError as found:
                error = found
            if _anywhere(error is not None):
                error = error or self._corrupted(candidate, "another process cannot read it")
            elif reading is not None:
                error = self._changed(candidate, reading)
                if error is None:
                    self.restored_step = candidate
                    return reading.finish(reading.leaves)
            if explicit or not candidates:
                assert error is not None
                raise error
            warnings.warn(f"{error}. It is passed over", CheckpointWarning, stacklevel=3)
            if self._claimed:
                self._in_process_0(lambda number=candidate: self._set_aside(number), "rename in")

    def _changed(self, step: int, reading: _Reading) -> CheckpointCorruptedError | None:
        """What is wrong with the values that were read, if anything."""
        found, saved = digests_of(reading.leaves), reading.layout["digests"]
        changed = tuple(path for path in found if saved and saved.get(path) != found[path])
        if not changed:
            return None
        shown = ", ".join(changed[:3]) + (" …" if len(changed) > 3 else "")
        return self._corrupted(step, f"{len(changed)} arrays have changed: {shown}", changed)

    def _set_aside(self, step: int) -> None:
        name = f"{step}{_CORRUPTED}"
        others = sum(path.name.startswith(name) for path in self._path.iterdir())
        (self._path / str(step)).rename(self._path / (f"{name}.{others}" if others else name))

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except (CheckpointError, MemoryError, PermissionError):
            raise
        # Orbax and tensorstore raise anything from KeyError to bare Exception for damaged files.
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise
            raise self._corrupted(step, _brief(error)) from error

    def _json(self, step: int, item: str) -> Any:
        with self._reading(step):
            return json.loads((self._path / str(step) / item / "metadata").read_text())

    def _layout(self, step: int) -> dict[str, Any]:
        found = self._json(step, "layout")
        keys = set(found) if isinstance(found, dict) else set()
        if keys == {"version", "empty"} and found["version"] == 1:
            warnings.warn(
                f"{self._where(step)} was written without digests; whether it is what was written "
                "cannot be told",
                CheckpointWarning,
                stacklevel=4,
            )
            unknown = {"digests": {}, "data": None, "conditions": {}, "configuration": {}}
            return {**found, "frozen": True, **unknown}
        if keys != {"body", "digest"} or digests.of_json(found["body"]) != found["digest"]:
            raise self._corrupted(step, "its layout has changed")
        if found["body"]["version"] != _FORMAT:
            version = found["body"]["version"]
            raise CheckpointError(
                f"{self._where(step)} has format {version}, this library reads {_FORMAT} and below"
            )
        return found["body"]

    def _saved_leaves(self, step: int) -> Leaves:
        with self._reading(step):
            import orbax.checkpoint as ocp

            folder = self._path / str(step) / "state"
            return flatten_dict(ocp.PyTreeCheckpointHandler().metadata(folder).tree)

    def _saved_params(self, step: int, kind: str) -> Leaves:
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}; there are {sorted(KINDS)}")
        everything = self._saved_leaves(step)
        if not any(path[0] == "ema" for path in everything):
            top = sorted({path[0] for path in everything})
            raise ValueError(f"{self._where(step)} is not of a TrainState, it holds {top}")
        return {p: leaf for p, leaf in everything.items() if p[0] in (KINDS[kind], "frozen")}

    def _frozen_leaves(self, step: int, layout: dict[str, Any], frozen: Params | None) -> Leaves:
        """The given leaves at the paths that the checkpoint leaves out."""
        if layout["frozen"]:
            return {}
        if frozen is None:
            raise ValueError(
                f"{self._where(step)} leaves the frozen leaves out; pass them as `frozen`"
            )
        given: Leaves = {("frozen", *path): leaf for path, leaf in leaves_of(frozen).items()}
        fixed: Leaves = {
            path: x for path, x in given.items() if "/".join(path) in layout["digests"]
        }
        return fixed

    def _check_base(self, step: int, layout: dict[str, Any], fixed: Leaves) -> None:
        """Whether frozen leaves that were not saved are those that the run was trained with."""
        if layout["frozen"]:
            return
        no_values = ["/".join(p) for p, x in fixed.items() if isinstance(x, jax.ShapeDtypeStruct)]
        if no_values:
            raise ValueError(
                f"{self._where(step)} leaves the frozen leaves out, so that the state must have "
                f"their values: {', '.join(no_values)}"
            )
        saved = {path: x for path, x in layout["digests"].items() if path.startswith("frozen/")}
        given = digests_of(fixed)
        differences = [
            f"{path}: trained with {saved.get(path, 'nothing')}, given {given.get(path, 'nothing')}"
            for path in sorted(saved.keys() | given.keys())
            if saved.get(path) != given.get(path)
        ]
        if differences:
            raise CheckpointMismatchError(self._where(step), differences)

    def _read(self, step: int, wanted: Leaves) -> Leaves:
        import orbax.checkpoint as ocp

        tree = unflatten_dict(wanted)
        arguments = ocp.args.PyTreeRestore(
            tree,
            restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
            partial_restore=True,
        )
        with self._reading(step):
            folder = self._path / str(step) / "state"
            return flatten_dict(ocp.PyTreeCheckpointHandler().restore(folder, args=arguments))

    def _compare_conditions(self, step: int, layout: dict[str, Any]) -> None:
        then, now = layout["conditions"], _conditions()
        changed = [
            f"{name} {then.get(name, 'unknown')} (now {now[name]})"
            for name in _DETERMINING
            if then and then.get(name) != now[name]
        ]
        if changed:
            warnings.warn(
                f"{self._where(step)} was written with {', '.join(changed)}: what follows will "
                "agree with an uninterrupted run up to rounding, not bit for bit",
                CheckpointWarning,
                stacklevel=5,
            )
