"""The benchmark on trained runs: parameterizations and weights as axes, honest network calls."""

from dataclasses import replace

import pytest
from PIL import Image

from diffusion_jax import cli
from diffusion_jax.commands.bench_plan import Benchmark, Study
from diffusion_jax.commands.bench_runs import Run, evaluations, measure_runs
from diffusion_jax.commands.train import train
from diffusion_jax.core.parameterization import X0
from diffusion_jax.core.timesteps import Steps
from diffusion_jax.data import Digits
from diffusion_jax.experiment import Evaluation, Training, find
from diffusion_jax.losses import Simple
from diffusion_jax.losses.weights import MinSNR
from diffusion_jax.models import MLPConfig

pytestmark = pytest.mark.slow

SMALL = Benchmark(
    run_study=Study(grids=("trailing", "karras"), samplers=("ddim", "heun"), nfe=(2, 6)),
    run_samples=40,
    run_seeds=2,
)


def tiny(name, data_dir, **parts):
    """A run of four steps with a small network."""
    experiment = find(name, tiny=True)
    parts = {"network": MLPConfig(width=16, depth=1), "steps": Steps(num_steps=2), **parts}
    return replace(
        experiment,
        system=replace(experiment.system, **parts),
        data=Digits(data_dir=str(data_dir)),
        training=Training(num_steps=4, batch_size=8, log_every=2, checkpoint_every=4),
        evaluation=Evaluation(batch_size=40),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """v with uniform weight, guided by labels; x0 with min-SNR weight, unconditional."""
    data, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("runs")
    train(tiny("classifier_free", data), folder / "guided")
    loss = Simple(weight=MinSNR())
    train(tiny("ddpm", data, parameterization=X0(), loss=loss), folder / "plain")
    return folder / "guided", folder / "plain"


def test_guidance_counts_two_calls(runs):
    counted = [Run(workdir, SMALL).calls for workdir in runs]
    assert counted == [2, 1]
    run = Run(runs[1], SMALL)
    assert evaluations(run.experiment, run.system, run.params) == 1


def test_runs_are_compared_at_equal_network_calls(runs, tmp_path, capsys):
    path = tmp_path / "bench.csv"
    rows = measure_runs(SMALL, runs, path)
    assert {(row["parameterization"], row["weight"]) for row in rows} == {
        ("v", "uniform"), ("x0", "min_snr")
    }  # fmt: skip
    # Two samplers, two grids, two numbers of calls, two seeds.
    assert len(rows) == 2 * 2 * 2 * 2 * 2
    assert all(0 < float(row["frechet_train_floor"]) < float(row["frechet_train"]) for row in rows)
    steps = {
        (row["parameterization"], row["sampler"], row["nfe_asked"]): (row["num_steps"], row["nfe"])
        for row in rows
    }
    assert steps["v", "ddim", "6"] == ("3", "6") and steps["x0", "ddim", "6"] == ("6", "6")
    assert steps["v", "heun", "6"] == ("2", "6") and steps["x0", "heun", "6"] == ("3", "5")
    text = path.read_text()
    path.write_text("".join(text.splitlines(keepends=True)[:9]))
    assert measure_runs(SMALL, runs, path) == rows and path.read_text() == text


def test_the_command_draws_runs(runs, tmp_path, capsys):
    options = ["--grids", "trailing", "--samplers", "ddim", "--nfe", "2", "4", "6"]
    options += ["--run-samples", "40", "--run-seeds", "2"]
    folders = [str(workdir) for workdir in runs]
    assert (
        cli.main(["bench", "schedules", *options, "--out", str(tmp_path), "--run", *folders]) == 0
    )
    printed = capsys.readouterr().out
    assert "at most 6 network calls" in printed and "min_snr" in printed
    assert Image.open(tmp_path / "runs.png").size[0] > 600
    assert cli.main(["bench", "schedules", "--out", str(tmp_path), "--run", str(tmp_path)]) == 2
