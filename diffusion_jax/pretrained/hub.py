"""Folders of the Hugging Face hub: only configurations and safetensors are fetched, by commit."""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusion_jax.io.safetensors import WeightsFileError
from diffusion_jax.io.shards import STEMS, indexed_files, weight_names

# Never code and never pickles. Weights are asked for by name, after their configurations.
SMALL_FILES = ("*.json", "*.txt", "*.model")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Names are given to the hub as patterns, so they have no characters that mean more than themselves.
_FILE = re.compile(r"\w[\w./ -]*")


class HubError(OSError):
    """A repository of the hub cannot be had; the message says what to do."""


def is_repository(name: str) -> bool:
    """Whether a string has the form of a repository's id, OWNER/NAME."""
    return bool(_REPOSITORY.fullmatch(name)) and ".." not in name


def _fetch(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repository}"
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=list(patterns)
            )
        )
    except errors.GatedRepoError as error:
        raise HubError(
            f"{repository} is gated: accept its licence at {page} and log in with: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{repository} has no revision {revision!r}; {page}/commits/main lists them"
        ) from error
    except (errors.RepositoryNotFoundError, errors.DisabledRepoError) as error:
        raise HubError(
            f"there is no folder {repository} here and no such repository at {page}; correct the "
            "name, or log in with hf auth login if it is private"
        ) from error
    except errors.HFValidationError as error:
        raise HubError(f"{repository} is neither a folder nor the id of a repository") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise HubError(
            f"{repository} is not a folder, not in the cache of the hub, and the hub cannot be "
            "reached; connect, unset HF_HUB_OFFLINE, or give the path of a folder"
        ) from error
    except errors.HfHubHTTPError as error:
        raise HubError(f"{repository} cannot be fetched from {page}: {error}") from error


def fetch_small(repository: str, revision: str | None = None) -> Path:
    """Fetches everything of a repository but weights, and prints its commit.

    The commit is all that it takes to load the same weights again.

    Args:
      repository: its id, OWNER/NAME.
      revision: branch, tag or commit; the main branch where None.

    Returns:
      the folder in the cache of the hub.

    Raises:
      HubError: if there is no such repository or revision, its licence is not accepted, or the
        hub cannot be reached.
    """
    folder = _fetch(repository, revision, SMALL_FILES)
    print(f"{repository}: revision {_commit(folder) or revision}", file=sys.stderr)
    return folder


def fetch_file(repository: str, name: str, revision: str | None = None) -> Path:
    """Fetches one safetensors file of a repository, and prints its commit.

    Args:
      repository: its id.
      name: of the file, with the folders that it lies in.
      revision: branch, tag or commit; the main branch where None.

    Raises:
      HubError: as `fetch_small`, and if the repository has no such file.
      WeightsFileError: if it is no safetensors file; nothing is fetched then.
    """
    if Path(name).suffix != ".safetensors" or not _FILE.fullmatch(name) or ".." in name:
        raise WeightsFileError(
            f"{name!r} of {repository} must be a safetensors file; a pickle has to be downloaded "
            "and converted once, where torch is installed: diffusion-jax convert FILE OUT"
        )
    folder = _fetch(repository, revision, [name])
    print(f"{repository}: revision {_commit(folder) or revision}", file=sys.stderr)
    if not (folder / name).exists():
        raise HubError(
            f"{repository} has no file {name}; https://huggingface.co/{repository}/tree/main "
            "lists them"
        )
    return folder / name


def fetch_weights(
    repository: str, folder: Path, parts: Sequence[str], *, variant: str | None = None
) -> None:
    """Adds the weights of some parts to a folder of `fetch_small`.

    Args:
      repository: its id.
      folder: what `fetch_small` gave.
      parts: folders in it that have weights, "" for the root.
      variant: which files; parts that do not have it get their plain ones.

    Raises:
      HubError: as `fetch_small`.
      WeightsFileError: if a part has no safetensors, or an index names anything but safetensors
        files beside it.
    """
    commit = _commit(folder)
    names = {part: _weight_files(folder, part, variant) for part in parts}
    _fetch(repository, commit, sum(names.values(), []))
    if variant is not None and (lacking := _lacking(folder, names)):
        plain = {part: _weight_files(folder, part, None) for part in lacking}
        _fetch(repository, commit, sum(plain.values(), []))
        names |= plain
    if lacking := _lacking(folder, names):
        where = ", ".join(part or "its root" for part in lacking)
        raise WeightsFileError(
            f"{repository} has no safetensors in {where}; if it has pickled weights, .bin or "
            f".ckpt, fetch those (hf download {repository}) and convert them, where torch is "
            "installed: diffusion-jax convert FILE OUT"
        )


def _lacking(folder: Path, names: Mapping[str, Sequence[str]]) -> list[str]:
    """Parts of which no file is there."""
    return [
        part for part, files in names.items() if not any((folder / file).exists() for file in files)
    ]


def _commit(folder: Path) -> str | None:
    return folder.name if folder.parent.name == "snapshots" else None


def _weight_files(folder: Path, part: str, variant: str | None) -> list[str]:
    """What the weights of a part may be called; the index, where there is one, knows it."""
    prefix = f"{part}/" if part else ""
    names = []
    for stem in STEMS:
        whole, *indexes = weight_names(stem, variant)
        for index in indexes:
            if (folder / part / index).exists():
                return [f"{prefix}{file}" for file in indexed_files(folder / part / index)]
        names.append(f"{prefix}{whole}")
    return names
