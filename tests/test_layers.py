"""Who may import whom: the layers of the package, read from its syntax trees."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "diffusion_jax"

BUILDING_BLOCKS = ("samplers", "guidance", "losses", "models", "training", "io", "data", "metrics")
# Top-level names of the package that assemble the others; these alone may import everything.
ASSEMBLY = (
    "__init__", "__main__", "cli", "commands", "configuration", "experiment", "features",
    "pretrained",
)  # fmt: skip

# Layer -> the other layers it may import. Every layer may import itself.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "core": (),
    **dict.fromkeys(BUILDING_BLOCKS, ("core",)),
    "conditioners": ("core", "models"),
    "systems": ("core", "samplers", "guidance", "losses", "models", "conditioners"),
}
CORE_LIBRARIES = ("jax", "numpy", "flax.struct", "flax.traverse_util", "chex", "scipy.special")
FORBIDDEN = ("torch", "torchvision", "tensorflow", "keras")
# The one converter of pickled checkpoints, and its test, need torch to read them.
MAY_IMPORT_TORCH = ("diffusion_jax/io/convert.py", "tests/io/test_convert.py")


class Import(NamedTuple):
    line: int
    names: tuple[str, ...]  # dotted candidates: `from a import b` may mean a.b or a
    relative: bool = False

    @property
    def text(self) -> str:
        return self.names[0]


def _absolute(node: ast.ImportFrom, path: str) -> str:
    if not node.level:
        return node.module or ""
    folder = path.removesuffix(".py").split("/")[: -node.level]
    return ".".join([*folder, *([node.module] if node.module else [])])


def _dynamic(node: ast.Call) -> str | None:
    function = node.func.attr if isinstance(node.func, ast.Attribute) else None
    function = node.func.id if isinstance(node.func, ast.Name) else function
    if function not in ("import_module", "__import__") or not node.args:
        return None
    name = node.args[0]
    return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else None


def imports(source: str, path: str) -> Iterator[Import]:
    """Every import of a file, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, (alias.name,))
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(node, path)
            for alias in node.names:
                yield Import(node.lineno, (f"{module}.{alias.name}", module), node.level > 0)
        elif isinstance(node, ast.Call) and (name := _dynamic(node)):
            yield Import(node.lineno, (name,))


