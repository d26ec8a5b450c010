"""Which schedule, grid and sampler is how accurate at how many network calls; nothing is trained.

diffusion-jax bench schedules --out runs/bench
python -m experiments.benchmark_schedules --out runs/bench

The data is a mixture of three Gaussians in the plane, whose denoiser is exact: what is measured is
the error of schedules, grids and samplers alone. CONFIG compares every schedule on every grid with
a sampler of first and one of second order, and every sampler on three usual pairs of schedule and
grid: about 570 cells. The folder keeps what was computed.
"""

import sys
from dataclasses import replace

from diffusion_jax.commands.bench_plan import Benchmark, Study

CONFIG = Benchmark(
    studies=(
        Study(samplers=("ddim", "dpm_solver_multistep"), nfe=(10, 50)),
        Study(schedules=("linear",), grids=("trailing", "karras")),
        Study(schedules=("edm",), grids=("karras",), nfe=(10, 20, 50)),
    )
)

TINY = replace(
    CONFIG,
    studies=(
        Study(
            schedules=("cosine", "edm"),
            grids=("karras",),
            samplers=("ddim", "heun", "dpm_solver_multistep", "ddpm"),
            nfe=(5, 10, 20),
        ),
    ),
    num_samples=1024,
    num_seeds=3,
)

if __name__ == "__main__":
    from diffusion_jax.cli import main

    sys.exit(main(["bench", "schedules", *sys.argv[1:]]))
