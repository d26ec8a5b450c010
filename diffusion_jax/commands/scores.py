"""Scores of generated images against real ones, and the table that shows them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusion_jax.commands.gather import Gathered, gather
from diffusion_jax.metrics import (
    FeatureFn,
    frechet_distance,
    nearest_ratio,
    precision_recall,
    squared_mmd,
)


@dataclass(frozen=True)
class Real:
    """Real data to compare with.

    Attributes:
      train, test: what was gathered of both splits.
      train_labels: [N] of all training images: the shares in which classes are drawn.
      features: what images are compared by.
      oracle: a classifier with `predict(images)`, or None.
    """

    train: Gathered
    test: Gathered
    train_labels: np.ndarray
    features: FeatureFn
    oracle: Any = None

    def score(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The scores of images [N, H, W, C] drawn for labels [N], see `compare`."""
        gathered = gather(
            [(images, labels)],
            features=self.features,
            shape=images.shape[1:],
            oracle=self.oracle,
        )
        return compare(gathered, self)


def compare(drawn: Gathered, real: Real) -> dict[str, float]:
    """Scores of images against real training and held-out data.

    Returns:
      num_samples; frechet_train and frechet_test: Fréchet distance to both splits over the
      features that were gathered; kernel_train: squared kernel distance (MMD²) to the training
      split, unbiased, over the images that were kept; precision and recall against equally many
      training images, at most 10,000; nearest_ratio: median distance to the nearest training
      image over that of held-out images; accuracy if there is an oracle.
    """
    fake, train, test = (g.stream.features for g in (drawn, real.train, real.test))
    count = min(len(fake), len(train))
    manifold = precision_recall(train[:count], fake[:count], k=3)
    scores = {
        "num_samples": drawn.count,
        "frechet_train": frechet_distance(drawn.stream.stats, real.train.stream.stats),
        "frechet_test": frechet_distance(drawn.stream.stats, real.test.stream.stats),
        "kernel_train": squared_mmd(fake, train),
        "precision": manifold.precision,
        "recall": manifold.recall,
        "nearest_ratio": nearest_ratio(fake, train, test),
    }
    if real.oracle is not None:
        scores["accuracy"] = drawn.correct / drawn.count
    return {name: float(value) for name, value in scores.items()}


def frame(real: Real) -> dict[str, dict[str, float]]:
    """The rows that frame a table: real held-out data as ceiling, shuffled labels as floor."""
    held_out = compare(real.test, real)
    # Compared with themselves they would score perfectly; precision and recall depend on the
    # number of images, which is another one than that of the generated.
    meaningless = ("frechet_test", "precision", "recall")
    rows = {"held-out": {k: v for k, v in held_out.items() if k not in meaningless}}
    if real.oracle is not None:
        rows["shuffled labels"] = {"accuracy": real.test.correct_shuffled / real.test.count}
    return rows


def summary(rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The scores that `Experiment.expected` may bound.

    Returns:
      "ROW/SCORE" for every score; over the rows of generated images min_nearest_ratio,
      best_frechet_train_ratio and best_frechet_test_ratio (smallest Fréchet distance over that
      between real splits); with scales best_scale_train and best_scale_test, where it is
      smallest, and recall_drop, recall at scale 1 minus recall at scale 3 if both were drawn.
    """
    scores = {
        f"{row}/{key}": value for row, values in rows.items() for key, value in values.items()
    }
    drawn = {row: values for row, values in rows.items() if row.startswith(("scale ", "samples"))}
    scores["min_nearest_ratio"] = min(values["nearest_ratio"] for values in drawn.values())
    real = rows["held-out"]["frechet_train"]
    for split in ("train", "test"):
        best = min(drawn, key=lambda row: drawn[row][f"frechet_{split}"])
        scores[f"best_frechet_{split}_ratio"] = drawn[best][f"frechet_{split}"] / real
        if best.startswith("scale "):
            scores[f"best_scale_{split}"] = float(best.removeprefix("scale "))
    if {"scale 1", "scale 3"} <= set(drawn):
        scores["recall_drop"] = drawn["scale 1"]["recall"] - drawn["scale 3"]["recall"]
    return scores


def check_expected(
    scores: Mapping[str, float], expected: Mapping[str, tuple[float, float]]
) -> list[tuple[str, float, tuple[float, float], bool]]:
    """(name, measured, (low, high), inside) for every expected score.

    Raises:
      ValueError: if an expected score was not measured.
    """
    missing = sorted(set(expected) - set(scores))
    if missing:
        raise ValueError(f"expected scores {missing} were not measured; there are {sorted(scores)}")
    return [
        (name, scores[name], (low, high), low <= scores[name] <= high)
        for name, (low, high) in expected.items()
    ]


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Rows as text, one score a column; what a row has not stays empty."""
    longest_first = sorted(rows.values(), key=len, reverse=True)
    names = list(dict.fromkeys(name for values in longest_first for name in values))
    width = max(len(row) for row in rows)

    def cell(values, name):
        if name not in values:
            return " " * 13
        return f"{values[name]:13.0f}" if name == "num_samples" else f"{values[name]:13.3f}"

    lines = [" " * width + "".join(f" {name:>13}" for name in names)]
    for row, values in rows.items():
        lines.append(f"{row:{width}}" + "".join(f" {cell(values, name)}" for name in names))
    return "\n".join(lines)
