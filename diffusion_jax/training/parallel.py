"""Devices: runs pure training steps and samplers over a mesh or under pmap.

In a job of several processes (see `training.processes`) a mesh has the devices of all of them
unless it is told otherwise. Then every process calls the same functions in the same order, with
its own part of batch and keys: process p of P has the p-th of P equal parts.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion_jax.core.types import Array, Batch, Key, Metrics, Params
from diffusion_jax.training.memory import within_memory
from diffusion_jax.training.state import TrainState

Step = Callable[[TrainState, Batch, Key], tuple[TrainState, Metrics]]
SampleFn = Callable[..., Array]
State = TypeVar("State")

# Below 64 Ki elements the collectives cost more than the memory that sharding saves.
MIN_SHARD_SIZE = 2**16

# For a CPU, compiling what runs once takes far longer than running it, and less so unoptimized.
_TO_RUN_ONCE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

_SMALLER_UPDATES = (
    "Lower the batch size, or raise accumulate, which leaves it as it is; recompute blocks (remat) "
    "or compute in bfloat16 in the network; split the state with fsdp"
)


def make_mesh(
    *, data: int | None = None, fsdp: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes `data` and `fsdp`; batches are split over both, big leaves over fsdp.

    The devices of a process lie together in it, in the order of the processes.

    Args:
      data: devices along `data`; None for all that `fsdp` leaves.
      fsdp: devices along `fsdp`.
      devices: the devices to use; None for all of `jax.devices()`.

    Raises:
      ValueError: if data · fsdp is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if fsdp < 1 or (data is not None and data < 1):
        raise ValueError(f"mesh axes must be at least 1, got data={data}, fsdp={fsdp}")
    rows = len(devices) // fsdp if data is None else data
    if rows * fsdp != len(devices):
        raise ValueError(
            f"data={data} and fsdp={fsdp} do not cover the {len(devices)} devices; choose axes "
            "whose product is the number of devices, or pass the devices to use"
        )
    # Linen layers cannot be differentiated under explicit axis types, the default of jax.
    types = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((rows, fsdp), ("data", "fsdp"), axis_types=types, devices=devices)
    owners = [device.process_index for device in mesh.devices.flat]
    if owners != sorted(owners):
        # An order for the network of the devices, in which parts of a batch would be no blocks.
        devices = sorted(devices, key=lambda device: device.process_index)
        mesh = Mesh(np.reshape(devices, (rows, fsdp)), ("data", "fsdp"), axis_types=types)
    return mesh


def _batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(("data", "fsdp")))


def _check_divisible(tree: Any, count: int) -> None:
    shapes = sorted({np.shape(leaf) for leaf in jax.tree.leaves(tree)})
    wrong = [shape for shape in shapes if not shape or shape[0] % count]
    if wrong:
        raise ValueError(
            f"the leading axis of every array must split over {count} devices, got shapes {wrong}; "
            f"choose a batch size that is a multiple of {count}"
        )


def _identity(x: Array) -> Array:
    return x


def _on_bits(function: Callable[[Array], Array], x: Array) -> Array:
    """function(x); keys cannot be cut and copied, the bits in them can."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        bits = function(jax.random.key_data(x))
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(x))
    return function(x)


def _place_over_processes(x: Any, sharding: NamedSharding) -> Array:
    if not isinstance(x, jax.Array):
        x = np.asarray(x)
    elif not x.is_fully_addressable:
        return jax.jit(_identity, out_shardings=sharding)(x)

    # Every process has the whole value and cuts out its own parts, so that nothing is sent.
    def cut(x):
        return jax.make_array_from_callback(x.shape, sharding, np.asarray(x).__getitem__)

    return _on_bits(cut, x)


def _place(tree: Any, shardings: Any) -> Any:
    # Comparing is much cheaper than a device_put per leaf in every step.
    leaves, wanted = jax.tree.leaves(tree), jax.tree.leaves(shardings)
    there = (getattr(x, "sharding", None) == s for x, s in zip(leaves, wanted, strict=True))
    if all(there):
        return tree
    if all(sharding.is_fully_addressable for sharding in wanted):
        return jax.device_put(tree, shardings)
    return jax.tree.map(_place_over_processes, tree, shardings)


def _own_devices(mesh: Mesh) -> int:
    """How many devices of a mesh over several processes are this process's."""
    owners = [device.process_index for device in mesh.devices.flat]
    own = owners.count(jax.process_index())
    if owners != [process for process in range(jax.process_count()) for _ in range(own)]:
        raise ValueError(
            "every process must have one block of the mesh's devices, all blocks equally long and "
            f"in the order of the processes; this mesh has the devices of {owners}, use make_mesh "
            "with the same number of devices in every process"
        )
    return own


