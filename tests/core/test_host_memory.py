"""Freed memory goes back to the system, and after compiling without being asked."""

import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax import cli
from diffusion_jax.core import host_memory
from diffusion_jax.core.host_memory import trim, trim_after_compiling
from diffusion_jax.pretrained import folder, from_config, from_pretrained, save_pretrained


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return 4096 * pages


def test_what_was_freed_is_given_back():
    if platform.libc_ver()[0] != "glibc":
        assert not trim()
        return
    blocks = [bytes(4000) for _ in range(25_000)]
    # Those that stay keep the heap from shrinking by itself.
    blocks = blocks[::500]
    before = resident()
    assert trim()
    assert before - resident() > 50e6
    assert len(blocks) == 50


@pytest.fixture
def trims(monkeypatch):
    """The calls of what takes the place of `trim`, after however short a compilation."""
    calls = []
    monkeypatch.setattr(host_memory, "trim", lambda: calls.append(1))
    monkeypatch.setattr(host_memory, "MIN_COMPILE_SECONDS", 0.0)
    return calls


def test_every_compilation_is_followed_by_one_trim(trims, monkeypatch):
    trim_after_compiling()
    trim_after_compiling()
    x = jnp.ones(3)
    step = jax.jit(lambda x: jnp.sin(x) * 1.2345)
    trims.clear()
    step(x)
    assert trims == [1]
    step(x)
    assert trims == [1]
    monkeypatch.setattr(host_memory, "MIN_COMPILE_SECONDS", 1e6)
    jax.jit(lambda x: jnp.cos(x) * 5.4321)(x)
    assert trims == [1]


@pytest.mark.parametrize("entry", ["from_pretrained", "command line"])
def test_loading_and_the_command_line_ask_for_it(entry, tmp_path, monkeypatch):
    asked = []
    for module in (folder, cli):
        monkeypatch.setattr(module, "trim_after_compiling", lambda: asked.append(1))
    save_pretrained(from_config({"_class_name": "DDIMScheduler"}), tmp_path)
    assert asked == []
    if entry == "from_pretrained":
        from_pretrained(tmp_path)
    else:
        assert cli.main(["train", "nothing-of-this-name"]) == 2
    assert asked == [1]
