"""The figures, ratios and checks of benchmarks/speed, on samples that are made up."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.speed import __main__ as runner
from benchmarks.speed import report, worker
from benchmarks.speed.cases import CASES, VARIANTS, default_cases, default_variants


def made_up(variant: str, side: str, *calls: float, **fields) -> dict:
    sample = {"case": "unet-mid", "kind": "unet", "variant": variant, "side": side}
    return {**sample, "calls_s": list(calls), "first_call_s": 9.0, **fields}


def test_a_figure_is_the_median_of_the_calls():
    assert report.figure(made_up("a", "ours", 5.0, 1.0, 2.0)) == 2.0


def test_the_first_call_counts_beyond_a_later_one():
    assert report.figure(made_up("a", "ours", 1.0, 3.0, 2.0, kind="first_call")) == 7.0


def test_ratios_are_those_of_medians_to_the_first_and_the_fastest_of_diffusers():
    samples = [
        *(made_up("eager", "theirs", value) for value in (4.0, 8.0, 100.0)),
        *(made_up("compiled", "theirs", value) for value in (6.0, 3.0, 6.0)),
        *(made_up("ours", "ours", value) for value in (1.0, 4.0, 2.0)),
    ]
    eager, compiled, ours = report.rows(samples, peak=0.0)
    assert (ours["median"], ours["min–max"], ours["processes"]) == ("2 s", "1 s – 4 s", "3")
    assert (ours["eager / this"], ours["fastest diffusers / this"]) == ("4.00", "3.00")
    assert (compiled["eager / this"], compiled["fastest diffusers / this"]) == ("1.33", "1.00")
    assert (eager["eager / this"], eager["fastest diffusers / this"]) == ("1.00", "0.75")


def test_throughput_and_memory():
    sizes = {"peak_bytes": 5, "trimmed_peak_bytes": 4, "parameter_bytes": 2}
    mib = {name: size * 2**20 for name, size in sizes.items()}
    sample = made_up("ours", "ours", 2.0, flop=4e12, **mib)
    (row,) = report.rows([sample], peak=8e12)
    assert (row["TFLOP/s"], row["of matmul"]) == ("2", "25%")
    assert (row["peak MiB"], row["without weights"]) == ("5", "3")
    assert row["after malloc_trim"] == "4"


def test_the_peak_is_the_fastest_product_of_any_process():
    assert report.matmul_peak([{"matmul_flops": 1.0}, {"matmul_flops": 3.0}, {}]) == 3.0
    assert report.matmul_peak([]) == 0.0


def test_a_table_leaves_out_columns_that_are_empty():
    lines = report.markdown([{"a": "1", "b": ""}, {"a": "2", "c": "3"}]).splitlines()
    assert lines == ["| a | c |", "| --- | --- |", "| 1 |  |", "| 2 | 3 |"]


@pytest.mark.parametrize(("value", "shown"), [(12.34, "12.3 s"), (0.0123, "12.3 ms")])
def test_seconds(value, shown):
    assert report.seconds(value) == shown


def test_differences_are_the_worst_of_all_outputs():
    expected = {"a": np.array([3.0, -4.0]), "b": np.array([10.0])}
    outputs = {"a": np.array([3.0, -3.0]), "b": np.array([10.5])}
    found = worker.differences(outputs, expected)
    assert found["difference"] == 1.0
    assert found["largest_output"] == 10.0
    assert found["relative_rms"] == pytest.approx(1.0 / 5.0)


def test_other_outputs_are_not_timed():
    ones = {"a": np.ones(3)}
    worker.check(worker.differences({"a": np.ones(3) + 1e-5}, ones), "cpu", "float32")
    with pytest.raises(ValueError, match="differ from diffusers' by 1.0e-01"):
        worker.check(worker.differences({"a": np.full(3, 1.1)}, ones), "cpu", "float32")
    with pytest.raises(ValueError, match="differ from diffusers' by nan"):
        worker.check(worker.differences({"a": np.full(3, np.nan)}, ones), "cuda", "bfloat16")


@pytest.mark.parametrize("outputs", [{}, {"a": np.ones(2)}])
def test_outputs_need_the_expected_names_and_shapes(outputs):
    with pytest.raises(ValueError, match="a must have shape \\(3,\\)"):
        worker.differences(outputs, {"a": np.ones(3)})


def test_the_allocator_and_nothing_of_the_shell_is_in_a_workers_environment(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=3")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    _, _, plain, _, tuned = VARIANTS["unet"]
    settings = runner.environment("cpu", Path("cache"), plain)
    assert "GLIBC_TUNABLES" not in settings
    assert settings["JAX_COMPILATION_CACHE_DIR"] == str(Path("cache") / "jax")
    tunables = runner.environment("cpu", Path("cache"), tuned)["GLIBC_TUNABLES"]
    # What is documented is what is set.
    assert tunables in runner.__doc__


@pytest.mark.parametrize(
    ("kind", "device", "kept"),
    [
        ("unet", "cpu", False),
        ("unet", "cuda", True),
        ("first_call", "cpu", None),
    ],
)
def test_caches_are_kept_where_a_second_start_is_timed_and_on_a_gpu(kind, device, kept):
    case = next(name for name, case in CASES.items() if case.kind == kind)
    args = runner.parse(["--device", device])
    run = runner.Run(case, CASES[case], Path("x"), args)
    folders = {}
    for variant in VARIANTS[kind]:
        folders[variant] = [runner.cache(run, variant, number) for number in range(3)]
        expected = variant.cache == "warm" if kept is None else kept
        assert len(set(folders[variant])) == (1 if expected else 3), variant
    # No variant finds what another one has compiled.
    assert len(set().union(*folders.values())) == sum(len(set(each)) for each in folders.values())


def test_the_runner_is_light():
    # A worker's peak of memory would begin at that of the process that started it.
    source = Path(runner.__file__).read_text() + Path(report.__file__).read_text()
    assert not re.search(r"^(import|from) (jax|torch|diffusers|numpy)", source, re.MULTILINE)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_default_case_compares_both_sides(device):
    for name in default_cases(device):
        sides = {variant.side for variant in default_variants(CASES[name].kind, device)}
        assert sides == {"ours", "theirs"}, name


def test_a_workers_arguments_survive_json():
    run = runner.Run("unet-mid", CASES["unet-mid"], Path("x"), _arguments())
    spec = worker.Spec(**json.loads(json.dumps(run.spec("time", "ours", compiled=True))))
    assert (spec.kind, spec.batch, spec.compiled, spec.path("a")) == ("unet", 2, True, Path("x/a"))
    assert spec.options["unet"]["block_out_channels"] == [128, 256, 512, 512]


def _arguments():
    return runner.parse(["--only", "unet-mid"])
