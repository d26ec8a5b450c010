"""Scores of generated images against real ones, and the table that shows them."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusion_jax.metrics.frechet import GaussianStats, frechet_distance
from diffusion_jax.metrics.manifold import nearest_ratio, precision_recall

# Pixel features: the covariance is dense and its eigenvalues are found in float64 on the host.
MAX_PIXELS = 4096
# Precision and recall compare every image with every other one.
MAX_MANIFOLD = 10_000


@dataclass(frozen=True)
class Reference:
    """Real data to compare with.

    Attributes:
      train, test: image [N, H, W, C] and label [N] of both splits.
      oracle: a classifier with `accuracy(images, labels)`, or None.
    """

    train: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]
    oracle: Any = None

    @functools.cached_property
    def stats(self) -> dict[str, GaussianStats]:
        """Mean and covariance of the pixels of both splits."""
        splits = {"train": self.train, "test": self.test}
        return {name: GaussianStats.of(_flat(split["image"])) for name, split in splits.items()}


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)


def compare(images: np.ndarray, labels: np.ndarray, reference: Reference) -> dict[str, float]:
    """Scores of images against real training and held-out data, with pixels as features.

    Args:
      images: [N, H, W, C] in [-1, 1].
      labels: [N], what was asked for.
      reference: real data.

    Returns:
      num_samples; frechet_train and frechet_test: Fréchet distance to both splits (over
      pixels, not FID); precision and recall against equally many training images, at most
      10,000;
      nearest_ratio: median distance to the nearest training image over that of held-out
      images; accuracy if there is an oracle.

    Raises:
      ValueError: if an image has more than 4096 values.
    """
    fake, train, test = (
        _flat(images),
        _flat(reference.train["image"]),
        _flat(reference.test["image"]),
    )
    if fake.shape[1] > MAX_PIXELS:
        raise ValueError(
            f"pixel features of {fake.shape[1]} values are too many (at most {MAX_PIXELS}); "
            "evaluate a system with smaller images"
        )
    count = min(len(fake), len(train), MAX_MANIFOLD)
    stats = GaussianStats.of(fake)
    manifold = precision_recall(train[:count], fake[:count], k=3)
    scores = {
        "num_samples": len(fake),
        "frechet_train": frechet_distance(stats, reference.stats["train"]),
        "frechet_test": frechet_distance(stats, reference.stats["test"]),
        "precision": manifold.precision,
        "recall": manifold.recall,
        "nearest_ratio": nearest_ratio(fake, train, test),
    }
    if reference.oracle is not None:
        scores["accuracy"] = reference.oracle.accuracy(images, labels)
    return {name: float(value) for name, value in scores.items()}


def frame(reference: Reference) -> dict[str, dict[str, float]]:
    """The rows that frame a table: real held-out data as ceiling, shuffled labels as floor."""
    test = reference.test
    held_out = compare(test["image"], test["label"], reference)
    # Compared with themselves they would score perfectly; precision and recall depend on the
    # number of images, which is another one than that of the generated.
    meaningless = ("frechet_test", "precision", "recall")
    rows = {"held-out": {k: v for k, v in held_out.items() if k not in meaningless}}
    if reference.oracle is not None:
        shuffled = np.random.default_rng(0).permutation(test["label"])
        rows["shuffled labels"] = {"accuracy": reference.oracle.accuracy(test["image"], shuffled)}
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
