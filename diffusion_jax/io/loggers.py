"""Loggers: where the numbers and pictures of a run go."""

import contextlib
import importlib
import json
import logging
import math
import os
import secrets
import time
import warnings
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm.auto import tqdm

from diffusion_jax.core.types import Logger
from diffusion_jax.io.files import write_text

_log = logging.getLogger(__name__)

# How every row of a JSONLLogger begins.
_ROW = b'{"step": '


def _to_uint8(image: np.ndarray) -> np.ndarray:
    """[H, W, C] float in [-1, 1] -> uint8; values outside are clipped, as a screen does."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise ValueError(f"an image must be [H, W, 1] or [H, W, 3], got shape {image.shape}")
    if image.dtype == np.uint8:
        return image
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"an image must be float in [-1, 1] or uint8, got {image.dtype}")
    return np.round(np.clip(image * 127.5 + 127.5, 0.0, 255.0)).astype(np.uint8)


class StdoutLogger:
    """Prints one line a log row, above the progress bar."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Prints `values` after the step."""
        tqdm.write(f"step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Prints that there is an image [H, W, C], since a terminal cannot show it."""
        tqdm.write(f"step {step}: image {name} of {image.shape[1]}x{image.shape[0]} pixels")

    def truncate_after(self, step: int) -> None:
        """Does nothing: printed lines cannot be taken back."""

    def close(self) -> None:
        """Does nothing: the stream is not ours."""


class JSONLLogger:
    """Appends one JSON object a log row to a file; images are PNG files in a folder beside it.

    Rows are {"step": 100, "loss": 0.1, …} and {"step": 100, "image": name, "file": path relative
    to the file}. Numbers that are not finite, for which JSON has no sign, become null.

    The file is opened anew for every row, so that it goes on where a disk was full or away. What
    a kill or a full disk left of a row is cut off before the next one.

    Attributes:
      path: the file; its folder is created.
    """

    def __init__(self, path: str | PathLike):
        self.path = Path(path).expanduser().resolve()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A file that cannot be written to is noticed now and not after the first hundred steps.
        self.path.open("ab").close()

    def _cut_half_row(self, file: BinaryIO) -> None:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        if file.read() in (b"", b"\n"):
            return
        file.seek(0)
        content = file.read()
        start = content.rfind(b"\n") + 1
        half = content[start:]
        if not (half.startswith(_ROW) or _ROW.startswith(half)):
            raise ValueError(
                f"{self.path} does not end in a log row but in {half[:80]!r}; move the file away "
                "or log to another path"
            )
        file.truncate(start)

    def _write(self, row: Mapping[str, object]) -> None:
        line = json.dumps(row, allow_nan=False) + "\n"
        with self.path.open("a+b") as file:
            self._cut_half_row(file)
            file.write(line.encode())

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a row.

        Raises:
          ValueError: if the file ends in half a line that is not of this logger.
        """
        numbers = {name: float(value) for name, value in values.items()}
        finite = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        self._write({"step": step, **finite})

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes [H, W, C], float in [-1, 1] or uint8, as a PNG file and a row that points to it.

        Raises:
          ValueError: if the image has another shape or dtype, or the file ends in half a line that
            is not of this logger.
        """
        from PIL import Image

        pixels = _to_uint8(image)
        folder = self.path.with_suffix(".images")
        file = folder / f"{name.replace('/', '_')}_{step:08d}.png"
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file)
        self._write({"step": step, "image": name, "file": str(file.relative_to(self.path.parent))})

    def truncate_after(self, step: int) -> None:
        """Drops the rows of later steps, and half a row at the end.

        Raises:
          ValueError: if a line is not of this logger; the file then stays as it is.
        """
        with self.path.open("a+b") as file:
            self._cut_half_row(file)
        kept = []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                row_step = json.loads(line)["step"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {self.path} is not a log row: {line.strip()[:80]!r}; move "
                    "the file away or log to another path"
                ) from error
            if row_step <= step:
                kept.append(line)
        write_text(self.path, "".join(kept))

    def close(self) -> None:
        """Does nothing: every row is in the file already."""


