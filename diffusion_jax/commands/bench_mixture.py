"""Schedules, grids and samplers on an exact denoiser, at equal numbers of network calls."""

import functools
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from diffusion_jax.commands.bench_calls import Counted, Steps
from diffusion_jax.commands.bench_csv import COLUMNS, SETTINGS, Rows, Table, versions
from diffusion_jax.commands.bench_plan import (
    BENCH_SAMPLERS,
    BENCH_SCHEDULES,
    Benchmark,
    Cell,
    cells,
    undefined,
)
from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.grid import Grid
from diffusion_jax.core.mixture import MIXTURE, Mixture, exact_flow
from diffusion_jax.core.timesteps import TIMESTEPS
from diffusion_jax.core.types import Array, NoiseLevel
from diffusion_jax.metrics import EnergyDistance, SlicedWasserstein
from diffusion_jax.samplers import fit_grid, initial_noise


class Drawn(NamedTuple):
    """What one cell drew.

    Attributes:
      x: [S, N, D] of each seed.
      x_T: [S, F, D] where the first of them started.
      start: the level that they started at.
      deterministic: whether the noise along the way does not matter.
      num_steps, nfe: steps and network calls.
    """

    x: np.ndarray
    x_T: np.ndarray
    start: NoiseLevel
    deterministic: bool
    num_steps: int
    nfe: int


class Drawer:
    """Draws the cells of a benchmark on the mixture."""

    def __init__(self, benchmark: Benchmark, mixture: Mixture = MIXTURE):
        self.benchmark, self.mixture = benchmark, mixture
        self._run, self._steps = Counted(mixture.denoise), Steps()
        seeds = range(benchmark.seed, benchmark.seed + benchmark.num_seeds)
        count = benchmark.num_samples
        self._keys = jnp.concatenate([image_keys(seed, range(count)) for seed in seeds])
        self._noise = initial_noise(self._keys, (mixture.dim,))
        self._max_steps = max(cell.nfe for cell in cells(benchmark)) + 1
        self._deterministic: dict[str, bool] = {}
        # Some spacings cost more than a short run.
        self._grids: dict[tuple[str, str, int], Grid] = {}

    def _grid(self, cell: Cell, num_steps: int) -> Grid:
        schedule, key = BENCH_SCHEDULES[cell.schedule], (cell.schedule, cell.grid, num_steps)
        if key not in self._grids:
            make = TIMESTEPS[cell.grid]
            self._grids[key] = make(schedule, num_steps, max_steps=self._max_steps)
        grid = self._grids[key]
        return fit_grid(BENCH_SAMPLERS[cell.sampler], grid, schedule)

    def _is_deterministic(self, cell: Cell, grid: Grid, x_T: Array, x: Array) -> bool:
        if cell.sampler not in self._deterministic:
            keys = image_keys(2**31 - 1, range(len(x_T)))
            other, _ = self._run(BENCH_SAMPLERS[cell.sampler], grid, x_T, keys)
            self._deterministic[cell.sampler] = bool(jnp.array_equal(x, other, equal_nan=True))
        return self._deterministic[cell.sampler]

    def __call__(self, cell: Cell) -> Drawn | None:
        """The points of a cell, or None if the sampler needs more network calls for one step."""
        schedule, sampler = BENCH_SCHEDULES[cell.schedule], BENCH_SAMPLERS[cell.sampler]
        no_signal = float(schedule(np.asarray(schedule.t_max)).alpha) == 0.0
        num_steps = self._steps.most(
            sampler,
            functools.partial(self._grid, cell),
            cell.nfe,
            (cell.sampler, cell.nfe, no_signal, cell.grid),
        )
        if num_steps == 0:
            return None
        grid = self._grid(cell, num_steps)
        start = NoiseLevel(*(np.asarray(field) for field in grid.level(0)))
        x_T = jnp.float32(schedule.prior_std(start)) * self._noise
        x, nfe = self._run(sampler, grid, x_T, self._keys)
        deterministic = self._is_deterministic(cell, grid, x_T, x)
        shape = (self.benchmark.num_seeds, self.benchmark.num_samples, self.mixture.dim)
        first = np.asarray(x_T).reshape(shape)[:, : self.benchmark.flow_points]
        return Drawn(np.asarray(x).reshape(shape), first, start, deterministic, num_steps, nfe)


