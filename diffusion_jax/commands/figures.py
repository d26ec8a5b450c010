"""Figures: sample sheets, curves over guidance scale, and training loss, as PNG files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.data.transforms import image_grid


def _show(axes, picture: np.ndarray) -> None:
    axes.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _framed(images: np.ndarray) -> np.ndarray:
    """A border of one dark pixel, so that neighbours in a sheet stay apart."""
    return np.pad(np.clip(images, -1, 1), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1.0)


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files.

    Raises:
      ModuleNotFoundError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures need matplotlib: pip install 'diffusion_jax[demo]'"
        ) from error

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def class_sheet(
    path: Path,
    real: Mapping[str, np.ndarray],
    generated: Mapping[str, np.ndarray],
    *,
    title: str,
    num_real: int = 6,
    num_generated: int = 12,
) -> None:
    """A row per class: real images on the left, generated ones on the right.

    Args:
      real, generated: image [N, H, W, C] in [-1, 1] and label [N]. Where a class has fewer
        images than there are columns, the rest of its row stays empty.
    """
    plt = pyplot()
    classes = np.unique(generated["label"])
    halves = []
    for part, count in ((real, num_real), (generated, num_generated)):
        cells = np.full((len(classes), count, *part["image"].shape[1:]), -1.0, np.float32)
        for row, label in enumerate(classes):
            chosen = part["image"][part["label"] == label][:count]
            cells[row, : len(chosen)] = chosen
        halves.append(image_grid(_framed(cells.reshape(-1, *cells.shape[2:])), columns=count))
    widths = [num_real, num_generated]
    height = 0.55 * len(classes) + 0.6
    figure, axes = plt.subplots(
        1, 2, figsize=(0.55 * sum(widths) + 0.8, height), width_ratios=widths, layout="constrained"
    )
    for ax, picture, name in zip(axes, halves, ("real", title), strict=True):
        _show(ax, picture)
        ax.set_title(name, fontsize=11)
    cell = halves[0].shape[0] / len(classes)
    axes[0].set_yticks((np.arange(len(classes)) + 0.5) * cell - 0.5, [str(c) for c in classes])
    axes[0].tick_params(length=0)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def named_sheets(path: Path, sheets: Mapping[str, np.ndarray], *, columns: int) -> None:
    """Sheets of images, one below the other, each with its name on the left.

    Args:
      sheets: images [N, H, W, C] in [-1, 1] by name.
      columns: images in a row.
    """
    plt = pyplot()
    pictures = [image_grid(_framed(images), columns=columns) for images in sheets.values()]
    heights = [picture.shape[0] / picture.shape[1] for picture in pictures]
    figure, axes = plt.subplots(
        len(sheets),
        1,
        figsize=(6.0, 0.12 * len(sheets) + 4.4 * sum(heights)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for ax, name, picture in zip(axes[:, 0], sheets, pictures, strict=True):
        _show(ax, picture)
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    # Long names would be cut.
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def guidance_curves(path: Path, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Oracle accuracy, recall and Fréchet distance against guidance scale."""
    plt = pyplot()
    drawn = {float(k.removeprefix("scale ")): v for k, v in rows.items() if k.startswith("scale ")}
    scales, real = sorted(drawn), rows["held-out"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for name, colour in (("accuracy", "C0"), ("recall", "C1")):
        if name in drawn[scales[0]]:
            axes[0].plot(scales, [drawn[s][name] for s in scales], "o-", color=colour, label=name)
    if "accuracy" in real:
        axes[0].axhline(real["accuracy"], color="C0", ls=":", label="accuracy on real held-out")
        floor = rows["shuffled labels"]["accuracy"]
        axes[0].axhline(floor, color="0.6", ls=":", label="accuracy on shuffled labels")
    axes[0].set_ylim(0, 1.05)
    for split, colour in (("train", "C2"), ("test", "C3")):
        values = [drawn[s][f"frechet_{split}"] for s in scales]
        axes[1].plot(scales, values, "o-", color=colour, label=f"to real {split}")
    axes[1].axhline(real["frechet_train"], color="0.6", ls=":", label="real test to real train")
    axes[1].set_ylabel("Fréchet distance over pixels")
    axes[1].set_ylim(bottom=0)
    for ax in axes:
        ax.set_xlabel("guidance scale")
        ax.set_xticks(scales)
        # Above the axes: inside, it would hide a curve of some runs.
        ax.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def loss_curve(path: Path, metrics: Path) -> None:
    """Training loss against step, out of a run's metrics.jsonl."""
    plt = pyplot()
    lines = metrics.read_text().splitlines(keepends=True)
    # A last line without an end was cut off by a kill or a full disk.
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    rows = [row for row in rows if row.get("loss") is not None]
    figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    ax.plot([row["step"] for row in rows], [row["loss"] for row in rows])
    ax.set_xlabel("step")
    ax.set_ylabel("training loss (mean since the last row)")
    ax.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)
    plt.close(figure)
