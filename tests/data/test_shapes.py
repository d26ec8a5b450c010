"""Rendered shapes: what is said of a scene is true, and the oracle sees it."""

import numpy as np
import pytest

from diffusion_jax.data import shapes, shapes_oracle
from diffusion_jax.data.shapes import COLOURS, SHAPES, Shapes
from diffusion_jax.data.sources import take


def _batch(count=300, **options):
    return take(Shapes(**options), count)


def _judge(batch, images=None):
    return shapes_oracle.judge(
        batch["image"] if images is None else images,
        batch["objects"],
        object_mask=batch["object_mask"],
        boxes=batch["boxes"],
    )


@pytest.mark.parametrize("size, most", [(8, 1), (8, 4), (16, 2), (32, 4), (64, 4)])
def test_the_oracle_recognises_real_data(size, most):
    """The ceiling; published pilot at 16 pixels: colour 1.000, shape .988, box IoU 1.000."""
    score = _judge(_batch(60 if size > 16 else 150, size=size, num_objects=(1, most)))
    assert score.colour >= 0.999
    assert score.shape >= 0.985
    assert score.box_iou >= 0.995
    assert score.quality >= 0.94


def test_the_oracle_has_a_floor():
    """Other scenes' images must not score: one of 12 labels, boxes that overlap by chance."""
    batch = _batch(num_objects=(1, 1))
    score = _judge(batch, np.roll(batch["image"], 1, axis=0))
    assert 0.15 < score.colour < 0.35 and score.shape < 0.16 and score.box_iou < 0.2


def test_the_oracle_sees_nothing_in_grey_noise():
    noise = np.random.default_rng(0).normal(0, 0.1, (16, 16, 3))
    assert shapes_oracle.find_objects(noise) == []
    batch = _batch(5)
    score = _judge(batch, np.stack([noise] * 5))
    assert score[:3] == (0.0, 0.0, 0.0) and np.isnan(score.quality)


def test_the_oracle_takes_the_largest_part_of_a_colour():
    image = np.zeros((16, 16, 3))
    image[2:8, 3:9] = shapes.PALETTE[2]
    image[12, 12] = image[14, 1] = shapes.PALETTE[2]
    (thing,) = shapes_oracle.find_objects(image)
    assert (COLOURS[thing.colour], SHAPES[thing.shape], thing.quality) == ("blue", "square", 1.0)
    np.testing.assert_allclose(thing.box, np.array([3, 2, 9, 8]) / 16)


def test_box_iou_by_hand():
    assert shapes_oracle.box_iou([0, 0, 0.5, 0.5], [0.25, 0, 0.75, 0.5]) == pytest.approx(1 / 3)
    assert shapes_oracle.box_iou([0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]) == 0.0
    assert shapes_oracle.box_iou([0, 0, 0, 0], [0, 0, 0, 0]) == 0.0


@pytest.mark.parametrize("size", [4, 5, 6, 9, 12, 48])
def test_shapes_touch_their_boxes_and_have_the_right_area(size):
    areas = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}
    masks = [shapes.shape_mask(i, size, size) for i in range(len(SHAPES))]
    for name, mask in zip(SHAPES, masks, strict=True):
        assert mask[0].any() and mask[-1].any() and mask[:, 0].any() and mask[:, -1].any()
        # One or two of the size pixels of each row may go either way.
        assert abs(mask.mean() - areas[name]) <= 1.5 / size
        np.testing.assert_array_equal(mask, mask[:, ::-1])
    assert not any(np.array_equal(masks[i], masks[i - 1]) for i in range(3))


def test_examples_depend_on_seed_and_index_alone():
    one, other = Shapes(seed=3)[7], Shapes(seed=3, length=20)[7]
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])
    assert not np.array_equal(one["image"], Shapes(seed=4)[7]["image"])
    assert not np.array_equal(one["image"], Shapes(seed=3)[8]["image"])


