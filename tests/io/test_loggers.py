"""Loggers: what they write is read back with other tools."""

import json
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.io.loggers import JSONLLogger, StdoutLogger, TensorBoardLogger

GRADIENT = np.linspace(-1.0, 1.0, 2 * 3 * 3, dtype=np.float32).reshape(2, 3, 3)


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


def _events(directory):
    """Events of all files in TensorBoard's order; a record is length, crc, bytes, crc."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(directory.iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            yield Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length


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
