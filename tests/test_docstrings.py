"""What every public thing must say about itself: purpose, source and shapes."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("diffusion_jax", "experiments", "tests")
NEED_SOURCE = ("core", "samplers", "guidance", "losses")
# Records with helper methods; other records are recognised by having no method at all.
RECORDS = ("diffusion_jax/core/condition.py: Condition",)
RECORD_BASES = ("Protocol", "NamedTuple", "TypedDict", "Enum")

SOURCE = re.compile(r"^\s*Source: \S", re.MULTILINE)
SHAPE = re.compile(r"\[(\d*[A-Z]\w*|\.\.\.|…)(,[^\[\]]*)?\]")

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _public_definitions(tree: ast.Module) -> Iterator[Definition]:
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node


def _name(node: ast.expr) -> str:
    node = node.value if isinstance(node, ast.Subscript) else node
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _is_record(node: Definition, path: str) -> bool:
    if not isinstance(node, ast.ClassDef):
        return False
    bases = [_name(base) for base in node.bases]
    if any(base in RECORD_BASES or base.endswith(("Error", "Exception")) for base in bases):
        return True
    has_method = any(isinstance(item, ast.FunctionDef) for item in node.body)
    is_dataclass = any(_name(item) == "dataclass" for item in node.decorator_list)
    return (is_dataclass and not has_method) or f"{path}: {node.name}" in RECORDS


def _module_problems(tree: ast.Module, path: str) -> Iterator[str]:
    if not ast.get_docstring(tree):
        yield f"{path}:1: the file does not say in its first line what it is for"


def _source_problems(tree: ast.Module, path: str) -> Iterator[str]:
    for node in _public_definitions(tree):
        docstring = ast.get_docstring(node)
        if not docstring:
            yield f"{path}:{node.lineno}: {node.name} has no docstring"
        elif not _is_record(node, path) and not SOURCE.search(docstring):
            yield (
                f"{path}:{node.lineno}: {node.name} names no origin; end its docstring with "
                "'Source: authors year (arXiv:id), eq. n.' or 'Source: none; <what it is>.'"
            )


def _shape_problems(tree: ast.Module, path: str) -> Iterator[str]:
    for node in _public_definitions(tree):
        for method in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(method, ast.FunctionDef) and method.name == "__call__":
                if not SHAPE.search(ast.get_docstring(method) or ""):
                    yield (
                        f"{path}:{method.lineno}: the docstring of {node.name}.__call__ states no "
                        "shapes such as [B, H, W, C]"
                    )


def problems(source: str, path: str) -> list[str]:
    """What one file leaves unsaid; `path` is relative to the repository."""
    tree, parts = ast.parse(source), path.split("/")
    if not tree.body and parts[0] == "tests":
        return []
    found = list(_module_problems(tree, path))
    if parts[0] == "diffusion_jax" and parts[1] in NEED_SOURCE:
        found += _source_problems(tree, path)
    if parts[0] == "diffusion_jax" and parts[1] == "models":
        found += _shape_problems(tree, path)
    return found


def test_every_file_says_what_it_must():
    files = sorted({path.resolve() for name in FOLDERS for path in (ROOT / name).rglob("*.py")})
    assert any(path.parent.name == "core" for path in files), f"no package found below {ROOT}"
    found = []
    for path in files:
        found += problems(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    assert not found, "docstrings that leave something out:\n" + "\n".join(found)


SILENT = 'def f():\n  """Adds."""'
SOURCED = 'def f():\n  """Adds.\n\n  Source: Ho et al. 2020 (arXiv:2006.11239), eq. 4.\n  """'
MODULE = 'class Net(nn.Module):\n  def __call__(self, x):\n    """{}"""'


@pytest.mark.parametrize(
    "path, body",
    [
        ("diffusion_jax/core/a.py", "def f(): ..."),
        ("diffusion_jax/core/a.py", SILENT),
        ("diffusion_jax/losses/a.py", 'def f():\n  """Adds.\n\n  Source:\n  """'),
        ("diffusion_jax/samplers/a.py", 'class Euler:\n  """Steps."""\n  def step(self): ...'),
        ("diffusion_jax/core/a.py", "class Level(NamedTuple):\n  t: int"),
        ("diffusion_jax/guidance/a.py", "class G(Protocol):\n  def __call__(self): ..."),
        ("diffusion_jax/models/a.py", MODULE.format("Applies the network.")),
        ("diffusion_jax/models/a.py", MODULE.format("Applies [see the paper].")),
        ("diffusion_jax/models/a.py", "class Net(nn.Module):\n  def __call__(self, x): ..."),
    ],
)
def test_an_omission_is_found(path, body):
    assert len(problems(f'"""A file."""\n{body}', path)) == 1


@pytest.mark.parametrize(
    "path, body",
    [
        ("diffusion_jax/core/a.py", SOURCED),
        ("diffusion_jax/core/a.py", "def _f(): ..."),
        ("diffusion_jax/io/a.py", SILENT),
        ("diffusion_jax/core/a.py", 'class Level(NamedTuple):\n  """A point."""\n  t: int'),
        ("diffusion_jax/samplers/a.py", '@struct.dataclass\nclass S:\n  """State."""\n  x: int'),
        ("diffusion_jax/samplers/a.py", 'class P(Protocol[T]):\n  """P."""\n  def f(self): ...'),
        ("diffusion_jax/models/a.py", MODULE.format("Maps x [B, H, W, C] to [B, H, W, 3].")),
        ("diffusion_jax/models/a.py", MODULE.format("Maps [..., C] to a sum.")),
        ("diffusion_jax/models/a.py", "class _Net(nn.Module):\n  def __call__(self, x): ..."),
    ],
)
def test_what_is_complete_passes(path, body):
    assert problems(f'"""A file."""\n{body}', path) == []


def test_a_file_without_a_purpose_is_found():
    assert len(problems("x = 1", "diffusion_jax/io/a.py")) == 1
    assert len(problems("", "diffusion_jax/io/__init__.py")) == 1
    assert problems("", "tests/parity/__init__.py") == []
