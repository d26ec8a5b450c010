"""Bad examples: named and raised, or replaced by what the data alone decides, up to a limit."""

import copy
import io
import itertools
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data import Folder
from diffusion_jax.data.bad_examples import SkipBad
from diffusion_jax.data.batching import batches
from diffusion_jax.data.decode import BadImageError
from diffusion_jax.data.read_ahead import check_picklable


class Numbers:
    """Example i has the label i; some are bad."""

    def __init__(self, count, *bad):
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise BadImageError(f"{index}.jpg: not a readable picture")
        return {"label": np.int32(index)}


def _labels(source):
    return [int(source[index]["label"]) for index in range(len(source))]


def _batches(source, count, **options):
    iterator = batches(source, batch_size=4, seed=7, on_bad_example="skip", **options)
    return [batch["label"].tolist() for batch in itertools.islice(iterator, count)]


@pytest.mark.filterwarnings("ignore:skipped")
def test_the_next_good_example_stands_in_and_the_last_is_followed_by_the_first():
    source = SkipBad(Numbers(8, 0, 3, 4, 7), limit=0.5)
    assert _labels(source) == [1, 1, 2, 5, 5, 5, 6, 1]
    assert source.num_bad == 4 and len(source) == 8


def test_each_is_warned_of_once_by_its_name():
    source = SkipBad(Numbers(8, 3, 4), limit=0.5)
    with pytest.warns(UserWarning, match="skipped a bad example: [34].jpg: not a") as caught:
        _labels(source)
        _labels(source)
    assert sorted(str(each.message)[23:28] for each in caught) == ["3.jpg", "4.jpg"]


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize(
    "count, limit, allowed", [(300, 0.01, 3), (299, 0.01, 2), (5, 0.01, 1), (4, 0.5, 2)]
)
def test_more_than_the_limit_raises_and_goes_on_raising(count, limit, allowed):
    good = SkipBad(Numbers(count, *range(1, 2 * allowed, 2)), limit)
    assert len(_labels(good)) == count and good.num_bad == allowed
    source = SkipBad(Numbers(count, *range(1, 2 * allowed + 1, 2), 2), limit)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{allowed + 1} of the {count} .* than the {allowed}"):
            _labels(source)


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_source_without_a_good_example_does_not_run_for_ever():
    for count, limit in ((1, 0.01), (3, 0.99)):
        with pytest.raises(ValueError, match=f"{count} of the {count} examples"):
            SkipBad(Numbers(count, *range(count)), limit)[0]


@pytest.mark.filterwarnings("ignore:skipped")
def test_batches_do_not_depend_on_threads_or_on_where_a_run_started():
    """By the definition: the order of good data, with every bad number replaced by the next."""
    bad = (0, 5, 6, 19)
    stands_in = {0: 1, 5: 7, 6: 7, 19: 1}
    good = batches(Numbers(20), batch_size=4, seed=7)
    expected = [
        [stands_in.get(label, label) for label in batch["label"].tolist()]
        for batch in itertools.islice(good, 10)
    ]
    sources = [SkipBad(Numbers(20, *bad), limit=0.2) for _ in range(3)]
    assert _batches(sources[0], 10, num_threads=0) == expected
    assert _batches(sources[1], 10, num_threads=4) == expected
    resumed = batches(sources[2], batch_size=4, seed=7)
    resumed.set_state({**resumed.get_state(), "next_batch": 6})
    assert [next(resumed)["label"].tolist() for _ in range(4)] == expected[6:]
    assert [source.num_bad for source in sources[:2]] == [4, 4]


class Together(Numbers):
    """Two threads meet in a bad example before either knows that it is bad."""

    def __init__(self, count, *bad):
        super().__init__(count, *bad)
        self.meeting = threading.Barrier(2, timeout=10)

    def __getitem__(self, index):
        if index in self.bad:
            self.meeting.wait()
        return super().__getitem__(index)


def test_threads_count_an_example_once():
    source = SkipBad(Together(8, 3), limit=0.5)
    with pytest.warns(UserWarning) as caught, ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda index: int(source[index]["label"]), [3, 3])) == [4, 4]
    assert source.num_bad == len(caught) == 1


def test_the_count_is_reported_and_the_first_example_may_be_bad():
    with pytest.warns(UserWarning, match="0.jpg"):
        iterator = batches(Numbers(8, 0), batch_size=4, seed=0, num_epochs=1, on_bad_example="skip")
    assert iterator.bad_examples == 1
    assert sorted(label for batch in iterator for label in batch["label"]) == [1, 1, *range(2, 8)]
    assert batches(Numbers(8), batch_size=4, seed=0).bad_examples == 0


def test_raising_is_the_default_and_only_pictures_are_skipped():
    iterator = batches(Numbers(8, 5), batch_size=4, seed=0, shuffle=False)
    next(iterator)
    for _ in range(2):
        with pytest.raises(BadImageError, match=r"5\.jpg"):
            next(iterator)
    with pytest.raises(BadImageError, match=r"0\.jpg"):
        batches(Numbers(8, 0), batch_size=4, seed=0)

    class Other(Numbers):
        def __getitem__(self, index):
            raise ValueError("the caption of example 0 is no text")

    with pytest.raises(ValueError, match="no text"):
        batches(Other(8), batch_size=4, seed=0, on_bad_example="skip")


def test_it_can_be_sent_to_another_process():
    source = SkipBad(Numbers(8, 3), limit=0.5)
    with pytest.warns(UserWarning):
        source[3]
    check_picklable(source)
    other = copy.copy(source)  # by the same methods
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _labels(other) == _labels(source) and other.num_bad == 1


@pytest.mark.parametrize("limit", [0.0, 1.0, -1, 5, float("nan")])
def test_a_limit_that_is_no_share_is_refused(limit):
    with pytest.raises(ValueError, match=r"in \(0, 1\), got"):
        SkipBad(Numbers(3), limit)


def test_what_cannot_be_flipped_is_still_known():
    class Cache(Numbers):
        flippable = False

    with pytest.raises(ValueError, match="cannot be flipped"):
        batches(Cache(8), batch_size=4, seed=0, flip=True, on_bad_example="skip")


def _jpeg(red):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").point(lambda v: red).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("content", [_jpeg(0)[:400], b"<html>not found</html>", b""])
def test_a_broken_download_in_a_folder_is_skipped_by_name(tmp_path, content):
    for index in range(4):
        (tmp_path / f"{index}.jpg").write_bytes(_jpeg(60 * index))
    (tmp_path / "2.jpg").write_bytes(content)
    source = Folder(str(tmp_path), 8).source()
    options = {"batch_size": 4, "seed": 0, "shuffle": False, "num_epochs": 1}
    with pytest.raises(BadImageError, match=r"2\.jpg: not a readable picture"):
        next(batches(source, **options))
    with pytest.warns(UserWarning, match=f"skipped a bad example: {tmp_path}/2.jpg: not a"):
        (batch,) = batches(source, **options, on_bad_example="skip")
    reds = (batch["image"][:, 0, 0, 0] + 1) * 127.5
    np.testing.assert_allclose(reds, [0, 60, 180, 180], atol=3)
