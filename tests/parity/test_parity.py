"""The parity runner: passes what agrees, and only that."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.parity import __main__ as runner
from tests.parity import samplers

pytestmark = pytest.mark.slow

CASES = Path(__file__).parent / "cases" / "samplers"
ORIGINALS = CASES.parent / "originals"
DIFFUSION = CASES.parent / "diffusion"


def manifest(folder=CASES):
    return json.loads((folder / "manifest.json").read_text())


def copy_of(tmp_path, case_id):
    """A writable folder with one case."""
    content = manifest()
    [case] = [case for case in content["cases"] if case["id"] == case_id]
    for key in ("inputs_file", "outputs_file"):
        (tmp_path / case[key]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(CASES / case[key], tmp_path / case[key])
    return case


def write(tmp_path, *cases):
    (tmp_path / "manifest.json").write_text(json.dumps({"cases": cases}))


def last_line(capsys):
    return capsys.readouterr().out.splitlines()[-1]


def test_recorded_trajectories_are_reproduced(capsys):
    """One case of every kind of sampler: states, predictions, times and tables."""
    assert runner.main([str(CASES)]) == 0
    assert last_line(capsys) == f"{len(manifest()['cases'])} passed, 0 failed, 0 not implemented"


def test_only_chooses_by_glob(capsys):
    assert runner.main([str(CASES), "--only", "*beta_tables*", "*dpmsolver_o2"]) == 0
    assert last_line(capsys) == "2 passed, 0 failed, 0 not implemented"
    assert runner.main([str(CASES), "--only", "nothing*"]) == 2
    assert runner.main([str(CASES / "nowhere")]) == 2


TABLE = "D_beta_tables/squaredcos_cap_v2_zsnr"


@pytest.mark.parametrize("change", ["value", "nan", "shape", "extra", "missing"])
def test_a_corrupted_output_fails(change, tmp_path, capsys):
    case = copy_of(tmp_path, TABLE)
    path = tmp_path / case["outputs_file"]
    outputs = dict(np.load(path))
    if change == "value":
        outputs["betas"][500] *= 1.01
    elif change == "nan":
        outputs["betas"][500] = np.nan
    elif change == "shape":
        outputs["betas"] = outputs["betas"][:-1]
    elif change == "extra":
        outputs["gammas"] = np.ones(3)
    elif change == "missing":
        outputs = {}
    np.savez(path, **outputs)
    write(tmp_path, case)
    assert runner.main([str(tmp_path)]) == 1
    assert last_line(capsys) == "0 passed, 1 failed, 0 not implemented"


def test_our_nan_fails_where_a_number_was_recorded():
    row = runner.compare(np.asarray([1.0, np.nan]), np.asarray([1.0, 2.0]), 1.0, 1.0)
    assert row.status == runner.FAILED
    assert runner.compare(np.asarray([np.inf]), np.asarray([1e30]), 1.0, 1.0).status == "FAILED"
    assert runner.compare(np.asarray([5.0]), np.asarray([np.inf]), 1.0, 1.0).status == "FAILED"


def test_tolerance_is_absolute_plus_relative():
    expected = np.asarray([0.0, 10.0])
    assert runner.compare(np.asarray([0.09, 11.0]), expected, 0.1, 0.1).status == "passed"
    assert runner.compare(np.asarray([0.11, 10.0]), expected, 0.1, 0.1).status == "FAILED"
    assert runner.compare(np.asarray([0.0, 11.2]), expected, 0.1, 0.1).status == "FAILED"


def test_unknown_options_are_not_implemented_and_errors_fail(tmp_path, capsys):
    case = copy_of(tmp_path, TABLE)
    unknown = {**case, "id": "unknown", "init_kwargs": {**case["init_kwargs"], "new_option": 1}}
    broken = {**case, "id": "broken", "inputs_file": "nowhere.npz"}
    other = {**case, "id": "other", "class": "diffusers.NewScheduler", "call": "trajectory"}
    write(tmp_path, unknown, broken, other, case)
    assert runner.main([str(tmp_path)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[:4]] == ["unknown", "broken", "other", TABLE]
    assert "FileNotFoundError" in out[1]
    assert out[-1] == "1 passed, 1 failed, 2 not implemented"


def test_cases_are_told_apart_by_their_fields(tmp_path, capsys):
    """The same case under another name, with another beta schedule, is still understood."""
    case = {**copy_of(tmp_path, TABLE), "id": "renamed"}
    assert samplers.run(case, tmp_path) is not None
    linear = {**case, "init_kwargs": {**case["init_kwargs"], "beta_schedule": "linear"}}
    write(tmp_path, linear)
    assert runner.main([str(tmp_path)]) == 1
    assert "FAILED betas; alphas_cumprod" in capsys.readouterr().out


def test_the_command_line_ends_with_a_status():
    command = [sys.executable, "-m", "tests.parity", str(CASES), "--only", "*beta_tables*"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1 passed, 0 failed, 0 not implemented"


def test_recorded_original_networks_are_reproduced(capsys):
    """Released names, labels and a low-resolution image; for the classifier the gradient too."""
    assert runner.main([str(ORIGINALS)]) == 0
    assert last_line(capsys) == "2 passed, 0 failed, 0 not implemented"


def test_original_networks_are_told_apart_by_their_fields(tmp_path, capsys):
    """The other order of attention fails, and what our networks do not have is not run."""
    for name in ("ckpt", "data"):
        (tmp_path / name).symlink_to(ORIGINALS / name)
    unet, classifier = manifest(ORIGINALS)["cases"]
    swapped = {**unet, "config": {**unet["config"], "use_new_attention_order": True}}
    volume = {**unet, "config": {**unet["config"], "dims": 3}}
    pool = {**classifier, "config": {**classifier["config"], "pool": "max"}}
    other = {**unet, "class": "guided_diffusion.unet.OtherModel"}
    write(tmp_path, swapped, volume, pool, other)
    assert runner.main([str(tmp_path)]) == 1
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].endswith("FAILED out")
    assert rows[-1] == "0 passed, 1 failed, 3 not implemented"


def test_recorded_terms_of_gaussian_diffusion_are_reproduced(capsys):
    """Tables, moments, steps, loops, losses and bits per dimension; the predicted mean too."""
    assert runner.main([str(DIFFUSION)]) == 0
    assert last_line(capsys) == "3 passed, 0 failed, 0 not implemented"


def test_gaussian_diffusion_is_told_apart_by_its_fields(tmp_path, capsys):
    """Another type of loss fails, another form of it is not run."""
    (tmp_path / "data").symlink_to(DIFFUSION / "data")
    _, ranged, functions = manifest(DIFFUSION)["cases"]

    def changed(**options):
        return {**ranged, "init_kwargs": {**ranged["init_kwargs"], **options}}

    unknown = changed(loss_type="L1"), changed(noise_schedule="sqrt"), changed(new_option=1)
    other = {**functions, "outputs": {"sqrt_of_2": {}}}
    write(tmp_path, changed(loss_type="MSE"), *unknown, other)
    assert runner.main([str(tmp_path)]) == 1
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].endswith("FAILED training_losses.vb; training_losses.loss")
    assert rows[-1] == "0 passed, 1 failed, 4 not implemented"
