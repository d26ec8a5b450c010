"""What evaluation keeps of a set of images, drawn or real: gathered batch by batch, resumable."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusion_jax.metrics import Feature, FeatureFn, FeatureStream

# Precision, recall and neighbours compare every image with every other one.
MAX_MANIFOLD = 10_000
# Images kept for pictures.
SHOWN = 512


@dataclass(frozen=True)
class Gathered:
    """Statistics of a stream of labelled images.

    Attributes:
      stream: statistics of the features, and the first of them.
      images: the first images, at most 512, [N, H, W, C] in [-1, 1].
      labels: theirs, [N].
      correct: images that the oracle took for their label.
      correct_shuffled: images that it took for the label of another image, a floor.
    """

    stream: FeatureStream
    images: np.ndarray
    labels: np.ndarray
    correct: int = 0
    correct_shuffled: int = 0

    @classmethod
    def nothing(cls, feature: Feature, shape: tuple[int, int, int]) -> "Gathered":
        """The start of a stream of images of a shape [H, W, C]."""
        stream = FeatureStream(feature, shape[:2], keep=MAX_MANIFOLD)
        return cls(stream, np.zeros((0, *shape), np.float32), np.zeros(0, np.int32))

    @property
    def count(self) -> int:
        """Images seen."""
        return self.stream.count

    def update(
        self, images: np.ndarray, labels: np.ndarray, *, features: FeatureFn, oracle: Any = None
    ) -> "Gathered":
        """With one more batch; the oracle has `predict(images)`, or is None.

        Raises:
          ValueError: if the images have another shape than those before.
        """
        if images.shape[1:] != self.images.shape[1:]:
            raise ValueError(
                f"expected images {self.images.shape[1:]}, got {images.shape[1:]}; set the "
                "system's image size and channels, or the data's"
            )
        room = max(SHOWN - len(self.images), 0)
        correct, shuffled = self.correct, self.correct_shuffled
        if oracle is not None:
            predicted = oracle.predict(images)
            correct += int((predicted == labels).sum())
            others = np.random.default_rng(self.count).permutation(labels)
            shuffled += int((predicted == others).sum())
        return Gathered(
            self.stream.update(np.asarray(features(images), np.float32)),
            np.concatenate([self.images, images[:room]]),
            np.concatenate([self.labels, np.asarray(labels[:room], np.int32)]),
            correct,
            shuffled,
        )

    def to_dict(self) -> dict[str, np.ndarray]:
        """As arrays, for `write_arrays`."""
        return {
            **self.stream.to_dict(),
            "images": self.images,
            "labels": self.labels,
            "correct": np.asarray(self.correct),
            "correct_shuffled": np.asarray(self.correct_shuffled),
        }

    def resumed(self, arrays: Mapping[str, np.ndarray]) -> "Gathered":
        """What `to_dict` stored.

        Raises:
          ValueError: if what is stored was of other features or images.
        """
        return Gathered(
            self.stream.resumed(arrays),
            arrays["images"],
            arrays["labels"],
            int(arrays["correct"]),
            int(arrays["correct_shuffled"]),
        )


def gather(
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    features: FeatureFn,
    shape: tuple[int, int, int],
    oracle: Any = None,
) -> Gathered:
    """Gathers batches of images and labels."""
    gathered = Gathered.nothing(features.feature, shape)
    for images, labels in batches:
        gathered = gathered.update(images, labels, features=features, oracle=oracle)
    return gathered
