"""Batches: complete, shuffled, sharded, resumable, numeric; and sources around sources."""

import itertools
import json

import numpy as np
import pytest

from diffusion_jax.data import DATASETS, ShapesData
from diffusion_jax.data.batching import batches
from diffusion_jax.data.sources import Arrays, numeric_keys, take


def _numbers(count=20):
    """Image i has the constant value i / 100 in its left column, label i."""
    image = np.zeros((count, 2, 2, 1), np.float32)
    image[:, :, 0, 0] = np.arange(count)[:, None] / 100
    return Arrays({"image": image, "label": np.arange(count, dtype=np.int32)})


def _labels(iterator, count=None):
    return [batch["label"].tolist() for batch in itertools.islice(iterator, count)]


def _equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_without_shuffle_the_order_is_that_of_the_source():
    got = _labels(batches(_numbers(10), batch_size=4, seed=0, shuffle=False, num_epochs=2))
    assert got == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1], [2, 3, 4, 5], [6, 7, 8, 9]]


def test_every_epoch_has_every_example_once_in_a_new_order():
    got = sum(_labels(batches(_numbers(), batch_size=5, seed=3, num_epochs=3)), [])
    epochs = [got[i : i + 20] for i in range(0, 60, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(20)]}) == 4


def test_an_incomplete_batch_is_dropped_and_there_may_be_no_end():
    assert len(_labels(batches(_numbers(), batch_size=6, seed=0, num_epochs=1))) == 3
    assert len(_labels(batches(_numbers(), batch_size=6, seed=0), 50)) == 50


def test_the_seed_decides():
    first, again, other = (
        _labels(batches(_numbers(), batch_size=10, seed=seed), 2) for seed in (1, 1, 2)
    )
    assert first == again and first != other


@pytest.mark.parametrize("threads", [0, 2])
def test_resuming_gives_the_very_same_batches(threads):
    """In a new iterator, with another read-ahead, from a state that went through JSON."""
    options = {"batch_size": 6, "seed": 5, "flip": True}
    whole = list(itertools.islice(batches(_numbers(), **options), 12))
    iterator = batches(_numbers(), **options, num_threads=threads)
    for _ in range(5):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = batches(_numbers(), **options, num_threads=2 - threads)
    next(resumed)
    resumed.set_state(state)
    for expected in whole[5:]:
        _equal(next(resumed), expected)
    assert resumed.get_state()["next_batch"] == 12
    iterator.set_state({**state, "next_batch": 0})
    _equal(next(iterator), whole[0])


def test_a_process_gets_the_rows_of_the_global_batch_that_follow_each_other():
    options = {"batch_size": 2, "seed": 0, "shuffle": False, "num_epochs": 2}
    shards = [
        _labels(batches(_numbers(10), **options, process_index=p, process_count=3))
        for p in range(3)
    ]
    # Three global batches of 3 x 2 in two epochs of 10: row i of batch k is example 6 k + 2 p + i.
    assert shards == [
        [[(6 * k + 2 * p + i) % 10 for i in range(2)] for k in range(3)] for p in range(3)
    ]


@pytest.mark.parametrize("count", [2, 3])
def test_the_batches_of_all_processes_are_the_batch_of_one(count):
    """Bit for bit, flips included, over the end of an epoch and from a restored position."""
    options = {"seed": 1, "flip": True}
    whole = batches(_numbers(), batch_size=6, **options)
    shards = [
        batches(_numbers(), batch_size=6 // count, **options, process_index=p, process_count=count)
        for p in range(count)
    ]
    for start in (0, 9):
        for iterator in (whole, *shards):
            iterator.set_state({**whole.get_state(), "next_batch": start})
        for _ in range(4):
            parts, together = [next(shard) for shard in shards], next(whole)
            joined = {key: np.concatenate([part[key] for part in parts]) for key in together}
            _equal(joined, together)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 4}, "global_batch_size was 5 and is 4"),
        ({"seed": 2}, "seed was 1 and is 2"),
        ({"shuffle": False}, "shuffle was True and is False"),
        ({"flip": True}, "flip was False and is True"),
        ({"keys": ("label",)}, "keys was"),
    ],
)
def test_a_state_of_other_options_is_refused(options, message):
    state = batches(_numbers(), batch_size=5, seed=1).get_state()
    with pytest.raises(ValueError, match=message):
        batches(_numbers(), **{"batch_size": 5, "seed": 1, **options}).set_state(state)


