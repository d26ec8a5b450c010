"""The ground all tests stand on: two CPU devices, no implicit broadcasting, optional float64."""

import gc
import os

_TWO_DEVICES = "--xla_force_host_platform_device_count=2"

# XLA reads these when jax starts, hence before the import of jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_TWO_DEVICES}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests that count compilations must see every one of them, whatever the user has configured.
jax.config.update("jax_enable_compilation_cache", False)
# The tests compile much and compute little: quick compilation to slow code is the better half.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_a_module_only():
    """Lets go of what a module compiled.

    Every program maps some pages of its own; Linux allows a process 65,530 mappings, and XLA aborts
    at the first one more.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def x64():
    """Float64 arrays within one test."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