class Judge:
    """Scores of drawn points against true ones and against the exact flow."""

    def __init__(self, benchmark: Benchmark, mixture: Mixture = MIXTURE):
        self.benchmark, self.mixture = benchmark, mixture
        self._flows: dict[tuple, np.ndarray] = {}
        self._sliced, self._energy, self.floors = [], [], []
        for seed in range(benchmark.seed, benchmark.seed + benchmark.num_seeds):
            true, other = (
                mixture.draw(np.random.default_rng([seed, which]), benchmark.num_samples)
                for which in (0, 1)
            )
            self._sliced.append(SlicedWasserstein(true))
            self._energy.append(EnergyDistance(true[: benchmark.energy_points]))
            floor = self._distances(len(self.floors), other)
            self.floors.append({f"{name}_floor": value for name, value in floor.items()})

    def _distances(self, index: int, x: np.ndarray) -> dict[str, float]:
        data = NoiseLevel(np.asarray(0.0), np.asarray(1.0), np.asarray(0.0))
        mode_error = float("inf")
        if np.isfinite(x).all():
            shares = self.mixture.class_probability(np.asarray(x, np.float64), data).mean(0)
            mode_error = float(np.abs(shares - np.asarray(self.mixture.weights)).max())
        return {
            "sliced_wasserstein": self._sliced[index](x),
            "energy_distance": self._energy[index](x[: self.benchmark.energy_points]),
            "mode_error": mode_error,
        }

    def _exact(self, drawn: Drawn) -> np.ndarray:
        key = tuple(float(rate) for rate in drawn.start) + (float(drawn.x_T.flat[0]),)
        if key not in self._flows:
            clean = NoiseLevel(np.asarray(0.0), np.asarray(1.0), np.asarray(0.0))
            flat = drawn.x_T.reshape(-1, self.mixture.dim)
            solved = exact_flow(
                self.mixture, flat, drawn.start, clean, num_steps=self.benchmark.flow_steps
            )
            self._flows[key] = solved.reshape(drawn.x_T.shape)
        return self._flows[key]

    def __call__(self, drawn: Drawn) -> list[dict[str, float]]:
        """The scores of every seed; rms_error is there for deterministic samplers."""
        scores = []
        for index, x in enumerate(drawn.x):
            values = self._distances(index, x)
            if drawn.deterministic:
                off = x[: self.benchmark.flow_points] - self._exact(drawn)[index]
                values["rms_error"] = float(np.sqrt(np.mean(np.sum(off**2, axis=-1))))
            scores.append({**values, **self.floors[index]})
        return scores


def settings(benchmark: Benchmark, cell: Cell, seed: int) -> dict[str, str]:
    """What identifies a row of the CSV."""
    values = {
        "data": "mixture",
        "schedule": cell.schedule,
        "schedule_options": repr(BENCH_SCHEDULES[cell.schedule]),
        "grid": cell.grid,
        "sampler": cell.sampler,
        "sampler_options": repr(BENCH_SAMPLERS[cell.sampler]),
        "nfe_asked": cell.nfe,
        "seed": seed,
        **{
            name: getattr(benchmark, name)
            for name in ("num_samples", "energy_points", "flow_points", "flow_steps")
        },
    }
    return {name: str(values.get(name, "")) for name in SETTINGS}


def defined_cells(benchmark: Benchmark) -> tuple[list[Cell], dict[tuple[str, str], str]]:
    """The cells that can be computed, and why the others cannot, by schedule and grid."""
    planned = cells(benchmark)
    pairs = dict.fromkeys((cell.schedule, cell.grid) for cell in planned)
    why = {pair: reason for pair in pairs if (reason := undefined(*pair)) is not None}
    return [cell for cell in planned if (cell.schedule, cell.grid) not in why], why


def measure(benchmark: Benchmark, path: Path) -> Rows:
    """Computes what is missing in a CSV file, and returns all rows of the benchmark.

    A row is a cell and a seed. Rows of other settings in the file stay in it.

    Raises:
      ValueError: if the file is another table.
    """
    planned, why = defined_cells(benchmark)
    table = Table(path, COLUMNS, SETTINGS)
    seeds = range(benchmark.seed, benchmark.seed + benchmark.num_seeds)
    wanted = {cell: [settings(benchmark, cell, seed) for seed in seeds] for cell in planned}
    missing = [cell for cell in planned if not all(table.has(row) for row in wanted[cell])]
    for (schedule, grid), reason in why.items():
        print(f"left out: {grid} on {schedule}: {reason}")
    print(
        f"{len(planned)} cells, {len(planned) - len(missing)} of them in {path} already; "
        f"{benchmark.num_seeds} seeds of {benchmark.num_samples} points each",
        flush=True,
    )
    if missing:
        _compute(benchmark, missing, wanted, table)
    order = [row for cell in planned for row in wanted[cell]]
    table.rewrite(order)
    return [table.get(row) for row in order if table.has(row)]


def _compute(
    benchmark: Benchmark,
    missing: Sequence[Cell],
    wanted: Mapping[Cell, list[dict[str, str]]],
    table: Table,
) -> None:
    drawer, judge, said = Drawer(benchmark), Judge(benchmark), versions()
    pending: deque[tuple[Cell, Drawn, Future]] = deque()

    def write() -> None:
        cell, drawn, scores = pending.popleft()
        for row, values in zip(wanted[cell], scores.result(), strict=True):
            measured = {"num_steps": drawn.num_steps, "nfe": drawn.nfe, "versions": said, **values}
            table.add({**row, **measured})

    # The next cell is drawn on one core while the last one is scored on another.
    with ThreadPoolExecutor(1) as pool:
        for cell in (progress := tqdm(missing, "cells", smoothing=0.1)):
            progress.set_postfix_str(cell.sampler, refresh=False)
            drawn = drawer(cell)
            if drawn is None:
                progress.write(f"left out: {cell.sampler} makes no step with {cell.nfe} calls")
                continue
            pending.append((cell, drawn, pool.submit(judge, drawn)))
            while len(pending) > 2:
                write()
        while pending:
            write()
