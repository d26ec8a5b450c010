"""Inception score: how sure and how varied a classifier finds the images, batch by batch."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class InceptionScore(NamedTuple):
    """Inception score over splits.

    Attributes:
      mean: in [1, K] for K classes; K if every class is equally frequent and certain.
      std: standard deviation over the splits.
    """

    mean: float
    std: float


def _x_log_x(p: np.ndarray) -> np.ndarray:
    """p log p, which is 0 at 0."""
    return p * np.log(np.where(p > 0.0, p, 1.0))


def _probabilities(probs: np.ndarray) -> np.ndarray:
    probs = np.asarray(probs, np.float64)
    if probs.ndim != 2 or not probs.size:
        raise ValueError(f"probabilities must be a non-empty [N, K], got {probs.shape}")
    # Written so that NaN is refused too. Softmax in float32 sums to 1 within 1e-4.
    if not (probs.min() >= 0.0 and np.abs(probs.sum(axis=1) - 1.0).max() < 1e-3):
        raise ValueError("every row must hold probabilities that sum to 1; give softmax(logits)")
    return probs


def _split_score(total: np.ndarray, information: float, count: int) -> float:
    """exp(mean Σ p log p - Σ q log q) with q the mean of p, from sums over a split."""
    return float(np.exp(information / count - _x_log_x(total / count).sum()))


def inception_score(probs: np.ndarray, *, splits: int = 10) -> InceptionScore:
    """Inception score of class probabilities.

    exp(mean_x KL(p(y|x) ‖ p(y))) in each split of consecutive images, p(y) the split's mean;
    then mean and standard deviation over the splits. Fewer images a split give a smaller score.
    It does not see collapse within a class.

    Args:
      probs: [N, K], rows that sum to 1; zeros are fine.
      splits: number of splits, 1 … N; split i holds images i N // splits and following.

    Raises:
      ValueError: if a row holds no probabilities or there are more splits than images.

    Source: Salimans et al. 2016 (arXiv:1606.03498), section 4.
    """
    probs = _probabilities(probs)
    if not 1 <= splits <= len(probs):
        raise ValueError(f"splits must be in 1 … {len(probs)}, got {splits}")
    bounds = [index * len(probs) // splits for index in range(splits + 1)]
    scores = []
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        part = probs[start:stop]
        scores.append(_split_score(part.sum(axis=0), _x_log_x(part).sum(), len(part)))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


@dataclasses.dataclass(frozen=True)
class ClassStats:
    """What the inception score needs to know of a stream of class probabilities.

    Attributes:
      split_size: images of a split; 5000 in ADM's evaluator.
      count: images seen.
      totals: [S, K] float64, Σ p over each split.
      information: [S] float64, Σ p log p over each split.
    """

    split_size: int
    count: int
    totals: np.ndarray
    information: np.ndarray

    @classmethod
    def empty(cls, num_classes: int, *, split_size: int = 5000) -> "ClassStats":
        """Statistics of nothing, to be updated; K = num_classes."""
        if num_classes < 1 or split_size < 1:
            raise ValueError(
                f"num_classes and split_size must be at least 1, got {num_classes}, {split_size}"
            )
        return cls(split_size, 0, np.zeros((0, num_classes)), np.zeros(0))

    def update(self, probs: np.ndarray) -> "ClassStats":
        """These statistics with the probabilities [N, K] of one more batch, in order.

        Raises:
          ValueError: if a row holds no probabilities, or the number of classes differs.
        """
        probs = _probabilities(probs)
        if probs.shape[1] != self.totals.shape[1]:
            raise ValueError(f"expected {self.totals.shape[1]} classes, got {probs.shape[1]}")
        count = self.count + len(probs)
        new = -(-count // self.split_size) - len(self.totals)
        totals = np.concatenate([self.totals, np.zeros((new, probs.shape[1]))])
        information = np.concatenate([self.information, np.zeros(new)])
        split = np.arange(self.count, count) // self.split_size
        np.add.at(totals, split, probs)
        np.add.at(information, split, _x_log_x(probs).sum(axis=1))
        return ClassStats(self.split_size, count, totals, information)

    def score(self) -> InceptionScore:
        """The inception score; a last split that is not full counts like the others.

        Raises:
          ValueError: if nothing was seen.

        Source: Salimans et al. 2016 (arXiv:1606.03498), section 4.
        """
        if not self.count:
            raise ValueError("an inception score needs at least one image, got none")
        sizes = np.full(len(self.totals), self.split_size)
        sizes[-1] = self.count - self.split_size * (len(sizes) - 1)
        parts = zip(self.totals, self.information, sizes, strict=True)
        scores = [_split_score(total, info, int(size)) for total, info, size in parts]
        return InceptionScore(float(np.mean(scores)), float(np.std(scores)))

    def to_dict(self) -> dict[str, np.ndarray]:
        """The statistics as arrays."""
        return {
            "split_size": np.asarray(self.split_size),
            "count": np.asarray(self.count),
            "totals": self.totals,
            "information": self.information,
        }

    @classmethod
    def from_dict(cls, arrays: Mapping[str, np.ndarray]) -> "ClassStats":
        """The statistics of `to_dict`, bit by bit.

        Raises:
          ValueError: if an array is missing, or they do not fit each other.
        """
        missing = sorted({"split_size", "count", "totals", "information"} - set(arrays))
        if missing:
            raise ValueError(f"class statistics lack {missing}")
        split_size, count = int(arrays["split_size"]), int(arrays["count"])
        totals, information = (
            np.asarray(arrays[key], np.float64) for key in ("totals", "information")
        )
        splits = -(-count // split_size) if split_size > 0 else -1
        if totals.ndim != 2 or len(totals) != splits or information.shape != (splits,):
            raise ValueError(
                f"{count} images in splits of {split_size} do not fit totals {totals.shape} and "
                f"information {information.shape}"
            )
        return cls(split_size, count, totals, information)
