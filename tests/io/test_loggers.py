"""Loggers: what they write is read back with other tools."""

import contextlib
import json
import logging
import resource
import struct
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.io.loggers import (
    JSONLLogger,
    StdoutLogger,
    TensorBoardLogger,
    Tolerant,
    WandbLogger,
)

GRADIENT = np.linspace(-1.0, 1.0, 2 * 3 * 3, dtype=np.float32).reshape(2, 3, 3)


@contextlib.contextmanager
def _full_disk(size):
    """No file can grow beyond `size` bytes: writes stop there and then fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_stdout_prints_one_line_a_row(capsys):
    logger = StdoutLogger()
    logger.scalars(100, {"loss": 0.123456, "rate": 2.0})
    logger.image(100, "samples", GRADIENT)
    logger.truncate_after(100)
    logger.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 100: loss 0.1235, rate 2",
        "step 100: image samples of 3x2 pixels",
    ]


def test_jsonl_rows_are_there_at_once_and_appended(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    first = JSONLLogger(path)
    first.scalars(1, {"loss": np.float32(0.5), "bucket": float("nan")})
    assert _rows(path) == [{"step": 1, "loss": 0.5, "bucket": None}]
    first.close()
    second = JSONLLogger(path)
    second.scalars(2, {"loss": 0.1})
    second.close()
    assert [row["step"] for row in _rows(path)] == [1, 2]


def test_jsonl_images_are_png_files(tmp_path):
    logger = JSONLLogger(tmp_path / "log.jsonl")
    logger.image(3, "eval/grid", GRADIENT)
    logger.image(4, "gray", np.full((4, 4, 1), 2.0))
    logger.image(5, "bytes", np.full((4, 4, 3), 7, np.uint8))
    logger.close()
    rows = _rows(tmp_path / "log.jsonl")
    assert [(row["step"], row["image"]) for row in rows] == [
        (3, "eval/grid"),
        (4, "gray"),
        (5, "bytes"),
    ]
    first, gray, raw = (np.asarray(Image.open(tmp_path / row["file"])) for row in rows)
    np.testing.assert_allclose(first / 127.5 - 1.0, GRADIENT, atol=1 / 255)
    np.testing.assert_array_equal(gray, np.full((4, 4), 255))
    np.testing.assert_array_equal(raw, np.full((4, 4, 3), 7))


@pytest.mark.parametrize("image", [np.zeros((4, 4)), np.zeros((4, 4, 2)), np.zeros((4, 4, 3), int)])
def test_what_is_no_image_is_refused(tmp_path, image):
    logger = JSONLLogger(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match="an image must be .* got"):
        logger.image(1, "x", image)
    logger.close()


def test_a_resumed_jsonl_has_no_step_twice(tmp_path):
    path = tmp_path / "log.jsonl"
    logger = JSONLLogger(path)
    for step in (10, 20, 30):
        logger.scalars(step, {"loss": step})
    logger.close()
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # what a kill in the middle of a write leaves
    logger = JSONLLogger(path)
    logger.truncate_after(20)
    logger.scalars(30, {"loss": -1.0})
    logger.close()
    assert [(row["step"], row["loss"]) for row in _rows(path)] == [(10, 10), (20, 20), (30, -1)]
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_foreign_file_is_not_truncated(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("hello\n")
    logger = JSONLLogger(path)
    with pytest.raises(ValueError, match="line 1 of .* is not a log row: 'hello'"):
        logger.truncate_after(0)
    assert path.read_text() == "hello\n"


@pytest.mark.parametrize("half", ['{"step": 40, "lo', '{"st', '{"step": 40, "loss": 40.0}'])
def test_half_a_row_of_a_killed_run_is_cut_off_before_the_next(tmp_path, half):
    """Also where nothing is truncated, since a run without checkpoints starts anew."""
    path = tmp_path / "log.jsonl"
    whole = '{"step": 30, "loss": 30.0}\n'
    path.write_text(whole + half)
    JSONLLogger(path).scalars(50, {"loss": 50.0})
    assert [row["step"] for row in _rows(path)] == [30, 50]
    path.write_text(whole + half)
    JSONLLogger(path).truncate_after(30)
    assert path.read_text() == whole


def test_a_full_disk_leaves_no_half_row_once_there_is_room_again(tmp_path):
    path = tmp_path / "log.jsonl"
    logger = JSONLLogger(path)
    logger.scalars(1, {"loss": 1.0})
    size = path.stat().st_size
    with _full_disk(size + 9):
        for step in (2, 3):
            with pytest.raises(OSError, match="File too large"):
                logger.scalars(step, {"loss": 2.0})
        assert path.stat().st_size == size + 9  # half a row is there
    logger.scalars(4, {"loss": 4.0})
    assert [row["step"] for row in _rows(path)] == [1, 4]
    with _full_disk(path.stat().st_size + 9), pytest.raises(OSError, match="File too large"):
        logger.scalars(5, {"loss": 5.0})
    logger.truncate_after(1)
    assert [row["step"] for row in _rows(path)] == [1]


def test_half_a_line_of_another_program_stays(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\nhello')
    logger = JSONLLogger(path)
    for write in (lambda: logger.truncate_after(0), lambda: logger.scalars(2, {})):
        with pytest.raises(ValueError, match=r"does not end in a log row but in b'hello'; move"):
            write()
    assert path.read_text() == '{"step": 1}\nhello'


def _events(directory):
    """Events of all files in TensorBoard's order."""
    for path in sorted(directory.iterdir()):
        yield from _whole_events(path)


