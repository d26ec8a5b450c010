"""Damages every file of a run's newest checkpoint, one at a time, and reads it.

python -m tests.faults.damage CHECKPOINTS COPIES HOW

Every damage must be noticed, and the checkpoint before be read in place of the damaged one; or it
must not matter, all values being those that were saved.
"""

import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_jax.io.checkpoint import Checkpoints
from diffusion_jax.io.checkpoint_errors import CheckpointCorruptedError, CheckpointWarning


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    """With one bit flipped in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes] | None] = {
    "deleted": None,
    "cut off in the middle": _cut,
    "with one bit flipped": flipped,
}


def target(experiment_file: Path) -> Any:
    """Shapes of the state of a run."""
    from diffusion_jax.experiment import load
    from diffusion_jax.training.state import TrainState

    experiment = load(experiment_file)
    stage, tx = experiment.system.build().stages["base"], experiment.optimizer.build()
    return jax.eval_shape(lambda key: TrainState.create(stage.init(key), tx), jax.random.key(0))


def check_equal(a: Any, b: Any, message: str) -> None:
    """Whether two states have the same bytes."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    same = all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)
    assert same, message


def main(whole: Path, copies: Path, how: str) -> None:
    shapes, noticed = target(whole.parent / "config.json"), 0
    with Checkpoints(whole) as checkpoints:
        before, newest = checkpoints.steps()[-2:]
        saved = {step: checkpoints.restore(shapes, step)[0] for step in (before, newest)}
    files = [path for path in sorted((whole / str(newest)).rglob("*")) if path.is_file()]
    for file in files:
        shutil.rmtree(copies, ignore_errors=True)
        for step in saved:
            shutil.copytree(whole / str(step), copies / str(step))
        harmed, change = copies / file.relative_to(whole), DAMAGES[how]
        if change is None:
            harmed.unlink()
        else:
            harmed.write_bytes(change(file.read_bytes()))
        with Checkpoints(copies) as checkpoints:
            try:
                state, _ = checkpoints.restore(shapes, newest)
            except CheckpointCorruptedError:
                noticed += 1
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    state, _ = checkpoints.restore(shapes)
                assert any(one.category is CheckpointWarning for one in said), file
                assert checkpoints.restored_step == before, file
        check_equal(state, saved[int(state.step)], f"{how}: {file} was not noticed")
    assert noticed >= 4, f"only {noticed} of {len(files)} files matter"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
