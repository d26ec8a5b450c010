"""What several proofs measure."""

from collections.abc import Mapping

import numpy as np

from diffusion_jax.commands.proof import Bench


def within_class_variance(images: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes of the summed variance of the pixels of a class's images."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    return float(np.mean([flat[labels == k].var(axis=0).sum() for k in np.unique(labels)]))


def variance_ratio(bench: Bench, images: np.ndarray, labels: np.ndarray) -> float:
    """Within-class variance of images over that of the real training data; inf if it diverged."""
    if not np.isfinite(images).all():
        return float("inf")
    real = bench.splits["train"]
    return within_class_variance(images, labels) / within_class_variance(
        real["image"], real["label"]
    )


def real_rows(bench: Bench) -> dict[str, float]:
    """The frame of every table: real held-out data as ceiling, shuffled labels as floor."""
    test, oracle = bench.splits["test"], bench.real.oracle
    shuffled = np.random.default_rng(0).permutation(test["label"])
    return {
        "frechet_train": bench.score(test["image"], test["label"])["frechet_train"],
        "accuracy": oracle.accuracy(test["image"], test["label"]),
        "confident": float(np.mean(oracle.confidence(test["image"]) >= 0.8)),
        "shuffled_accuracy": oracle.accuracy(test["image"], shuffled),
    }


def drop(scores: Mapping[str, float], score: str, before: str, after: str) -> float:
    """By how much a score falls from one row to another."""
    return scores[f"{before}/{score}"] - scores[f"{after}/{score}"]
