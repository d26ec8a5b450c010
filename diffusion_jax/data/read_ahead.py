"""Items of a sequence in order, read ahead by threads and worker processes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _start_worker(index: int, count: int) -> None:
    """Runs first in a worker."""
    del index, count
    # Ctrl-C and a scheduler's SIGTERM reach the whole group of processes, but what they mean is
    # for the main process to say, which may want batches until its step is done.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # A main process that was killed cannot stop its workers.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def check_picklable(source: Any) -> None:
    """Checks that worker processes can have a copy of a source.

    Raises:
      ValueError: if it cannot be pickled.
    """
    import cloudpickle

    try:
        with open(os.devnull, "wb") as nowhere:
            cloudpickle.dump(source, nowhere)
    # What an object's own way of pickling raises is up to it.
    except Exception as error:
        raise ValueError(
            f"{source!r} cannot be sent to worker processes ({type(error).__name__}: {error}); "
            "open files and locks when an example is read, or use num_workers=0, where threads "
            "share the source"
        ) from error


def read_ahead(items: Sequence[Any], start: int, *, num_threads: int, num_workers: int) -> Any:
    """An iterator over items[start], items[start + 1], …, in this order however they are read.

    Args:
      items: random access, picklable if there are workers.
      start: index of the first item, at most the number of items.
      num_threads: threads that read ahead, in every process that reads; 0 for none.
      num_workers: processes that read; 0 reads in this one. Worker w of W reads the items
        start + w, start + w + W, ….

    Returns:
      An iterator with a method `close` that ends threads and workers. What an item raises is
      raised in its turn; a worker that was killed raises a RuntimeError with its exit code.
    """
    import grain

    dataset = grain.MapDataset.source(items)[start:].to_iter_dataset(
        grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    )
    if num_workers:
        from absl import flags

        # Grain reads flags of absl, which only a program of absl parses, and no notebook.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=num_workers)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
    return iter(dataset)
