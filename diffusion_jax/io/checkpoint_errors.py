"""What can be wrong with a checkpoint, one class each."""


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; what is raised is one of its subclasses."""


class CheckpointMissingError(CheckpointError, FileNotFoundError):
    """There is no such checkpoint."""


class CheckpointSaveError(CheckpointError, OSError):
    """A checkpoint was not written. Earlier ones are as they were.

    Attributes:
      step: the step that is not on disk.
      last_committed_step: the newest one that is, None if there is none.
    """

    def __init__(self, step: int | None, last: int | None, reason: str):
        self.step, self.last_committed_step = step, last
        super().__init__(
            f"the checkpoint of step {step} was not written; the newest is of step {last}: {reason}"
        )


class CheckpointCorruptedError(CheckpointError, ValueError):
    """A checkpoint is not what was written: a file is damaged, cut off or missing.

    Attributes:
      step: which one.
      leaves: paths of the arrays whose values have changed, if the damage is in them.
    """

    def __init__(self, step: int, where: str, reason: str, leaves: tuple[str, ...] = ()):
        self.step, self.leaves = step, leaves
        super().__init__(
            f"{where} is corrupted: {reason}. Restoring without a step takes the newest good one"
        )


class CheckpointMismatchError(CheckpointError, ValueError):
    """A checkpoint and the state that it should fill differ.

    Attributes:
      differences: one line for every leaf: its path, what was saved, what is wanted.
    """

    def __init__(self, where: str, differences: list[str]):
        self.differences = differences
        super().__init__(
            f"{where} does not fit, {len(differences)} leaves differ; was it written with another "
            "model, optimizer, loss or choice of trainable leaves?\n  " + "\n  ".join(differences)
        )


class CheckpointWarning(UserWarning):
    """A checkpoint was passed over, or goes on under other conditions than it was written."""
