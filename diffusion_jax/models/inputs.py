"""What every network checks about its inputs before it computes anything."""

from typing import Any

import jax.numpy as jnp

from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import Array, Key

DType = Any  # what jnp.dtype understands: jnp.bfloat16, "bfloat16", a numpy dtype
READS = ("vector", "image")


def check_inputs(
    x: Array, t: Array, cond: Condition, *, keys: Key | None, embed_dim: int, needs_vector: bool
) -> None:
    """Raises ValueError unless the inputs of a network fit each other.

    Args:
      x: [B, ..., C].
      t: [B].
      cond: may fill `vector` [B, embed_dim] and `image` [B, ..., C'], nothing else.
      keys: [B] or None.
      embed_dim: width of the network's time embedding.
      needs_vector: whether `cond.vector` must be there.
    """
    check_batch(x, t, keys)
    unread = sorted(set(cond.slots()) - set(READS))
    if unread:
        raise ValueError(
            f"this network reads the slots {list(READS)} of a condition, got {unread} as well; "
            "use a network with attention to them, or a conditioner that does not fill them"
        )
    _check_vector(cond, (x.shape[0], embed_dim), needs_vector)
    if cond.image is not None and cond.image.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"cond.image must agree with x in all but the channels, x has shape {x.shape}, "
            f"cond.image {cond.image.shape}; resize it in the conditioner"
        )


def check_batch(x: Array, t: Array, keys: Key | None) -> None:
    """Raises ValueError unless x [B, ..., C], t [B] and keys [B] are of one batch."""
    batch = x.shape[0] if x.ndim else 0
    if x.ndim < 2:
        raise ValueError(f"x must have shape [B, ..., C], got {x.shape}")
    if jnp.shape(t) != (batch,):
        raise ValueError(f"t must hold one time per example, shape ({batch},), got {jnp.shape(t)}")
    if keys is not None and keys.shape[:1] != (batch,):
        raise ValueError(f"keys must hold one key per example, {batch}, got shape {keys.shape}")


def check_no_condition(cond: Condition) -> None:
    """Raises ValueError if a classifier of noisy data is told more than x and t."""
    if cond.slots():
        raise ValueError(
            "a classifier of noisy data reads x and t alone, since a condition would tell it the "
            f"answer; got a condition that fills {list(cond.slots())}, give it Condition()"
        )


def _check_vector(cond: Condition, shape: tuple[int, int], needed: bool) -> None:
    if cond.vector is None:
        if needed:
            raise ValueError(
                f"this network was configured with needs_vector=True, so cond.vector {shape} "
                "must be given, got None; is the conditioner missing?"
            )
    elif cond.vector.shape != shape:
        raise ValueError(
            f"cond.vector is added to the time embedding and must have shape {shape}, "
            f"got {cond.vector.shape}; the conditioner's width is the network's embed_dim"
        )


def with_image(x: Array, cond: Condition) -> Array:
    """x with the channels of cond.image behind its own, [B, ..., C] -> [B, ..., C + C']."""
    if cond.image is None:
        return x
    return jnp.concatenate([x, cond.image.astype(x.dtype)], axis=-1)


def with_vector(emb: Array, cond: Condition) -> Array:
    """The time embedding plus cond.vector, [B, E] -> [B, E]."""
    return emb if cond.vector is None else emb + cond.vector.astype(emb.dtype)