def test_annotations_agree_with_each_other():
    """Masks, boxes, keypoints, maps and labels describe the same pixels."""
    source = Shapes(size=32, num_objects=(1, 4))
    for index in range(60):
        example = source[index]
        count = example["object_mask"].sum()
        assert not example["masks"][count:].any() and not example["boxes"][count:].any()
        assert (example["masks"].sum(axis=0) <= 1).all()
        semantic = np.zeros((32, 32), int)
        for mask, box, points, label in zip(
            example["masks"][:count], example["boxes"], example["keypoints"], example["objects"],
            strict=False,
        ):  # fmt: skip
            ys, xs = np.nonzero(mask)
            extremes = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / 32
            np.testing.assert_allclose(box, extremes, atol=1e-6)
            np.testing.assert_allclose(points[0], [(xs.mean() + 0.5) / 32, (ys.mean() + 0.5) / 32])
            np.testing.assert_allclose(points[1:3, 0], extremes[[0, 2]] + [0.5 / 32, -0.5 / 32])
            np.testing.assert_allclose(points[3:5, 1], extremes[[1, 3]] + [0.5 / 32, -0.5 / 32])
            colour = example["image"][mask].mean(axis=0)
            np.testing.assert_allclose(colour, shapes.PALETTE[label // 3], atol=0.02)
            semantic[mask] = label + 1
        np.testing.assert_array_equal(example["semantic"], semantic)
        inside = np.pad(semantic, 1, mode="edge")
        around = [inside[:-2, 1:-1], inside[2:, 1:-1], inside[1:-1, :-2], inside[1:-1, 2:]]
        edges = np.any([side != semantic for side in around], axis=0) & (semantic > 0)
        np.testing.assert_array_equal(example["edges"][..., 0], edges)


def test_captions_are_true():
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    seen = set()
    for index in range(120):
        example = Shapes(num_objects=(2, 2))[index]
        words = example["caption"].split()
        assert words[:3] == example["phrases"][0].split()
        assert words[-3:] == example["phrases"][1].split()
        x, y = (example["boxes"][0] - example["boxes"][1])[:2] + (
            example["boxes"][0] - example["boxes"][1]
        )[2:]
        true = {"left": x < 0, "right": x > 0, "above": y < 0, "below": y > 0}
        assert true[words[3]] and not true[opposite[words[3]]]
        seen.add(words[3])
        label = COLOURS.index(words[1]) * 3 + SHAPES.index(words[2])
        assert example["label"] == label == example["objects"][0]
    assert seen == set(opposite)


def test_every_caption_fits_the_vocabulary():
    batch = _batch(80, num_objects=(4, 4))
    assert batch["token_mask"].sum(axis=1).max() == 15
    example = Shapes(num_objects=(4, 4))[0]
    words = [shapes.VOCABULARY[i] for i in example["tokens"][example["token_mask"]]]
    assert " ".join(words) == example["caption"]
    assert not batch["tokens"][~batch["token_mask"]].any()


def test_labels_cover_all_classes_and_pixels_stay_inside():
    batch = _batch(size=16, num_objects=(1, 1))
    assert set(batch["label"].tolist()) == set(range(12))
    assert np.abs(batch["image"]).max() < 0.75
    background = batch["image"][batch["semantic"] == 0]
    assert np.abs(background - background.mean(axis=1, keepdims=True)).std() < 0.03


def test_the_noise_has_its_standard_deviation():
    clean, noisy = Shapes(size=64, noise=0.0)[0]["image"], Shapes(size=64)[0]["image"]
    assert (noisy - clean).std() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 12}, "12"),
        ({"num_objects": (2, 1)}, r"\(2, 1\)"),
        ({"num_objects": (1, 5)}, r"\(1, 5\)"),
        ({"length": 0}, "got 0"),
        ({"seed": -1}, "-1"),
        ({"noise": 0.5}, "0.5"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Shapes(**options)


def test_other_bad_input():
    with pytest.raises(IndexError, match="20 of 20"):
        Shapes(length=20)[20]
    with pytest.raises(ValueError, match="'purple'"):
        shapes.encode("a purple circle")
    with pytest.raises(ValueError, match="6 words"):
        shapes.encode("a red circle a red circle", 5)
    with pytest.raises(ValueError, match=r"\(16, 16\)"):
        shapes_oracle.find_objects(np.zeros((16, 16)))
    batch = _batch(3)
    with pytest.raises(ValueError, match="same B"):
        _judge(batch, batch["image"][:2])
    with pytest.raises(ValueError, match="False everywhere"):
        _judge({**batch, "object_mask": np.zeros((3, 2), bool)})
