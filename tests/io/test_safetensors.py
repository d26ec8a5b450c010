"""safetensors files: what the format's own library reads and writes, and hostile files."""

import json
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from diffusion_jax.io.safetensors import (
    MAX_TENSORS,
    WeightsFile,
    WeightsFileError,
    check_finite,
    write_safetensors,
)

TENSORS = {
    "transposed": np.arange(6.0, dtype=np.float32).reshape(2, 3).T,
    "sliced": np.arange(12, dtype=np.int64).reshape(3, 4)[:, ::2],
    "reversed": np.arange(5, dtype=np.int8)[::-1],
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
    "repeated": np.broadcast_to(np.float64(3.0), (2, 2)),
    "big_endian": np.arange(4, dtype=">f4"),
    "bfloat16": np.linspace(-3, 3, 7).astype(ml_dtypes.bfloat16),
    "jax": jnp.arange(3.0, dtype=jnp.bfloat16),
    "scalar": np.float32(2.5),
    "empty": np.zeros((0, 3), np.float32),
    "bool": np.array([True, False, True]),
}


def test_what_we_write_is_what_the_formats_own_library_reads(tmp_path):
    """Whatever the strides, the byte order and the dtype; the data are aligned."""
    write_safetensors(TENSORS, tmp_path / "a.safetensors", metadata={"format": "pt", "by": "us"})
    theirs = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    ours = WeightsFile(tmp_path / "a.safetensors")
    assert set(theirs) == set(ours) == set(TENSORS)
    for name, tensor in TENSORS.items():
        for read in (theirs[name], ours[name]):
            np.testing.assert_array_equal(read, np.asarray(tensor))
            assert (read.shape, read.dtype.name) == (np.shape(tensor), np.dtype(tensor.dtype).name)
        assert ours.specs[name].start % ours[name].dtype.itemsize == 0
    assert ours.metadata == {"format": "pt", "by": "us"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_the_formats_own_library_writes_is_what_we_read(tmp_path):
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in TENSORS.items()}
    del tensors["big_endian"]
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    ours = WeightsFile(tmp_path / "a.safetensors")
    assert set(ours) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(ours[name], tensor)
        assert ours[name].dtype == tensor.dtype
    with pytest.raises(ValueError, match="read-only"):
        ours["transposed"][0, 0] = 1.0


def test_a_tensor_is_read_when_it_is_asked_for(tmp_path):
    """Bytes that change between opening and asking show in the tensor: nothing was read before."""
    path = tmp_path / "a.safetensors"
    write_safetensors({"a": np.zeros(2, np.float32), "b": np.ones(2, np.float32)}, path)
    tensors = WeightsFile(path)
    with path.open("r+b") as file:
        file.seek(tensors.specs["b"].start)
        file.write(np.full(2, 7.0, np.float32).tobytes())
    assert tensors["b"].tolist() == [7.0, 7.0]
    assert tensors["a"].tolist() == [0.0, 0.0]


def file_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


