"""Figures of a benchmark: error against network calls, and where schedules and grids look."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_jax.commands.bench_report import Line, Score
from diffusion_jax.commands.figures import pyplot
from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.forward import log_snr
from diffusion_jax.core.schedules import NoiseSchedule
from diffusion_jax.core.timesteps import TIMESTEPS

# Okabe and Ito's colours, which those who do not see red or green tell apart, without the yellow
# that white paper hides. Lines beyond them repeat the colours with another dash and marker.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")
LABELS = {
    "rms_error": "RMS error against the exact flow",
    "sliced_wasserstein": "sliced Wasserstein-2 to the truth",
    "frechet_train": "Fréchet distance to training data",
}
# More panels than these would be too small to read.
MAX_COLUMNS = 6


def style(index: int) -> dict[str, Any]:
    """Colour, dash and marker of a line, different for the first 28."""
    turn = index // len(COLOURS) % len(DASHES)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[turn],
        "marker": MARKERS[turn],
        "markersize": 4,
        "linewidth": 1.4,
    }


def _curve(ax: Any, found: Sequence[Line], score: str, look: Mapping[str, Any]) -> None:
    found = sorted(found, key=lambda line: line.nfe)
    points = [(line.nfe, line.scores[score]) for line in found]
    points = [(nfe, s) for nfe, s in points if np.isfinite(s.mean) and s.mean > 0]
    if not points:
        return
    nfe = [n for n, _ in points]
    mean = np.asarray([s.mean for _, s in points])
    half = np.nan_to_num([s.half_width for _, s in points])
    ax.plot(nfe, mean, **look)
    # A logarithmic axis has no place for what is below 0.
    ax.fill_between(
        nfe, np.maximum(mean - half, mean / 10), mean + half, color=look["color"], alpha=0.1, lw=0
    )


def _log_axes(ax: Any, ticks: Sequence[int]) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    ax.grid(True, which="major", color="0.9", lw=0.7)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _bounds(found: Sequence[Line], score: str, floor: Score | None) -> tuple[float, float]:
    """The range of an axis: a few curves that explode do not flatten all others."""
    means = np.asarray([line.scores[score].mean for line in found if score in line.scores])
    means = means[np.isfinite(means) & (means > 0)]
    low = min(means.min(), floor.mean if floor else np.inf)
    return 0.7 * low, 1.4 * max(np.quantile(means, 0.97), 1.01 * low)


def _looks(
    found: Sequence[Line],
    score: str,
    name_of: Callable[[Line], str],
    before: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """How each curve looks: as in the row above if that has the same names, else in the order of
    the curves' ends, so that the list beside the panels reads like them from top to bottom."""
    names = {name_of(line) for line in found}
    if names == set(before):
        return before
    last = {name_of(line): line for line in sorted(found, key=lambda line: line.nfe_asked)}
    ends = {name: line.scores[score].mean for name, line in last.items()}
    ordered = sorted(names, key=lambda name: (-ends[name], name))
    return {name: style(index) for index, name in enumerate(ordered)}


Panel = tuple[str, Callable[[Line], bool]]


