"""Evaluation: draw many images of a trained system and compare them with real ones."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from diffusion_jax.core.arrays import as_arrays, image_keys
from diffusion_jax.core.types import Batch, Params
from diffusion_jax.experiment import Experiment
from diffusion_jax.metrics import GaussianStats, frechet_distance, nearest_ratio, precision_recall
from diffusion_jax.systems import Stage
from diffusion_jax.training.parallel import make_mesh, mesh_sample

# Pixel features: the covariance is dense and its eigenvalues are found in float64 on the host.
MAX_PIXELS = 4096


def make_sampler(stage: Stage) -> Callable[..., np.ndarray]:
    """The stage's sampler, compiled once and run over every local device.

    Returns:
      (params, batch, *, seed, guide=None, sampler=None, grid=None, batch_size, start=0) ->
      images [N, H, W, C] float32. Image i depends on (seed, start + i) and batch["label"][i].
    """
    mesh = make_mesh()
    size = mesh.devices.size

    def draw(params, batch, keys, guide, sampler, grid):
        return stage.sample(params, batch, keys, guide=guide, sampler=sampler, grid=grid)

    compiled = mesh_sample(draw, mesh)

    def sample(
        params: Params,
        batch: Batch,
        *,
        seed: int,
        batch_size: int,
        guide: Any = None,
        sampler: Any = None,
        grid: Any = None,
        start: int = 0,
        progress: str | None = None,
    ) -> np.ndarray:
        total = len(batch["label"])
        batch_size = min(-(-batch_size // size) * size, -(-total // size) * size)
        guide = as_arrays(stage.guide if guide is None else guide)
        sampler = as_arrays(stage.sampler if sampler is None else sampler)
        grid = stage.grid if grid is None else grid
        images = []
        firsts = range(0, total, batch_size)
        for first in tqdm(firsts, desc=progress, disable=progress is None, leave=False):
            # The last batch is filled up to the compiled shape, and cut again below.
            indices = np.minimum(np.arange(first, first + batch_size), total - 1)
            part = {name: jnp.asarray(values[indices]) for name, values in batch.items()}
            keys = image_keys(seed, start + np.arange(first, first + batch_size))
            images.append(np.asarray(compiled(params, part, keys, guide, sampler, grid)))
        return np.concatenate(images)[:total]

    return sample


def load_all(source: Any) -> dict[str, np.ndarray]:
    """Every example of a random-access source, stacked: image [N, H, W, C], label [N]."""
    examples = [source[index] for index in range(len(source))]
    images = np.stack([example["image"] for example in examples])
    labels = [int(example.get("label", 0)) for example in examples]
    return {"image": images, "label": np.asarray(labels, np.int32)}


def _stats(images: np.ndarray) -> GaussianStats:
    stats = GaussianStats(int(np.prod(images.shape[1:])))
    stats.update(images.reshape(len(images), -1))
    return stats


def compare(
    images: np.ndarray, labels: np.ndarray, *, train: Mapping, test: Mapping, oracle: Any
) -> dict[str, float]:
    """Scores of images against real training and held-out data, over pixels as features.

    Args:
      images: [N, H, W, C] in [-1, 1].
      labels: [N], what was asked for.
      train, test: {"image", "label"} of real data.
      oracle: classifier of the data set, or None.

    Returns:
      frechet_train and frechet_test: Fréchet distance to both splits (over pixels, not FID);
      precision and recall against equally many training images; nearest_ratio: median
      distance to the nearest training image over that of held-out images; with an oracle
      accuracy.

    Raises:
      ValueError: if an image has more than 4096 values.
    """
    size = int(np.prod(images.shape[1:]))
    if size > MAX_PIXELS:
        raise ValueError(
            f"pixel features of {size} values are too many (at most {MAX_PIXELS}); evaluate on "
            "smaller images"
        )
    stats = _stats(images)
    count = min(len(images), len(train["image"]))
    real = train["image"][:count].reshape(count, -1)
    fake = images[:count].reshape(count, -1)
    precision, recall = precision_recall(real, fake, k=3)
    scores = {
        "frechet_train": frechet_distance(stats, _stats(train["image"])),
        "frechet_test": frechet_distance(stats, _stats(test["image"])),
        "precision": precision,
        "recall": recall,
        "nearest_ratio": nearest_ratio(fake, *(
            split["image"].reshape(len(split["image"]), -1) for split in (train, test)
        )),
    }
    if oracle is not None:
        scores["accuracy"] = oracle.accuracy(images, labels)
    return {name: float(value) for name, value in scores.items()}


def reference_rows(train: Mapping, test: Mapping, oracle: Any) -> dict[str, dict[str, float]]:
    """The rows that frame a table: real held-out data as ceiling, shuffled labels as floor."""
    rows = {"held-out": compare(test["image"], test["label"], train=train, test=test, oracle=oracle)}
    if oracle is not None:
        shuffled = np.random.default_rng(0).permutation(test["label"])
        rows["shuffled labels"] = {"accuracy": float(oracle.accuracy(test["image"], shuffled))}
    return rows


def evaluate(
    experiment: Experiment, stage: Stage, params: Params, *, train: Mapping, test: Mapping,
    oracle: Any,
) -> Iterator[tuple[float | None, np.ndarray, np.ndarray, dict[str, float]]]:
    """Draws and scores one set of images per guidance scale.

    Yields:
      (scale, images, labels, scores); scale is None for a system without guidance.
    """
    config = experiment.evaluation
    count = config.num_samples or len(train["image"])
    labels = np.resize(train["label"], count)
    sampler = make_sampler(stage)
    guided = hasattr(experiment.system, "guide")
    for scale in config.scales if guided else (None,):
        guide = experiment.system.guide(scale) if guided else None
        name = "samples" if scale is None else f"scale {scale:g}"
        images = sampler(
            params, {"label": labels}, seed=config.seed, guide=guide,
            batch_size=config.batch_size, progress=name,
        )
        yield scale, images, labels, compare(images, labels, train=train, test=test, oracle=oracle)


def check_expected(scores: Mapping[str, float], expected: Mapping) -> list[tuple[str, float, tuple, bool]]:
    """(name, measured, (low, high), inside) for every expected score.

    Raises:
      ValueError: if an expected score was not measured.
    """
    missing = sorted(set(expected) - set(scores))
    if missing:
        raise ValueError(f"expected scores {missing} were not measured; there are {sorted(scores)}")
    return [
        (name, scores[name], tuple(bounds), bounds[0] <= scores[name] <= bounds[1])
        for name, bounds in expected.items()
    ]
