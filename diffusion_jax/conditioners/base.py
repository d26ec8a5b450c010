"""The conditioner protocol: from a batch to a Condition, its null, and their combination."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.core.arrays import fold_in_each
from diffusion_jax.core.condition import Condition, Grounding, check_same_slots, drop
from diffusion_jax.core.types import Batch, Key, Params


class Conditioner(NamedTuple):
    """Fills slots of a Condition from a batch.

    Attributes:
      init: key -> parameters, {} if nothing is learned.
      apply: (params, batch, keys [B] or None) -> Condition; keys are given in training only
        and switch random dropping on.
      null: (params, batch) -> the unconditional branch, which fills exactly the same slots.
    """

    init: Callable[[Key], Params]
    apply: Callable[[Params, Batch, Key | None], Condition]
    null: Callable[[Params, Batch], Condition]


def _nothing(*_) -> Condition:
    return Condition()


UNCONDITIONAL = Conditioner(init=lambda key: {}, apply=_nothing, null=_nothing)


def with_dropout(conditioner: Conditioner, rate: float) -> Conditioner:
    """Replaces the condition by the null condition with probability `rate` in training.

    Args:
      conditioner: to be dropped as a whole, example by example.
      rate: in [0, 1).

    Raises:
      ValueError: if the rate is out of range.

    Source: Ho & Salimans 2022 (arXiv:2207.12598), algorithm 1.
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"the dropout rate must lie in [0, 1), got {rate}")

    def apply(params, batch, keys):
        if keys is None:
            return conditioner.apply(params, batch, None)
        # Two folds, so that dropping is independent of what the conditioner itself draws.
        cond = conditioner.apply(params, batch, fold_in_each(keys, 0))
        return drop(fold_in_each(keys, 1), cond, conditioner.null(params, batch), rate)

    return conditioner._replace(apply=apply)


def _join(conditions: list[Condition]) -> Condition:
    filled = {
        slot: [getattr(c, slot) for c in conditions if getattr(c, slot) is not None]
        for slot in ("vector", "tokens", "image", "grounding", "time")
    }
    joined = Condition()
    if filled["vector"]:
        joined = joined.replace(vector=sum(filled["vector"]))
    if filled["time"]:
        joined = joined.replace(time=sum(filled["time"]))
    if filled["tokens"]:
        masks = [
            jnp.ones(c.tokens.shape[:2], bool) if c.token_mask is None else c.token_mask
            for c in conditions
            if c.tokens is not None
        ]
        any_mask = any(c.token_mask is not None for c in conditions)
        joined = joined.replace(
            tokens=jnp.concatenate(filled["tokens"], axis=1),
            token_mask=jnp.concatenate(masks, axis=1) if any_mask else None,
        )
    if filled["image"]:
        joined = joined.replace(image=jnp.concatenate(filled["image"], axis=-1))
    if filled["grounding"]:
        objects = jnp.concatenate([g.objects for g in filled["grounding"]], axis=1)
        joined = joined.replace(grounding=Grounding(objects, filled["grounding"][0].gate))
    return joined


def combine(**parts: Conditioner) -> Conditioner:
    """One conditioner of several: vectors add, tokens and objects concatenate in length, images
    in channels, in the order given. Parameters are nested under the parts' names; those of a part
    without any may be left out.

    Raises:
      ValueError: if there is no part; at use, if a part's null fills other slots than it does.

    Source: none; a convention of this library.
    """
    if not parts:
        raise ValueError("combine needs at least one conditioner; use UNCONDITIONAL for none")

    def init(key):
        keys = jax.random.split(key, len(parts))
        return {name: p.init(k) for (name, p), k in zip(parts.items(), keys, strict=True)}

    def apply(params, batch, keys):
        conditions = []
        for index, (name, part) in enumerate(parts.items()):
            part_keys = None if keys is None else fold_in_each(keys, index)
            conditions.append(part.apply(params.get(name, {}), batch, part_keys))
        return _join(conditions)

    def null(params, batch):
        conditions = []
        for name, part in parts.items():
            own = params.get(name, {})
            conditions.append(part.null(own, batch))
            check_same_slots(part.apply(own, batch, None), conditions[-1])
        return _join(conditions)

    return Conditioner(init, apply, null)
