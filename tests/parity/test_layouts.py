"""Cases that need what is not installed: refused, not run, and neither passed nor failed."""

import json

import jax
import numpy as np
import pytest

from diffusion_jax.io.convert import MissingTorchError
from diffusion_jax.io.safetensors import WeightsFile, write_safetensors
from diffusion_jax.pretrained import save_pretrained
from tests.parity import __main__ as runner
from tests.parity import layouts
from tests.pretrained.toys import add_toys, toy

CASE = {"id": "pickled", "checkpoint": "toy"}


@pytest.fixture
def pickled(tmp_path, monkeypatch):
    """A folder of cases whose one checkpoint has its tensors in a .bin."""
    add_toys(monkeypatch)
    save_pretrained(toy(), tmp_path / "toy")
    old = tmp_path / "toy" / "diffusion_pytorch_model.safetensors"
    old.rename(old.with_suffix(".bin"))
    (tmp_path / "manifest.json").write_text(json.dumps({"cases": [CASE]}))
    return tmp_path


def test_a_pickled_case_is_not_run_without_torch(pickled, monkeypatch, capsys):
    def without(files, out):
        raise MissingTorchError("no torch")

    monkeypatch.setattr(layouts, "convert_files", without)
    assert runner.run_folder(pickled, ["*"], [layouts.load]) == {
        "passed": 0,
        "FAILED": 0,
        "not implemented": 0,
        "not run": 1,
    }
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("not run its pickle was refused; converting it needs torch")
    assert lines[1] == "0 passed, 0 failed, 0 not implemented, 1 not run"


def test_a_pickled_case_is_converted_where_torch_is(pickled, monkeypatch):
    """The conversion is replaced by one that copies: what it writes is what is loaded."""

    def copying(files, out):
        (file,) = files
        tensors = WeightsFile(file)
        write_safetensors(tensors, out / f"{file.stem}.safetensors")

    monkeypatch.setattr(layouts, "convert_files", copying)
    loaded = layouts.load(CASE, pickled)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, toy().params)


def test_a_pickle_that_is_not_refused_fails(pickled, monkeypatch):
    monkeypatch.setattr(layouts, "from_pretrained", lambda *args, **kwargs: toy())
    with pytest.raises(AssertionError, match="was not refused"):
        layouts.load(CASE, pickled)