TWO = {"a": entry(), "b": entry(offsets=(8, 16))}
MANY = {f"t{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(MAX_TENSORS + 1)}
PLAIN = json.dumps(entry())

# name -> (content, what the message says). Of W3 and W4: empty, truncated, oversized, lying …
HOSTILE = {
    "empty": (b"", "0 bytes"),
    "seven_bytes": (b"\x01" * 7, "7 bytes"),
    "header_of_2_to_63": (file_of({}, length=2**63), "announces"),
    "header_of_2_to_40": (file_of({}, length=2**40), "announces"),
    "header_over_100_mb": (file_of({}, length=100_000_001), "announces"),
    "header_longer_than_file": (file_of({}, length=64), "announces"),
    "no_json": (file_of(b"{not json"), "not valid JSON"),
    "no_utf8": (file_of(b'{"\xff\xfe": 1}'), "not valid JSON"),
    "no_object": (file_of([1, 2]), "expected an object"),
    "infinite": (file_of(b'{"__metadata__": {"a": Infinity}}'), "Infinity"),
    "deeply_nested": (file_of(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "nested"),
    "shape_overflow": (file_of({"a": entry(shape=(2**63, 2**63))}, bytes(8)), "any memory"),
    "empty_shape_of_2_to_50": (file_of({"a": entry(shape=(0, 2**50), offsets=(0, 0))}), "memory"),
    "rank": (file_of({"a": entry(shape=[1] * 100, offsets=(0, 4))}, bytes(4)), "shape of at most"),
    "negative_shape": (file_of({"a": entry(shape=(-2,))}, bytes(8)), "integers >= 0"),
    "fractional_shape": (file_of({"a": entry(shape=(2.0,))}, bytes(8)), "integers >= 0"),
    "true_shape": (file_of({"a": entry(shape=(True,), offsets=(0, 4))}, bytes(4)), "integers >= 0"),
    "negative_offset": (file_of({"a": entry(offsets=(-8, 0))}, bytes(8)), "data_offsets >= 0"),
    "three_offsets": (file_of({"a": entry(offsets=(0, 4, 8))}, bytes(8)), "two data_offsets"),
    "reversed_offsets": (file_of({"a": entry(offsets=(8, 0))}, bytes(8)), "hold -8"),
    "dtype_of_other_size": (file_of({"a": entry("F64")}, bytes(8)), "needs 16 bytes"),
    "unknown_dtype": (file_of({"a": entry("F8_E4M3", (8,))}, bytes(8)), "known are F64"),
    "dtype_no_string": (file_of({"a": entry(["F32"])}, bytes(8)), "known are F64"),
    "entry_no_object": (file_of({"a": 3}), "must have dtype"),
    "entry_incomplete": (file_of({"a": {"dtype": "F32"}}), "must have dtype"),
    "entry_with_more": (file_of({"a": entry(code="import os")}, bytes(8)), "must have dtype"),
    "overlap": (file_of(TWO | {"b": entry(offsets=(4, 12))}, bytes(12)), "overlaps"),
    "same_data_twice": (file_of(TWO | {"b": entry()}, bytes(8)), "overlaps"),
    "hole": (file_of(TWO | {"b": entry(offsets=(12, 20))}, bytes(20)), "hole"),
    "hole_at_start": (file_of({"a": entry(offsets=(8, 16))}, bytes(16)), "hole"),
    "truncated": (file_of(TWO, bytes(15)), "cut off"),
    "trailing_data": (file_of(TWO, bytes(17)), "belong to no tensor"),
    "metadata_no_strings": (file_of({"__metadata__": {"a": 1}}), "strings"),
    "metadata_no_object": (file_of({"__metadata__": ["a"]}), "strings"),
    "duplicate_tensor": (file_of(f'{{"a":{PLAIN},"a":{PLAIN}}}'.encode(), bytes(8)), "twice"),
    "duplicate_field": (
        file_of(f'{{"a":{PLAIN[:-1]},"dtype":"I32"}}}}'.encode(), bytes(8)),
        "'dtype' occurs twice",
    ),
    "too_many_tensors": (file_of(MANY), "more than 50000"),
    "git_lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "zip_of_torch": (b"PK\x03\x04" + bytes(100), "diffusion-jax convert"),
    "pickle": (b"\x80\x02}q\x00." + bytes(20), "diffusion-jax convert"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_by_name(name, tmp_path):
    content, message = HOSTILE[name]
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsFileError, match=message) as caught:
        WeightsFile(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_an_honest_file_of_the_same_builder_is_read(tmp_path):
    """The builder is not what is refused; names are only names, and a length may look magic."""
    path = tmp_path / "a.safetensors"
    data = np.arange(4, dtype=np.float32).tobytes()
    names = {"../../etc/passwd": TWO["a"], "/b": TWO["b"]}
    # A header of 0x0280 bytes begins as a pickle does.
    path.write_bytes(file_of(json.dumps(names).encode().ljust(0x0280), data))
    tensors = WeightsFile(path)
    assert tensors["../../etc/passwd"].tolist() == [0.0, 1.0]
    assert tensors["/b"].tolist() == [2.0, 3.0]
    path.write_bytes(file_of({}))
    assert dict(WeightsFile(path)) == {}


def test_a_folder_and_nothing_are_refused(tmp_path):
    with pytest.raises(WeightsFileError, match="is a folder"):
        WeightsFile(tmp_path)
    with pytest.raises(FileNotFoundError):
        WeightsFile(tmp_path / "nowhere.safetensors")


def test_finiteness_is_checked_where_it_is_asked_for():
    good = {"a": np.ones(2, np.float32), "i": np.ones(2, np.int32), "h": np.ones(2, np.float16)}
    check_finite(good, "there")
    bad = {**good, "n": np.array([1.0, np.nan]), "h": np.array([np.inf]).astype(jnp.bfloat16)}
    with pytest.raises(WeightsFileError, match="there: 2 tensors are not finite: h, n"):
        check_finite(bad, "there")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors({"a": np.ones(1, np.float32)}, path)
    for tensors in ({"a": np.ones(1, np.complex64)}, {"__metadata__": np.ones(1, np.float32)}):
        with pytest.raises(ValueError, match="complex64|reserves"):
            write_safetensors(tensors, path)
    assert WeightsFile(path)["a"].tolist() == [1.0]
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]
