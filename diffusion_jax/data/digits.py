"""The 1,797 real handwritten digits of scikit-learn: arrays, fixed split and class oracle."""

import dataclasses
import functools
from typing import Any

import numpy as np

SPLITS = ("train", "test")
NUM_CLASSES = 10
MAX_VALUE = 16


def split_indices(labels: np.ndarray, split: str) -> np.ndarray:
    """Which examples belong to a split, as sorted indices.

    The split is scikit-learn's train_test_split(test_size=0.2, random_state=0, stratify=labels):
    1,437 train and 360 test digits with equal class shares.

    Raises:
      ValueError: if the split is neither "train" nor "test".
    """
    from sklearn.model_selection import train_test_split

    if split not in SPLITS:
        raise ValueError(f"the split must be one of {SPLITS}, got {split!r}")
    halves = train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels
    )
    return np.sort(halves[SPLITS.index(split)])


def load_pixels(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixel values [N, 8, 8, 1] uint8 in 0 … 16 and labels [N] int32 of a split."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn: pip install 'diffusion_jax[demo]'"
        ) from error

    digits = load_digits()
    chosen = split_indices(digits.target, split)
    return (
        digits.images[chosen].astype(np.uint8)[..., None],
        digits.target[chosen].astype(np.int32),
    )


def pixels_to_float(pixels: np.ndarray) -> np.ndarray:
    """Values 0 … 16 -> float32 [-1, 1] as v / 8 - 1, which float32 holds exactly."""
    return pixels.astype(np.float32) / np.float32(8.0) - np.float32(1.0)


def pixels_to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Values 0 … 16 -> 0 … 255 for a picture file: round(255 v / 16), one-to-one."""
    return np.rint(pixels.astype(np.float64) * 255.0 / MAX_VALUE).astype(np.uint8)


def uint8_to_pixels(image: np.ndarray) -> np.ndarray:
    """The inverse of `pixels_to_uint8`.

    Raises:
      ValueError: if a value is none of the 17 that `pixels_to_uint8` makes.
    """
    pixels = np.rint(image.astype(np.float64) * MAX_VALUE / 255.0).astype(np.uint8)
    wrong = pixels_to_uint8(pixels) != image
    if wrong.any():
        raise ValueError(
            f"not a picture of the digits set: the value {int(image[wrong][0])} is none of its 17 "
            "grey levels round(255 v / 16)"
        )
    return pixels


def load_arrays(split: str) -> dict[str, np.ndarray]:
    """A whole split, straight from scikit-learn.

    Returns:
      image [N, 8, 8, 1] float32 in [-1, 1] with values v / 8 - 1, label [N] int32.

    Raises:
      ValueError: if the split is neither "train" nor "test".
    """
    pixels, labels = load_pixels(split)
    return {"image": pixels_to_float(pixels), "label": labels}


# The order in which scikit-learn lists its machines; a positive margin is for the first.
_PAIRS = np.triu_indices(NUM_CLASSES, 1)


def _features(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1:] != (8, 8, 1):
        raise ValueError(f"the oracle takes images [N, 8, 8, 1], got {images.shape}")
    return images.reshape(len(images), -1).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A classifier of real digits that judges samples.

    Attributes:
      model: the fitted scikit-learn classifier, one machine for each pair of classes.
      slope: of the logistic function that makes a probability of a machine's margin.
    """

    model: Any
    slope: float

    def predict(self, images: np.ndarray) -> np.ndarray:
        """The digit on each image [N, 8, 8, 1] in [-1, 1], as [N] int32.

        Raises:
          ValueError: if the images have another shape.
        """
        return self.model.predict(_features(images)).astype(np.int32)

    def confidence(self, images: np.ndarray) -> np.ndarray:
        """How sure the oracle is of the digit that it predicts, [N] in (0, 1).

        The least probability, over the nine other digits, that the image is the predicted digit
        and not that one, given that it is one of the two.

        Raises:
          ValueError: if the images have another shape.
        """
        margins = self.model.decision_function(_features(images))
        predicted = self.predict(images)[:, None]
        first, second = _PAIRS
        signed = np.where(first == predicted, margins, np.inf)
        signed = np.where(second == predicted, -margins, signed)
        return 1.0 / (1.0 + np.exp(-self.slope * signed.min(axis=1)))

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Share of images whose predicted digit is their label, in [0, 1].

        Raises:
          ValueError: if there is not one label per image.
        """
        predicted, labels = self.predict(images), np.asarray(labels)
        if labels.shape != predicted.shape:
            raise ValueError(f"labels must have shape {predicted.shape}, got {labels.shape}")
        return float((predicted == labels).mean())


@functools.cache
def fit_oracle() -> Oracle:
    """Fits the oracle on the real training digits, in a second or two.

    A support vector machine with the kernel exp(-gamma ‖x - y‖²), C = 10, gamma = 0.02 on
    pixels in [-1, 1]; right on 99 % of the held-out digits. Its margins are made probabilities
    by logistic regression on the margins of five-fold cross-validation.

    Source: Platt 1999, "Probabilistic outputs for support vector machines", section 2.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.svm import SVC

    train = load_arrays("train")
    features, labels = _features(train["image"]), train["label"]
    model = SVC(C=10.0, gamma=0.02, decision_function_shape="ovo")
    margins = cross_val_predict(model, features, labels, method="decision_function")
    # Of every digit, the nine machines that know its class, and whether that is their first.
    first, second = _PAIRS
    knows = (first == labels[:, None]) | (second == labels[:, None])
    is_first = np.broadcast_to(first == labels[:, None], knows.shape)[knows]
    platt = LogisticRegression(fit_intercept=False, C=1e6).fit(margins[knows][:, None], is_first)
    return Oracle(model.fit(features, labels), float(platt.coef_[0, 0]))
