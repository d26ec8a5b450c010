"""The benchmark of schedules and samplers: honest counts, resumable rows, tables and figures."""

import csv
import math

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import cli
from diffusion_jax.commands import bench_mixture
from diffusion_jax.commands.bench import bench
from diffusion_jax.commands.bench_calls import Steps
from diffusion_jax.commands.bench_csv import COLUMNS, SCORES, SETTINGS, Table
from diffusion_jax.commands.bench_mixture import defined_cells, measure
from diffusion_jax.commands.bench_plan import (
    BENCH_SAMPLERS,
    BENCH_SCHEDULES,
    LEFT_OUT,
    Benchmark,
    Study,
    cells,
    find_benchmark,
    narrowed,
)
from diffusion_jax.commands.bench_report import Score, floors, lines, table
from diffusion_jax.core.schedules import EDM, SCHEDULES, FlowMatching, Linear
from diffusion_jax.core.timesteps import TIMESTEPS, karras, trailing
from diffusion_jax.samplers import (
    DDIM,
    KDPM2,
    PNDM,
    SAMPLERS,
    DPMSolverMultistep,
    Heun,
    UniPC,
    fit_grid,
)

TINY = Benchmark(
    studies=(
        Study(
            schedules=("linear", "edm", "flow_matching"),
            grids=("trailing", "karras"),
            samplers=("heun", "ddpm"),
            nfe=(4, 9),
        ),
        Study(schedules=("edm",), grids=("karras",), samplers=("ddim", "heun"), nfe=(4, 40)),
    ),
    num_samples=64,
    num_seeds=2,
    energy_points=32,
    flow_points=16,
    flow_steps=64,
)


# Network calls.


def calls_of(sampler, num_steps, schedule, make=trailing):
    grid = make(schedule, num_steps, max_steps=16)
    return Steps().calls(sampler, fit_grid(sampler, grid, schedule))


@pytest.mark.parametrize(
    "sampler, calls",
    [
        pytest.param(DDIM(), lambda n: n, id="ddim"),
        pytest.param(Heun(), lambda n: 2 * n - 1, id="heun"),
        pytest.param(PNDM(), lambda n: n + 9, id="pndm"),
        pytest.param(DPMSolverMultistep(), lambda n: n, id="2m", marks=pytest.mark.slow),
        pytest.param(UniPC(), lambda n: n, id="unipc", marks=pytest.mark.slow),
        pytest.param(KDPM2(), lambda n: 2 * n - 1, id="kdpm2", marks=pytest.mark.slow),
        pytest.param(
            PNDM(runge_kutta_start=False), lambda n: n + 1, id="plms", marks=pytest.mark.slow
        ),
    ],
)
def test_network_calls_are_the_known_formulas(sampler, calls):
    """N, 2N - 1, PLMS N + 1, PNDM N + 9, counted while the sampler runs."""
    assert [calls_of(sampler, n, Linear()) for n in (5, 12)] == [calls(5), calls(12)]


def test_a_start_without_signal_saves_a_call():
    """Heun's first step is Euler's where alpha = 0; only a count can know."""
    assert calls_of(Heun(), 6, FlowMatching()) == 2 * 6 - 2
    assert calls_of(Heun(), 6, EDM(), karras) == 2 * 6 - 1


@pytest.mark.parametrize(
    "sampler, nfe, num_steps",
    [
        (Heun(), 9, 5),
        (Heun(), 10, 5),
        (Heun(), 1, 1),
        (DDIM(), 7, 7),
        (PNDM(), 12, 3),
        (PNDM(), 13, 4),
    ],
)
def test_the_most_steps_within_a_number_of_calls(sampler, nfe, num_steps):
    schedule, steps = Linear(), Steps()

    def make(count):
        return fit_grid(sampler, trailing(schedule, count, max_steps=16), schedule)

    # The second time starts from the first answer, the third from a wrong one.
    assert steps.most(sampler, make, nfe, "a") == num_steps
    assert steps.most(sampler, make, nfe, "a") == num_steps
    steps._guesses["a"] = 3
    assert steps.most(sampler, make, nfe, "a") == num_steps


