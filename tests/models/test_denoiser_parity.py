"""Our UNet loads diffusers' weights and computes diffusers' numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.parity import denoisers

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "parity" / "cases" / "denoisers"
CASES = json.loads((FOLDER / "manifest.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_outputs_are_those_of_the_peer(case):
    ours = denoisers.run(case, FOLDER)
    with np.load(FOLDER / case["outputs_file"]) as expected:
        assert ours.keys() == case["outputs"].keys()
        for name, tolerance in case["outputs"].items():
            np.testing.assert_allclose(
                ours[name], expected[name], atol=tolerance["atol"], rtol=tolerance["rtol"]
            )


@pytest.mark.parametrize(
    "change", [{"class": "diffusers.UNet3DModel"}, {"checkpoint_format": "original-ldm"}]
)
def test_a_form_that_is_not_implemented_is_none(change):
    assert denoisers.run({**CASES[0], **change}, FOLDER) is None
