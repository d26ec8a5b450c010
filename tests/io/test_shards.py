"""Weights in several files: the index, variants, and folders that hold none."""

import json
import math

import numpy as np
import pytest

from diffusion_jax.io.safetensors import WeightsFile, WeightsFileError, write_safetensors
from diffusion_jax.io.shards import ShardedWeights, open_weights, read_json, save_weights

TENSORS = {name: np.full((4,), i, np.float32) for i, name in enumerate("abcde")}
INDEX = "model.safetensors.index.json"


def same(read, tensors=TENSORS):
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read[name], tensor)


@pytest.mark.parametrize("size, files", [(80, 1), (32, 4), (1, 6)])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_what_is_written_is_read(size, files, variant, tmp_path):
    """One file, several of two tensors, and one for each where all are larger than the limit."""
    paths = save_weights(TENSORS, tmp_path, stem="model", variant=variant, max_shard_size=size)
    assert len(paths) == files == len(list(tmp_path.iterdir()))
    same(open_weights(tmp_path, variant=variant))
    with pytest.raises(
        WeightsFileError, match=r"there is variant='fp16'|no weights of the variant"
    ):
        open_weights(tmp_path, variant=None if variant else "bf16")
    with pytest.raises(ValueError, match="already holds"):
        save_weights(TENSORS, tmp_path, stem="model", variant=variant)


def test_files_are_named_as_other_libraries_name_them(tmp_path):
    save_weights(TENSORS, tmp_path, stem="model", max_shard_size=48)
    save_weights(TENSORS, tmp_path, stem="model", variant="fp16", max_shard_size=48)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "model.fp16-00001-of-00002.safetensors",
        "model.fp16-00002-of-00002.safetensors",
        "model.safetensors.index.fp16.json",
    }
    index = read_json(tmp_path / INDEX)
    assert index["metadata"]["total_size"] == 80
    assert index["weight_map"]["e"] == "model-00002-of-00002.safetensors"


@pytest.fixture
def sharded(tmp_path):
    """A folder with two shards, and a function that changes its index."""
    save_weights(TENSORS, tmp_path, stem="model", max_shard_size=48)
    path = tmp_path / INDEX

    def changed(**more):
        index = read_json(path)
        index["weight_map"].update(more)
        path.write_text(json.dumps(index))
        return path

    return changed


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "x.bin", "", 3],
)
def test_an_index_names_files_beside_it_only(name, sharded, tmp_path):
    write_safetensors({"a": TENSORS["a"]}, tmp_path.parent / "x.safetensors")
    with pytest.raises(WeightsFileError, match="plain name|names of files"):
        ShardedWeights(sharded(a=name))


def test_an_index_and_its_files_agree(sharded, tmp_path):
    second = "model-00002-of-00002.safetensors"
    with pytest.raises(WeightsFileError, match=r"(?s)2 tensor\(s\).*lacks a.*does not place"):
        ShardedWeights(sharded(a=second))
    with pytest.raises(WeightsFileError, match="lacks z"):
        ShardedWeights(sharded(a="model-00001-of-00002.safetensors", z=second))
    (tmp_path / second).unlink()
    with pytest.raises(WeightsFileError, match=f"not there: {second}"):
        ShardedWeights(tmp_path / INDEX)


def test_a_damaged_shard_is_named(sharded, tmp_path):
    path = tmp_path / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsFileError, match="model-00002-of-00002.*cut off"):
        ShardedWeights(tmp_path / INDEX)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": []}', '{"a": 1, "a": 2}', "{}", "\x00"])
def test_an_index_that_is_none_is_refused(text, tmp_path):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(WeightsFileError, match=INDEX):
        open_weights(tmp_path)


def test_older_names_of_variants_are_read(tmp_path):
    """Shards used to carry the variant at their end, and some indexes before theirs."""
    write_safetensors(TENSORS, tmp_path / "model-00001-of-00001.fp16.safetensors")
    weight_map = dict.fromkeys(TENSORS, "model-00001-of-00001.fp16.safetensors")
    path = tmp_path / "model.fp16.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    same(open_weights(tmp_path, variant="fp16"))


def test_two_sets_of_weights_are_ambiguous(sharded, tmp_path):
    write_safetensors(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(WeightsFileError, match="twice"):
        open_weights(tmp_path)


def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path):
    for i in (1, 2):
        (tmp_path / f"pytorch_model-0000{i}-of-00002.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(WeightsFileError, match=r"diffusion-jax convert \S+1-of\S+ \S+2-of\S+ \S+"):
        open_weights(tmp_path)


def test_an_empty_folder_says_what_is_missing(tmp_path):
    with pytest.raises(WeightsFileError, match=r"no weights: there is no diffusion_pytorch_model"):
        open_weights(tmp_path)


def test_a_whole_file_is_opened_as_such(tmp_path):
    write_safetensors(TENSORS, tmp_path / "diffusion_pytorch_model.safetensors")
    assert isinstance(open_weights(tmp_path), WeightsFile)
    with pytest.raises(ValueError, match="at least 1 byte"):
        save_weights(TENSORS, tmp_path / "b", stem="model", max_shard_size=0)


def test_infinite_numbers_of_configurations_are_read_and_nan_is_not(tmp_path):
    path = tmp_path / "scheduler_config.json"
    # As diffusers writes a DPMSolverMultistepScheduler.
    path.write_text('{"lambda_min_clipped": -Infinity, "b": Infinity}')
    assert read_json(path) == {"lambda_min_clipped": -math.inf, "b": math.inf}
    path.write_text('{"a": NaN}')
    with pytest.raises(WeightsFileError, match="NaN"):
        read_json(path)
