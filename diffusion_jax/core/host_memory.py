"""Memory of the host that glibc keeps after it was freed."""

import ctypes
import functools
import sys

import jax.monitoring

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
# What compiles faster frees little.
MIN_COMPILE_SECONDS = 1.0


def trim() -> bool:
    """Has glibc give the free pages of its heap back to the system.

    What is in use stays where it is, and no setting changes.

    Returns:
      Whether there was anything to give back; False where the C library is not glibc.

    Source: malloc_trim(3) of the Linux manual.
    """
    if sys.platform != "linux":
        return False
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return give_back is not None and bool(give_back(0))


@functools.cache
def trim_after_compiling() -> None:
    """Has this process `trim` after every compilation that took a second or more, from now on.

    Compiling a large network frees hundreds of MB, which glibc otherwise keeps beside what the
    network then needs. `from_pretrained` and the command line ask for it, importing does not.

    Source: none; a convention of this library.
    """

    def after(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILE_EVENT and duration_secs >= MIN_COMPILE_SECONDS:
            trim()

    jax.monitoring.register_event_duration_secs_listener(after)
