"""What every network checks about its configuration and its inputs."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import Array, Key

DType = Any  # what jnp.dtype understands: jnp.bfloat16, "bfloat16", a numpy dtype
READS = ("vector", "image")


def at_least_one(config: object, *names: str) -> None:
    """Raises ValueError, naming the field, if one of these is neither None nor at least 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_inputs(
    x: Array,
    t: Array,
    cond: Condition,
    *,
    keys: Key | None,
    embed_dim: int,
    needs_vector: bool,
    needs_tokens: bool = False,
    reads: Sequence[str] = READS,
) -> None:
    """Raises ValueError unless the inputs of a network fit each other.

    Args:
      x: [B, ..., C].
      t: [B].
      cond: may fill the slots that the network reads: `vector` [B, embed_dim], `image`
        [B, ..., C'], `tokens` [B, L, D] with `token_mask` [B, L].
      keys: [B] or None.
      embed_dim: width of the network's time embedding.
      needs_vector: whether `cond.vector` must be there.
      needs_tokens: whether `cond.tokens` must be there.
      reads: the slots that the network reads.
    """
    check_batch(x, t, keys)
    unread = sorted(set(cond.slots()) - set(reads))
    if unread:
        raise ValueError(
            f"this network reads the slots {list(reads)} of a condition, got {unread} as well; "
            "use a network with attention to them, or a conditioner that does not fill them"
        )
    _check_vector(cond, (x.shape[0], embed_dim), needs_vector)
    _check_tokens(cond, x.shape[0], needs_tokens)
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


def _check_tokens(cond: Condition, batch: int, needed: bool) -> None:
    tokens, mask = cond.tokens, cond.token_mask
    if tokens is None:
        if needed or mask is not None:
            raise ValueError(
                "this network attends to cond.tokens [B, L, D], got None; is the conditioner "
                "missing?"
            )
    elif tokens.ndim != 3 or tokens.shape[0] != batch:
        raise ValueError(
            f"cond.tokens must have shape [B, L, D] with B = {batch}, got {tokens.shape}"
        )
    elif mask is not None and (mask.shape != tokens.shape[:2] or mask.dtype != jnp.bool_):
        raise ValueError(
            f"cond.token_mask must be bool of shape {tokens.shape[:2]}, one value for each token, "
            f"got {mask.dtype} of shape {mask.shape}"
        )


def with_image(x: Array, cond: Condition) -> Array:
    """x with the channels of cond.image behind its own, [B, ..., C] -> [B, ..., C + C']."""
    if cond.image is None:
        return x
    return jnp.concatenate([x, cond.image.astype(x.dtype)], axis=-1)


def with_vector(emb: Array, cond: Condition, *, concat: bool = False) -> Array:
    """The time embedding plus cond.vector [B, E], or followed by it.

    Returns:
      [B, E], or [B, 2 E] where `concat`.
    """
    if cond.vector is None:
        return emb
    vector = cond.vector.astype(emb.dtype)
    return jnp.concatenate([emb, vector], axis=-1) if concat else emb + vector
