"""The analytic oracle of the rendered shapes: from pixels back to colour, shape and box."""

from typing import NamedTuple

import numpy as np

from diffusion_jax.data.shapes import COLOURS, PALETTE, SHAPES, shape_mask

# Palette colours have a saturation of 1.2 and grey has none.
_SATURATION = 0.6
_MIN_PIXELS = 4


class Found(NamedTuple):
    """One object that the oracle sees.

    Attributes:
      colour: index into COLOURS.
      shape: index into SHAPES.
      box: [4] xyxy in [0, 1].
      quality: overlap (intersection over union) with the best template, in [0, 1].
    """

    colour: int
    shape: int
    box: np.ndarray
    quality: float

    @property
    def label(self) -> int:
        return self.colour * len(SHAPES) + self.shape


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def _largest_component(mask: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    parts, count = ndimage.label(mask)
    if count <= 1:
        return mask
    return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])


def find_objects(image: np.ndarray) -> list[Found]:
    """The objects of one image: at most one of each colour, in the order of COLOURS.

    Pixels whose channels differ by more than 0.6 are coloured, each by the nearest palette
    colour; the largest connected part of a colour is an object if it has four pixels. Its
    extreme pixels give the box, the best overlapping template of this box gives the shape.

    Args:
      image: [S, S, 3] in [-1, 1].

    Raises:
      ValueError: if the image has another shape.
    """
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"the oracle takes one image [H, W, 3], got {image.shape}")
    height, width = image.shape[:2]
    coloured = image.max(axis=-1) - image.min(axis=-1) > _SATURATION
    distance = np.sum((image[..., None, :] - PALETTE) ** 2, axis=-1)
    nearest = distance.argmin(axis=-1)
    found = []
    for colour in range(len(COLOURS)):
        mask = coloured & (nearest == colour)
        if mask.sum() < _MIN_PIXELS:
            continue
        mask = _largest_component(mask)
        if mask.sum() < _MIN_PIXELS:
            continue
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        inside = mask[top:bottom, left:right]
        scores = [_overlap(inside, shape_mask(i, *inside.shape)) for i in range(len(SHAPES))]
        box = np.array([left / width, top / height, right / width, bottom / height])
        found.append(Found(colour, int(np.argmax(scores)), box, max(scores)))
    return found


def box_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes [4] xyxy; 0 where the union is empty."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = float(np.prod(np.maximum(sides, 0.0)))
    union = float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - shared
    return shared / union if union > 0.0 else 0.0


class Judgement(NamedTuple):
    """How well images show what they should; all means over the expected objects, in [0, 1].

    Attributes:
      colour: an object of the expected colour is there.
      shape: it is there and has the expected shape.
      box_iou: overlap of its box with the expected one, 0 if it is not there.
      quality: overlap with the best template, over the objects that are there (NaN if none).
    """

    colour: float
    shape: float
    box_iou: float
    quality: float


def judge(
    images: np.ndarray, objects: np.ndarray, *, object_mask: np.ndarray, boxes: np.ndarray
) -> Judgement:
    """Compares images with the objects that they should show.

    Args:
      images: [B, S, S, 3] in [-1, 1].
      objects: [B, M] labels, colour · 3 + shape.
      object_mask: [B, M] bool, True where an object is expected.
      boxes: [B, M, 4] xyxy in [0, 1].

    Raises:
      ValueError: if the shapes do not fit or no object is expected.
    """
    images, objects, boxes = np.asarray(images), np.asarray(objects), np.asarray(boxes)
    object_mask = np.asarray(object_mask, bool)
    batch, slots = objects.shape
    if (
        len(images) != batch
        or object_mask.shape != (batch, slots)
        or boxes.shape[:2]
        != (
            batch,
            slots,
        )
    ):
        raise ValueError(
            f"images {images.shape}, objects {objects.shape}, object_mask {object_mask.shape} and "
            f"boxes {boxes.shape} must have the same B, and the last three the same M"
        )
    if not object_mask.any():
        raise ValueError("object_mask is False everywhere: there is no object to look for")
    rows, qualities = [], []
    for image, labels, wanted, places in zip(images, objects, object_mask, boxes, strict=True):
        found = {thing.colour: thing for thing in find_objects(image)}
        for label, place in zip(labels[wanted], places[wanted], strict=True):
            thing = found.get(int(label) // len(SHAPES))
            if thing is None:
                rows.append((0.0, 0.0, 0.0))
                continue
            rows.append((1.0, float(thing.label == label), box_iou(thing.box, place)))
            qualities.append(thing.quality)
    colour, shape, overlap = np.mean(rows, axis=0)
    quality = float(np.mean(qualities)) if qualities else float("nan")
    return Judgement(float(colour), float(shape), float(overlap), quality)
