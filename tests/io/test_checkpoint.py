"""Checkpoints: what is written comes back bit for bit, and what does not fit is named."""

import errno
import fcntl
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion_jax.core import struct
from diffusion_jax.io import checkpoint as module
from diffusion_jax.io.checkpoint import Checkpoints, resolve
from diffusion_jax.io.checkpoint_errors import (
    CheckpointCorruptedError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointMissingError,
    CheckpointSaveError,
    CheckpointWarning,
)


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


DAMAGES = {
    "deleted": lambda data: None,
    "cut off": lambda data: data[: len(data) // 2],
    "one bit flipped": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
    ),
}


def _large(offset=0.0):
    """Random arrays too large to be kept in orbax's index, and too random to be compressed."""
    rng = np.random.default_rng(0)
    return {
        "w": rng.normal(size=(64, 32)).astype(np.float32) + np.float32(offset),
        "n": jnp.int32(3),
    }


def _files(folder):
    return [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "run"
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, _large(step), {"n": step})
    return folder


# Orbax leaves reads unfinished behind a read that failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damage_goes_unnoticed(two_steps, tmp_path, damage):
    """Of every file of the newest checkpoint; a file that nothing depends on may be damaged."""
    noticed = []
    for file in _files(two_steps / "2"):
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(two_steps, run)
        harmed, data = run / file.relative_to(two_steps), DAMAGES[damage](file.read_bytes())
        harmed.unlink() if data is None else harmed.write_bytes(data)
        with Checkpoints(run) as checkpoints:
            try:
                state, position = checkpoints.restore(_large(), 2)
            except CheckpointCorruptedError as error:
                noticed.append(file)
                assert error.step == 2 and "step 2" in str(error)
                with pytest.warns(CheckpointWarning, match="step 2 .* corrupted.*passed over"):
                    state, position = checkpoints.restore(_large())
                assert checkpoints.restored_step == 1
        step = position["n"]
        _assert_bit_equal(state, jax.tree.map(jnp.asarray, _large(step)))
    # The data itself, its index, and what we write about it.
    assert len(noticed) >= 4 and max(file.stat().st_size for file in noticed) > 4096


