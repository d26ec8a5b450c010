"""Statistics of real data in a file, and distances to them that say what they are called."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion_jax.metrics.arrays import read_arrays, write_arrays
from diffusion_jax.metrics.features import POOL, SPATIAL, Feature
from diffusion_jax.metrics.frechet import Gaussian, GaussianStats, frechet_distance

_FORMAT = 1
_KEYS = ("format", "mean", "covariance", "count", "feature", "image_size", "source")


@dataclasses.dataclass(frozen=True)
class Reference:
    """Mean and covariance of the features of real data, and where they come from.

    Attributes:
      mean: [D] float64.
      covariance: [D, D] float64, unbiased.
      count: number of images; None where a foreign file does not say.
      feature: which features.
      image_size: (height, width) of the images before any resizing of the feature function.
      source: data set, split and preparation in words.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None
    feature: Feature
    image_size: tuple[int, int]
    source: str

    def __post_init__(self):
        dim = np.size(self.mean)
        if np.shape(self.mean) != (dim,) or np.shape(self.covariance) != (dim, dim) or not dim:
            raise ValueError(
                f"a reference needs mean [D] and covariance [D, D], got {np.shape(self.mean)} and "
                f"{np.shape(self.covariance)}"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("the mean or covariance of a reference is NaN or infinite")
        if not np.allclose(self.covariance, self.covariance.T, rtol=1e-5, atol=1e-8):
            raise ValueError("the covariance of a reference must be symmetric")
        if not self.source.strip():
            raise ValueError("source must say which data a reference was made of, got ''")


class FrechetScore(NamedTuple):
    """A Fréchet distance to a reference, with what is needed to compare it with others.

    Attributes:
      label: "FID", "sFID" or "Fréchet distance over …".
      value: the distance, at least 0.
      num_samples: images that were compared; the distance is biased upwards by about 1/N.
      num_reference: images of the reference, None if unknown.
      feature: which features.
      source: what the reference was made of.
    """

    label: str
    value: float
    num_samples: int
    num_reference: int | None
    feature: Feature
    source: str


def save_reference(
    path: str | Path,
    stats: GaussianStats,
    *,
    feature: Feature,
    image_size: tuple[int, int],
    source: str,
) -> Reference:
    """Writes statistics of real data with the declaration of what they are.

    Args:
      path: a file whose name ends in ".npz".
      stats: features of at least two images.
      feature: `feature` of the function that made them. Real pictures must have been rounded
        to the nearest of 8 bits, which changes nothing; truncating would darken them.
      image_size: (height, width) of the images given to that function.
      source: data set, split and preparation: "cifar10, train, 50000 images".

    Returns:
      What `load_reference` will return.

    Raises:
      ValueError: if there are too few images, or a description is empty.
    """
    size = (int(image_size[0]), int(image_size[1]))
    reference = Reference(stats.mean, stats.covariance, stats.count, feature, size, source)
    write_arrays(
        path,
        {
            "format": np.asarray(_FORMAT),
            "mean": reference.mean,
            "covariance": reference.covariance,
            "count": np.asarray(stats.count),
            "feature": np.asarray(list(feature)),
            "image_size": np.asarray(size),
            "source": np.asarray(source),
        },
    )
    return reference


def load_reference(path: str | Path) -> Reference:
    """Reads what `save_reference` wrote.

    Raises:
      ValueError: if the file is another, of another format, or damaged. Files of other
        programs are read by `load_foreign_reference`.
    """
    arrays = read_arrays(path, *_KEYS)
    if int(arrays["format"]) != _FORMAT:
        raise ValueError(f"{path}: format {int(arrays['format'])} is unknown, expected {_FORMAT}")
    if arrays["feature"].shape != (len(Feature._fields),) or arrays["image_size"].shape != (2,):
        raise ValueError(
            f"{path}: feature must have {len(Feature._fields)} entries and image_size 2, got "
            f"{arrays['feature'].shape} and {arrays['image_size'].shape}"
        )
    height, width = map(int, arrays["image_size"])
    return Reference(
        arrays["mean"],
        arrays["covariance"],
        int(arrays["count"]),
        Feature(*map(str, arrays["feature"])),
        (height, width),
        str(arrays["source"]),
    )


def load_foreign_reference(
    path: str | Path,
    *,
    feature: Feature,
    image_size: tuple[int, int],
    source: str,
    count: int | None = None,
) -> Reference:
    """Reads statistics of ADM's evaluator or of pytorch-fid, whose files do not say what they are.

    They hold mu and sigma over Inception's pool3, ADM's also mu_s and sigma_s over its spatial
    features; which of them is read follows from `feature.name`.

    Args:
      path: a .npz file.
      feature: the caller's declaration of what the statistics were made of. ADM's files are
        of the variant "tf-2015", those of the script pytorch-fid of "pytorch-fid".
      image_size: (height, width) of the images.
      source: data set, split and preparation.
      count: number of images if known.

    Raises:
      ValueError: if the feature is none of Inception's, or the file has no such statistics.
    """
    keys = {POOL: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}.get(feature.name)
    if keys is None:
        raise ValueError(
            f"such files hold statistics over {POOL!r} or {SPATIAL!r}, got {feature.name!r}"
        )
    arrays = read_arrays(path, *keys)
    mean, covariance = (np.asarray(arrays[key], np.float64) for key in keys)
    size = (int(image_size[0]), int(image_size[1]))
    return Reference(mean, covariance, count, feature, size, source)


def load_foreign_images(path: str | Path) -> np.ndarray:
    """The images arr_0 of a file of ADM's evaluator, samples or reference.

    Returns:
      [N, H, W, 3] uint8; x / 127.5 - 1 brings a batch of them to [-1, 1].

    Raises:
      ValueError: if the file has no images, or they are no 8-bit colours.
    """
    images = read_arrays(path, "arr_0")["arr_0"]
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(
            f"{path}: arr_0 must be uint8 [N, H, W, 3], got {images.dtype} {images.shape}"
        )
    return images


def check_comparable(feature: Feature, image_size: tuple[int, int], reference: Reference) -> None:
    """Refuses to compare numbers that only look alike.

    Raises:
      ValueError: if the feature, its variant, its resizing or the image size differ.
    """
    ours, theirs = feature._asdict(), reference.feature._asdict()
    ours["image_size"], theirs["image_size"] = tuple(image_size), reference.image_size
    different = [
        f"{key} {value!r} against {theirs[key]!r}"
        for key, value in ours.items()
        if value != theirs[key]
    ]
    if different:
        raise ValueError(
            f"samples and the reference ({reference.source}) do not compare: "
            f"{', '.join(different)}. Make a reference of the same real data with this feature "
            "function, or choose the function that the reference declares"
        )


def frechet_score(
    samples: Gaussian,
    reference: Reference,
    *,
    num_samples: int,
    feature: Feature,
    image_size: tuple[int, int],
) -> FrechetScore:
    """Fréchet distance of samples to a reference, under its proper name.

    Args:
      samples: statistics of the samples' features.
      reference: statistics of real data.
      num_samples: number of samples behind the statistics.
      feature, image_size: what `samples` were computed with and from.

    Raises:
      ValueError: if samples and reference do not compare, see `check_comparable`.
    """
    check_comparable(feature, image_size, reference)
    value = frechet_distance(samples, reference)
    label, source = feature.frechet_label, reference.source
    return FrechetScore(label, value, num_samples, reference.count, feature, source)
