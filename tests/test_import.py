"""What `import diffusion_jax` costs, and the ground that conftest.py promises the tests."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).resolve().parents[1]
# Libraries that only some users need, or that take a second and hundreds of megabytes.
LATE = (
    "torch", "tensorflow", "transformers", "tensorflow_datasets", "orbax", "matplotlib", "grain",
    "PIL", "sklearn",
)  # fmt: skip


def _loaded_by(statement: str) -> list[str]:
    program = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_loads_no_heavy_library():
    loaded = _loaded_by("import diffusion_jax")
    assert "diffusion_jax" in loaded
    assert [name for name in LATE if name in loaded] == []


def test_the_probe_sees_what_an_import_loads():
    assert "wave" in _loaded_by("import wave") and "wave" not in _loaded_by("import json")


def test_tests_run_on_two_devices_and_refuse_implicit_broadcasting():
    assert jax.local_device_count("cpu") >= 2
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)


def test_x64_is_on_within_the_test_that_asks_for_it(x64):
    assert jnp.zeros(1).dtype == jnp.float64


def test_x64_is_off_elsewhere():
    assert jnp.zeros(1).dtype == jnp.float32
