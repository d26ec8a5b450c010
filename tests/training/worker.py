"""One process of a job, started by test_processes.py: python -m … CONFIG REPORT TASK…

CONFIG are the arguments of `Processes` as JSON, TASK are functions of this file, and what they
return goes to the file REPORT, one line of JSON after the other.
"""

import json
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax.io.checkpoint import Checkpoints
from diffusion_jax.training import parallel, processes
from diffusion_jax.training.ema import EMA
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.step import make_train_step, step_keys

BATCH, STEPS, WIDTH = 16, 20, 32
TX = optax.adam(0.01)


def params(key):
    """Two matrices that 2 and 4 devices divide, and a bias."""
    first, second = jax.random.split(key)
    return {
        "first": 0.5 * jax.random.normal(first, (4, WIDTH)),
        "bias": jnp.zeros((WIDTH,)),
        "second": 0.5 * jax.random.normal(second, (WIDTH, 4)),
    }


def init(key):
    """The state before the first step."""
    return TrainState.create(params(key), TX)


def loss(params, batch, keys):
    """A denoiser with one hidden layer; noise is a function of the example's key."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)
    hidden = jnp.tanh((batch["x"] + noise) @ params["first"] + params["bias"][None])
    error = hidden @ params["second"] - batch["x"]
    return jnp.mean(error**2), {"error": jnp.abs(error).mean()}


def batch(step):
    """The global batch of a step."""
    return {"x": np.random.default_rng(step).normal(size=(BATCH, 4)).astype(np.float32)}


def say(**values):
    """One line for the test, at once."""
    # Not stdout, into whose lines gloo writes its own.
    with open(sys.argv[2], "a") as report:
        report.write(json.dumps(values) + "\n")


def _rows(step):
    """This process's rows of a global batch, and their keys."""
    rows = BATCH // jax.process_count()
    start = jax.process_index() * rows
    keys = step_keys(jax.random.key(1), step, rows, offset=start)
    return jax.tree.map(lambda x: x[start : start + rows], batch(step)), keys


def train(fsdp):
    """Losses and gradient norms of a run, its last parameters, and bytes on a device."""
    mesh = parallel.make_mesh(fsdp=fsdp)
    step = make_train_step(loss, TX, ema=EMA(0.9), accumulate=2)
    run = parallel.mesh_train(step, mesh, min_shard_size=WIDTH + 1)
    state, curve = parallel.init_state(init, mesh, jax.random.key(0), min_shard_size=WIDTH + 1), []
    for index in range(STEPS):
        state, metrics = run(state, *_rows(index))
        curve.append([float(metrics[name]) for name in ("loss", "grad_norm", "error")])
    first = state.trainable["first"].addressable_shards
    host = parallel.to_host(state.trainable)
    return {
        "curve": curve,
        "sums": {name: float(np.abs(leaf).sum()) for name, leaf in host.items()},
        "first_shard": [list(shard.data.shape) for shard in first],
        "processes": sorted({d.process_index for d in state.step.sharding.device_set}),
    }


def _message(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def curves():
    """The three layouts of four devices."""
    return {str(fsdp): train(fsdp) for fsdp in (1, 2, 4)}


def agreement():
    """What every process says of agreeing and disagreeing values and of a writer that fails."""
    index, written = jax.process_index(), []
    same, other = {"seed": 1, "model": {"width": 2}}, {"step": 5, "model": [0, 0, index]}
    processes.barrier("before")

    def fail():
        written.append(index)
        raise OSError("no space left")

    return {
        "same": _message(lambda: processes.check_agreement(same)),
        "other": _message(lambda: processes.check_agreement({**same, **other})),
        "absent": _message(lambda: processes.check_agreement({"rank": 0} if index else {})),
        "success": _message(lambda: processes.agree_from_writer(lambda: written.append(-1))),
        "failure": _message(lambda: processes.agree_from_writer(fail)),
        "written": written,
        "writer": processes.is_writer(),
    }


def _draw(params, inputs, keys, scale):
    noise = jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)
    return scale * noise + params + inputs["shift"][:, None]