# Rows.


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "bench.csv"
    return measure(TINY, path), path


def test_every_defined_cell_and_seed_is_one_row(measured):
    rows, path = measured
    with path.open() as file:
        assert list(csv.DictReader(file)) == rows
    planned, why = defined_cells(TINY)
    assert set(why) == {("flow_matching", "karras")}
    # 2 samplers on 5 pairs with 2 numbers of calls, ddim with 2, heun with one more.
    assert len(planned) == 2 * 5 * 2 + 2 + 1
    assert len(rows) == 2 * len(planned) == len({tuple(row[s] for s in SETTINGS) for row in rows})


def test_rows_say_what_was_measured(measured):
    rows, _ = measured
    for row in rows:
        assert tuple(row) == COLUMNS
        assert 0 < int(row["nfe"]) <= int(row["nfe_asked"])
        assert bool(row["rms_error"]) == (row["sampler"] != "ddpm")
        assert float(row["sliced_wasserstein"]) > 0 and "jax" in row["versions"]
        assert row["schedule_options"] == repr(BENCH_SCHEDULES[row["schedule"]])
    heun = [r for r in rows if r["sampler"] == "heun" and r["schedule"] == "edm"]
    assert {(r["nfe_asked"], r["num_steps"], r["nfe"]) for r in heun if r["grid"] == "karras"} == {
        ("4", "2", "3"), ("9", "5", "9"), ("40", "20", "39")
    }  # fmt: skip


def test_errors_are_large_with_few_calls_and_small_with_many(measured):
    """Euler's method is 1st, Heun's 2nd order: with 40 calls Heun is ahead, with 4 behind."""
    error = {
        (line.sampler, line.nfe_asked): line.scores["rms_error"].mean
        for line in lines(measured[0], SCORES)
        if (line.schedule, line.grid) == ("edm", "karras") and line.sampler != "ddpm"
    }
    assert error["heun", 40] < error["ddim", 40] < 0.1 < error["ddim", 4] < error["heun", 4]