class TensorBoardLogger:
    """Writes TensorBoard event files with tensorboardX.

    Everything is written at once and by the caller's thread. The writing thread of tensorboardX
    ends for good at the first error, after which adding events waits for it for ever.

    Attributes:
      directory: folder of the event files.

    Raises:
      ImportError: if tensorboardX is not installed.
    """

    def __init__(self, directory: str | PathLike):
        try:
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2
        except ImportError as error:
            raise ImportError(
                "TensorBoardLogger needs tensorboardX: pip install diffusion_jax[logging]"
            ) from error
        self.directory = Path(directory).expanduser().resolve()
        self._summary, self._make, self._protos = summary, EventsWriter, event_pb2
        self._files = 0
        self._writer: Any = None
        self._forget_from: int | None = None
        self._write([])

    def _write(self, events: list[Any]) -> None:
        try:
            if self._writer is None:
                self.directory.mkdir(parents=True, exist_ok=True)
                # Two files of one second would get the same name and the second erase the first.
                self._files += 1
                suffix = f".{os.getpid()}.{self._files}"
                self._writer = self._make(str(self.directory / "events"), suffix)
            if self._forget_from is not None:
                session = self._protos.SessionLog(status=self._protos.SessionLog.START)
                events = [self._protos.Event(step=self._forget_from, session_log=session), *events]
            for event in events:
                event.wall_time = time.time()
                self._writer.write_event(event)
            self._writer.flush()
        except OSError:
            # Behind half an event nothing of a file is read, so the next one gets a new file.
            self._leave()
            raise
        self._forget_from = None

    def _leave(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point to the curve of every name."""
        points = [self._summary.scalar(name, float(value)) for name, value in values.items()]
        self._write([self._protos.Event(step=step, summary=point) for point in points])

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds an image [H, W, C], float in [-1, 1] or uint8.

        Raises:
          ValueError: if the image has another shape or dtype.
        """
        picture = self._summary.image(name, _to_uint8(image), dataformats="HWC")
        self._write([self._protos.Event(step=step, summary=picture)])

    def truncate_after(self, step: int) -> None:
        """Starts a new event file that tells TensorBoard to forget later steps."""
        self._leave()
        self._forget_from = step + 1
        self._write([])

    def close(self) -> None:
        """Closes the file."""
        self._leave()


class WandbLogger:
    """Sends rows and images to Weights & Biases, or keeps them for `wandb sync` when offline.

    The run's id is kept in the file wandb-run-id beside W&B's own folder, so that a resumed run
    goes on as the same W&B run; offline every start writes a part of its own under that id. The
    environment decides on the account and on offline or not, for example by WANDB_MODE=offline.

    Rows are drawn over their `step` and not over the number of calls, since W&B refuses rows
    whose number does not grow and a resumed run repeats some.

    Attributes:
      directory: folder for W&B's files; created.
      run_id: id of the W&B run.

    Raises:
      ImportError: if wandb is not installed.
    """

    def __init__(
        self,
        directory: str | PathLike,
        *,
        project: str,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        """Starts or resumes the run.

        Args:
          directory: see above.
          project: of W&B; it is created if there is none.
          name: how the run is shown; None for the name of `directory`.
          config: the run's settings, shown beside its curves.
        """
        try:
            wandb = importlib.import_module("wandb")
            # A folder `wandb` of earlier runs can be imported too, and has none.
            init = wandb.init
        except (ImportError, AttributeError) as error:
            raise ImportError(
                "WandbLogger needs wandb: pip install diffusion_jax[logging]"
            ) from error
        self.directory = Path(directory).expanduser().resolve()
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self.directory / "wandb-run-id"
        if not file.exists():
            write_text(file, secrets.token_hex(8))
        self.run_id = file.read_text(encoding="utf-8").strip()
        self._image = wandb.Image
        self._run = init(
            project=project,
            name=name or self.directory.name,
            dir=str(self.directory),
            config=dict(config or {}),
            id=self.run_id,
            resume="allow",
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Sends a row."""
        self._run.log({"step": step, **{name: float(value) for name, value in values.items()}})

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Sends an image [H, W, C], float in [-1, 1] or uint8.

        Raises:
          ValueError: if the image has another shape or dtype.
        """
        pixels = _to_uint8(image)
        shown = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
        self._run.log({"step": step, name: self._image(shown)})

    def truncate_after(self, step: int) -> None:
        """Does nothing: W&B keeps what it was sent.

        The rows of updates that are repeated come twice, at the same steps; with the same numbers
        where resuming is exact.
        """

    def close(self) -> None:
        """Waits until everything is sent, and ends the run."""
        self._run.finish()


class Tolerant:
    """A logger whose failures do not stop a run.

    What the wrapped logger raises becomes a RuntimeWarning, once for every kind: method and type
    of the exception. It is called again at the next row, since a full disk may be emptied. Each
    failure goes with its traceback to Python's log `diffusion_jax.io.loggers` at the level INFO,
    and `close` warns of their number.

    Only a ValueError of `truncate_after` is raised: it says that a file is another's, before the
    first update, when nothing is lost. KeyboardInterrupt and SystemExit are no failures.

    Attributes:
      logger: the logger.
      failures: calls that have failed.
    """

    def __init__(self, logger: Logger):
        self.logger = logger
        self.failures = 0
        self._kinds: set[tuple[str, type]] = set()

    def _call(self, method: Callable[..., None], *args: Any) -> None:
        try:
            method(*args)
        except Exception as error:
            what = f"{type(self.logger).__name__}.{method.__name__}"
            if method.__name__ == "truncate_after" and isinstance(error, ValueError):
                raise
            self.failures += 1
            _log.info("%s failed", what, exc_info=True)
            kind = (method.__name__, type(error))
            if kind in self._kinds:
                return
            self._kinds.add(kind)
            warnings.warn(
                f"{what} failed: {type(error).__name__}: {error}. The run goes on, and further "
                "failures of this kind are not shown; logging.basicConfig(level='INFO') shows all",
                RuntimeWarning,
                stacklevel=3,
            )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs a row, or warns."""
        self._call(self.logger.scalars, step, values)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Logs an image, or warns."""
        self._call(self.logger.image, step, name, image)

    def truncate_after(self, step: int) -> None:
        """Drops later rows, or warns.

        Raises:
          ValueError: if the wrapped logger does.
        """
        self._call(self.logger.truncate_after, step)

    def close(self) -> None:
        """Closes the logger, or warns, and says how many calls have failed."""
        self._call(self.logger.close)
        if self.failures:
            name = type(self.logger).__name__
            warnings.warn(
                f"{self.failures} calls of {name} failed in this run, so its record has gaps",
                RuntimeWarning,
                stacklevel=2,
            )
