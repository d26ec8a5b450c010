"""The wheel: complete, correctly labelled, and usable in an empty directory."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
# Building writes beside the sources, hence a copy; only what the build reads is in it.
INPUTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "diffusion_jax", "experiments")


class Installation(NamedTuple):
    source: Path
    wheel: Path
    target: Path


def _run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _isolation() -> list[str]:
    """An environment with a recent setuptools builds without downloading one."""
    try:
        recent = int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        recent = False
    return ["--no-build-isolation"] if recent else []


@pytest.fixture(scope="module")
def installation(tmp_path_factory) -> Installation:
    """The package as users get it: built from a copy of the checkout, installed elsewhere."""
    source, target, wheels = (tmp_path_factory.mktemp(name) for name in ("source", "lib", "wheel"))
    for name in INPUTS:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip")
    _run(*pip, "wheel", "-q", "--no-deps", *_isolation(), "-w", wheels, source, cwd=source)
    (wheel,) = wheels.glob("*.whl")
    _run(*pip, "install", "-q", "--no-deps", "--target", target, wheel, cwd=wheels)
    return Installation(source, wheel, target)


def test_the_wheel_holds_every_module_and_nothing_else(installation):
    expected = {"diffusion_jax/py.typed"}
    for path in (ROOT / "experiments").rglob("*.py"):
        expected.add("diffusion_jax/" + path.relative_to(ROOT).as_posix())
    for path in (ROOT / "diffusion_jax").rglob("*.py"):
        expected.add(path.relative_to(ROOT).as_posix())
    names = set(zipfile.ZipFile(installation.wheel).namelist())
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == expected, "a folder without __init__.py is not packed"
    assert "diffusion_jax-0.1.0.dist-info/licenses/LICENSE" in names


def test_the_wheel_says_what_it_is_and_needs(installation):
    (distribution,) = importlib.metadata.distributions(path=[str(installation.target)])
    about = distribution.metadata
    assert (about["Name"], about["Version"]) == ("diffusion_jax", "0.1.0")
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.11"
    needed = {line for line in distribution.requires or [] if "extra ==" not in line}
    for name in ("jax", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "chex"):
        assert any(line.startswith(name) and "<" in line for line in needed), (name, needed)
    assert not any(line.startswith(("torch", "tensorflow>", "tensorflow<")) for line in needed)
    commands = {point.name: point.value for point in distribution.entry_points}
    assert commands == {"diffusion-jax": "diffusion_jax.cli:main"}


def test_an_installed_package_finds_itself_in_an_empty_directory(installation, tmp_path):
    program = (
        "import diffusion_jax, diffusion_jax.experiments as experiments;"
        "print(diffusion_jax.__file__); print(experiments.__file__)"
    )
    places = _run(sys.executable, "-c", program, cwd=tmp_path, path=installation.target)
    package = installation.target / "diffusion_jax"
    assert places.split() == [
        str(package / "__init__.py"),
        str(package / "experiments/__init__.py"),
    ]


def test_a_checkout_finds_its_experiments_under_both_names(installation):
    program = (
        "import diffusion_jax.experiments as inside, experiments as beside;"
        "print(inside.__file__); print(beside.__file__)"
    )
    places = _run(sys.executable, "-c", program, cwd=installation.source).split()
    assert places[0] == str(installation.source / "diffusion_jax/experiments/__init__.py")
    assert places[1] == str(installation.source / "experiments/__init__.py")


def test_the_command_explains_itself_in_an_empty_directory(installation, tmp_path):
    program = "import sys; from diffusion_jax.cli import main; sys.argv[1:] = ['--help']; main()"
    text = _run(sys.executable, "-c", program, cwd=tmp_path, path=installation.target)
    assert "sample" in text and "train" in text
