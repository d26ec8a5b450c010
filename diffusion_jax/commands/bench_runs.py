"""bench schedules --run: grids and samplers on trained networks, by Fréchet distance."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from tqdm.auto import tqdm

from diffusion_jax.commands.bench_calls import Steps
from diffusion_jax.commands.bench_csv import COLUMNS, SETTINGS, Rows, Table, versions
from diffusion_jax.commands.bench_plan import BENCH_SAMPLERS, Benchmark, Cell, product
from diffusion_jax.commands.evaluate import real_data
from diffusion_jax.commands.gather import gather
from diffusion_jax.commands.run import restore_params
from diffusion_jax.commands.sample import make_sampler
from diffusion_jax.commands.scores import Real
from diffusion_jax.configuration import kind_of
from diffusion_jax.core import struct
from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.grid import Grid
from diffusion_jax.core.timesteps import TIMESTEPS
from diffusion_jax.core.types import Params
from diffusion_jax.experiment import Experiment, find
from diffusion_jax.metrics import frechet_distance
from diffusion_jax.samplers import SamplerState, fit_grid
from diffusion_jax.systems import System


@struct.dataclass
class _Evaluations:
    """A step that does nothing but count how often the denoiser calls a network."""

    shape: tuple[int, ...] = struct.field(pytree_node=False)
    found: list = struct.field(pytree_node=False, default_factory=list)

    def init(self, x_T: Any) -> SamplerState:
        return SamplerState(x_T)

    def step(self, keys, denoise, state, level, next_level, info) -> SamplerState:
        del keys, next_level, info
        calls = []

        def count(call, args, kwargs, context):
            x = args[0] if args and context.method_name == "__call__" else None
            if not context.module.path and getattr(x, "shape", ())[1:] == self.shape:
                # Two guided halves in one batch are two calls.
                calls.append(x.shape[0] / state.x.shape[0])
            return call(*args, **kwargs)

        with nn.intercept_methods(count):
            denoise(state.x, level)
        self.found.append(round(sum(calls)))
        return state


def evaluations(experiment: Experiment, system: System, params: Params) -> int:
    """Network calls of one call of the denoiser, by tracing it: 2 with classifier-free guidance."""
    config = experiment.system
    probe = _Evaluations((config.image_size, config.image_size, config.channels))
    keys, batch = image_keys(0, range(2)), {"label": jnp.zeros(2, jnp.int32)}
    jax.eval_shape(lambda p: system.sample(p, batch, keys, sampler=probe), params)
    return max(probe.found[-1], 1)


class Run:
    """A trained run, its data, and what identifies its rows."""

    def __init__(self, workdir: Path, benchmark: Benchmark):
        self.experiment = find(str(workdir))
        self.system = self.experiment.system.build()
        steps, self.params = restore_params(workdir, self.system)
        self.benchmark = benchmark
        self.name = f"{workdir} step {max(steps.values())}"
        self.calls = evaluations(self.experiment, self.system, self.params)
        self._draw, self._steps = make_sampler(self.system), Steps()
        self._real: Real | None = None

    @property
    def real(self) -> Real:
        """Training and held-out data."""
        if self._real is None:
            self._real = real_data(self.experiment, judged=False)
        return self._real

    def settings(self, cell: Cell, seed: int) -> dict[str, str]:
        """What identifies a row of the CSV."""
        config = self.experiment.system
        weight = getattr(config.loss, "weight", None)
        values = {
            "data": "run",
            "run": self.name,
            "parameterization": kind_of("parameterization", config.parameterization),
            "weight": kind_of("loss", config.loss) if weight is None else kind_of("weight", weight),
            "schedule": kind_of("schedule", config.schedule),
            "schedule_options": repr(config.schedule),
            "grid": cell.grid,
            "sampler": cell.sampler,
            "sampler_options": repr(BENCH_SAMPLERS[cell.sampler]),
            "nfe_asked": cell.nfe,
            "num_samples": self.benchmark.run_samples,
            "seed": seed,
        }
        return {name: str(values.get(name, "")) for name in SETTINGS}

    def _grid(self, cell: Cell, num_steps: int) -> Grid:
        schedule, length = self.experiment.system.schedule, max(self.benchmark.run_study.nfe) + 1
        grid = TIMESTEPS[cell.grid](schedule, num_steps, max_steps=length)
        return fit_grid(BENCH_SAMPLERS[cell.sampler], grid, schedule)

    def undefined(self, grid: str) -> str | None:
        """Why the grid cannot be made on the run's schedule, or None if it can."""
        try:
            self._grid(Cell("", grid, "ddim", 1), 2)
        except ValueError as error:
            return str(error)
        return None

    def most_steps(self, cell: Cell) -> int:
        """The largest number of steps within the cell's network calls; 0 if there is none."""
        sampler, make = BENCH_SAMPLERS[cell.sampler], functools.partial(self._grid, cell)
        return self._steps.most(sampler, make, cell.nfe // self.calls, (cell.sampler, cell.nfe))

    def measure(self, cell: Cell, num_steps: int, seed: int) -> dict[str, float | int]:
        """Scores of one seed: Fréchet distances to both splits, beside that between the splits."""
        sampler, grid = BENCH_SAMPLERS[cell.sampler], self._grid(cell, num_steps)
        count = self.benchmark.run_samples or len(self.real.train_labels)
        labels = np.resize(self.real.train_labels, count)
        images = self._draw(
            self.params,
            {"label": labels},
            seed=seed,
            batch_size=self.experiment.evaluation.batch_size,
            sampler=sampler,
            grid=grid,
        )
        scores = {"frechet_train": float("inf"), "frechet_test": float("inf")}
        real = self.real
        if np.isfinite(images).all():
            drawn = gather([(images, labels)], features=real.features, shape=images.shape[1:])
            for split, of in (("train", real.train), ("test", real.test)):
                distance = frechet_distance(drawn.stream.stats, of.stream.stats)
                scores[f"frechet_{split}"] = float(distance)
        floor = float(frechet_distance(real.test.stream.stats, real.train.stream.stats))
        return {
            **scores,
            "frechet_train_floor": floor,
            "num_steps": num_steps,
            "nfe": self.calls * self._steps.calls(sampler, grid),
        }


def measure_runs(benchmark: Benchmark, workdirs: Sequence[Path], path: Path) -> Rows:
    """Computes what is missing in a CSV file about trained runs, and returns all of their rows.

    Every run keeps the schedule, parameterization, loss weight and guidance that it was trained
    and configured with: these axes are the runs.

    Raises:
      ValueError: if a directory holds no trained run, or the file is another table.
    """
    table = Table(path, COLUMNS, SETTINGS)
    seeds = range(benchmark.seed, benchmark.seed + benchmark.run_seeds)
    runs = [Run(workdir, benchmark) for workdir in workdirs]
    planned = []
    for run in runs:
        grids = benchmark.run_study.grids or tuple(TIMESTEPS)
        why = {grid: reason for grid in grids if (reason := run.undefined(grid)) is not None}
        for grid, reason in why.items():
            print(f"left out: {grid} on {run.name}: {reason}")
        for cell in product(replace(benchmark.run_study, schedules=("linear",))):
            if cell.grid not in why:
                planned.append((run, cell, [run.settings(cell, seed) for seed in seeds]))
    missing = [entry for entry in planned if not all(table.has(row) for row in entry[2])]
    there = len(planned) - len(missing)
    print(
        f"{len(planned)} cells of {len(runs)} runs, {there} of them in {path} already", flush=True
    )
    said = versions()
    for run, cell, rows in (progress := tqdm(missing, "cells of runs", disable=not missing)):
        num_steps = run.most_steps(cell)
        if num_steps == 0:
            progress.write(f"left out: {cell.sampler} makes no step with {cell.nfe} calls")
            continue
        for seed, row in zip(seeds, rows, strict=True):
            if not table.has(row):
                table.add({**row, "versions": said, **run.measure(cell, num_steps, seed)})
    order = [row for _, _, rows in planned for row in rows]
    table.rewrite(order)
    return [table.get(row) for row in order if table.has(row)]
