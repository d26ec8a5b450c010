"""Released classes of network, tokenizers and tables give their peers' recorded outputs."""

import json
from pathlib import Path

import pytest

from tests.parity.__main__ import HANDLERS, PASSED, run_case

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent / "cases" / "released"
CASES = json.loads((FOLDER / "manifest.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_outputs_are_those_of_the_peer(case):
    row = run_case(case, FOLDER, HANDLERS)
    assert row.status == PASSED, row.message
