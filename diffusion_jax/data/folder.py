"""A user's folder of pictures as a random-access source, with captions or classes if wanted."""

import json
from pathlib import Path

import numpy as np

from diffusion_jax.data.decode import decode_image
from diffusion_jax.data.transforms import resize_and_crop, to_float

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def find_images(folder: str | Path) -> list[Path]:
    """All pictures below a folder, hidden ones excepted, sorted by path.

    Raises:
      ValueError: if it is no folder, or has no file with one of SUFFIXES.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is not a folder")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise ValueError(f"no pictures below {str(folder)!r}; looked for {', '.join(SUFFIXES)}")
    return paths


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: captions must be UTF-8 text ({error})") from error


def _json(text: str, where: str) -> dict:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object {{...}}, got {type(value).__name__}")
    return value


def _listed_captions(folder: Path) -> dict[str, str] | None:
    """Captions by relative path from captions.json or metadata.jsonl, None without either."""
    table, lines = folder / "captions.json", folder / "metadata.jsonl"
    if table.is_file() and lines.is_file():
        raise ValueError(f"{str(folder)!r} has {table.name} and {lines.name}; keep one of them")
    if table.is_file():
        captions = _json(_text(table), str(table))
    elif lines.is_file():
        captions = {}
        for number, line in enumerate(_text(lines).splitlines(), start=1):
            row = _json(line, f"{lines}, line {number}")
            if not isinstance(row.get("file_name"), str) or "text" not in row:
                raise ValueError(f"{lines}, line {number}: 'file_name' and 'text' are needed")
            captions[row["file_name"]] = row["text"]
    else:
        return None
    for name, caption in captions.items():
        if not isinstance(name, str) or not isinstance(caption, str):
            raise ValueError(f"{str(folder)!r}: the caption of {name!r} is no text: {caption!r}")
    return captions


def find_captions(folder: str | Path, paths: list[Path]) -> list[str]:
    """The caption of every picture.

    Looked for in captions.json ({"cat.jpg": "a cat", …}) or metadata.jsonl (lines of
    {"file_name": "cat.jpg", "text": "a cat"}) in the folder, else in cat.txt beside cat.jpg.

    Raises:
      ValueError: if a picture has no caption, or a file is not as described.
    """
    folder = Path(folder).expanduser()
    listed = _listed_captions(folder)
    if listed is None:
        texts = [path.with_suffix(".txt") for path in paths]
        found = [_text(text) if text.is_file() else None for text in texts]
    else:
        found = [listed.get(path.relative_to(folder).as_posix()) for path in paths]
    missing = [str(path) for path, caption in zip(paths, found, strict=True) if caption is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(paths)} pictures have no caption, the first is {missing[0]}; "
            "write captions.json, metadata.jsonl or a .txt beside each picture"
        )
    return [caption for caption in found if caption is not None]


def class_names(folder: str | Path, paths: list[Path]) -> list[str]:
    """Names of the folders directly below `folder`, sorted: the classes.

    Raises:
      ValueError: if a picture lies in no such folder.
    """
    folder = Path(folder).expanduser()
    for path in paths:
        if path.parent == folder:
            raise ValueError(f"{path} lies in no class folder; move it to {folder}/CLASS/")
    return sorted({path.relative_to(folder).parts[0] for path in paths})


class FolderSource:
    """Random access to the pictures of a folder; see `pipeline.Folder` for the options."""

    def __init__(
        self,
        folder: str,
        image_size: int,
        *,
        channels: int = 3,
        captions: bool = False,
        classes: bool = False,
    ):
        self._root = Path(folder).expanduser()
        self._image_size, self._channels = image_size, channels
        self._paths = find_images(self._root)
        self._captions = find_captions(self._root, self._paths) if captions else None
        self.class_names = class_names(self._root, self._paths) if classes else None

    def __len__(self) -> int:
        return len(self._paths)

    def __repr__(self) -> str:
        return f"FolderSource({str(self._root)!r}, {len(self)} pictures)"

    def __getitem__(self, index: int) -> dict:
        """image [S, S, C] float32 in [-1, 1]; caption and label [] int32 if asked for."""
        path = self._paths[index]
        image = decode_image(str(path), self._channels, name=str(path))
        example = {"image": to_float(resize_and_crop(image, self._image_size))}
        if self._captions is not None:
            example["caption"] = self._captions[index]
        if self.class_names is not None:
            name = path.relative_to(self._root).parts[0]
            example["label"] = np.int32(self.class_names.index(name))
        return example
