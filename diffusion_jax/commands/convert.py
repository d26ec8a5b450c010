"""convert: pickled weights as safetensors, with a line about what was written."""

from collections.abc import Sequence
from pathlib import Path

from diffusion_jax.io.convert import convert_files


def convert(
    files: Sequence[Path], out: Path, *, key: str | None = None, max_shard_size: int | None = None
) -> list[Path]:
    """Converts files and prints what came of it; see `io.convert.convert_files`."""
    done = convert_files(files, out, key=key, max_shard_size=max_shard_size)
    if done.left_out:
        print(f"left out, no tensors: {', '.join(done.left_out)}")
    print(f"{done.tensors} tensors are in {', '.join(map(str, done.files))}")
    return done.files
