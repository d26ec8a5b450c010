"""Memory: the error when a device has too little for a compiled function, with the numbers."""

from collections.abc import Callable
from typing import Any

import jax
from jax.errors import JaxRuntimeError


class OutOfMemoryError(MemoryError):
    """A device has not the memory that a compiled function needs."""


def is_out_of_memory(error: JaxRuntimeError) -> bool:
    """Whether that is what an error of jax says."""
    return str(error).startswith("RESOURCE_EXHAUSTED")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def _needs(jitted: Any, args: Any) -> str:
    # What was compiled already is not compiled again, and donated arrays still have shapes.
    sizes = jitted.lower(*args).compile().memory_analysis()
    if sizes is None:
        return ""
    new = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return (
        f" On each device it takes {_gigabytes(sizes.argument_size_in_bytes)} for its arguments, "
        f"{_gigabytes(sizes.temp_size_in_bytes)} for intermediate values and {_gigabytes(new)} for "
        "new results."
    )


def within_memory(jitted: Any, *, what: str, advice: str) -> Callable[..., Any]:
    """A jitted function whose error, where a device has too little memory, says what it takes.

    The first call waits for its result, since jax may notice only then.

    Args:
      jitted: from `jax.jit`; it may donate arguments.
      what: the name of the function in the error.
      advice: what to do against it.

    Returns:
      callable with the arguments of `jitted`. It raises OutOfMemoryError with the sizes from
      `memory_analysis` of the compiled function.
    """
    called = False

    def run(*args: Any) -> Any:
        nonlocal called
        try:
            results = jitted(*args)
            if not called:
                jax.block_until_ready(results)
                called = True
        except JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
            has = f" A device has {_gigabytes(limit)}." if limit else ""
            raise OutOfMemoryError(
                f"{what} does not fit into memory.{_needs(jitted, args)}{has} {advice}"
            ) from error
        return results

    return run