def check_batch_size(batch_size: int, mesh: Mesh, *, accumulate: int = 1) -> None:
    """Checks, before anything is compiled, that a global batch splits without rest.

    Args:
      batch_size: examples of a batch over all processes.
      mesh: from `make_mesh`.
      accumulate: microbatches, as for `make_train_step`.

    Raises:
      ValueError: if it does not, with the numbers.
    """
    parts = mesh.size * accumulate
    if batch_size < 1 or batch_size % parts:
        processes = jax.process_count()
        raise ValueError(
            f"batch_size {batch_size} does not split over {mesh.size} devices in {processes} "
            f"process{'es' * (processes > 1)} x {accumulate} microbatches; choose a multiple of "
            f"{parts}"
        )


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Splits the leading axis of every leaf over all devices of the mesh.

    Args:
      mesh: from `make_mesh`.
      batch: pytree of arrays [B, ...]; also keys [B]. On a mesh over P processes these are the
        process's own rows, and row i of process p is row p·B + i of the result [P·B, ...].

    Raises:
      ValueError: if B is not divisible by the number of the process's devices, or its devices
        are no block of the mesh.
    """
    sharding = _batch_sharding(mesh)
    if sharding.is_fully_addressable:
        _check_divisible(batch, mesh.size)
        return jax.device_put(batch, sharding)
    _check_divisible(batch, _own_devices(mesh))

    def join(x):
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(lambda x: _on_bits(join, x), batch)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Puts a copy of every leaf on every device of the mesh; what is there already stays."""
    whole = NamedSharding(mesh, P())
    return _place(tree, jax.tree.map(lambda _: whole, tree))


def state_shardings(mesh: Mesh, state: Any, *, min_shard_size: int = MIN_SHARD_SIZE) -> Any:
    """Shardings of a state or parameter tree.

    A leaf with at least `min_shard_size` elements has its largest axis that `fsdp` divides
    split over `fsdp`; all others are replicated. The rule sees shapes only, so parameters,
    averages and optimizer moments of one leaf are split alike.

    Returns:
      tree like `state` with a NamedSharding for every leaf.
    """
    size = mesh.shape["fsdp"]

    def one(leaf):
        shape = np.shape(leaf)
        axes = [axis for axis in range(len(shape)) if shape[axis] % size == 0]
        if size == 1 or not axes or np.prod(shape) < min_shard_size:
            return NamedSharding(mesh, P())
        axis = max(axes, key=lambda a: shape[a])
        return NamedSharding(mesh, P(*[None] * axis, "fsdp"))

    return jax.tree.map(one, state)


def shard_state(mesh: Mesh, state: Any, *, min_shard_size: int = MIN_SHARD_SIZE) -> Any:
    """Places a state or parameter tree as `state_shardings` says."""
    return _place(state, state_shardings(mesh, state, min_shard_size=min_shard_size))


def init_state(
    function: Callable[..., State], mesh: Mesh, *args: Any, min_shard_size: int = MIN_SHARD_SIZE
) -> State:
    """function(*args), computed where its results belong; no device ever holds a split leaf whole.

    Args:
      function: makes a state or parameter tree, for example from a key.
      mesh: from `make_mesh`.
      args: keys and arrays, the same in every process.
      min_shard_size: elements from which a leaf is split over `fsdp`.

    Returns:
      the tree, placed as `state_shardings` says.
    """
    shapes = jax.eval_shape(function, *args)
    shardings = state_shardings(mesh, shapes, min_shard_size=min_shard_size)
    options = _TO_RUN_ONCE if jax.default_backend() == "cpu" else None
    compiled = jax.jit(function, out_shardings=shardings, compiler_options=options)
    return compiled(*replicate(mesh, args))


def to_host(tree: Any) -> Any:
    """A copy of a tree in numpy arrays; every process gets all of it and must call this.

    Leaves that are split over processes are put together one after the other, so that a device
    holds one of them whole at a time.

    Args:
      tree: pytree of arrays, none of them keys.
    """

    def one(x):
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            x = jax.jit(_identity, out_shardings=NamedSharding(x.sharding.mesh, P()))(x)
        return np.array(x)

    return jax.tree.map(one, tree)


def mesh_train(step: Step, mesh: Mesh, *, min_shard_size: int = MIN_SHARD_SIZE) -> Step:
    """Compiles a step for a mesh.

    The returned callable takes ordinary arguments, places them and donates the state: the
    arrays of a state that was passed in must not be used again. Batch and keys are the process's
    own rows, see `shard_batch`; metrics are the same in every process.

    Args:
      step: from `make_train_step` without `axis_name`.
      mesh: from `make_mesh`.
      min_shard_size: elements from which a leaf is split over `fsdp`.

    Raises:
      ValueError: if the step averages over a named axis; when called, if the batch does not
        split over the devices.
      OutOfMemoryError: when called, if a device has too little memory.
    """
    axis_name = getattr(step, "axis_name", None)
    if axis_name is not None:
        raise ValueError(
            f"a mesh needs a step without axis_name, got axis_name={axis_name!r}; use pmap_train"
        )
    compiled: dict[Any, tuple[Any, Step]] = {}

    def run(state: TrainState, batch: Batch, keys: Key) -> tuple[TrainState, Metrics]:
        structure = jax.tree.structure(state)
        if structure not in compiled:
            shardings = state_shardings(mesh, state, min_shard_size=min_shard_size)
            out = (shardings, NamedSharding(mesh, P()))
            jitted = jax.jit(step, donate_argnums=0, out_shardings=out)
            function = within_memory(jitted, what="an update", advice=_SMALLER_UPDATES)
            compiled[structure] = shardings, function
        shardings, function = compiled[structure]
        return function(_place(state, shardings), *shard_batch(mesh, (batch, keys)))

    return run


