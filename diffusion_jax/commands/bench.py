"""bench schedules: measures what is missing, then tables and figures of everything."""

from collections.abc import Sequence
from pathlib import Path

from diffusion_jax.commands import bench_figures
from diffusion_jax.commands.bench_csv import SCORES
from diffusion_jax.commands.bench_mixture import measure
from diffusion_jax.commands.bench_plan import BENCH_SCHEDULES, Benchmark
from diffusion_jax.commands.bench_report import floors, lines, table
from diffusion_jax.commands.bench_runs import measure_runs
from diffusion_jax.commands.figures import pyplot
from diffusion_jax.io.files import write_text


def bench(benchmark: Benchmark, out: Path, runs: Sequence[Path] = (), *, shown: int = 10) -> None:
    """Measures, prints tables, and writes bench.csv, tables.txt and figures into a folder.

    Args:
      benchmark: what is compared.
      out: the folder; what is in its bench.csv is not computed again.
      runs: working directories of trained runs; if there are any, these are compared, and the
        mixture is not.
      shown: lines of each printed table; the file has all of them.

    Raises:
      ValueError: if a run is none, or bench.csv is another table.
    """
    # Missing plotting libraries should show before the work, not after it.
    pyplot()
    out.mkdir(parents=True, exist_ok=True)
    path, written = out / "bench.csv", ["bench.csv"]
    if runs:
        rows, by, text = measure_runs(benchmark, runs, path), "frechet_train", "tables_of_runs.txt"
    else:
        rows, by, text = measure(benchmark, path), "sliced_wasserstein", "tables.txt"
    found, limits = lines(rows, SCORES), floors(rows, SCORES)
    said = [f"{name} of two true sets: {score.mean:.4f}" for name, score in limits.items()]
    head = "± is the half width of a 95 % confidence interval\n" + "\n".join(said)
    write_text(out / text, f"{head}\n\n{table(found, by=by)}")
    print(f"{head}\n\n{table(found, by=by, shown=shown)}")
    written.append(text)
    if runs:
        bench_figures.run_curves(out / "runs.png", found, limits)
        written.append("runs.png")
    else:
        used = dict.fromkeys(line.schedule for line in found)
        grids = list(dict.fromkeys(line.grid for line in found))
        schedules = {name: made for name, made in BENCH_SCHEDULES.items() if name in used}
        bench_figures.log_snr_density(out / "log_snr.png", schedules, grids)
        written.append("log_snr.png")
        for name, draw in (
            ("samplers.png", bench_figures.sampler_curves),
            ("schedules.png", bench_figures.schedule_curves),
        ):
            if draw(out / name, found, limits):
                written.append(name)
    print(f"{', '.join(written)} are in {out}")
