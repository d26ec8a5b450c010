"""evaluate: scores, pictures and expectations of a trained run, written into its directory."""

import json
import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

import diffusion_jax
from diffusion_jax.commands.run import build_stage, num_classes, restore_params
from diffusion_jax.commands.sample import make_sampler
from diffusion_jax.commands.scores import (
    Reference,
    check_expected,
    compare,
    frame,
    summary,
    table,
)
from diffusion_jax.configuration import to_dict
from diffusion_jax.core.types import Params
from diffusion_jax.data.sources import take
from diffusion_jax.experiment import Experiment
from diffusion_jax.systems import Stage


def real_data(experiment: Experiment) -> Reference:
    """Training and held-out data of an experiment, with the data set's oracle if there is one.

    Raises:
      ValueError: if the data has no split "test".
    """
    if not hasattr(experiment.data, "split"):
        raise ValueError(
            f"{type(experiment.data).__name__} has no held-out split to compare with; evaluate an "
            "experiment on digits, shapes or a TFDS set"
        )
    splits = {}
    for split in ("train", "test"):
        source = replace(experiment.data, split=split).source()
        keys = ("image",) if num_classes(experiment) is None else ("image", "label")
        splits[split] = take(source, len(source), keys)
        splits[split].setdefault("label", np.zeros(len(source), np.int32))
    fit = getattr(experiment.data, "oracle", None)
    conditional = num_classes(experiment) is not None
    return Reference(splits["train"], splits["test"], fit() if fit and conditional else None)


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    device = jax.devices()[0]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{jax.device_count()} x {device.device_kind}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "diffusion_jax": diffusion_jax.__version__,
    }


def draw_all(
    experiment: Experiment, stage: Stage, params: Params, labels: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    """Draws the evaluation's images, one set per guidance scale.

    Yields:
      (name of the row, images [N, H, W, C]): "scale 1", … or "samples" without guidance.
    """
    config, sampler = experiment.evaluation, make_sampler(stage)
    guided = hasattr(experiment.system, "guide")
    for scale in config.scales if guided else (None,):
        name = "samples" if scale is None else f"scale {scale:g}"
        images = sampler(
            params,
            {"label": labels},
            seed=config.seed,
            batch_size=config.batch_size,
            guide=None if scale is None else experiment.system.guide(scale),
            progress=name,
        )
        yield name, images


def evaluate(experiment: Experiment, workdir: Path) -> dict:
    """Draws, scores, and writes metrics.json with samples.png, guidance.png and loss.png.

    Returns:
      what metrics.json holds: machine, step, seconds, rows, summary, and expected as a list of
      [name, measured, low, high, inside]. An evaluation that is there already, of the same
      checkpoint and settings, is read and not repeated.

    Raises:
      ValueError: if there is no checkpoint, or the data has no held-out split.
    """
    step, params = restore_params(workdir)
    path = workdir / "metrics.json"
    settings = {"step": step, **to_dict(experiment.evaluation)}
    if path.exists():
        report = json.loads(path.read_text())
        if report["settings"] == settings:
            print(f"{path} is there already for this checkpoint and these settings")
            return report
    from diffusion_jax.commands import figures

    start = time.time()
    real = real_data(experiment)
    count = experiment.evaluation.num_samples or len(real.train["image"])
    labels = np.resize(real.train["label"], count)
    rows, sheet = frame(real), None
    for name, images in draw_all(experiment, build_stage(experiment), params, labels):
        rows[name] = compare(images, labels, real)
        if sheet is None or name == _shown(rows):
            sheet = name, images
    scores = summary(rows)
    report = {
        "settings": settings,
        "machine": machine(),
        "seconds": round(time.time() - start, 1),
        "rows": rows,
        "summary": scores,
        "expected": [
            [name, value, *bounds, inside]
            for name, value, bounds, inside in check_expected(scores, experiment.expected)
        ],
    }
    name, images = sheet
    drawn = {"image": images, "label": labels}
    figures.class_sheet(workdir / "samples.png", real.test, drawn, title=f"generated, {name}")
    if any(row.startswith("scale ") for row in rows):
        figures.guidance_curves(workdir / "guidance.png", rows)
    figures.loss_curve(workdir / "loss.png", workdir / "metrics.jsonl")
    path.write_text(json.dumps(report, indent=2) + "\n")
    return report


def _shown(rows: dict) -> str:
    """The row whose images are shown: the one nearest to the real held-out data."""
    drawn = [row for row in rows if row.startswith(("scale ", "samples"))]
    return min(drawn, key=lambda row: rows[row]["frechet_test"])


def show(report: dict) -> bool:
    """Prints the table and the expectations; whether all of them hold."""
    print(table(report["rows"]))
    for name, value, low, high, inside in report["expected"]:
        verdict = "ok" if inside else "NOT MET"
        print(f"{name:28} measured {value:8.3f}   expected {low:g} to {high:g}   {verdict}")
    return all(row[-1] for row in report["expected"])
