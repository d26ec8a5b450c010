"""Loggers: where the numbers and pictures of a run go."""

import json
import math
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm


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

    Attributes:
      path: the file; its folder is created.
    """

    def __init__(self, path: str | PathLike):
        self.path = Path(path).expanduser().resolve()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")

    def _write(self, row: Mapping[str, object]) -> None:
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a row."""
        numbers = {name: float(value) for name, value in values.items()}
        finite = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        self._write({"step": step, **finite})

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes [H, W, C], float in [-1, 1] or uint8, as a PNG file and a row that points to it.

        Raises:
          ValueError: if the image has another shape or dtype.
        """
        from PIL import Image

        pixels = _to_uint8(image)
        folder = self.path.with_suffix(".images")
        file = folder / f"{name.replace('/', '_')}_{step:08d}.png"
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file)
        self._write({"step": step, "image": name, "file": str(file.relative_to(self.path.parent))})

    def truncate_after(self, step: int) -> None:
        """Drops the rows of later steps, and a last line that was cut off by a kill.

        Raises:
          ValueError: if a line other than the last is not a row of this logger.
        """
        self._file.close()
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = []
        for number, line in enumerate(lines, start=1):
            if number == len(lines) and not line.endswith("\n"):
                break
            try:
                row_step = json.loads(line)["step"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {self.path} is not a log row: {line.strip()[:80]!r}; move "
                    "the file away or log to another path"
                ) from error
            if row_step <= step:
                kept.append(line)
        # Written beside and renamed, so that a kill leaves either the old file or the new one.
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardLogger:
    """Writes TensorBoard event files with tensorboardX.

    Attributes:
      directory: folder of the event files.

    Raises:
      ImportError: if tensorboardX is not installed.
    """

    def __init__(self, directory: str | PathLike):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoardLogger needs tensorboardX: pip install diffusion_jax[logging]"
            ) from error
        self.directory = Path(directory).expanduser().resolve()
        self._make, self._files = SummaryWriter, 0
        self._writer = self._open(None)

    def _open(self, purge_step: int | None) -> Any:
        # Two files of one second would get the same name and the second erase the first.
        self._files += 1
        suffix = f".{os.getpid()}.{self._files}"
        return self._make(str(self.directory), purge_step=purge_step, filename_suffix=suffix)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point to the curve of every name."""
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), step)
        self._writer.flush()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds an image [H, W, C], float in [-1, 1] or uint8.

        Raises:
          ValueError: if the image has another shape or dtype.
        """
        self._writer.add_image(name, _to_uint8(image), step, dataformats="HWC")
        self._writer.flush()

    def truncate_after(self, step: int) -> None:
        """Starts a new event file that tells TensorBoard to forget later steps."""
        self._writer.close()
        self._writer = self._open(step + 1)

    def close(self) -> None:
        """Writes what is left and closes the file."""
        self._writer.close()
