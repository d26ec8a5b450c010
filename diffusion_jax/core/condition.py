"""Condition: what a network is told besides x_t, classified by its route into the network."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.arrays import per_example
from diffusion_jax.core.types import Array, Key


@struct.dataclass
class Grounding:
    """Grounded objects for gated self-attention.

    Attributes:
      objects: [B, M, D] grounding tokens; unused slots hold the learned null token.
      gate: [B] multiplier in [0, 1] of the adapter's output.
    """

    objects: Array
    gate: Array


@struct.dataclass
class Condition:
    """Routes into the network; a slot that is None is not there.

    Attributes:
      vector: [B, D] added to the time embedding.
      tokens: [B, L, D] keys and values of cross-attention.
      token_mask: [B, L] bool, True where a token may be attended to.
      image: [B, H, W, C] concatenated to x.
      grounding: objects for gated self-attention.
      time: [B, F] added to the features that the time embedding is made of.
    """

    vector: Array | None = None
    tokens: Array | None = None
    token_mask: Array | None = None
    image: Array | None = None
    grounding: Grounding | None = None
    time: Array | None = None

    def slots(self) -> tuple[str, ...]:
        """Names of the filled slots."""
        return tuple(f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None)


def check_same_slots(a: Condition, b: Condition) -> None:
    """Raises ValueError, naming the slots, unless both conditions fill the same ones.

    Source: none; a convention of this library.
    """
    only_a, only_b = set(a.slots()) - set(b.slots()), set(b.slots()) - set(a.slots())
    if only_a or only_b:
        raise ValueError(
            "the two conditions must fill the same slots; filled in the first only: "
            f"{sorted(only_a)}, in the second only: {sorted(only_b)}"
        )


def _pad_tokens(cond: Condition, length: int) -> Condition:
    if cond.tokens is None or cond.tokens.shape[1] == length:
        return cond
    missing = length - cond.tokens.shape[1]
    mask = cond.token_mask
    if mask is None:
        mask = jnp.ones(cond.tokens.shape[:2], bool)
    return cond.replace(
        tokens=jnp.pad(cond.tokens, ((0, 0), (0, missing), (0, 0))),
        token_mask=jnp.pad(mask, ((0, 0), (0, missing))),
    )


def _same_length(a: Condition, b: Condition) -> tuple[Condition, Condition]:
    if a.tokens is not None and b.tokens is not None and a.tokens.shape[1] != b.tokens.shape[1]:
        length = max(a.tokens.shape[1], b.tokens.shape[1])
        # Both get a mask, since the padded one needs one and the slots must agree.
        masks = [
            jnp.ones(c.tokens.shape[:2], bool) if c.token_mask is None else c.token_mask
            for c in (a, b)
        ]
        a, b = a.replace(token_mask=masks[0]), b.replace(token_mask=masks[1])
        a, b = _pad_tokens(a, length), _pad_tokens(b, length)
    check_same_slots(a, b)
    return a, b


def drop(keys: Key, cond: Condition, null: Condition, rate: float) -> Condition:
    """Replaces each example's condition by the null condition with probability `rate`.

    Args:
      keys: [B], one per example.
      cond, null: conditions that fill the same slots.
      rate: probability in [0, 1].

    Raises:
      ValueError: if the slots differ.

    Source: Ho & Salimans 2022 (arXiv:2207.12598), algorithm 1, line 3.
    """
    cond, null = _same_length(cond, null)
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(keys)
    return jax.tree.map(lambda c, n: jnp.where(per_example(dropped, c), n, c), cond, null)


def together(cond: Condition, uncond: Condition) -> Condition:
    """One condition of 2B examples, c0 u0 c1 u1 …, for a single network call.

    Tokens of different lengths are padded to the longer one and masked.

    Raises:
      ValueError: if the slots differ.

    Source: none; a convention of this library.
    """
    cond, uncond = _same_length(cond, uncond)

    def interleave(c, u):
        return jnp.stack([c, u], axis=1).reshape((2 * c.shape[0],) + c.shape[1:])

    return jax.tree.map(interleave, cond, uncond)
