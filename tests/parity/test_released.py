"""Released networks, tokenizers and tables, and pipelines, give their peers' recorded outputs."""

import json
from pathlib import Path

import pytest

from tests.parity.__main__ import HANDLERS, PASSED, run_case

pytestmark = pytest.mark.slow

FOLDERS = [Path(__file__).parent / "cases" / name for name in ("released", "pipelines")]
CASES = [
    pytest.param(case, folder, id=case["id"])
    for folder in FOLDERS
    for case in json.loads((folder / "manifest.json").read_text())["cases"]
]


@pytest.mark.parametrize("case, folder", CASES)
def test_outputs_are_those_of_the_peer(case, folder):
    row = run_case(case, folder, HANDLERS)
    assert row.status == PASSED, row.message