def test_a_state_of_other_data_or_of_nothing_is_refused():
    iterator = batches(_numbers(), batch_size=5, seed=1)
    with pytest.raises(ValueError, match="examples was 21 and is 20"):
        iterator.set_state(batches(_numbers(21), batch_size=5, seed=1).get_state())
    with pytest.raises(ValueError, match="next_batch"):
        iterator.set_state({"next_index": 3})


def test_flips_are_per_example():
    flipped = []
    for batch in itertools.islice(batches(_numbers(), batch_size=10, seed=1, flip=True), 4):
        for image, label in zip(batch["image"], batch["label"], strict=True):
            mirrored = image[0, 0, 0] == 0 and image[0, 1, 0] == np.float32(label / 100)
            kept = image[0, 1, 0] == 0 and image[0, 0, 0] == np.float32(label / 100)
            assert mirrored or kept
            flipped += [mirrored] if label else []
    # 38 flips of label 1 … 19 in two epochs: 19 expected, standard deviation 3.
    assert len(flipped) == 38 and 8 < sum(flipped) < 30


def test_flips_depend_on_seed_and_epoch():
    def flips(seed):
        options = {"batch_size": 20, "shuffle": False, "flip": True}
        got = itertools.islice(batches(_numbers(), seed=seed, **options), 2)
        return [tuple(batch["image"][1:, 0, 0, 0] == 0) for batch in got]

    assert len({*flips(1), *flips(2)}) == 4