def _panels(
    path: Path,
    found: Sequence[Line],
    *,
    rows: Sequence[tuple[str, str, Callable[[Line], bool]]],
    columns: Sequence[Panel],
    name_of: Callable[[Line], str],
    floors: Mapping[str, Score],
    title: str,
) -> None:
    """A grid of panels of curves, the names of each row's curves beside it.

    Args:
      rows: (name, score, which lines) of each row of panels.
      columns: (name, which lines) of each column.
      name_of: what a curve is called; the same name has the same look in a row.
    """
    plt = pyplot()
    from matplotlib import ticker

    figure, axes = plt.subplots(
        len(rows),
        len(columns),
        figsize=((3.1 if len(columns) < 5 else 2.5) * len(columns) + 2.6, 3.3 * len(rows) + 0.4),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    ticks = sorted({line.nfe_asked for line in found})
    looks: dict[str, dict[str, Any]] = {}
    for row, (row_name, score, in_row) in zip(axes, rows, strict=True):
        here = [line for line in found if in_row(line) and score in line.scores]
        shown = [line for line in here if any(inside(line) for _, inside in columns)]
        looks = _looks(shown, score, name_of, looks)
        names = list(looks)
        floor = floors.get(score)
        for ax, (column_name, inside) in zip(row, columns, strict=True):
            for name in names:
                curve = [line for line in shown if inside(line) and name_of(line) == name]
                _curve(ax, curve, score, {**looks[name], "label": name})
            _log_axes(ax, ticks)
            if floor is not None:
                ax.axhspan(1e-12, floor.mean, color="0.85", lw=0, zorder=0)
            if ax in axes[0]:
                ax.set_title(column_name, fontsize=10)
            if ax in axes[-1]:
                ax.set_xlabel("network calls")
        low, high = _bounds(shown, score, floor)
        row[0].set_ylim(low, high)
        if high < 100 * low:
            row[0].yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            row[0].yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
        label = LABELS.get(score, score)
        row[0].set_ylabel(f"{row_name}\n{label}" if row_name else label, fontsize=9)
        handles = [plt.Line2D([], [], **looks[name]) for name in names]
        if floor is not None:
            handles.append(plt.Rectangle((0, 0), 1, 1, color="0.85"))
        row[-1].legend(
            handles,
            [*names, *(["two true sets"] if floor is not None else [])],
            loc="center left",
            bbox_to_anchor=(1.02, 0.5),
            fontsize=8,
            frameon=False,
            handlelength=2.6,
        )
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _many(found: Sequence[Line], key: Callable[[Line], Any], of: Callable[[Line], Any]) -> list:
    """Values of `key` with three or more values of `of`, those with most first."""
    groups: dict[Any, set] = {}
    for line in found:
        groups.setdefault(key(line), set()).add(of(line))
    most = sorted((k for k in groups if len(groups[k]) > 2), key=lambda k: -len(groups[k]))
    return most[:MAX_COLUMNS]


def sampler_curves(path: Path, found: Sequence[Line], floors: Mapping[str, Score]) -> bool:
    """Error against network calls of every sampler, on the pairs of schedule and grid with most.

    Returns:
      whether there were enough samplers for a picture.
    """
    pairs = _many(found, lambda line: (line.schedule, line.grid), lambda line: line.sampler)
    most = max(
        (len({s.sampler for s in found if (s.schedule, s.grid) == pair}) for pair in pairs),
        default=0,
    )
    pairs = [
        p for p in pairs if 2 * len({s.sampler for s in found if (s.schedule, s.grid) == p}) > most
    ]
    if not pairs:
        return False
    deterministic = {line.sampler for line in found if "rms_error" in line.scores}
    rows = [
        ("deterministic", "rms_error", lambda line: line.sampler in deterministic),
        ("deterministic", "sliced_wasserstein", lambda line: line.sampler in deterministic),
        ("stochastic", "sliced_wasserstein", lambda line: line.sampler not in deterministic),
    ]
    in_pairs = [line for line in found if (line.schedule, line.grid) in pairs]
    rows = [row for row in rows if any(row[1] in s.scores and row[2](s) for s in in_pairs)]
    _panels(
        path,
        found,
        rows=rows,
        columns=[
            (
                f"{schedule}, {grid}",
                lambda line, pair=(schedule, grid): (line.schedule, line.grid) == pair,
            )
            for schedule, grid in pairs
        ],
        name_of=lambda line: line.sampler,
        floors=floors,
        title="Samplers on an exact denoiser; bands: 95 % confidence over seeds",
    )
    return True


def schedule_curves(path: Path, found: Sequence[Line], floors: Mapping[str, Score]) -> bool:
    """Error against network calls of every schedule, a column a grid and a row a sampler.

    Returns:
      whether there were enough schedules for a picture.
    """
    samplers = _many(found, lambda line: line.sampler, lambda line: line.schedule)
    if not samplers:
        return False
    chosen = [line for line in found if line.sampler in samplers]
    grids = list(dict.fromkeys(line.grid for line in chosen))[:MAX_COLUMNS]
    _panels(
        path,
        chosen,
        rows=[
            (name, "sliced_wasserstein", lambda line, name=name: line.sampler == name)
            for name in samplers
        ],
        columns=[(grid, lambda line, grid=grid: line.grid == grid) for grid in grids],
        name_of=lambda line: line.schedule,
        floors=floors,
        title="Schedules and grids on an exact denoiser; bands: 95 % confidence over seeds",
    )
    return True


def run_curves(path: Path, found: Sequence[Line], floors: Mapping[str, Score]) -> None:
    """Fréchet distance against network calls of trained runs, a column a run."""
    runs = list(dict.fromkeys(line.run for line in found))[:MAX_COLUMNS]

    def title(run: str) -> str:
        line = next(line for line in found if line.run == run)
        return f"{Path(run).name}: {line.parameterization}, {line.weight}"

    _panels(
        path,
        found,
        rows=[("", "frechet_train", lambda line: True)],
        columns=[(title(run), lambda line, run=run: line.run == run) for run in runs],
        name_of=lambda line: f"{line.sampler}, {line.grid}",
        floors=floors,
        title="Trained networks; grey: below the distance of real held-out data",
    )


def _mark(index: int) -> dict[str, str]:
    return {"marker": MARKERS[index % len(MARKERS)], "color": COLOURS[index % len(COLOURS)]}


def log_snr_density(
    path: Path, schedules: Mapping[str, NoiseSchedule], grids: Sequence[str], *, num_steps: int = 10
) -> None:
    """Where each schedule trains, as a density of log-SNR, and where each grid calls the network.

    Args:
      schedules: by name, one row each.
      grids: names in TIMESTEPS; a grid that does not exist on a schedule is left out there.
      num_steps: of the grids.
    """
    plt = pyplot()
    low, high = -22.0, 22.0
    edges = np.linspace(low, high, 177)
    keys = image_keys(0, range(20_000))
    figure, axes = plt.subplots(
        len(schedules),
        1,
        figsize=(9.5, (0.5 + 0.06 * len(grids)) * len(schedules) + 1.4),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for ax, (name, schedule) in zip(axes[:, 0], schedules.items(), strict=True):
        with np.errstate(divide="ignore"):
            values = np.asarray(log_snr(schedule(jnp.asarray(schedule.sample_t(keys)))))
        density, _ = np.histogram(values, edges)
        density = density / density.max()
        ax.fill_between(edges[:-1], density, step="post", color="0.8", lw=0)
        ax.step(edges[:-1], density, where="post", color="0.35", lw=0.9)
        for index, grid in enumerate(grids):
            try:
                made = TIMESTEPS[grid](schedule, num_steps, max_steps=num_steps)
            except ValueError:
                continue
            with np.errstate(divide="ignore"):
                visited = np.asarray(log_snr(made.levels))[:num_steps]
            visited = visited[(visited > low) & (visited < high)]
            place = np.full(len(visited), -0.16 * (index + 1))
            ax.plot(visited, place, ls="", ms=3.2, clip_on=False, **_mark(index))
        ax.set_ylim(-0.16 * (len(grids) + 0.8), 1.08)
        ax.set_yticks([])
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        for side in ("top", "right", "left", "bottom"):
            ax.spines[side].set_visible(False)
        ax.tick_params(bottom=False)
        ax.grid(True, axis="x", color="0.92", lw=0.7)
        ax.set_axisbelow(True)
    axes[-1, 0].tick_params(bottom=True)
    axes[-1, 0].set_xlim(high, low)
    axes[-1, 0].set_xlabel("log-SNR, log(α² / σ²); noise to the right")
    handles = [plt.Rectangle((0, 0), 1, 1, color="0.8")] + [
        plt.Line2D([], [], ls="", ms=5, **_mark(index)) for index in range(len(grids))
    ]
    names = ["training times", *(f"{grid}, {num_steps} steps" for grid in grids)]
    figure.legend(handles, names, loc="outside upper center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
