"""Digests of arrays: what tells a checkpoint that a disk has changed from one that it has not."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion_jax.core.types import Array

# Arbitrary odd numbers that make the two sums independent of each other.
_SALTS = (0x9E3779B9, 0x7FEB352D)


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array as uint32, wider elements along one more axis."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.stack([_words(x.real), _words(x.imag)], axis=-1)
    bits = min(8 * x.dtype.itemsize, 32)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every bit of the result depends on every bit of x."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _sums(x: jax.Array) -> jax.Array:
    words = _words(x)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place * jnp.uint32(size % 2**32) + along
    terms = (_mixed(words ^ _mixed(place + jnp.uint32(salt))) for salt in _SALTS)
    return jnp.stack([jnp.sum(term, dtype=jnp.uint32) for term in terms])


def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


@functools.cache
def _whole(function: Callable, mesh: Mesh | None) -> Callable:
    """Compiled with a result that every process can read."""
    return jax.jit(function, out_shardings=None if mesh is None else NamedSharding(mesh, P()))


def _apply(function: Callable, leaf: Array) -> Array:
    sharding = getattr(leaf, "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return _whole(function, mesh)(leaf)


def digest(leaf: Array) -> Array:
    """The digest of an array, [2] uint32 on the devices of the array.

    S_j = Σ_i mix(w_i ⊕ mix(i + c_j)) mod 2³², j = 1, 2, over the 32-bit words w_i of the array.
    `mix` is a bijection, so that a change of one word always changes both sums, and other changes
    go unnoticed with a probability near 2^-64. Sums of integers do not depend on their order: the
    digest is the same however an array is split over devices and processes. It finds accidents,
    not forgeries.

    Args:
      leaf: numbers or booleans.

    Source: none; a convention of this library. `mix` is the finalizer of MurmurHash3.
    """
    return _apply(_sums, leaf)


def is_finite(leaf: Array) -> Array:
    """Whether an array of floating-point numbers has neither NaN nor infinity, [] bool."""
    return _apply(_all_finite, leaf)


def text(sums: Any) -> str:
    """A digest as 16 hexadecimal digits."""
    return "".join(f"{int(value):08x}" for value in np.asarray(sums))


def of_json(value: Mapping[str, Any]) -> str:
    """The BLAKE2b digest of a JSON value, the same for every order of its keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()
