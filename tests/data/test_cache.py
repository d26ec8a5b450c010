"""Caches of computed arrays: exact, taken up after an interruption, refused if made otherwise."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion_jax.data import DATASETS, Cached
from diffusion_jax.data.batching import batches
from diffusion_jax.data.cache import Mirrored, precompute


class Pictures:
    """Example i is an image of the columns i, i + 1/4, i + 1/2, …, and the caption of i letters."""

    def __init__(self, length, **more):
        self.length, self.more = length, more

    def __len__(self):
        return self.length

    def __repr__(self):
        return "Pictures"

    def __getitem__(self, index):
        columns = np.arange(4, dtype=np.float32)[None, :, None] / 4 + index
        return {
            "image": np.broadcast_to(columns, (2, 4, 3)),
            "label": np.int32(index % 2),
            "caption": "a" * index,
            "other": None,
            **self.more,
        }


class Encoder:
    """Means over rows, lengths of captions, labels; counts its calls and can be interrupted."""

    def __init__(self, stop_after=None):
        self.indices, self.stop_after = [], stop_after

    def __call__(self, batch):
        if len(self.indices) == self.stop_after:
            raise KeyboardInterrupt
        self.indices.append(batch["index"].tolist())
        return {
            "moments": jnp.mean(batch["image"], axis=1),
            "length": np.asarray([len(text) for text in batch["caption"]]),
            "label": batch["label"],
        }


def _make(folder, function=None, *, length=7, **options):
    options = {"description": "test", "batch_size": 2, "shard_size": 3} | options
    precompute(Pictures(length), function or Encoder(), folder, **options)


def test_every_example_is_computed_once_and_read_back(tmp_path):
    function = Encoder()
    _make(tmp_path / "a/b", function)
    # Shards of 3, 3 and 1, in batches of 2 whose last example fills the place of a missing one.
    assert function.indices == [[0, 1], [2, 2], [3, 4], [5, 5], [6, 6]]
    source = Cached(str(tmp_path / "a/b")).source()
    assert len(source) == 7 and source.description == "test"
    for index in range(7):
        example = source[index]
        assert {key: value.shape for key, value in example.items()} == {
            "moments": (4, 3),
            "length": (),
            "label": (),
        }
        assert example["moments"].dtype == np.float32
        np.testing.assert_array_equal(example["moments"][:, 0], index + np.arange(4) / 4)
        assert (example["length"], example["label"]) == (index, index % 2)
    for index in (-1, 7):
        with pytest.raises(IndexError, match=str(index)):
            source[index]


def test_the_shards_are_plain_safetensors(tmp_path):
    _make(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["00000.safetensors", "00001.safetensors", "00002.safetensors", "index.json"]
    np.testing.assert_array_equal(load_file(tmp_path / "00001.safetensors")["length"], [3, 4, 5])


def test_strides_do_not_matter(tmp_path):
    def transposed(batch):
        image = batch["image"]
        return {"x": np.asfortranarray(image), "y": image.transpose(0, 3, 2, 1)}

    _make(tmp_path, transposed, length=4, batch_size=4, shard_size=4)
    source = Cached(str(tmp_path)).source()
    image = Pictures(4)[2]["image"]
    np.testing.assert_array_equal(source[2]["x"], image)
    np.testing.assert_array_equal(source[2]["y"], image.transpose(2, 1, 0))


@pytest.mark.parametrize("dtype, step", [("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_dtypes_round_to_nearest_and_come_back_as_float32(tmp_path, dtype, step):
    values = np.float32([1.001, 3.14159, -100.3])
    for name, cast in (("a", np.float64), ("b", np.float32), ("c", jnp.bfloat16)):
        _make(
            tmp_path / name,
            lambda batch, cast=cast: {"x": np.stack([values] * 2).astype(cast)},
            dtype=dtype,
        )
    assert load_file(tmp_path / "a/00000.safetensors")["x"].dtype == dtype
    found = Cached(str(tmp_path / "a")).source()[6]["x"]
    assert found.dtype == np.float32
    # Rounding to p bits errs by 2^-p of the value at most.
    np.testing.assert_allclose(found, values, rtol=step or 1e-12)
    if dtype != "float32":
        assert not np.array_equal(found, values)


def test_an_interrupted_cache_is_taken_up(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _make(tmp_path, Encoder(stop_after=3))
    with pytest.raises(ValueError, match="2 of 3 shards are missing, the first is 00001"):
        Cached(str(tmp_path)).source()
    function = Encoder()
    _make(tmp_path, function)
    assert function.indices == [[3, 4], [5, 5], [6, 6]]
    assert [int(Cached(str(tmp_path)).source()[i]["length"]) for i in range(7)] == list(range(7))
    function = Encoder()
    _make(tmp_path, function)
    assert function.indices == []


def test_a_shard_appears_only_when_it_is_whole(tmp_path, monkeypatch):
    def killed(*names):
        raise KeyboardInterrupt

    _make(tmp_path, length=3)
    (tmp_path / "00000.safetensors").unlink()
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        _make(tmp_path, length=3)
    monkeypatch.undo()
    assert not (tmp_path / "00000.safetensors").exists()
    _make(tmp_path, length=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.safetensors", "index.json"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"description": "other"}, "description was 'test' and is 'other'"),
        ({"length": 8}, "examples was 7 and is 8"),
        ({"dtype": "float16"}, "dtype was 'float32' and is 'float16'"),
        ({"shard_size": 4}, "shard_size was 3 and is 4"),
    ],
)
def test_a_cache_of_something_else_is_not_continued(tmp_path, options, message):
    _make(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"made by something else: {message}"):
        _make(tmp_path, **options)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_shards_of_another_cache_and_damaged_ones_are_named(tmp_path):
    _make(tmp_path / "a")
    _make(tmp_path / "b", description="other")
    for content, message in (
        ((tmp_path / "b/00001.safetensors").read_bytes(), "was not made with this index.json"),
        ((tmp_path / "a/00002.safetensors").read_bytes(), "was not made with this index.json"),
        ((tmp_path / "a/00001.safetensors").read_bytes()[:-1], "damaged"),
        (b"", "damaged"),
    ):
        (tmp_path / "a/00001.safetensors").write_bytes(content)
        for act in (Cached(str(tmp_path / "a")).source, lambda: _make(tmp_path / "a")):
            with pytest.raises(ValueError, match=f"00001.safetensors: {message}"):
                act()


def test_folders_that_are_no_caches(tmp_path):
    with pytest.raises(ValueError, match="is no cache"):
        Cached(str(tmp_path)).source()
    save_file({"x": np.zeros(3)}, tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match="has files but no index.json"):
        _make(tmp_path)
    good = {"format": 1, "examples": 1, "shard_size": 1, "dtype": "float32", "description": "x"}
    for text in ("{", "[]", json.dumps(good | {"format": 2}), json.dumps({"format": 1})):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(ValueError, match="index.json: (not JSON|expected)"):
            Cached(str(tmp_path)).source()
    for count in (0, "3", True):
        (tmp_path / "index.json").write_text(json.dumps(good | {"examples": count}))
        with pytest.raises(ValueError, match="at least 1"):
            Cached(str(tmp_path)).source()


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda batch: batch["image"], "arrays by name"),
        (lambda batch: {}, "arrays by name"),
        (
            lambda batch: {"x": batch["image"][:1]},
            r"'x' must be an array \[2, ...\].*\(1, 2, 4, 3\)",
        ),
        (lambda batch: {"x": np.float32(1)}, r"'x' must be an array \[2, ...\]"),
        (lambda batch: {"x": batch["caption"]}, "'x' must be real numbers, got <U"),
        (lambda batch: {"x": batch["image"] * 1j}, "'x' must be real numbers, got complex"),
        (lambda batch: {"x": batch["image"] * np.nan}, "'x' of example 0 is not finite"),
        (
            lambda batch: {"x": np.where(batch["index"] == 4, 1e5, 0.0)},
            "'x' of example 4 is not finite as float16",
        ),
        (
            lambda batch: {"x" if batch["index"][0] < 3 else "y": batch["image"]},
            "00001.safetensors: has .*those before have",
        ),
        (
            lambda batch: {"x": batch["image"] if batch["index"][0] != 2 else batch["label"]},
            "batch of example 2: has .*those before have",
        ),
        (
            lambda batch: {
                "x": batch["label"],
                **({"y": batch["label"]} if 2 in batch["index"] else {}),
            },
            "batch of example 2: has .*those before have",
        ),
    ],
)
def test_what_the_function_must_give(tmp_path, function, message):
    with pytest.raises(ValueError, match=message):
        _make(tmp_path, function, dtype="float16")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"description": " "}, "description"),
        ({"dtype": "int8"}, "'int8'"),
        ({"length": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"shard_size": 0}, "at least 1"),
        ({"num_threads": 0}, "at least 1"),
        ({"process_index": 1}, "1 of 1"),
    ],
)
def test_bad_options_write_nothing(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        _make(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_the_name_index_is_taken(tmp_path):
    with pytest.raises(ValueError, match="has a key 'index'"):
        precompute(Pictures(3, index=1), Encoder(), tmp_path, description="test")


def test_processes_share_the_shards(tmp_path):
    for process in (1, 0):
        function = Encoder()
        _make(tmp_path, function, process_index=process, process_count=2)
        numbers = {index for batch in function.indices for index in batch}
        assert numbers == ({3, 4, 5} if process else {0, 1, 2, 6})
    assert int(Cached(str(tmp_path)).source()[5]["length"]) == 5


def test_a_jitted_function_compiles_once(tmp_path):
    function = jax.jit(lambda image: {"x": image * 2})
    _make(tmp_path, lambda batch: function(batch["image"]))
    assert function._cache_size() == 1


def test_batches_of_a_cache_and_no_flips(tmp_path):
    _make(tmp_path, lambda batch: {"image": batch["image"] / 8, "label": batch["label"]})
    source = DATASETS["cached"](str(tmp_path)).source()
    (batch,) = batches(source, batch_size=7, seed=0, shuffle=False, num_epochs=1)
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], np.arange(7) / 8)
    np.testing.assert_array_equal(batch["label"], [0, 1, 0, 1, 0, 1, 0])
    with pytest.raises(ValueError, match="cannot be flipped.*Mirrored"):
        batches(source, batch_size=1, seed=0, flip=True)


def test_both_images_of_a_mirrored_source_are_cached(tmp_path):
    pictures = [{"image": Pictures(3)[i]["image"], "caption": "a" * i} for i in range(3)]
    mirrored = Mirrored(pictures)
    precompute(
        mirrored,
        lambda batch: {"row": batch["image"][:, 0, :, 0], "n": [len(t) for t in batch["caption"]]},
        tmp_path,
        description="test",
    )
    source = Cached(str(tmp_path)).source()
    assert len(source) == len(mirrored) == 6
    row = np.arange(4) / 4
    for index in range(3):
        np.testing.assert_array_equal(source[2 * index]["row"], index + row)
        np.testing.assert_array_equal(source[2 * index + 1]["row"], index + row[::-1])
        assert source[2 * index]["n"] == source[2 * index + 1]["n"] == index
    for example in ({"image": 0, "boxes": 0}, {"label": 0}):
        with pytest.raises(ValueError, match="mirrored are examples of image"):
            Mirrored([example])
