"""Batches of a source that can be left and taken up again exactly."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_jax.core.types import Batch
from diffusion_jax.data.bad_examples import ON_BAD_EXAMPLE, SkipBad
from diffusion_jax.data.read_ahead import check_picklable, read_ahead
from diffusion_jax.data.sources import Source, check_keys, stack
from diffusion_jax.data.transforms import check_images, check_labels

_FLIPPABLE = frozenset({"image", "label"})


class _Rows:
    """The batches of one process by number: rows of the global batches.

    Row i of batch k is example k·stride + first + i of the order, i < size.
    """

    def __init__(
        self,
        order: Sequence[dict[str, Any]],
        keys: Sequence[str],
        *,
        first: int,
        size: int,
        stride: int,
        num_classes: int | None,
    ):
        self._order, self._keys = order, keys
        self._first, self._size, self._stride = first, size, stride
        self._num_classes = num_classes

    def __len__(self) -> int:
        return len(self._order) // self._stride

    def __getitem__(self, number: int) -> Batch:
        start = number * self._stride + self._first
        rows = [self._order[index] for index in range(start, start + self._size)]
        try:
            batch = stack(rows, self._keys)
            if "image" in batch:
                check_images(batch["image"])
            if self._num_classes is not None:
                check_labels(batch["label"], self._num_classes)
        except ValueError as error:
            raise ValueError(f"batch {number}: {error}") from error
        return batch


def _end(running: list[Any]) -> None:
    while running:
        running.pop().close()


class Batches(Iterator[Batch]):
    """Batches of a source, made by `batches`: a `DataIterator` with an exact position.

    After an exception, Ctrl-C included, it stands before the batch that did not come. Its threads
    and worker processes end with it.
    """

    def __init__(
        self,
        rows: Sequence[Batch],
        source: Source,
        identity: Mapping[str, Any],
        *,
        num_threads: int,
        num_workers: int,
    ):
        self._rows, self._source, self._identity = rows, source, dict(identity)
        self._num_threads, self._num_workers = num_threads, num_workers
        self._next = 0
        # The iterator under way, if any, in a list, so that this can end it without this object:
        # at the end of a program too, while there still is what ending it needs.
        self._running: list[Any] = []
        weakref.finalize(self, _end, self._running)

    def __next__(self) -> Batch:
        if self._next == len(self._rows):
            self.close()
            raise StopIteration
        if not self._running:
            iterator = read_ahead(
                self._rows,
                self._next,
                num_threads=self._num_threads,
                num_workers=self._num_workers,
            )
            self._running.append(iterator)
        try:
            batch = next(self._running[0])
        except BaseException:
            # What is read ahead would go on behind the batch that failed.
            self.close()
            raise
        self._next += 1
        if self._num_workers:
            # Out of shared memory, of which containers have little, and which a kept batch holds.
            return {key: np.array(value) for key, value in batch.items()}
        return batch

    def close(self) -> None:
        """Ends threads and worker processes; the next batch, if one is wanted, starts new ones."""
        _end(self._running)

    @property
    def bad_examples(self) -> int | None:
        """How many different bad examples were skipped so far, in batches read ahead too.

        None with worker processes, each of which counts for itself.
        """
        if self._num_workers:
            return None
        return self._source.num_bad if isinstance(self._source, SkipBad) else 0

    def get_state(self) -> dict[str, Any]:
        """The next batch's number, and what it would be a number of."""
        return {"next_batch": self._next, **self._identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position that `get_state` gave, perhaps in another process.

        The numbers of threads and workers may have changed, and that of processes if the global
        batch size has not.

        Raises:
          ValueError: names what differs, if the state is from other data or other options.
        """
        expected = {"next_batch", *self._identity}
        if set(state) != expected:
            raise ValueError(f"a data state has the keys {sorted(expected)}, got {sorted(state)}")
        changed = [
            f"{key} was {state[key]!r} and is {value!r}"
            for key, value in self._identity.items()
            if state[key] != value
        ]
        if changed:
            raise ValueError(
                f"cannot resume the data exactly: {'; '.join(changed)}. Use the options of the "
                "run that was saved"
            )
        position = state["next_batch"]
        if type(position) is not int or not 0 <= position <= len(self._rows):
            raise ValueError(
                f"next_batch must be a number in 0 … {len(self._rows)}, the number of batches, got "
                f"{position!r}"
            )
        self.close()
        self._next = position


def _mirror(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    if rng.random() < 0.5:
        return {**example, "image": example["image"][:, ::-1]}
    return example


def _check_counts(
    source: Source, batch_size: int, seed: int, *, process_index: int, process_count: int
) -> None:
    if batch_size < 1 or process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(
            "batch_size and process_count must be at least 1 and process_index below "
            f"process_count, got {batch_size}, {process_count}, {process_index}"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"the seed must lie in 0 … 2³² - 1, got {seed}")
    if len(source) == 0:
        raise ValueError(f"{source!r} has no examples")
    if len(source) < batch_size * process_count:
        raise ValueError(
            f"{source!r} has {len(source)} examples, fewer than one batch of "
            f"{batch_size} x {process_count} processes; lower the batch size"
        )


def _check_reading(
    source: Source,
    num_epochs: int | None,
    *,
    num_threads: int,
    num_workers: int,
    on_bad_example: str,
) -> None:
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs must be at least 1, or None for no end, got {num_epochs}")
    if num_threads < 0 or num_workers < 0:
        raise ValueError(
            f"num_threads and num_workers must be at least 0, got {num_threads} and {num_workers}"
        )
    if on_bad_example not in ON_BAD_EXAMPLE:
        raise ValueError(f"on_bad_example must be one of {ON_BAD_EXAMPLE}, got {on_bad_example!r}")
    if num_workers:
        check_picklable(source)


def _check_content(
    source: Source, chosen: Sequence[str], *, flip: bool, num_classes: int | None
) -> None:
    if flip and not getattr(source, "flippable", True):
        raise ValueError(
            f"{source!r} cannot be flipped: what was computed from an image is not that of its "
            "mirror image; make a cache of data.cache.Mirrored(source), which has both, and leave "
            "flip out"
        )
    if flip and not _FLIPPABLE.issuperset(chosen):
        raise ValueError(
            f"flip mirrors only the image, which makes {sorted(set(chosen) - _FLIPPABLE)} wrong; "
            "choose keys=('image', 'label') or leave flip out"
        )
    if num_classes is not None and (num_classes < 1 or "label" not in chosen):
        raise ValueError(
            f"num_classes is at least 1 and for batches with a 'label', got {num_classes} for "
            f"{list(chosen)}"
        )


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    num_epochs: int | None = None,
    flip: bool = False,
    keys: Sequence[str] | None = None,
    num_classes: int | None = None,
    on_bad_example: str = "raise",
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
    num_workers: int = 0,
) -> Batches:
    """Shuffled batches without end, or for some epochs.

    The order of all examples is a function of the seed; epochs follow each other without a
    gap, an incomplete last batch is dropped. Row i of batch k of process p is example
    k·B·P + p·B + i of that order: the batches of all processes, one behind the other, are the
    batch of one process with the global batch size B·P.

    Every batch is checked: images as `transforms.check_images` says, labels if their number of
    classes is given.

    Args:
      source: random access to examples.
      batch_size: B, examples per batch of this process.
      seed: of order and flips, in 0 … 2³² - 1.
      shuffle: a new order in every epoch; without it the order of the source.
      num_epochs: None for no end.
      flip: mirror each image left-right with probability 1/2; for image and label only.
      keys: what a batch holds; None for everything numeric.
      num_classes: labels must lie in 0 … num_classes - 1; None does not check them.
      on_bad_example: "raise" stops at a picture that cannot be used, "skip" puts
        `bad_examples.SkipBad` with its limit around the source.
      process_index: p, which of the processes this is.
      process_count: P, the number of processes.
      num_threads: threads that read ahead, in every process that reads; 0 for none.
      num_workers: worker processes that read, for sources whose work holds Python's lock; 0
        reads in this process. A worker imports what the source needs, which takes seconds, and
        hands over batches in shared memory. A script that uses workers must be importable, as for
        every use of multiprocessing: its work belongs under `if __name__ == "__main__":`.

    Order and content depend neither on `num_threads` nor on `num_workers`.

    Returns:
      An iterator of dicts of numpy arrays [B, ...] with `get_state` and `set_state`.

    Raises:
      ValueError: if the source is empty or smaller than a batch, an option is out of range, what
        a batch holds cannot be flipped, or the source cannot be sent to workers. The iterator
        raises it for a batch that does not pass its checks, and `BadImageError` for a picture.
    """
    _check_counts(
        source, batch_size, seed, process_index=process_index, process_count=process_count
    )
    _check_reading(
        source,
        num_epochs,
        num_threads=num_threads,
        num_workers=num_workers,
        on_bad_example=on_bad_example,
    )
    source = SkipBad(source) if on_bad_example == "skip" else source
    chosen = check_keys(source[0], keys)
    _check_content(source, chosen, flip=flip, num_classes=num_classes)
    import grain

    order = grain.MapDataset.source(source)
    order = order.shuffle(seed=seed) if shuffle else order
    order = order.repeat(num_epochs)
    order = order.random_map(_mirror, seed=seed) if flip else order
    rows = _Rows(
        order,
        chosen,
        first=process_index * batch_size,
        size=batch_size,
        stride=batch_size * process_count,
        num_classes=num_classes,
    )
    identity = {
        "examples": len(source),
        "global_batch_size": batch_size * process_count,
        "seed": seed,
        "shuffle": shuffle,
        "flip": flip,
        "keys": list(chosen),
    }
    return Batches(rows, source, identity, num_threads=num_threads, num_workers=num_workers)