def test_half_a_table_is_completed_to_the_same_table(measured, tmp_path, monkeypatch):
    """What is there is not computed again, and what is missing comes out the same."""
    rows, path = measured
    text = path.read_text()
    half = tmp_path / "bench.csv"
    kept = text.splitlines(keepends=True)
    half.write_text("".join(kept[: len(kept) // 2]) + kept[len(kept) // 2][:20])
    assert measure(TINY, half) == rows
    assert half.read_text() == text

    def fail(*args):
        raise AssertionError("computed again")

    monkeypatch.setattr(bench_mixture, "Drawer", fail)
    assert measure(TINY, half) == rows and half.read_text() == text


def test_rows_of_other_settings_stay(measured, tmp_path):
    rows, path = measured
    shared = tmp_path / "bench.csv"
    shared.write_text(path.read_text())
    small = narrowed(TINY, samplers=("ddim",), schedules=("edm",), grids=("karras",), nfe=(3,))
    new = measure(small, shared)
    assert len(new) == 2 and {row["nfe"] for row in new} == {"3"}
    with shared.open() as file:
        assert list(csv.DictReader(file)) == new + rows


def test_another_table_is_refused(tmp_path):
    path = tmp_path / "bench.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        Table(path, COLUMNS, SETTINGS)
    fresh = Table(tmp_path / "new.csv", ("a", "b"), ("a",))
    with pytest.raises(ValueError, match="no columns"):
        fresh.add({"a": 1, "c": 2})


def test_numbers_survive_the_file(tmp_path):
    path = tmp_path / "t.csv"
    Table(path, ("a", "b"), ("a",)).add({"a": "x, y", "b": np.float64(0.1) / 3})
    assert float(Table(path, ("a", "b"), ("a",)).get({"a": "x, y"})["b"]) == 0.1 / 3


# Tables.


def test_a_score_over_seeds_has_a_confidence_interval():
    """1, 2, 3: mean 2, t(0.975, 2) = 4.30, standard error 1/√3."""
    score = Score.of([1.0, 2.0, 3.0])
    assert score.mean == 2.0 and score.half_width == pytest.approx(4.30 / math.sqrt(3))
    assert Score.of([1.0, math.inf]).mean == math.inf
    assert math.isnan(Score.of([1.0]).half_width)


def test_tables_are_sorted_by_error_at_each_number_of_calls(measured):
    found = lines(measured[0], SCORES)
    text = table(found, by="rms_error")
    assert "ddpm" not in text
    for part in text.split("at most ")[1:]:
        errors = [float(line.split("±")[0].split()[-1]) for line in part.split("\n")[2:] if line]
        assert len(errors) > 1 and errors == sorted(errors)
    assert len(table(found, by="sliced_wasserstein", shown=1).split("\n\n")[0].split("\n")) == 3


def test_the_floor_is_what_two_true_sets_score(measured):
    floor = floors(measured[0], SCORES)
    assert set(floor) == {"sliced_wasserstein", "energy_distance", "mode_error"}
    assert 0.05 < floor["sliced_wasserstein"].mean < 0.5


# The plan.


def test_the_default_is_small_enough_and_covers_every_table():
    """At most 800 cells, in which every schedule, grid and sampler occurs that can."""
    planned, _ = defined_cells(find_benchmark())
    assert len(planned) <= 800
    for axis, names in (("schedule", SCHEDULES), ("grid", TIMESTEPS), ("sampler", SAMPLERS)):
        assert {getattr(cell, axis) for cell in planned} >= set(names) - set(LEFT_OUT)
    assert len(planned) == len(set(planned))


def test_cells_of_a_sampler_come_together():
    order = [cell.sampler for cell in cells(find_benchmark())]
    changes = sum(a != b for a, b in zip(order[:-1], order[1:], strict=True))
    assert changes == len(set(order)) - 1 == len(BENCH_SAMPLERS) - 1


def test_options_replace_axes():
    command = cli.parse(
        [
            "bench",
            "schedules",
            "--tiny",
            "--nfe",
            "3",
            "7",
            "--samplers",
            "heun",
            "--num-seeds",
            "2",
        ]
    )
    assert command.config.num_seeds == 2
    chosen = narrowed(command.config, nfe=command.nfe, samplers=command.samplers)
    assert {(cell.sampler, cell.nfe) for cell in cells(chosen)} == {("heun", 3), ("heun", 7)}
    assert chosen.run_study.samplers == ("heun",) and chosen.run_study.schedules == ()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["bench"], "bench schedules, or"),
        (["bench", "schedules", "--samplers", "lcm"], "consistency functions"),
        (["bench", "schedules", "--nfe", "0"], "at least 1"),
        (["bench", "schedules", "--grids", "cubic"], "must be among"),
        (["bench", "schedules", "nothing.py"], "there is no file"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_file_may_hold_the_benchmark(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from diffusion_jax.commands.bench_plan import Benchmark, Study\n"
        "CONFIG = Benchmark(studies=(Study(nfe=(3,)),), num_samples=8, energy_points=8, "
        "flow_points=8)\n"
    )
    assert find_benchmark(str(path)).num_samples == 8
    with pytest.raises(ValueError, match="must define TINY"):
        find_benchmark(str(path), tiny=True)


@pytest.mark.parametrize("wrong", [{"num_samples": 1}, {"flow_points": 9999}, {"studies": ()}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Benchmark(**wrong)


@pytest.mark.slow
def test_the_command_writes_tables_and_figures(measured, tmp_path, capsys):
    (tmp_path / "bench.csv").write_text(measured[1].read_text())
    bench(TINY, tmp_path, shown=3)
    printed = capsys.readouterr().out
    assert "at most 9 network calls, the best 3 of" in printed and "two true sets" in printed
    assert "heun" in (tmp_path / "tables.txt").read_text()
    for name in ("log_snr.png", "schedules.png"):
        assert Image.open(tmp_path / name).size[0] > 600
