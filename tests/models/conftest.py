"""These tests compile much and compute little, so nothing is optimized in them."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def unoptimized():
    """Compiles quickly to slow code."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
