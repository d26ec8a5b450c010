"""Batches: complete, shuffled, sharded, resumable, numeric; and sources around sources."""

import itertools
import json

import numpy as np
import pytest

from diffusion_jax.data import DATASETS, ShapesData
from diffusion_jax.data.pipeline import batches
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


def test_processes_share_the_data_without_duplicates():
    """The union of the processes' batches is the batch of one process."""
    whole = _labels(batches(_numbers(), batch_size=6, seed=1, num_epochs=2))
    shards = [
        _labels(
            batches(
                _numbers(), batch_size=2, seed=1, num_epochs=2, process_index=p, process_count=3
            )
        )
        for p in range(3)
    ]
    assert [len(shard) for shard in shards] == [len(whole)] * 3 == [6] * 3
    for parts, together in zip(zip(*shards, strict=True), whole, strict=True):
        assert sorted(sum(parts, [])) == sorted(together)


def test_a_state_may_move_to_another_number_of_processes():
    one = batches(_numbers(), batch_size=6, seed=1)
    for _ in range(4):
        next(one)
    state, expected = one.get_state(), next(one)["label"]
    parts = []
    for p in range(2):
        half = batches(_numbers(), batch_size=3, seed=1, process_index=p, process_count=2)
        half.set_state(state)
        parts += next(half)["label"].tolist()
    assert sorted(parts) == sorted(expected.tolist())


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


def test_flips_are_per_example_and_the_same_for_any_number_of_processes():
    flipped = {}
    for p in range(2):
        shard = batches(
            _numbers(), batch_size=5, seed=1, flip=True, process_index=p, process_count=2
        )
        for batch in itertools.islice(shard, 4):
            for image, label in zip(batch["image"], batch["label"], strict=True):
                mirrored = image[0, 0, 0] == 0 and image[0, 1, 0] == np.float32(label / 100)
                kept = image[0, 1, 0] == 0 and image[0, 0, 0] == np.float32(label / 100)
                assert mirrored or kept
                flipped.setdefault(int(label), []).append(bool(mirrored))
    whole = {}
    for batch in itertools.islice(batches(_numbers(), batch_size=10, seed=1, flip=True), 4):
        for image, label in zip(batch["image"], batch["label"], strict=True):
            whole.setdefault(int(label), []).append(bool(image[0, 0, 0] == 0))
    assert {k: sorted(v) for k, v in flipped.items()} == {k: sorted(v) for k, v in whole.items()}
    # 38 flips of label 1 … 19 in two epochs: 19 expected, standard deviation 3.
    assert 8 < sum(sum(flips) for label, flips in whole.items() if label) < 30


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


def test_the_first_batch_is_checked():
    images = np.full((4, 2, 2, 1), 3.0, np.float32)
    with pytest.raises(ValueError, match=r"\[3, 3\]"):
        next(batches(Arrays({"image": images}), batch_size=2, seed=0))


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
