"""Class labels as a learned vector, with a learned null class."""

import jax
import jax.numpy as jnp

from diffusion_jax.conditioners.base import Conditioner
from diffusion_jax.core.condition import Condition


def label(
    num_classes: int, dim: int, *, null: bool = True, tables: int | None = None
) -> Conditioner:
    """Looks `batch["label"]` [B] int32 up in a table, whose last row is the null label.

    Args:
      num_classes: labels are 0 … num_classes - 1.
      dim: width of the vector, the network's time embedding.
      null: learn a null label, in row num_classes. Without, the table has num_classes rows as
        ADM's, and the null condition is zero, which no network was trained with: not for
        classifier-free guidance.
      tables: how many tables the label is looked up in, for a network whose blocks have one
        each; None for a single one, whose parameter is "embedding" instead of "embedding_0" …

    Returns:
      A conditioner that fills `vector` [B, dim], or [B, tables · dim] with the tables' rows side
      by side.

    Raises:
      ValueError: if num_classes, dim or tables is below 1; at use, if labels are not integers [B].

    Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), section 3.1 (embedding added to the time
    embedding); Ho & Salimans 2022 (arXiv:2207.12598), section 3.2 (the null class).
    """
    if num_classes < 1 or dim < 1:
        raise ValueError(f"num_classes and dim must be at least 1, got {num_classes} and {dim}")
    if tables is not None and tables < 1:
        raise ValueError(f"tables must be at least 1 or None, got {tables}")
    names = ["embedding"] if tables is None else [f"embedding_{i}" for i in range(tables)]

    def init(key):
        keys = [key] if tables is None else jax.random.split(key, tables)
        shape = (num_classes + null, dim)
        return {name: jax.random.normal(k, shape) for name, k in zip(names, keys, strict=True)}

    def apply(params, batch, keys):
        del keys
        if "label" not in batch:
            raise ValueError(f"the batch has no 'label', only {sorted(batch)}")
        labels = batch["label"]
        if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(f"labels must be integers [B], got {labels.dtype} {labels.shape}")
        rows = [jnp.asarray(params[name])[labels] for name in names]
        return Condition(vector=jnp.concatenate(rows, axis=-1))

    def unconditional(params, batch):
        rows = [params[name][-1] if null else jnp.zeros(dim) for name in names]
        row = jnp.concatenate(rows)
        return Condition(vector=jnp.broadcast_to(row, (batch["label"].shape[0], row.size)))

    return Conditioner(init, apply, unconditional)
