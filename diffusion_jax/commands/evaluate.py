"""evaluate: scores, pictures and expectations of a trained run, written into its directory."""

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from diffusion_jax.commands import figures
from diffusion_jax.commands.gather import Gathered, gather
from diffusion_jax.commands.run import (
    check_same_model,
    num_classes,
    provenance,
    restore_params,
    stage_dir,
)
from diffusion_jax.commands.sample import make_batch_sampler
from diffusion_jax.commands.scores import Real, check_expected, compare, frame, summary, table
from diffusion_jax.configuration import to_dict
from diffusion_jax.core.types import Params
from diffusion_jax.data.sources import Source
from diffusion_jax.experiment import Experiment
from diffusion_jax.guidance import Unguided
from diffusion_jax.io.files import write_text
from diffusion_jax.metrics import load_reference, read_arrays, write_arrays
from diffusion_jax.systems import System

# Real images whose features are computed at once.
_CHUNK = 512
# An interrupted evaluation loses at most this much work.
SAVE_EVERY_SECONDS = 60.0


def real_data(experiment: Experiment, *, judged: bool | None = None) -> Real:
    """What real training and held-out data look like, with the oracle if there is one.

    Args:
      judged: whether an oracle judges; None for where the system is told labels.

    Raises:
      ValueError: if the data has no split "test".
    """
    if not hasattr(experiment.data, "split"):
        raise ValueError(
            f"{type(experiment.data).__name__} has no held-out split to compare with; evaluate an "
            "experiment on digits, shapes or a TFDS set"
        )
    labelled = num_classes(experiment) is not None
    judged = labelled if judged is None else judged
    fit = getattr(experiment.data, "oracle", None)
    oracle = fit() if fit and judged else None
    features = experiment.evaluation.features.build()
    system = experiment.system
    shape = (system.image_size, system.image_size, system.channels)
    splits, labels = {}, []
    for split in ("train", "test"):
        source = replace(experiment.data, split=split).source()
        chunks = _chunks(source, labelled or judged, labels if split == "train" else [])
        splits[split] = gather(chunks, features=features, shape=shape, oracle=oracle)
    return Real(splits["train"], splits["test"], np.concatenate(labels), features, oracle)


def _chunks(
    source: Source, labelled: bool, seen: list[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(source), _CHUNK):
        examples = [source[i] for i in range(start, min(start + _CHUNK, len(source)))]
        labels = np.asarray([e["label"] if labelled else 0 for e in examples], np.int32)
        seen.append(labels)
        yield np.stack([example["image"] for example in examples]), labels


def draw_all(
    experiment: Experiment, system: System, params: Params, *, real: Real, folder: Path
) -> Iterator[tuple[str, Gathered]]:
    """Draws the evaluation's images, one set per guidance scale, batch by batch.

    What is known so far is stored in `folder` every minute and at the end, from where an
    interrupted evaluation goes on.

    Yields:
      (name of the row, what was gathered): "scale 1", … or "samples" without guidance.
    """
    config, sampler = experiment.evaluation, make_batch_sampler(system)
    count = config.num_samples or len(real.train_labels)
    labels = np.resize(real.train_labels, count)
    guided = not isinstance(getattr(experiment.system, "guidance", Unguided()), Unguided)
    for scale in config.scales if guided else (None,):
        name = "samples" if scale is None else f"scale {scale:g}"
        path = folder / f"{name.replace(' ', '_')}.npz"
        gathered = Gathered.nothing(real.features.feature, real.train.images.shape[1:])
        if path.exists():
            gathered = gathered.resumed(read_arrays(path))
        batches = sampler(
            params,
            {"label": labels},
            seed=config.seed,
            batch_size=config.batch_size,
            first=gathered.count,
            guide=None if scale is None else experiment.system.guide(scale),
            progress=name,
        )
        saved = time.monotonic()
        for images in batches:
            asked = labels[gathered.count : gathered.count + len(images)]
            gathered = gathered.update(images, asked, features=real.features, oracle=real.oracle)
            done = gathered.count == count
            if done or time.monotonic() - saved >= SAVE_EVERY_SECONDS:
                write_arrays(path, gathered.to_dict())
                saved = time.monotonic()
        yield name, gathered


def _partial_folder(workdir: Path, settings: Mapping) -> Path:
    """The folder of an unfinished evaluation, emptied if it was one with other settings."""
    folder = workdir / "evaluation"
    path = folder / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    write_text(path, json.dumps(settings, indent=2) + "\n")
    return folder


def evaluate(experiment: Experiment, workdir: Path) -> dict:
    """Draws, scores, and writes metrics.json with samples.png, guidance.png and loss.png.

    Images are drawn over all devices and never held all at once. An evaluation that was
    interrupted goes on from what it stored last, with the same result.

    Returns:
      what metrics.json holds: settings, machine, seconds, rows and summary. Scores that are
      there already, of the same checkpoint and settings, are read and not drawn again.

    Raises:
      ValueError: if there is no checkpoint, the experiment means another network, or the data
        have no held-out split.
    """
    check_same_model(experiment, workdir)
    system = experiment.system.build()
    steps, params = restore_params(workdir, system)
    values = to_dict(experiment)
    settings = {"steps": steps, **{key: values[key] for key in ("system", "data", "evaluation")}}
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
    reference = experiment.evaluation.reference
    reference = load_reference(reference) if reference else None
    rows, shown = frame(real), None
    folder = _partial_folder(workdir, settings)
    for name, gathered in draw_all(experiment, system, params, real=real, folder=folder):
        rows[name] = compare(gathered, real)
        if reference is not None:
            rows[name]["frechet_reference"] = gathered.stream.frechet(reference).value
        if shown is None or name == _shown(rows):
            shown = name, gathered
    name, gathered = shown
    figures.class_sheet(
        workdir / "samples.png",
        {"image": real.test.images, "label": real.test.labels},
        {"image": gathered.images, "label": gathered.labels},
        title=f"generated, {name}",
    )
    if any(row.startswith("scale ") for row in rows):
        figures.guidance_curves(workdir / "guidance.png", rows)
    for stage in system.stages:
        run = stage_dir(workdir, system, stage)
        figures.loss_curve(run / "loss.png", run / "metrics.jsonl")
    report = {
        "settings": settings,
        "frechet": real.features.feature.frechet_label,
        "machine": provenance(),
        "seconds": round(time.time() - start, 1),
        "rows": rows,
        "summary": summary(rows),
    }
    write_text(path, json.dumps(report, indent=2) + "\n")
    shutil.rmtree(folder)
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
    print(f"frechet: {report['frechet']}")
    print(table(report["rows"]))
    checked = check_expected(report["summary"], expected)
    for name, value, (low, high), inside in checked:
        verdict = "ok" if inside else "NOT MET"
        print(f"{name:28} measured {value:8.3f}   expected {low:g} to {high:g}   {verdict}")
    return all(row[-1] for row in checked)