def mesh_sample(
    sample_fn: SampleFn, mesh: Mesh, *, min_shard_size: int = MIN_SHARD_SIZE
) -> SampleFn:
    """Compiles a sampler for a mesh.

    Args:
      sample_fn: (params, inputs, keys [B], *rest) -> images [B, ...]; `inputs` is a pytree
        of arrays [B, ...] and `rest` is the same for every image. On a mesh over several
        processes inputs and keys are the process's own rows, see `shard_batch`.
      mesh: from `make_mesh`.
      min_shard_size: elements from which a leaf of params is split over `fsdp`.

    Returns:
      callable of the same signature, whose images stay split over the mesh. It raises
      ValueError if B does not split over the devices, and OutOfMemoryError if a device has too
      little memory.
    """
    draw = within_memory(
        jax.jit(sample_fn, out_shardings=_batch_sharding(mesh)),
        what="drawing a batch of images",
        advice="Lower the batch size, or compute in bfloat16 in the network",
    )

    def run(params: Params, inputs: Any, keys: Key, *rest: Any) -> Array:
        params = shard_state(mesh, params, min_shard_size=min_shard_size)
        return draw(params, *shard_batch(mesh, (inputs, keys)), *replicate(mesh, rest))

    return run


def _pmap_mesh(devices: Sequence[jax.Device] | None, axis_name: str) -> Mesh:
    devices = jax.local_devices() if devices is None else list(devices)
    types = (AxisType.Auto,)
    return jax.make_mesh((len(devices),), (axis_name,), axis_types=types, devices=devices)


def _split(tree: Any, count: int) -> Any:
    _check_divisible(tree, count)
    return jax.tree.map(lambda x: x.reshape((count, x.shape[0] // count) + x.shape[1:]), tree)


def pmap_train(
    step: Step, *, axis_name: str = "data", devices: Sequence[jax.Device] | None = None
) -> Step:
    """Runs a step under pmap with the arguments and results of `mesh_train`.

    Batch and keys [B] are split over the devices. The state has no device axis, before or
    after: it is replicated once and stays so. It is donated.

    Args:
      step: from `make_train_step` with the same `axis_name`.
      axis_name: name of the device axis.
      devices: the devices to use; None for all local ones.

    Raises:
      ValueError: if the step does not average over `axis_name`, or there are several processes;
        when called, if the batch does not split over the devices.
    """
    if jax.process_count() > 1:
        raise ValueError(
            "pmap_train averages over the devices of one process only, and this job has "
            f"{jax.process_count()}; use mesh_train"
        )
    averaged = getattr(step, "axis_name", axis_name)
    if averaged != axis_name:
        raise ValueError(
            f"the step averages over axis_name={averaged!r} but pmap's axis is {axis_name!r}, so "
            f"the devices would drift apart; give make_train_step axis_name={axis_name!r}"
        )
    mesh = _pmap_mesh(devices, axis_name)
    mapped = jax.pmap(
        step,
        axis_name=axis_name,
        in_axes=(None, 0, 0),
        out_axes=(None, None),
        devices=mesh.devices.tolist(),
        donate_argnums=0,
    )

    def run(state: TrainState, batch: Batch, keys: Key) -> tuple[TrainState, Metrics]:
        return mapped(replicate(mesh, state), *_split((batch, keys), mesh.size))

    return run


def pmap_sample(sample_fn: SampleFn, *, devices: Sequence[jax.Device] | None = None) -> SampleFn:
    """Runs a sampler under pmap with the arguments and results of `mesh_sample`.

    Args:
      sample_fn: (params, inputs, keys [B], *rest) -> images [B, ...], as for `mesh_sample`.
      devices: the devices to use; None for all local ones.

    Returns:
      callable of the same signature. It raises ValueError if B does not split over the devices.
    """
    mesh = _pmap_mesh(devices, "data")
    mapped = jax.pmap(
        lambda params, inputs, keys, rest: sample_fn(params, inputs, keys, *rest),
        axis_name="data",
        in_axes=(None, 0, 0, None),
        devices=mesh.devices.tolist(),
    )

    def run(params: Params, inputs: Any, keys: Key, *rest: Any) -> Array:
        params, rest = replicate(mesh, (params, rest))
        images = mapped(params, *_split((inputs, keys), mesh.size), rest)
        return images.reshape((keys.shape[0],) + images.shape[2:])

    return run
