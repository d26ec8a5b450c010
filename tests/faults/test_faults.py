"""The short form of `make faults`, and its table in the docs."""

from pathlib import Path

import pytest

from tests.faults.__main__ import table
from tests.faults.cases import FAULTS
from tests.faults.lab import ROOT, Lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(Path(tmp_path_factory.mktemp("lab")))


@pytest.mark.slow
@pytest.mark.parametrize("one", [f for f in FAULTS if f.quick], ids=lambda f: f.name)
def test_a_run_survives(lab, one):
    one.run(lab)


def test_the_docs_hold_the_table():
    assert table() in (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
