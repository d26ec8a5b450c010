"""The notebooks run from beginning to end, as they are, with random weights."""

import runpy
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_says_what_to_change_for_real_weights(notebook, tmp_path, monkeypatch):
    text = notebook.read_text("utf-8")
    assert "format_name: percent" in text
    assert "# **With real weights** set `MODEL" in text
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    shown = []
    monkeypatch.setattr(plt, "show", lambda: (shown.append(plt.gcf()), plt.close("all")))
    runpy.run_path(str(notebook))
    assert len(shown) >= 2
    assert all(figure.axes for figure in shown)
