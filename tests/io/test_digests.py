"""Digests against the same sums in Python's own integers, and against changes of the data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion_jax.io import digests

ONES = 2**32 - 1


def _murmur(x):
    """The finalizer of MurmurHash3, as Appleby published it."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & ONES
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & ONES
    return x ^ (x >> 16)


def _expected(words):
    return [
        sum(_murmur(word ^ _murmur(i + salt & ONES)) for i, word in enumerate(words)) & ONES
        for salt in (0x9E3779B9, 0x7FEB352D)
    ]


@pytest.mark.parametrize(
    "array, unsigned",
    [
        (np.linspace(-3, 7, 24, dtype=np.float32).reshape(2, 3, 4), np.uint32),
        (np.array([0.0, -0.0, np.nan, np.inf], np.float32), np.uint32),
        (np.arange(-4, 5, dtype=np.int32), np.uint32),
        (np.linspace(-1, 1, 7).astype(np.float16), np.uint16),
        (np.arange(250, 256, dtype=np.uint8).reshape(3, 2), np.uint8),
        (np.array(-5, np.int8), np.uint8),
        (np.zeros((3, 0), np.float32), np.uint32),
    ],
)
def test_the_sums_are_those_of_the_definition(array, unsigned):
    words = [int(word) for word in array.reshape(-1).view(unsigned)]
    assert [int(s) for s in digests.digest(array)] == _expected(words)
    assert digests.text(digests.digest(array)) == "{:08x}{:08x}".format(*_expected(words))


def test_other_kinds_of_numbers():
    half = jnp.array([1.5, -2.0], jnp.bfloat16)
    assert [int(s) for s in digests.digest(half)] == _expected([0x3FC0, 0xC000])
    assert [int(s) for s in digests.digest(np.array([True, False]))] == _expected([1, 0])
    pair = np.array([1.0 - 2.0j], np.complex64)
    assert [int(s) for s in digests.digest(pair)] == _expected([0x3F800000, 0xC0000000])


def test_wide_numbers(x64):
    wide = jnp.array([2**40 + 3], jnp.int64)
    assert [int(s) for s in digests.digest(wide)] == _expected([3, 2**8])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 23), st.integers(0, 31))
def test_every_flipped_bit_changes_both_sums(place, bit):
    array = np.linspace(-3, 7, 24, dtype=np.float32)
    flipped = array.view(np.uint32).copy()
    flipped[place] ^= np.uint32(1 << bit)
    before, after = digests.digest(array), digests.digest(flipped.view(np.float32))
    assert (np.asarray(before) != np.asarray(after)).all()


def test_exchanged_elements_are_noticed():
    array = np.arange(6, dtype=np.float32)
    exchanged = array[[1, 0, 2, 3, 4, 5]]
    assert digests.digest(array).tolist() != digests.digest(exchanged).tolist()


def test_a_digest_does_not_depend_on_how_an_array_is_split():
    array = np.arange(48, dtype=np.float32).reshape(4, 12)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    for spec in (P(), P("data"), P(None, "data")):
        split = jax.device_put(array, NamedSharding(mesh, spec))
        assert digests.digest(split).tolist() == digests.digest(array).tolist()
        assert digests.digest(split).sharding.is_fully_replicated


def test_json_is_the_same_in_every_order():
    assert digests.of_json({"a": 1, "b": [2.5]}) == digests.of_json({"b": [2.5], "a": 1})
    assert digests.of_json({"a": 1}) != digests.of_json({"a": 2})


@pytest.mark.parametrize("value, expected", [(1.0, True), (np.nan, False), (-np.inf, False)])
def test_finite(value, expected):
    assert bool(digests.is_finite(jnp.array([0.0, value]))) == expected
