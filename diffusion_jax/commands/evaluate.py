"""evaluate: scores, pictures and expectations of a trained run, written into its directory."""

import json
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

import diffusion_jax
from diffusion_jax.commands import figures
from diffusion_jax.commands.run import (
    build_stage,
    check_same_model,
    num_classes,
    restore_params,
)
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
from diffusion_jax.guidance import ClassifierFree
from diffusion_jax.io.files import write_text
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
    guided = isinstance(getattr(experiment.system, "guidance", None), ClassifierFree)
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
      what metrics.json holds: settings, machine, seconds, rows and summary. Scores that are
      there already, of the same checkpoint and settings, are read and not drawn again.

    Raises:
      ValueError: if there is no checkpoint, the experiment means another network, or the data
        have no held-out split.
    """
    check_same_model(experiment, workdir)
    stage = build_stage(experiment)
    step, params = restore_params(workdir)
    values = to_dict(experiment)
    settings = {"step": step, **{key: values[key] for key in ("system", "data", "evaluation")}}
    path = workdir / "metrics.json"
    if path.exists():
        report = json.loads(path.read_text())
        if report["settings"] == settings:
            print(f"{path} is there already for this checkpoint and these settings")
            return report
    # Missing plotting libraries should show before the work, not after it.
    figures.pyplot()

    start = time.time()
    real = real_data(experiment)
    count = experiment.evaluation.num_samples or len(real.train["image"])
    labels = np.resize(real.train["label"], count)
    rows, sheet = frame(real), None
    for name, images in draw_all(experiment, stage, params, labels):
        rows[name] = compare(images, labels, real)
        if sheet is None or name == _shown(rows):
            sheet = name, images
    name, images = sheet
    drawn = {"image": images, "label": labels}
    figures.class_sheet(workdir / "samples.png", real.test, drawn, title=f"generated, {name}")
    if any(row.startswith("scale ") for row in rows):
        figures.guidance_curves(workdir / "guidance.png", rows)
    figures.loss_curve(workdir / "loss.png", workdir / "metrics.jsonl")
    report = {
        "settings": settings,
        "machine": machine(),
        "seconds": round(time.time() - start, 1),
        "rows": rows,
        "summary": summary(rows),
    }
    write_text(path, json.dumps(report, indent=2) + "\n")
    return report


def _shown(rows: dict) -> str:
    """The row whose images are shown: the one nearest to the real held-out data."""
    drawn = [row for row in rows if row.startswith(("scale ", "samples"))]
    return min(drawn, key=lambda row: rows[row]["frechet_test"])


def show(report: dict, expected: Mapping[str, tuple[float, float]]) -> bool:
    """Prints the table and the expectations; whether all of them hold.

    Raises:
      ValueError: if an expected score was not measured.
    """
    print(table(report["rows"]))
    checked = check_expected(report["summary"], expected)
    for name, value, (low, high), inside in checked:
        verdict = "ok" if inside else "NOT MET"
        print(f"{name:28} measured {value:8.3f}   expected {low:g} to {high:g}   {verdict}")
    return all(row[-1] for row in checked)
