"""Shards of pictures and captions, tar files as webdataset and img2dataset write them.

The files stay as they are: nothing is extracted, and no name in a shard is used as a path.
"""

import glob
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_jax.data.decode import decode_image
from diffusion_jax.data.folder import SUFFIXES
from diffusion_jax.data.transforms import resize_and_crop, to_float

PICTURES = tuple(suffix[1:] for suffix in SUFFIXES)
CAPTIONS = ("txt", "json")

# The key ends at the first dot of the name's last part: a/b.seg.png is the seg.png of a/b.
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)


class Place(NamedTuple):
    """Where a member's content lies in its shard, in bytes, and what its extension says it is."""

    start: int
    size: int
    kind: str


class Example(NamedTuple):
    """A picture of a shard; `caption` is None where captions are not wanted."""

    shard: Path
    key: str
    picture: Place
    caption: Place | None


def find_shards(pattern: str) -> list[Path]:
    """The files that match a pattern such as "set/*.tar", sorted by name.

    Raises:
      ValueError: if there are none.
    """
    paths = sorted(map(Path, glob.glob(os.path.expanduser(pattern), recursive=True)))
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise ValueError(
            f"no file matches {pattern!r}; expected a path with the wildcards *, ? and [...] of a "
            "shell, such as folder/*.tar"
        )
    return paths


def _regular_files(shard: Path) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar, in its order, from the headers alone."""
    end, length = 0, shard.stat().st_size
    with tarfile.open(shard, mode="r:") as tar:
        for member in tar:
            # A negative size would lead back to a header that was read before, for ever.
            if member.offset_data <= end or not 0 <= member.size <= length - member.offset_data:
                raise tarfile.ReadError(f"member {member.name!r} has the size {member.size}")
            end = member.offset_data
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise ValueError(
                    f"{shard}: {member.name!r} is a link, a device or a sparse file; shards hold "
                    "regular files only, write it anew with the pictures themselves"
                )
            yield member
        # tarfile takes a damaged header for the end, and the rest would be lost unnoticed.
        with shard.open("rb") as file:
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {tar.offset}")


def _members(shard: Path) -> dict[str, dict[str, Place]]:
    """Key -> extension -> place. Hidden files and those without an extension are left out."""
    found: dict[str, dict[str, Place]] = {}
    try:
        for member in _regular_files(shard):
            parts = _NAME.fullmatch(member.name)
            if parts is None:
                continue
            key, kind = parts[1], parts[2].lower()
            places = found.setdefault(key, {})
            if kind in places:
                raise ValueError(f"{shard}: {key!r} has two files .{kind}; keep one of them")
            places[kind] = Place(member.offset_data, member.size, kind)
    # The last two are tarfile's for headers that ask for too much, or nest too deep.
    except (tarfile.TarError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{shard}: damaged, or no uncompressed tar ({error}); random access needs whole and "
            "uncompressed ones"
        ) from error
    return found


def index_shard(shard: Path, *, captions: bool = True) -> list[Example]:
    """The pictures of a shard in its order, found by reading its headers.

    Files of one key belong together: KEY.jpg with KEY.txt, or with KEY.json that has a string
    "caption"; the .txt counts where both are there. Other files of a key are left alone.

    Args:
      shard: an uncompressed tar.
      captions: whether every picture has one.

    Raises:
      ValueError: if it is no such tar, is damaged, has links or devices, has no picture, or a
        key has two pictures, no picture or no caption.
    """
    examples = []
    for key, places in _members(shard).items():
        pictures = [places[kind] for kind in PICTURES if kind in places]
        texts = [places[kind] for kind in CAPTIONS if kind in places]
        if len(pictures) != 1:
            raise ValueError(
                f"{shard}: {key!r} has {len(pictures)} pictures, expected one of "
                f"{', '.join(PICTURES)}; it has the files {', '.join(places)}"
            )
        if captions and not texts:
            raise ValueError(
                f"{shard}: {key!r} has no caption, {key}.txt or {key}.json; write one, or choose "
                "captions=False"
            )
        examples.append(Example(shard, key, pictures[0], texts[0] if captions else None))
    if not examples:
        raise ValueError(f"{shard}: no pictures; looked for {', '.join(PICTURES)}")
    return examples


def _read(shard: Path, place: Place) -> bytes:
    # Opened for each file, so that the number of shards is not bounded by open files, and threads
    # and processes share nothing.
    with shard.open("rb") as file:
        file.seek(place.start)
        content = file.read(place.size)
    if len(content) != place.size:
        raise ValueError(f"{shard} has become shorter since it was indexed; start again")
    return content


def _caption(content: bytes, kind: str, name: str) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: captions must be UTF-8 text ({error})") from error
    if kind == "txt":
        return text.strip()
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON ({error})") from error
    caption = values.get("caption") if isinstance(values, dict) else None
    if not isinstance(caption, str):
        raise ValueError(f"{name}: expected an object with a string 'caption', got {text:.200}")
    return caption.strip()


class WebDatasetSource:
    """Random access to the pictures of shards; see `pipeline.WebDataset` for the options."""

    def __init__(self, shards: str, image_size: int, *, channels: int = 3, captions: bool = True):
        self._pattern, self._image_size, self._channels = shards, image_size, channels
        self._examples = [
            example
            for shard in find_shards(shards)
            for example in index_shard(shard, captions=captions)
        ]

    def __len__(self) -> int:
        return len(self._examples)

    def __repr__(self) -> str:
        return f"WebDatasetSource({self._pattern!r}, {len(self)} pictures)"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """image [S, S, C] float32 in [-1, 1]; caption if asked for."""
        shard, key, picture, caption = self._examples[index]
        content = io.BytesIO(_read(shard, picture))
        image = decode_image(content, self._channels, name=f"{shard}: {key}.{picture.kind}")
        example: dict[str, Any] = {"image": to_float(resize_and_crop(image, self._image_size))}
        if caption is not None:
            name = f"{shard}: {key}.{caption.kind}"
            example["caption"] = _caption(_read(shard, caption), caption.kind, name)
        return example
