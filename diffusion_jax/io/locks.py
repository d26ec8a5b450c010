"""A lock on a file, which ends with the process that holds it however that ends."""

import os
import platform
import warnings
from pathlib import Path
from typing import Any

from diffusion_jax.io.checkpoint_errors import CheckpointError, CheckpointWarning


def locked(path: Path) -> Any:
    """An open file with a lock; None, with a warning, where there are no locks.

    Raises:
      CheckpointError: if another process has the lock, with its number.
    """
    lock = path.open("a+")
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        lock.close()
        raise CheckpointError(
            f"another run writes checkpoints into {path.parent} (process {owner}); stop it, or use "
            "another directory"
        ) from error
    # Windows, and some network file systems.
    except (ImportError, OSError) as error:
        lock.close()
        warnings.warn(
            f"{path.parent} cannot be locked ({error}): that no other run writes into it is not "
            "checked",
            CheckpointWarning,
            stacklevel=6,
        )
        return None
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {platform.node()}")
    lock.flush()
    return lock