def test_flipped_data_names_the_leaf(two_steps, tmp_path):
    """Orbax itself reads it without an error."""
    shutil.copytree(two_steps, tmp_path / "run")
    harmed = max(_files(tmp_path / "run" / "2"), key=lambda path: path.stat().st_size)
    data = bytearray(harmed.read_bytes())
    data[len(data) // 2] ^= 1
    harmed.write_bytes(data)
    with Checkpoints(tmp_path / "run") as checkpoints:
        with pytest.raises(CheckpointCorruptedError, match="1 arrays have changed: w") as error:
            checkpoints.restore(_large(), 2)
    assert error.value.leaves == ("w",)


@pytest.mark.parametrize(
    "item, old, new, reason",
    [
        ("data", '"n": 2', '"n": 3', "the position of the data has changed"),
        ("layout", '"frozen": true', '"frozen": false', "its layout has changed"),
    ],
)
def test_json_that_still_reads_is_compared_too(two_steps, tmp_path, item, old, new, reason):
    shutil.copytree(two_steps, tmp_path / "run")
    file = tmp_path / "run" / "2" / item / "metadata"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with Checkpoints(tmp_path / "run") as checkpoints:
        with pytest.raises(CheckpointCorruptedError, match=reason):
            checkpoints.restore(_large(), 2)


def test_a_writer_sets_a_corrupted_checkpoint_aside(two_steps, tmp_path):
    """So that the run can go on from the step before and write that step again."""
    run = tmp_path / "run"
    shutil.copytree(two_steps, run)
    (run / "2" / "layout" / "metadata").write_text("{}")
    with Checkpoints(run) as checkpoints:
        checkpoints.claim()
        with pytest.warns(CheckpointWarning, match="passed over"):
            checkpoints.restore(_large())
        assert checkpoints.steps() == (1,) and (run / "2.corrupted").is_dir()
        checkpoints.save(2, _large(5.0), {})
        checkpoints.wait()
        state, _ = checkpoints.restore(_large())
    np.testing.assert_array_equal(state["w"], _large(5.0)["w"])


def test_nothing_good_left(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "run")
    for step in (1, 2):
        (tmp_path / "run" / str(step) / "layout" / "metadata").write_text("{}")
    with Checkpoints(tmp_path / "run") as checkpoints:
        with (
            pytest.warns(CheckpointWarning),
            pytest.raises(CheckpointCorruptedError, match="step 1"),
        ):
            checkpoints.restore(_large())


def test_a_failed_write_leaves_the_step_before(checkpoints, monkeypatch):
    checkpoints.save(1, _large(), {})
    checkpoints.wait()
    assert checkpoints.last_committed_step == 1

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    checkpoints.save(2, _large(2.0), {})
    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", full)
    with pytest.raises(
        CheckpointSaveError, match="step 2 .* No space left .* bytes are free"
    ) as error:
        checkpoints.wait()
    assert error.value.step == 2
    # A new manager, which looks at the disk and goes on.
    checkpoints.save(3, _large(3.0), {})
    checkpoints.wait()
    assert checkpoints.last_committed_step == 3
    np.testing.assert_array_equal(checkpoints.restore(_large())[0]["w"], _large(3.0)["w"])


def test_no_room_is_said_before_anything_is_written(checkpoints, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(8192 + 2**20))
    with pytest.raises(CheckpointSaveError, match="takes 8,196 bytes, 1,056,768 are free"):
        checkpoints.save(1, _large(), {})
    assert checkpoints.steps() == () and _files(checkpoints.directory) == []


@pytest.mark.parametrize("part", ["trainable", "ema"])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_poisoned_state_is_not_saved(checkpoints, part, value):
    state = _state()
    getattr(state, part)["net"]["w"] = jnp.full((3, 2), value)
    with pytest.raises(CheckpointSaveError, match=f"NaN or infinity in {part}/net/w"):
        checkpoints.save(1, state, {})
    assert checkpoints.steps() == ()


def test_one_writer_at_a_time(checkpoints):
    checkpoints.claim()
    with Checkpoints(checkpoints.directory) as other:
        with pytest.raises(CheckpointError, match=f"another run .*process {os.getpid()} on"):
            other.claim()
        assert other.steps() == ()
    # Its own claim is no obstacle, and still holds.
    checkpoints.claim()
    with Checkpoints(checkpoints.directory) as other:
        with pytest.raises(CheckpointError, match="another run"):
            other.claim()
    checkpoints.release()
    with Checkpoints(checkpoints.directory) as other:
        other.claim()


def test_where_there_are_no_locks_it_is_said(checkpoints, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    leftover = Path(checkpoints.directory) / "4.orbax-checkpoint-tmp"
    leftover.mkdir(parents=True)
    with pytest.warns(CheckpointWarning, match="cannot be locked .*No locks available"):
        checkpoints.claim()
    assert leftover.exists(), "another run may be writing it"


def test_leftovers_of_a_kill_are_deleted_by_the_writer_alone(checkpoints):
    leftover = Path(checkpoints.directory) / "4.orbax-checkpoint-tmp"
    leftover.mkdir(parents=True)
    checkpoints.save(1, _large(), {})
    checkpoints.wait()
    checkpoints.restore(_large())
    assert leftover.exists(), "it may be what a running job writes"
    with pytest.warns(CheckpointWarning, match="deleted .*4.orbax-checkpoint-tmp"):
        checkpoints.claim()
    assert not leftover.exists() and checkpoints.steps() == (1,)


def test_trained_leaves_alone(tmp_path):
    """The frozen ones come from the state, and must be those of the run."""
    state = _state()
    with (
        Checkpoints(tmp_path / "part", frozen=False) as part,
        Checkpoints(tmp_path / "all") as whole,
    ):
        for checkpoints in (part, whole):
            checkpoints.save(1, state, {})
            checkpoints.wait()
        restored, _ = part.restore(_state(5.0).replace(frozen=state.frozen))
        _assert_bit_equal(restored, state)
        assert part.digest() == whole.digest()
        with pytest.raises(ValueError, match="must have their values: frozen/net/b"):
            part.restore(jax.eval_shape(_state))
        other = state.replace(frozen={"net": {"b": jnp.array([1.0, 2.0])}, "label": {}})
        with pytest.raises(
            CheckpointMismatchError, match=r"frozen/net/b: trained with float32\[2\]"
        ):
            part.restore(other)
        params = whole.restore_params()
        _assert_bit_equal(part.restore_params(frozen=params), params)
        with pytest.raises(ValueError, match="leaves the frozen leaves out; pass them"):
            part.restore_params()
        with pytest.raises(CheckpointMismatchError, match="frozen/net/b: trained with"):
            part.restore_params(frozen={"net": {**params["net"], "b": jnp.ones(2)}})


def test_digests_tell_states_apart(checkpoints):
    for step, offset in ((1, 0.0), (2, 0.0), (3, 1e-6)):
        checkpoints.save(step, _state(offset), {"n": step})
        checkpoints.wait()
        if step == 2:
            assert checkpoints.digest(1) == checkpoints.digest(2)
    assert checkpoints.digest(2) != checkpoints.digest(3) == checkpoints.digest()


def test_matching_leaves_can_be_taken_and_the_others_are_named(checkpoints):
    checkpoints.save(1, _state(), {})
    checkpoints.wait()
    like = {"net": {"w": jnp.zeros((3, 2)), "new": jnp.ones(2)}}
    found = checkpoints.restore_matching(like, kind="raw")
    assert found.missing == ("net/new",)
    assert sorted(found.unexpected) == ["net/b", "net/half"]
    expected = {"net": {"w": _state().trainable["net"]["w"], "new": jnp.ones(2)}}
    _assert_bit_equal(found.params, expected)
    with pytest.raises(CheckpointMismatchError, match=r"net/w: saved float32\[3, 2\]"):
        checkpoints.restore_matching({"net": {"w": jnp.zeros((2, 3))}})


def test_other_conditions_are_said(checkpoints, monkeypatch):
    checkpoints.save(1, _large(), {})
    checkpoints.wait()
    now = module._conditions()
    monkeypatch.setattr(module, "_conditions", lambda: {**now, "devices": 8})
    with pytest.warns(CheckpointWarning, match=r"devices 2 \(now 8\): .* up to rounding"):
        checkpoints.restore(_large())
    # A condition that was not recorded yet when it was written.
    monkeypatch.setattr(module, "_DETERMINING", ("weather",))
    monkeypatch.setattr(module, "_conditions", lambda: {**now, "weather": "rain"})
    with pytest.warns(CheckpointWarning, match=r"weather unknown \(now rain\)"):
        checkpoints.restore(_large())


def test_checkpoints_from_before_digests_still_read(checkpoints):
    """As this library wrote them in 2026; that nothing is verified is said."""
    checkpoints.save(1, _state(), {"n": 1})
    checkpoints.wait()
    layout = Path(checkpoints.directory) / "1" / "layout" / "metadata"
    layout.write_text(json.dumps({"version": 1, "empty": [["frozen", "label"]]}))
    with pytest.warns(CheckpointWarning, match="written without digests"):
        state, _ = checkpoints.restore(_state())
    _assert_bit_equal(state, _state())


def test_a_later_format_is_refused(checkpoints):
    checkpoints.save(1, _large(), {})
    checkpoints.wait()
    layout = Path(checkpoints.directory) / "1" / "layout" / "metadata"
    body = {**json.loads(layout.read_text())["body"], "version": 3}
    layout.write_text(json.dumps({"body": body, "digest": module.digests.of_json(body)}))
    with pytest.raises(CheckpointError, match="has format 3, this library reads 2"):
        checkpoints.restore(_large())


def test_a_step_that_is_corrupted_twice_is_set_aside_twice(two_steps, tmp_path):
    run = tmp_path / "run"
    for _ in range(2):
        shutil.copytree(two_steps, run, dirs_exist_ok=True)
        (run / "2" / "layout" / "metadata").write_text("{}")
        with Checkpoints(run) as checkpoints:
            checkpoints.claim()
            with pytest.warns(CheckpointWarning, match="passed over"):
                checkpoints.restore(_large())
    assert {"2.corrupted", "2.corrupted.1"} <= {path.name for path in run.iterdir()}


def test_typed_keys_are_refused_in_words(checkpoints):
    with pytest.raises(ValueError, match="key is a typed key; save jax.random.key_data"):
        checkpoints.save(1, {"key": jax.random.key(0)}, {})


def test_numbers_that_jax_would_cut_are_refused(checkpoints):
    with pytest.raises(ValueError, match="restore n with 32 bits"):
        checkpoints.save(1, {"n": np.int64(2**40)}, {})


def test_errors_have_their_kinds(checkpoints):
    with pytest.raises(CheckpointMissingError):
        checkpoints.restore(_state())
    assert issubclass(CheckpointMissingError, FileNotFoundError)
    assert issubclass(CheckpointSaveError, OSError)
