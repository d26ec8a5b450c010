"""What a benchmark of schedules and samplers compares: axes, cells, and the names of both."""

import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_jax.core.schedules import SCHEDULES, NoiseSchedule, ShiftedLogSNR
from diffusion_jax.core.timesteps import TIMESTEPS
from diffusion_jax.samplers import (
    DDIM,
    DDPM,
    SAMPLERS,
    DPMSolverMultistep,
    EulerChurn,
    HeunChurn,
    UniPC,
)

# Rows of the tables that say nothing without more input, and why.
LEFT_OUT = {
    "betas": "is whatever values it is given",
    "lcm": "samples consistency functions, not denoisers",
    "tcd": "samples consistency functions, not denoisers",
    "consistency_multistep": "samples consistency functions, not denoisers",
}

BENCH_SCHEDULES: dict[str, NoiseSchedule] = {
    **{name: make() for name, make in SCHEDULES.items() if name not in LEFT_OUT},
    # For images four times as large; with a shift of 0 it would be its base.
    "shifted_log_snr": ShiftedLogSNR(shift=-2.772588722239781),
}


# Every row of SAMPLERS as it stands, and what options make of some.
BENCH_SAMPLERS: dict[str, Any] = {
    **{name: make() for name, make in SAMPLERS.items() if name not in LEFT_OUT},
    # Without churn these would be Euler's and Heun's methods.
    "euler_churn": EulerChurn(s_churn=10.0),
    "heun_churn": HeunChurn(s_churn=10.0),
    "ddpm_small": DDPM("small"),
    "ddim_eta_1": DDIM(eta=1.0),
    "dpm_solver_multistep_3": DPMSolverMultistep(order=3),
    "unipc_3": UniPC(order=3),
    "dpm_solver_multistep_sde": DPMSolverMultistep(algorithm="sde-dpmsolver++"),
}


@dataclass(frozen=True)
class Study:
    """A product of axes; an empty axis is all of its table.

    Attributes:
      schedules: names in BENCH_SCHEDULES.
      grids: names in TIMESTEPS.
      samplers: names in BENCH_SAMPLERS.
      nfe: numbers of network calls, each at least 1.

    Raises:
      ValueError: if a name is unknown or a number out of range.
    """

    schedules: tuple[str, ...] = ()
    grids: tuple[str, ...] = ()
    samplers: tuple[str, ...] = ()
    nfe: tuple[int, ...] = (5, 10, 20, 50, 100)

    def __post_init__(self):
        tables = (
            ("schedules", BENCH_SCHEDULES),
            ("grids", TIMESTEPS),
            ("samplers", BENCH_SAMPLERS),
        )
        for axis, table in tables:
            for name in getattr(self, axis):
                if name not in table:
                    why = f"; {name} {LEFT_OUT[name]}" if name in LEFT_OUT else ""
                    raise ValueError(f"{axis} must be among {sorted(table)}, got {name!r}{why}")
        if not self.nfe or min(self.nfe) < 1:
            raise ValueError(f"nfe must be numbers of at least 1, got {self.nfe}")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark on the mixture whose denoiser is exact: nothing is trained.

    Attributes:
      studies: products of axes; what is in several is computed once.
      num_samples: points per cell and seed.
      num_seeds: how often, each with its own noise and its own true points.
      energy_points: points of the energy distance, whose cost grows with their square.
      flow_points: points that are held against the exact flow.
      flow_steps: Runge-Kutta steps of the exact flow. 512 leave an error of about 1e-7, a
        tenth of what float32 leaves of the samplers.
      seed: the first seed.
      run_study: what is compared on trained runs, each on its own schedule.
      run_samples: images per cell and seed of a trained run; 0 for as many as there are training
        images.
      run_seeds: seeds of a trained run.

    Raises:
      ValueError: if a number is out of range.
    """

    studies: tuple[Study, ...] = (Study(),)
    num_samples: int = 4096
    num_seeds: int = 5
    energy_points: int = 1024
    flow_points: int = 256
    flow_steps: int = 512
    seed: int = 0
    run_study: Study = Study(
        grids=("trailing",), samplers=("ddim", "heun", "dpm_solver_multistep"), nfe=(5, 10, 20, 50)
    )
    run_samples: int = 0
    run_seeds: int = 3

    def __post_init__(self):
        for name in ("num_samples", "energy_points", "flow_points"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}")
        for name in ("num_seeds", "flow_steps", "run_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("energy_points", "flow_points"):
            if getattr(self, name) > self.num_samples:
                raise ValueError(f"{name} must be at most num_samples = {self.num_samples}")
        if self.run_samples < 0:
            raise ValueError(f"run_samples must be at least 0, got {self.run_samples}")
        if not self.studies:
            raise ValueError("studies must not be empty")


class Cell(NamedTuple):
    """One combination.

    Attributes:
      schedule, grid, sampler: names.
      nfe: network calls that must not be exceeded.
    """

    schedule: str
    grid: str
    sampler: str
    nfe: int


def product(study: Study) -> Iterator[Cell]:
    """Every combination of a study."""
    # Samplers outermost: each compiles once, when its first cell comes.
    for sampler in study.samplers or BENCH_SAMPLERS:
        for schedule in study.schedules or BENCH_SCHEDULES:
            for grid in study.grids or TIMESTEPS:
                for nfe in study.nfe:
                    yield Cell(schedule, grid, sampler, nfe)


def cells(benchmark: Benchmark) -> list[Cell]:
    """Every cell of a benchmark once, the cells of one sampler together."""
    unique = dict.fromkeys(cell for study in benchmark.studies for cell in product(study))
    place = {name: index for index, name in enumerate(BENCH_SAMPLERS)}
    return sorted(unique, key=lambda cell: place[cell.sampler])


def undefined(schedule: str, grid: str) -> str | None:
    """Why a grid cannot be made on a schedule, or None if it can."""
    try:
        TIMESTEPS[grid](BENCH_SCHEDULES[schedule], 2, max_steps=2)
    except ValueError as error:
        return str(error)
    return None


def narrowed(benchmark: Benchmark, **axes: tuple) -> Benchmark:
    """A benchmark whose studies, that of runs too, have these axes in place of their own.

    Args:
      axes: values of `schedules`, `grids`, `samplers` or `nfe`; an empty one changes nothing.

    Raises:
      ValueError: if a name is unknown.
    """
    given = {axis: tuple(values) for axis, values in axes.items() if values}
    of_runs = {axis: values for axis, values in given.items() if axis != "schedules"}
    return replace(
        benchmark,
        studies=tuple(replace(study, **given) for study in benchmark.studies),
        run_study=replace(benchmark.run_study, **of_runs),
    )


def find_benchmark(path: str | None = None, *, tiny: bool = False) -> Benchmark:
    """The benchmark of a .py file, or the one that comes with the package.

    Args:
      path: a file that defines CONFIG (and TINY), or None.
      tiny: TINY instead of CONFIG.

    Raises:
      ValueError: if the file does not define it.
      OSError: if there is no such file.
    """
    if path is None:
        module = importlib.import_module("diffusion_jax.experiments.benchmark_schedules")
    else:
        if not Path(path).exists():
            raise FileNotFoundError(f"there is no file {path}")
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    wanted = "TINY" if tiny else "CONFIG"
    found = getattr(module, wanted, None)
    if not isinstance(found, Benchmark):
        raise ValueError(f"{path} must define {wanted}, a Benchmark, got {found!r}")
    return found
