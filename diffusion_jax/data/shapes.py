"""Rendered shapes: an endless data set of which every attribute is known exactly."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
NUM_CLASSES = len(COLOURS) * len(SHAPES)
# Far from ±1, so that saturation of samples can be seen and noise is never clipped.
PALETTE = np.array(
    [[0.6, -0.6, -0.6], [-0.6, 0.6, -0.6], [-0.6, -0.6, 0.6], [0.6, 0.6, -0.6]], np.float32
)
GREY = 0.3
SIZES = (8, 16, 32, 64)
MAX_OBJECTS = 4
# Below four pixels a circle and a square have the same mask.
MIN_DIAMETER = 4
NUM_KEYPOINTS = 5

VOCABULARY = ("<pad>", "a", "and", "of", "left", "right", "above", "below", *COLOURS, *SHAPES)
CAPTION_LENGTH = 16
NUMERIC_KEYS = (
    "image label objects object_mask boxes keypoints masks semantic edges tokens token_mask"
).split()


class Object(NamedTuple):
    """One shape of a scene: indices into COLOURS and SHAPES, and its square in pixels."""

    colour: int
    shape: int
    left: int
    top: int
    diameter: int

    @property
    def label(self) -> int:
        return self.colour * len(SHAPES) + self.shape

    @property
    def phrase(self) -> str:
        return f"a {COLOURS[self.colour]} {SHAPES[self.shape]}"


def shape_mask(shape: int, height: int, width: int) -> np.ndarray:
    """The pixels [height, width] bool of a shape that touches all four sides of its box.

    A pixel of a circle belongs to it if its centre does. Row i of a triangle with its apex
    on top is (i + 1) / height of the width.
    """
    # Twice the distances from the centre, integers: rounding must not decide about a pixel.
    x = np.abs(2 * np.arange(width) + 1 - width)[None]
    y = np.abs(2 * np.arange(height) + 1 - height)[:, None]
    if SHAPES[shape] == "circle":
        return (x * height) ** 2 + (y * width) ** 2 <= (width * height) ** 2
    if SHAPES[shape] == "square":
        return np.ones((height, width), bool)
    return x * height <= (np.arange(height)[:, None] + 1) * width


def encode(text: str, length: int = CAPTION_LENGTH) -> tuple[np.ndarray, np.ndarray]:
    """Words of VOCABULARY -> ids [length] int32, padded with 0, and mask [length] bool.

    Raises:
      ValueError: names the word that the vocabulary lacks, or the number of words if it is
        above `length`.
    """
    words = text.split()
    unknown = [word for word in words if word not in VOCABULARY[1:]]
    if unknown:
        raise ValueError(f"{unknown[0]!r} of {text!r} is not in the vocabulary {VOCABULARY[1:]}")
    if len(words) > length:
        raise ValueError(f"{text!r} has {len(words)} words, at most {length} are possible")
    ids = np.zeros(length, np.int32)
    ids[: len(words)] = [VOCABULARY.index(word) for word in words]
    return ids, np.arange(length) < len(words)


def caption_of(objects: Sequence[Object]) -> str:
    """Says what is in a scene; two objects are related by where they are."""
    if len(objects) != 2:
        return " and ".join(thing.phrase for thing in objects)
    first, second = objects
    # Twice the centres, to stay with integers.
    dx = 2 * first.left + first.diameter - 2 * second.left - second.diameter
    dy = 2 * first.top + first.diameter - 2 * second.top - second.diameter
    if abs(dx) >= abs(dy):
        relation = "left of" if dx < 0 else "right of"
    else:
        relation = "above" if dy < 0 else "below"
    return f"{first.phrase} {relation} {second.phrase}"


def _cells(count: int, size: int, rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """Cells (left, top, width, height) in which `count` objects cannot overlap."""
    half = size // 2
    if count == 1:
        return [(0, 0, size, size)]
    if count == 2 and rng.random() < 0.5:
        cells = [(0, 0, half, size), (half, 0, half, size)]
    elif count == 2:
        cells = [(0, 0, size, half), (0, half, size, half)]
    else:
        cells = [(x, y, half, half) for y in (0, half) for x in (0, half)]
    return [cells[i] for i in rng.permutation(len(cells))[:count]]


def _scene(rng: np.random.Generator, size: int, num_objects: tuple[int, int]) -> list[Object]:
    count = int(rng.integers(num_objects[0], num_objects[1] + 1))
    colours = rng.permutation(len(COLOURS))[:count]
    objects = []
    for colour, (left, top, width, height) in zip(colours, _cells(count, size, rng), strict=True):
        room = min(width, height)
        smallest, largest = max(MIN_DIAMETER, round(0.35 * room)), max(MIN_DIAMETER, 3 * room // 4)
        diameter = int(rng.integers(smallest, largest + 1))
        x = left + int(rng.integers(0, width - diameter + 1))
        y = top + int(rng.integers(0, height - diameter + 1))
        objects.append(Object(int(colour), int(rng.integers(len(SHAPES))), x, y, diameter))
    return objects


@functools.lru_cache(maxsize=256)
def _template(shape: int, diameter: int) -> tuple[np.ndarray, np.ndarray]:
    """Mask of a shape and its keypoints in pixels, from the corner of its square.

    Keypoints [5, 2] are the centre of mass and the leftmost, rightmost, top and bottom point,
    each the mean of the pixels that share the extreme.
    """
    mask = shape_mask(shape, diameter, diameter)
    ys, xs = np.nonzero(mask)
    points = [(xs.mean(), ys.mean())]
    for axis in (xs, ys):
        for extreme in (0, diameter - 1):
            there = axis == extreme
            points.append((xs[there].mean(), ys[there].mean()))
    return mask, np.array(points) + 0.5


def _edges(owner: np.ndarray) -> np.ndarray:
    """Pixels [H, W] of an object with a neighbour (of four) that is not of this object."""
    rows, columns = owner[1:] != owner[:-1], owner[:, 1:] != owner[:, :-1]
    differs = np.zeros(owner.shape, bool)
    differs[1:] |= rows
    differs[:-1] |= rows
    differs[:, 1:] |= columns
    differs[:, :-1] |= columns
    return differs & (owner > 0)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """A random-access source of scenes with one to four coloured shapes on grey.

    Objects of a scene have different colours and do not overlap. Pixels are
    colour + noise · z with z ~ N(0, 1). Example i depends on (seed, i) alone.

    Attributes:
      size: side of the image in pixels: 8, 16, 32 or 64.
      num_objects: fewest and most objects of a scene, within 1 … 4.
      length: number of examples.
      seed: at least 0; different seeds give different data.
      noise: standard deviation of the pixel noise, within [0, 0.05].

    Raises:
      ValueError: if an attribute is out of range.
    """

    size: int = 16
    num_objects: tuple[int, int] = (1, 2)
    length: int = 50_000
    seed: int = 0
    noise: float = 0.02

    def __post_init__(self):
        if self.size not in SIZES:
            raise ValueError(f"the size must be one of {SIZES}, got {self.size}")
        low, high = self.num_objects
        if not 1 <= low <= high <= MAX_OBJECTS:
            raise ValueError(
                f"num_objects must be (fewest, most) within 1 … 4, got {self.num_objects}"
            )
        if self.length < 1 or self.seed < 0:
            raise ValueError(
                f"length must be at least 1 and seed at least 0, got {self.length}, {self.seed}"
            )
        if not 0.0 <= self.noise <= 0.05:
            raise ValueError(f"the noise must lie in [0, 0.05], got {self.noise}")

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> tuple[list[Object], np.random.Generator]:
        """The objects of example `index`, and the generator that drew them, to go on with."""
        if not 0 <= index < self.length:
            raise IndexError(f"example {index} of {self.length}")
        rng = np.random.default_rng((self.seed, int(index)))
        return _scene(rng, self.size, self.num_objects), rng

    def __getitem__(self, index: int) -> dict:
        """One example, M = the most objects, S = size; unused slots are zero and masked.

        Returns:
          image [S, S, 3] float32; label [] int32, colour · 3 + shape of the object that is
          mentioned first; caption, a string, and as VOCABULARY indices tokens [16] int32 with
          token_mask [16] bool; phrases, M strings; objects [M] int32, the label of each;
          object_mask [M] bool; boxes [M, 4] float32, xyxy in [0, 1]; keypoints [M, 5, 2]
          float32, xy in [0, 1]: centre, left, right, top, bottom; masks [M, S, S] bool;
          semantic [S, S] int32, 1 + label or 0; edges [S, S, 1] float32, 0 or 1.
        """
        objects, rng = self.scene(index)
        example = self._layout(objects)
        owner, labels = example.pop("owner"), example["objects"]
        grey = np.full((1, 3), rng.uniform(-GREY, GREY), np.float32)
        colours = np.concatenate([grey, PALETTE[labels // len(SHAPES)]])
        noise = self.noise * rng.standard_normal((self.size, self.size, 3))
        caption = caption_of(objects)
        tokens, token_mask = encode(caption)
        padding = [""] * (self.num_objects[1] - len(objects))
        return {
            "image": (colours[owner] + noise).astype(np.float32),
            "label": labels[0],
            "caption": caption,
            "tokens": tokens,
            "token_mask": token_mask,
            "phrases": [thing.phrase for thing in objects] + padding,
            "semantic": np.concatenate([[0], labels + 1])[owner].astype(np.int32),
            "edges": _edges(owner)[..., None].astype(np.float32),
            **example,
        }

    def _layout(self, objects: Sequence[Object]) -> dict[str, np.ndarray]:
        """Where the objects are; owner [S, S] is 1 + the slot of the object at a pixel, or 0."""
        size, slots = self.size, self.num_objects[1]
        owner = np.zeros((size, size), np.int32)
        labels = np.zeros(slots, np.int32)
        masks, boxes = np.zeros((slots, size, size), bool), np.zeros((slots, 4), np.float32)
        keypoints = np.zeros((slots, NUM_KEYPOINTS, 2), np.float32)
        for slot, thing in enumerate(objects):
            right, bottom = thing.left + thing.diameter, thing.top + thing.diameter
            mask, points = _template(thing.shape, thing.diameter)
            masks[slot, thing.top : bottom, thing.left : right] = mask
            owner[masks[slot]] = slot + 1
            boxes[slot] = (thing.left / size, thing.top / size, right / size, bottom / size)
            keypoints[slot] = (points + (thing.left, thing.top)) / size
            labels[slot] = thing.label
        return {
            "objects": labels,
            "object_mask": np.arange(slots) < len(objects),
            "boxes": boxes,
            "keypoints": keypoints,
            "masks": masks,
            "owner": owner,
        }
