"""Named arrays in a .npz file that holds no Python objects and is whole or not there."""

import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def write_arrays(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays so that a process killed in between leaves the old file.

    Args:
      path: a file whose name ends in ".npz".
      arrays: name -> numbers or text.

    Raises:
      ValueError: if the name ends otherwise, or an array holds Python objects.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"the name of a file of arrays must end in .npz, got {path}")
    for name, array in arrays.items():
        if np.asarray(array).dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, only numbers and text can be written")
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        np.savez(file, **dict(arrays))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_arrays(path: str | Path, *names: str) -> dict[str, np.ndarray]:
    """Reads these arrays, or all of them if no name is given.

    Raises:
      ValueError: if the file is no whole .npz, lacks one of them, or one holds Python objects,
        which could run code when they are read.
    """
    try:
        opened = np.load(Path(path), allow_pickle=False)
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise ValueError("a single array, not a .npz file")
        with opened as file:
            missing = sorted(set(names) - set(file.files))
            if missing:
                raise ValueError(f"has no array {missing}; it has {sorted(file.files)}")
            return {name: file[name] for name in names or file.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from error
