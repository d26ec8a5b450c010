"""Everything that image metrics need of a stream of features, resumable after any batch."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from diffusion_jax.core.types import Array
from diffusion_jax.metrics.features import Feature
from diffusion_jax.metrics.frechet import GaussianStats
from diffusion_jax.metrics.reference import FrechetScore, Reference, frechet_score


@dataclasses.dataclass(frozen=True)
class FeatureStream:
    """Statistics of all features of a stream, and the first few features themselves.

    Mean and covariance need every image but little memory; precision, recall, nearest
    neighbours and the kernel distance need the features, of fewer images.

    Attributes:
      feature: which features.
      image_size: (height, width) of the images before any resizing.
      keep: how many features are kept at most.
      stats: of all features; None before the first batch.
      kept: batches of the first features, [B, D] float32 each.
    """

    feature: Feature
    image_size: tuple[int, int]
    keep: int = 0
    stats: GaussianStats | None = None
    kept: tuple[np.ndarray, ...] = ()

    def __post_init__(self):
        if self.keep < 0:
            raise ValueError(f"keep must be at least 0, got {self.keep}")

    @property
    def count(self) -> int:
        """Images seen."""
        return 0 if self.stats is None else self.stats.count

    @property
    def features(self) -> np.ndarray:
        """The kept features [min(count, keep), D] float32, in the order of the stream.

        Raises:
          ValueError: if none were kept.
        """
        if not self.kept:
            raise ValueError(f"no features were kept: keep is {self.keep}, count {self.count}")
        return np.concatenate(self.kept)

    def update(self, features: Array) -> "FeatureStream":
        """This stream with the features [B, D] of one more batch.

        Raises:
          ValueError: if they are empty, not finite, or of another dimension.
        """
        features = np.asarray(features)
        batch = GaussianStats.of(features)
        stats = batch if self.stats is None else self.stats.merge(batch)
        room = max(self.keep - self.count, 0)
        flat = features[:room].reshape(-1, len(batch.mean)).astype(np.float32)
        kept = (*self.kept, flat) if room else self.kept
        return dataclasses.replace(self, stats=stats, kept=kept)

    def merge(self, other: "FeatureStream") -> "FeatureStream":
        """Both streams one after the other, of two processes for example.

        Raises:
          ValueError: if they are streams of different features, sizes or `keep`.
        """
        for name in ("feature", "image_size", "keep"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ValueError(f"streams of different {name} do not merge: {ours}, {theirs}")
        if self.stats is None or other.stats is None:
            return self if other.stats is None else other
        room = self.keep - sum(map(len, self.kept))
        more = (np.concatenate(other.kept)[:room],) if room and other.kept else ()
        stats, kept = self.stats.merge(other.stats), self.kept + more
        return dataclasses.replace(self, stats=stats, kept=kept)

    def frechet(self, reference: Reference) -> FrechetScore:
        """Fréchet distance to a reference, under its proper name.

        Raises:
          ValueError: if the reference is of other features or another image size, or fewer
            than two images were seen.
        """
        return frechet_score(
            self.stats or GaussianStats.empty(len(reference.mean)),
            reference,
            num_samples=self.count,
            feature=self.feature,
            image_size=self.image_size,
        )

    def to_dict(self) -> dict[str, np.ndarray]:
        """The stream as arrays, which `write_arrays` writes to a file."""
        arrays = {
            "feature": np.asarray(list(self.feature)),
            "image_size": np.asarray(self.image_size),
            "keep": np.asarray(self.keep),
        }
        if self.stats is not None:
            arrays.update(self.stats.to_dict())
        if self.kept:
            arrays["kept"] = self.features
        return arrays

    def resumed(self, arrays: Mapping[str, np.ndarray]) -> "FeatureStream":
        """The stream that `to_dict` of an equally declared stream stored, bit by bit.

        Args:
          arrays: what `to_dict` returned.

        Raises:
          ValueError: if what is stored was declared otherwise, or is incomplete.
        """
        declared = FeatureStream(self.feature, self.image_size, self.keep).to_dict()
        for name, value in declared.items():
            if name not in arrays or not np.array_equal(arrays[name], value):
                stored = arrays[name] if name in arrays else "nothing"
                raise ValueError(f"the stored stream has {name} {stored}, this one {value}")
        if "count" not in arrays:
            return dataclasses.replace(self, stats=None, kept=())
        stats = GaussianStats.from_dict(arrays)
        kept = (np.asarray(arrays["kept"], np.float32),) if "kept" in arrays else ()
        expected = (min(stats.count, self.keep), len(stats.mean))
        if (kept[0].shape if kept else (0, len(stats.mean))) != expected:
            raise ValueError(
                f"the stored stream of {stats.count} images should keep features {expected}, got "
                f"{kept[0].shape if kept else 'none'}"
            )
        return dataclasses.replace(self, stats=stats, kept=kept)