def test_batches_hold_numbers_only():
    source = ShapesData(num_examples=8).source()
    batch = next(batches(source, batch_size=2, seed=0))
    assert set(batch) == set(numeric_keys(source[0])) == set(source[0]) - {"caption", "phrases"}
    assert all(value.dtype.kind in "biuf" and len(value) == 2 for value in batch.values())
    few = next(batches(source, batch_size=2, seed=0, keys=("tokens", "image")))
    assert list(few) == ["tokens", "image"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "at least 1"),
        ({"process_index": 1}, "got 4, 1, 1"),
        ({"seed": -1}, "-1"),
        ({"num_epochs": 0}, "num_epochs .* got 0"),
        ({"batch_size": 21}, "20 examples, fewer than one batch of 21 x 1"),
        ({"process_count": 6}, "4 x 6 processes"),
        # Two epochs would fill a batch, but this is hardly what is wanted.
        ({"batch_size": 30, "num_epochs": 2}, "fewer than one batch of 30 x 1"),
        ({"num_threads": -1}, "got -1 and 0"),
        ({"num_workers": -1}, "got 2 and -1"),
        ({"on_bad_example": "ignore"}, "one of .*'raise', 'skip'.*got 'ignore'"),
        ({"num_classes": 0}, r"got 0 for \['image', 'label'\]"),
        ({"num_classes": 20, "keys": ("image",)}, r"got 20 for \['image'\]"),
        ({"keys": ("image", "caption")}, "'caption'"),
        ({"keys": ()}, "none at all"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        batches(_numbers(), **{"batch_size": 4, "seed": 0, **options})


def test_an_empty_set_is_refused_before_it_is_read():
    with pytest.raises(ValueError, match="no examples"):
        batches(Arrays({"image": np.zeros((0, 2, 2, 1))}), batch_size=1, seed=0)


def test_flip_is_refused_where_it_would_make_boxes_wrong():
    source = ShapesData(num_examples=8).source()
    with pytest.raises(ValueError, match=r"boxes.*choose keys"):
        batches(source, batch_size=2, seed=0, flip=True)
    next(batches(source, batch_size=2, seed=0, flip=True, keys=("image", "label")))


def _changed(key, index, value):
    arrays = {key: array.copy() for key, array in _numbers().arrays.items()}
    arrays[key][index] = value
    return Arrays(arrays)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize(
    "source, message",
    [
        (_changed("image", 13, np.nan), "batch 3: 'image' .* 4 of 16 values are NaN"),
        (_changed("image", 13, 3.0), r"batch 3: 'image' .*\[0, 3\]"),
        (_changed("label", 13, 20), "batch 3: labels must lie in 0 … 19, got 12 … 20"),
        (_changed("label", 13, -1), "batch 3: labels must lie in 0 … 19, got -1 … 15"),
    ],
    ids=["nan", "range", "label", "unknown label"],
)
def test_every_batch_is_checked(source, message, threads):
    """The run can be taken up before the batch that is wrong, not behind it."""
    options = {"batch_size": 4, "seed": 0, "shuffle": False, "num_classes": 20}
    iterator = batches(source, **options, num_threads=threads)
    for _ in range(3):
        next(iterator)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            next(iterator)
        assert iterator.get_state()["next_batch"] == 3


class Ragged:
    """Of two sizes."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"image": np.zeros((2 + index // 3, 2, 1), np.float32)}


def test_images_of_several_sizes_are_named():
    iterator = batches(Ragged(), batch_size=2, seed=0, shuffle=False)
    next(iterator)
    with pytest.raises(ValueError, match="batch 1: .*same shape"):
        next(iterator)


class Interrupted:
    """Ctrl-C comes once, when example 9 is read."""

    def __init__(self):
        self.source, self.came = _numbers(), False

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index == 9 and not self.came:
            self.came = True
            raise KeyboardInterrupt
        return self.source[index]


@pytest.mark.parametrize("threads", [0, 2])
def test_nothing_is_lost_at_an_interruption(threads):
    options = {"batch_size": 4, "seed": 0, "shuffle": False, "num_epochs": 1}
    iterator = batches(Interrupted(), **options, num_threads=threads)
    got = _labels(iterator, 2)
    with pytest.raises(KeyboardInterrupt):
        next(iterator)
    assert got + _labels(iterator) == _labels(batches(_numbers(), **options))
    with pytest.raises(StopIteration):
        next(iterator)


@pytest.mark.parametrize("position", [-1, 6, 1.0, True, "1", None])
def test_a_position_that_is_none_is_refused(position):
    iterator = batches(_numbers(), batch_size=4, seed=0, num_epochs=1)
    state = iterator.get_state()
    with pytest.raises(ValueError, match="next_batch must be a number in 0 … 5.*got"):
        iterator.set_state({**state, "next_batch": position})
    iterator.set_state({**state, "next_batch": 5})
    assert _labels(iterator) == []


def test_splits_of_shapes_share_nothing():
    train, test = (ShapesData(split, num_examples=40).source() for split in ("train", "test"))
    images = {train[i]["image"].tobytes() for i in range(40)}
    assert len(images) == 40 and not any(test[i]["image"].tobytes() in images for i in range(40))
    with pytest.raises(ValueError, match="'valid'"):
        ShapesData("valid").source()


def test_arrays_have_one_length_and_so_many_examples():
    with pytest.raises(ValueError, match="take 21 of the 20"):
        take(_numbers(), 21)
    with pytest.raises(ValueError, match="'a': 2"):
        Arrays({"a": np.zeros(2), "b": np.zeros(3)})


def test_configurations_say_what_they_hold():
    assert set(DATASETS) == {"digits", "shapes", "folder", "webdataset", "tfds", "cached"}
    config = DATASETS["shapes"](image_size=8, num_examples=3)
    assert (config.image_size, config.channels, config.num_classes) == (8, 3, 12)
    assert config.source()[0]["image"].shape == (8, 8, 3)
    digits = DATASETS["digits"]()
    assert (digits.image_size, digits.channels, digits.num_classes) == (8, 1, 10)
