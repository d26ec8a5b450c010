"""The original files of MNIST and CIFAR-10: where they are, their hashes, how to read them."""

import gzip
import hashlib
import os
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

CIFAR10_CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
_CIFAR10_RECORD = 1 + 3 * 32 * 32
_CIFAR10_MEMBERS = {
    "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test": ("test_batch.bin",),
}
# A batch holds 10,000 records; more than this is not the archive we know.
_CIFAR10_MAX_MEMBER = 10_000 * _CIFAR10_RECORD
_MNIST_PREFIX = {"train": "train", "test": "t10k"}
_MNIST_MAX_IMAGES = 60_000
_MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_CHUNK = 1 << 20


class Original(NamedTuple):
    """One original file.

    Attributes:
      url: where it can be had.
      sha256: of the file, in hex.
    """

    url: str
    sha256: str

    @property
    def filename(self) -> str:
        return self.url.rsplit("/", 1)[1]


ORIGINALS: dict[str, tuple[Original, ...]] = {
    "digits": (),
    "mnist": (
        Original(
            _MNIST_URL + "train-images-idx3-ubyte.gz",
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        Original(
            _MNIST_URL + "train-labels-idx1-ubyte.gz",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        Original(
            _MNIST_URL + "t10k-images-idx3-ubyte.gz",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        Original(
            _MNIST_URL + "t10k-labels-idx1-ubyte.gz",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    "cifar10": (
        Original(
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
    ),
}


def download(original: Original, folder: str | Path) -> Path:
    """Fetches one original file into a folder, unless it is there, and checks its hash.

    Raises:
      ValueError: if the SHA-256 differs; the file is not kept then.
      OSError: if it cannot be fetched.
    """
    folder = Path(folder)
    target = folder / original.filename
    if target.exists():
        _check_hash(target, original)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{original.filename}.{os.getpid()}.part"
    try:
        with urllib.request.urlopen(original.url, timeout=60) as reply, partial.open("wb") as out:
            while chunk := reply.read(_CHUNK):
                out.write(chunk)
        _check_hash(partial, original)
        partial.rename(target)
    except urllib.error.URLError as error:
        raise OSError(
            f"cannot fetch {original.url}: {error.reason}. If you have {target.name} already, name "
            "its folder with --source-dir"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def _check_hash(path: Path, original: Original) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != original.sha256:
        raise ValueError(
            f"{path} is not the file of {original.url}: its SHA-256 is {digest.hexdigest()}, "
            f"expected {original.sha256}. Delete it and try again"
        )


def check_folder(name: str, folder: str | Path) -> None:
    """Checks that a folder holds the original files of a data set.

    Raises:
      ValueError: names the folder and the files that are not there.
    """
    folder = Path(folder)
    missing = [o.filename for o in ORIGINALS[name] if not (folder / o.filename).is_file()]
    if missing:
        raise ValueError(f"{str(folder)!r} lacks the original files {missing} of {name}")


def _read_idx(path: Path, rank: int) -> np.ndarray:
    """An array of bytes in the idx format: 0 0 8 rank, big-endian sizes, values."""
    try:
        with gzip.open(path, "rb") as file:
            header = file.read(4 + 4 * rank)
            if len(header) < 4 + 4 * rank or header[:4] != bytes((0, 0, 8, rank)):
                raise ValueError(f"{path} is not an idx file of bytes with {rank} dimensions")
            shape = tuple(int(size) for size in np.frombuffer(header, ">u4", rank, offset=4))
            if shape[0] > _MNIST_MAX_IMAGES or shape[1:] != (28, 28)[: rank - 1]:
                raise ValueError(f"{path} holds an array of {shape}, which is not MNIST")
            expected = int(np.prod(shape))
            # One byte more than announced, to notice a file that is too long.
            values = file.read(expected + 1)
    except (EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if len(values) != expected:
        raise ValueError(f"{path} announces {expected} values but does not hold just as many")
    return np.frombuffer(values, np.uint8).reshape(shape)


def read_mnist(folder: str | Path, split: str) -> Iterator[tuple[np.ndarray, int]]:
    """Images [28, 28, 1] uint8 and labels of a split, from the original idx files.

    Raises:
      ValueError: names the file that is not as it should be.
    """
    prefix = Path(folder) / _MNIST_PREFIX[split]
    images = _read_idx(Path(f"{prefix}-images-idx3-ubyte.gz"), 3)
    labels = _read_idx(Path(f"{prefix}-labels-idx1-ubyte.gz"), 1)
    if len(images) != len(labels):
        raise ValueError(f"{prefix}-*: {len(images)} images but {len(labels)} labels")
    yield from zip(images[..., None], labels.tolist(), strict=True)


def _cifar10_batches(archive: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    # Members are read one by one and never written to disk, so no path in the archive matters.
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = member.name.rsplit("/", 1)[-1]
                if name not in names or not member.isreg():
                    continue
                if name in found or member.size > _CIFAR10_MAX_MEMBER:
                    raise ValueError(f"{archive}: {member.name} is too large or there twice")
                found[name] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{archive} cannot be read: {error}") from error
    return found


def read_cifar10(folder: str | Path, split: str) -> Iterator[tuple[np.ndarray, int]]:
    """Images [32, 32, 3] uint8 and labels of a split, from cifar-10-binary.tar.gz.

    Raises:
      ValueError: names the archive and what is wrong with it.
    """
    archive = Path(folder) / ORIGINALS["cifar10"][0].filename
    names = _CIFAR10_MEMBERS[split]
    batches = _cifar10_batches(archive, names)
    for name in names:
        if name not in batches:
            raise ValueError(f"{archive} has no regular file {name}")
        if not batches[name] or len(batches[name]) % _CIFAR10_RECORD:
            raise ValueError(
                f"{archive}: {name} has {len(batches[name])} bytes, which is no multiple of "
                f"{_CIFAR10_RECORD}"
            )
        records = np.frombuffer(batches[name], np.uint8).reshape(-1, _CIFAR10_RECORD)
        if records[:, 0].max() >= len(CIFAR10_CLASSES):
            raise ValueError(f"{archive}: {name} has the label {records[:, 0].max()}, above 9")
        images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        yield from zip(images, records[:, 0].tolist(), strict=True)