def _within(name: str, parents: tuple[str, ...]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def _layer(path: str) -> str:
    parts = Path(path).with_suffix("").parts
    return parts[1] if parts[0] == PACKAGE else parts[0]


def _core_library_problem(imported: Import) -> str | None:
    top = imported.text.split(".")[0]
    if top in sys.stdlib_module_names or top == PACKAGE:
        return None
    if any(_within(name, CORE_LIBRARIES) for name in imported.names):
        return None
    return f"core may import {', '.join(CORE_LIBRARIES)} and the standard library only"


def _layer_problem(layer: str, imported: Import) -> str | None:
    if imported.text.split(".")[0] == "experiments":
        return (
            "experiments are reached as diffusion_jax.experiments, or relatively from each other, "
            "because an installed package has no other name for them"
        )
    if imported.text.split(".")[0] != PACKAGE:
        return None
    target = (*imported.text.split("."), "__init__")[1]
    if layer in (*ASSEMBLY, "experiments") or target == layer:
        return None
    if layer not in MAY_IMPORT:
        return f"{layer} is not in the table of layers: give it a row in tests/test_layers.py"
    if target not in MAY_IMPORT[layer]:
        allowed = ", ".join((layer, *MAY_IMPORT[layer]))
        return f"{layer} may import only these of the package: {allowed}"
    return None


def problems(source: str, path: str) -> list[str]:
    """What is wrong with the imports of one file; `path` is relative to the repository."""
    layer, found = _layer(path), []
    for imported in imports(source, path):
        reasons = []
        if _within(imported.text, FORBIDDEN) and path not in MAY_IMPORT_TORCH:
            reasons.append("torch and tensorflow are never imported")
        if imported.relative and layer != "experiments":
            reasons.append("imports are absolute")
        elif not imported.relative and layer != "tests":
            reasons.append(_layer_problem(layer, imported))
        if layer == "core":
            reasons.append(_core_library_problem(imported))
        found += [f"{path}:{imported.line}: {imported.text}: {r}" for r in reasons if r]
    return found


def _files() -> list[Path]:
    folders = (PACKAGE, "experiments", "tests")
    # diffusion_jax/experiments is a link to a folder that is in the list already.
    files = {path.resolve() for name in folders for path in (ROOT / name).rglob("*.py")}
    return sorted(files)


def test_every_import_respects_the_layers():
    files = _files()
    assert any(path.parent.name == "core" for path in files), f"no package found below {ROOT}"
    found = []
    for path in files:
        found += problems(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    assert not found, "imports that break the layers:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "path, source",
    [
        ("diffusion_jax/core/a.py", "import flax.linen as nn"),
        ("diffusion_jax/core/a.py", "from flax import linen"),
        ("diffusion_jax/core/a.py", "import optax"),
        ("diffusion_jax/core/a.py", "from diffusion_jax.samplers.base import sample"),
        ("diffusion_jax/core/a.py", "from diffusion_jax import samplers"),
        ("diffusion_jax/core/a.py", "import diffusion_jax"),
        ("diffusion_jax/core/a.py", "from diffusion_jax import sample"),
        ("diffusion_jax/core/a.py", "from .types import Array"),
        ("diffusion_jax/samplers/a.py", "def f():\n  from diffusion_jax.models.unet import UNet"),
        ("diffusion_jax/guidance/a.py", "from diffusion_jax.samplers import SAMPLERS"),
        ("diffusion_jax/training/a.py", "from diffusion_jax.experiment import Experiment"),
        ("diffusion_jax/io/a.py", "from diffusion_jax.cli import main"),
        ("diffusion_jax/io/tables/a.py", "from diffusion_jax.models.unet import UNet"),
        ("diffusion_jax/io/tables/a.py", "from ..mapping import Row"),
        ("diffusion_jax/conditioners/a.py", "import diffusion_jax.systems.ddpm"),
        ("diffusion_jax/systems/a.py", "from diffusion_jax.data.digits import digits"),
        ("diffusion_jax/systems/a.py", "from diffusion_jax.experiments import ddpm"),
        ("diffusion_jax/cli.py", "from experiments import ddpm"),
        ("diffusion_jax/pretrained/a.py", "import torch.nn"),
        ("diffusion_jax/metrics/a.py", "import tensorflow as tf"),
        ("diffusion_jax/metrics/a.py", "tf = importlib.import_module('tensorflow')"),
        ("diffusion_jax/metrics/a.py", "torch = __import__('torch')"),
        ("diffusion_jax/surprise/a.py", "from diffusion_jax.core import types"),
        ("experiments/a.py", "from experiments import ddpm"),
        ("experiments/a.py", "import torch"),
        ("tests/core/test_a.py", "import torch"),
        ("tests/core/test_a.py", "from . import analytic"),
    ],
)
def test_a_forbidden_import_is_found(path, source):
    assert len(problems(source, path)) == 1, problems(source, path)


@pytest.mark.parametrize(
    "path, source",
    [
        ("diffusion_jax/core/a.py", "import functools, jax.numpy as jnp, numpy as np, chex"),
        ("diffusion_jax/core/a.py", "from flax import struct"),
        ("diffusion_jax/core/a.py", "from flax.traverse_util import flatten_dict"),
        ("diffusion_jax/core/a.py", "from diffusion_jax.core.types import Array"),
        ("diffusion_jax/samplers/a.py", "from diffusion_jax.core import types"),
        ("diffusion_jax/samplers/a.py", "from diffusion_jax.samplers.base import sample"),
        ("diffusion_jax/models/a.py", "import torchlike, flax.linen as nn"),
        ("diffusion_jax/conditioners/a.py", "from diffusion_jax.models import clip"),
        ("diffusion_jax/systems/a.py", "from diffusion_jax.conditioners import base"),
        ("diffusion_jax/io/convert.py", "import torch"),
        ("diffusion_jax/cli.py", "from diffusion_jax.experiments import ddpm"),
        ("diffusion_jax/pretrained/a.py", "from diffusion_jax.io import safetensors"),
        ("experiments/a.py", "from . import ddpm\nfrom .ddpm import CONFIG"),
        ("experiments/a.py", "from diffusion_jax import cli"),
        ("tests/core/test_a.py", "from tests import analytic"),
    ],
)
def test_an_allowed_import_is_not_found(path, source):
    assert problems(source, path) == []
