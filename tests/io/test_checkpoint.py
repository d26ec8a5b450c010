"""Checkpoints: what is written comes back bit for bit, and what does not fit is named."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion_jax.core import struct
from diffusion_jax.io.checkpoint import CheckpointMismatchError, Checkpoints, resolve


class Moments(NamedTuple):
    count: Any
    mu: Any


@struct.dataclass
class State:
    """The fields of a training state."""

    step: Any
    trainable: Any
    frozen: Any
    ema: Any
    opt_state: Any


def _state(offset=0.0):
    w = jnp.arange(6.0).reshape(3, 2) + offset
    return State(
        step=jnp.int32(7),
        trainable={"net": {"w": w, "half": w.astype(jnp.bfloat16)}},
        frozen={"net": {"b": jnp.array([jnp.nan, -0.0])}, "label": {}},
        ema={"net": {"w": w + 100, "half": w.astype(jnp.bfloat16) + 1}},
        opt_state=(Moments(jnp.int32(7), {"net": {"w": w * 2, "half": None}}), ()),
    )


def _assert_bit_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def checkpoints(tmp_path):
    with Checkpoints(tmp_path / "run", max_to_keep=2) as opened:
        yield opened


def test_round_trip_into_an_abstract_target(checkpoints):
    """Dataclasses, named tuples, empty nodes, None, NaN, bfloat16."""
    checkpoints.save(7, _state(), {"epoch": 2, "seeds": [1, 2]})
    checkpoints.wait()
    target = jax.eval_shape(_state)
    with Checkpoints(checkpoints.directory) as reader:
        state, data_state = reader.restore(target)
    _assert_bit_equal(state, _state())
    assert data_state == {"epoch": 2, "seeds": [1, 2]}


def test_saved_arrays_may_be_donated_and_the_position_changed_at_once(checkpoints):
    state, position = {"w": jnp.zeros((512, 512))}, {"n": 1}
    donate = jax.jit(lambda s: {"w": s["w"] + 1}, donate_argnums=0)
    state = jax.block_until_ready(donate(state))
    checkpoints.save(1, state, position)
    position["n"] = 2
    for _ in range(3):
        state = donate(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    restored, data_state = checkpoints.restore(state)
    np.testing.assert_array_equal(restored["w"], np.ones((512, 512)))
    assert data_state == {"n": 1}


def test_only_complete_checkpoints_are_listed_and_old_ones_deleted(checkpoints):
    assert checkpoints.last_committed_step is None
    for step in (1, 2, 3):
        checkpoints.save(step, _state(float(step)), {})
    checkpoints.wait()
    # What a kill during a write leaves behind.
    (Path(checkpoints.directory) / "4.orbax-checkpoint-tmp").mkdir()
    assert checkpoints.steps() == (2, 3) and checkpoints.last_committed_step == 3
    state, _ = checkpoints.restore(_state(), 2)
    _assert_bit_equal(state, _state(2.0))
    checkpoints.save(4, _state(4.0), {})
    checkpoints.wait()
    assert checkpoints.last_committed_step == 4


def test_every_leaf_that_differs_is_listed(checkpoints):
    checkpoints.save(1, _state(), {})
    checkpoints.wait()
    other = _state()
    other.trainable["net"]["w"] = jnp.zeros((3, 4))
    other.ema["net"]["half"] = jnp.zeros((3, 2), jnp.float32)
    other.frozen["net"] = {"c": jnp.zeros(5)}
    with pytest.raises(CheckpointMismatchError, match="step 1 .* 4 leaves differ") as error:
        checkpoints.restore(other)
    assert error.value.differences == [
        "ema/net/half: saved bfloat16[3, 2], wanted float32[3, 2]",
        "frozen/net/b: saved float32[2], wanted nothing",
        "frozen/net/c: saved nothing, wanted float32[5]",
        "trainable/net/w: saved float32[3, 2], wanted float32[3, 4]",
    ]
    assert all(line in str(error.value) for line in error.value.differences)


@pytest.mark.parametrize("kind", ["ema", "raw"])
def test_parameters_alone_are_the_merged_tree(checkpoints, kind):
    state = _state()
    checkpoints.save(1, state, {})
    checkpoints.wait()
    with Checkpoints(checkpoints.directory) as reader:
        params = reader.restore_params(kind=kind)
    half = state.ema if kind == "ema" else state.trainable
    _assert_bit_equal(params, {"net": {**half["net"], **state.frozen["net"]}, "label": {}})


def test_parameters_can_be_checked_against_a_model(checkpoints):
    checkpoints.save(1, _state(), {})
    checkpoints.wait()
    params = checkpoints.restore_params()
    _assert_bit_equal(checkpoints.restore_params(like=jax.eval_shape(lambda: params)), params)
    wrong = {**params, "net": {**params["net"], "w": jnp.zeros((9, 2))}}
    with pytest.raises(CheckpointMismatchError, match=r"net/w: saved float32\[3, 2\], wanted"):
        checkpoints.restore_params(like=wrong)


def test_shardings_are_those_of_the_target(checkpoints):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    w = jnp.arange(8.0).reshape(4, 2)
    checkpoints.save(1, {"w": jax.device_put(w, split)}, {})
    checkpoints.wait()
    for sharding in (split, whole, w.sharding):
        target = {"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding)}
        restored = checkpoints.restore(target)[0]["w"]
        assert restored.sharding == sharding
        np.testing.assert_array_equal(restored, w)


def test_what_does_not_exist_is_named(checkpoints, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoints.restore(_state())
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoints.restore_params()
    assert not (tmp_path / "run").exists(), "looking must not create the directory"
    checkpoints.save(3, _state(), {})
    checkpoints.wait()
    with pytest.raises(FileNotFoundError, match=r"step 5 in .*complete are \[3\]"):
        checkpoints.restore(_state(), 5)
    with pytest.raises(ValueError, match=r"'best'; there are \['ema', 'raw'\]"):
        checkpoints.restore_params(kind="best")


def test_what_cannot_be_saved_is_refused(checkpoints):
    with pytest.raises(ValueError, match="JSON-serialisable: .*ndarray"):
        checkpoints.save(1, _state(), {"position": np.zeros(2)})
    checkpoints.save(3, {"w": jnp.zeros(2)}, {})
    checkpoints.wait()
    with pytest.raises(ValueError, match="step 3 is not above step 3"):
        checkpoints.save(3, {"w": jnp.zeros(2)}, {})
    with pytest.raises(ValueError, match=r"not of a TrainState, it holds \['w'\]"):
        checkpoints.restore_params()


def test_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Checkpoints("runs/a").directory == str(tmp_path / "runs" / "a")
    assert resolve("gs://bucket/run") == "gs://bucket/run"
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="is a file"):
        Checkpoints("file")
    with pytest.raises(ValueError, match="max_to_keep must be at least 1, got 0"):
        Checkpoints("runs", max_to_keep=0)