def test_tensorboard_events(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.scalars(5, {"loss": 0.25})
    logger.image(5, "grid", GRADIENT)
    logger.truncate_after(3)
    logger.scalars(4, {"loss": 0.5})
    logger.close()
    events = list(_events(tmp_path))
    values = [(event.step, value) for event in events for value in event.summary.value]
    scalars = [(s, v.tag, v.simple_value) for s, v in values if v.HasField("simple_value")]
    assert scalars == [(5, "loss", 0.25), (4, "loss", 0.5)]
    images = [(s, v.tag, v.image.height, v.image.width) for s, v in values if v.HasField("image")]
    assert images == [(5, "grid", 2, 3)]
    # A session start at step 4 makes TensorBoard drop earlier files' events from there on.
    starts = [e.step for e in events if e.HasField("session_log") and e.session_log.status == 1]
    assert 4 in starts


def test_tensorboard_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install diffusion_jax\[logging\]"):
        TensorBoardLogger(tmp_path)


def test_tensorboard_goes_on_after_a_full_disk(tmp_path):
    """With tensorboardX's own thread the run would stand still from here on."""
    logger = TensorBoardLogger(tmp_path)
    logger.scalars(1, {"loss": 1.0})
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    with _full_disk(200):
        for step in range(2, 20):
            with pytest.raises(OSError, match="File too large"):
                logger.image(step, "noise", noise)
        with pytest.raises(OSError, match="File too large"):
            logger.image(20, "noise", noise)
    logger.scalars(21, {"loss": 21.0})
    logger.close()
    first, *_, last = sorted(tmp_path.iterdir(), key=lambda path: int(path.name.split(".")[-1]))
    for path, step in ((first, 1), (last, 21)):
        event = next(e for e in _whole_events(path) if e.summary.value)
        assert (event.step, event.summary.value[0].simple_value) == (step, step)


def _whole_events(path):
    """Events of a file, up to half a one; a record is length, crc, bytes, crc."""
    from tensorboardX.proto.event_pb2 import Event

    content, at = path.read_bytes(), 0
    while at + 16 <= len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        if at + 16 + length > len(content):
            return
        yield Event.FromString(content[at + 12 : at + 12 + length])
        at += 16 + length


def test_tensorboard_forgets_late_if_the_disk_is_full_at_the_start(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.scalars(5, {"loss": 5.0})
    with _full_disk(10), pytest.raises(OSError, match="File too large"):
        logger.truncate_after(3)
    logger.scalars(4, {"loss": 4.0})
    logger.scalars(5, {"loss": 5.5})
    logger.close()
    last = max(tmp_path.iterdir(), key=lambda path: int(path.name.split(".")[-1]))
    events = [(e.step, e.session_log.status) for e in _whole_events(last)]
    # The file's version, one session start, and the points.
    assert events == [(0, 0), (4, 1), (4, 0), (5, 0)]


class FakeRun:
    """Records what a W&B run is told."""

    def __init__(self, options):
        self.options, self.calls = options, []

    def __getattr__(self, name):
        return lambda *args, **options: self.calls.append((name, args, options))


@pytest.fixture
def wandb(monkeypatch):
    module = types.ModuleType("wandb")
    module.runs = []

    def init(**options):
        module.runs.append(FakeRun(options))
        return module.runs[-1]

    module.init, module.Image = init, lambda pixels: ("image", pixels)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_rows_over_their_step(tmp_path, wandb):
    logger = WandbLogger(tmp_path / "run", project="digits", config={"rate": 0.1})
    logger.scalars(10, {"loss": np.float32(0.5), "bad": float("nan")})
    logger.image(10, "grid", GRADIENT)
    logger.image(10, "gray", np.zeros((4, 4, 1)))
    logger.truncate_after(5)
    logger.close()
    (run,) = wandb.runs
    assert run.options == {
        "project": "digits",
        "name": "run",
        "dir": str(tmp_path / "run"),
        "config": {"rate": 0.1},
        "id": logger.run_id,
        "resume": "allow",
    }
    names = [name for name, _, _ in run.calls]
    assert names == ["define_metric", "define_metric", "log", "log", "log", "finish"]
    assert run.calls[1] == ("define_metric", ("*",), {"step_metric": "step"})
    # Never log(..., step=n): W&B drops rows whose n does not grow.
    assert all(not options for name, _, options in run.calls if name == "log")
    (row,), (picture,), (gray,) = (args for name, args, _ in run.calls if name == "log")
    assert row["step"] == 10 and row["loss"] == 0.5 and type(row["loss"]) is float
    assert np.isnan(row["bad"])
    np.testing.assert_array_equal(picture["grid"][1], np.round(GRADIENT * 127.5 + 127.5))
    assert picture["step"] == 10 and gray["gray"][1].shape == (4, 4)


def test_a_resumed_run_is_the_same_wandb_run_and_another_directory_another(tmp_path, wandb):
    for folder in ("a", "a", "b"):
        WandbLogger(tmp_path / folder, project="digits", name="mine").close()
    first, second, other = (run.options["id"] for run in wandb.runs)
    assert first == second != other and len(first) == 16
    assert {run.options["name"] for run in wandb.runs} == {"mine"}
    assert (tmp_path / "a" / "wandb-run-id").read_text() == first


@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")])
def test_wandb_without_its_library_says_what_to_install(tmp_path, monkeypatch, module):
    """A folder `wandb` of earlier runs imports as an empty module."""
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ImportError, match=r"pip install diffusion_jax\[logging\]"):
        WandbLogger(tmp_path, project="p")


class Failing:
    """Raises what it is given, or notes the call."""

    def __init__(self, error=None):
        self.error, self.steps = error, []

    def scalars(self, step, values):
        if self.error is not None:
            raise self.error
        self.steps.append(step)

    def image(self, step, name, image):
        self.scalars(step, {})

    def truncate_after(self, step):
        self.scalars(step, {})

    def close(self):
        self.scalars(-1, {})


def test_a_failing_logger_warns_once_of_a_kind_and_is_asked_again(caplog):
    inner = Failing(OSError(28, "No space left on device"))
    logger = Tolerant(inner)
    with pytest.warns(RuntimeWarning) as caught, caplog.at_level(logging.INFO):
        for step in range(3):
            logger.scalars(step, {})
        logger.image(3, "grid", GRADIENT)
        inner.error = ConnectionError("unreachable")
        logger.scalars(4, {})
        logger.truncate_after(0)
    texts = [str(warning.message) for warning in caught]
    assert [text.split(":")[0] for text in texts] == [
        "Failing.scalars failed",
        "Failing.image failed",
        "Failing.scalars failed",
        "Failing.truncate_after failed",
    ]
    assert "OSError: [Errno 28] No space left on device. The run goes on" in texts[0]
    assert {Path(warning.filename) for warning in caught} == {Path(__file__)}
    assert logger.failures == len(caplog.records) == 6
    assert "No space left" in caplog.text

    inner.error = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logger.scalars(5, {})
    assert inner.steps == [5]
    with pytest.warns(RuntimeWarning, match="6 calls of Failing failed in this run"):
        logger.close()
    assert inner.steps == [5, -1]


def test_a_logger_that_works_says_nothing():
    logger = Tolerant(Failing())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logger.truncate_after(0)
        logger.scalars(1, {"loss": 1.0})
        logger.image(1, "grid", GRADIENT)
        logger.close()
    assert logger.logger.steps == [0, 1, 1, -1]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_what_ends_a_run_is_no_failure(error):
    for call in (lambda logger: logger.scalars(1, {}), lambda logger: logger.close()):
        with pytest.raises(type(error)):
            call(Tolerant(Failing(error)))


def test_a_foreign_file_is_an_error_at_the_start_and_a_warning_later(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("hello")
    logger = Tolerant(JSONLLogger(path))
    with pytest.raises(ValueError, match="does not end in a log row"):
        logger.truncate_after(0)
    with pytest.warns(RuntimeWarning, match="JSONLLogger.scalars failed: ValueError"):
        logger.scalars(1, {})


def test_a_run_on_a_full_disk_goes_on_and_its_record_is_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    logger = Tolerant(JSONLLogger(path))
    for step in range(1, 7):
        room = contextlib.nullcontext() if step in (1, 5, 6) else _full_disk(40)
        with room, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logger.scalars(step, {"loss": 1.0})
    assert [row["step"] for row in _rows(path)] == [1, 5, 6] and logger.failures == 3