def placement():
    """States placed from every kind of array, batches in order, and what is refused."""
    mesh, whole = parallel.make_mesh(fsdp=4), np.arange(32, dtype=np.float32).reshape(4, 8)

    def values(x):
        return [np.asarray(shard.data).tolist() for shard in x.addressable_shards]

    split = parallel.shard_state(mesh, {"w": whole, "k": jnp.arange(4)}, min_shard_size=4)
    back = parallel.replicate(mesh, split)
    keys = step_keys(jax.random.key(3), 0, 2, offset=2 * jax.process_index())
    global_keys = parallel.shard_batch(mesh, keys)
    draw = parallel.mesh_sample(_draw, mesh)
    shifts = np.float32(2 * jax.process_index()) + np.arange(2, dtype=np.float32)
    local = parallel.make_mesh(devices=jax.local_devices())
    mixed = [jax.devices()[index] for index in (2, 0, 3, 1)]
    sorted_mesh = parallel.make_mesh(devices=mixed)
    foreign = jax.sharding.Mesh(np.reshape(mixed, (1, 4)), ("data", "fsdp"))
    return {
        "blocks": [device.process_index for device in sorted_mesh.devices.flat],
        "split": values(split["w"]),
        "again": parallel.shard_state(mesh, split, min_shard_size=4)["w"] is split["w"],
        "resplit": values(parallel.shard_state(mesh, back, min_shard_size=4)["w"]),
        "back": np.asarray(back["w"]).tolist(),
        "host": parallel.to_host(split)["w"].tolist(),
        "number": str(parallel.replicate(mesh, 0.5).dtype),
        "key": jax.random.key_data(parallel.replicate(mesh, jax.random.key(5))).tolist(),
        "keys": [jax.random.key_data(s.data).tolist() for s in global_keys.addressable_shards],
        "images": values(draw(np.ones((1, 2)), {"shift": shifts}, keys, 3.0)),
        "own_mesh": parallel.shard_batch(local, np.arange(2)).is_fully_addressable,
        "order": _message(lambda: parallel.shard_batch(foreign, np.zeros(2))),
        "rows": _message(lambda: parallel.shard_batch(mesh, np.zeros(3))),
        "size": _message(lambda: parallel.check_batch_size(12, mesh, accumulate=2)),
        "pmap": _message(lambda: parallel.pmap_train(lambda state, batch, keys: (state, {}))),
    }


def memory():
    """Bytes of a state on a device, whole and split, as compiled and as they are."""
    seen = {}
    for fsdp in (1, 4):
        mesh = parallel.make_mesh(fsdp=fsdp)
        step = make_train_step(loss, TX, ema=EMA(0.9))
        wide = {"first": jnp.ones((4, 1024)), "bias": jnp.ones(1024), "second": jnp.ones((1024, 4))}
        state = parallel.shard_state(mesh, TrainState.create(wide, TX), min_shard_size=1)
        arguments = state, *parallel.shard_batch(mesh, _rows(0))
        shardings = parallel.state_shardings(mesh, state, min_shard_size=1)
        compiled = jax.jit(step, in_shardings=(shardings, None, None)).lower(*arguments).compile()
        state, _ = parallel.mesh_train(step, mesh, min_shard_size=1)(*arguments)
        kept = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state)]
        seen[fsdp] = [compiled.memory_analysis().argument_size_in_bytes, sum(kept)]
    return seen


def files():
    """A directory that all see or not, and a checkpoint of which process 1 cannot read its part."""
    place, index = Path(sys.argv[2]).parent, jax.process_index()
    mesh, w = parallel.make_mesh(fsdp=4), np.random.default_rng(0).normal(size=(4096, 8))
    state = parallel.shard_state(mesh, {"w": w.astype(np.float32)}, min_shard_size=1)
    seen = {
        "shared": _message(lambda: processes.check_shared(place / "all")),
        "own": _message(lambda: processes.check_shared(place / f"own{index}")),
    }
    with Checkpoints(place / "all") as checkpoints:
        for step in (8, 16):
            checkpoints.save(step, state, {})
        checkpoints.wait()
        if processes.is_writer():
            parts = (place / "all" / "16" / "state" / "ocdbt.process_1" / "d").iterdir()
            largest = max(parts, key=lambda path: path.stat().st_size)
            os.truncate(largest, largest.stat().st_size // 2)
        processes.barrier("cut")
        checkpoints.claim()
        restored, _ = checkpoints.restore(state)
        same = np.array_equal(parallel.to_host(restored)["w"], w.astype(np.float32))
        seen["restored"] = [checkpoints.restored_step, same, checkpoints.steps()]
    return seen


def preempted():
    """Steps until the notice, then waits to be killed."""
    say(stepping=True)
    step = 0
    while not processes.reached_preemption():
        processes.barrier("step")
        step += 1
        time.sleep(0.02)
    say(preempted=step)
    time.sleep(60)


def stepping():
    """Steps until a peer is gone."""
    _step()


def failing():
    """Steps until process 1 raises an error that the others do not know of."""
    _step(last=20 if jax.process_index() == 1 else None)


def _step(last=None):
    mesh = parallel.make_mesh()
    ones = parallel.shard_batch(mesh, np.ones(len(jax.local_devices()), np.float32))
    total = jax.jit(jnp.sum)
    say(stepping=float(total(ones)))
    step = 0
    while step != last:
        float(total(ones))
        time.sleep(0.02)
        step += 1
    raise OSError("only in this process")


def main():
    """Joins the processes and does one thing after the other."""
    config = processes.Processes(**json.loads(sys.argv[1]))
    processes.initialize(config)
    say(processes=jax.process_count(), index=jax.process_index(), devices=jax.device_count())
    say(twice=_message(lambda: processes.initialize(config)))
    for name in sys.argv[3:]:
        say(**{name: globals()[name]()})


if __name__ == "__main__":
    main()
