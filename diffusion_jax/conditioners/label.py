"""Class labels as a learned vector, with a learned null class."""

import jax
import jax.numpy as jnp

from diffusion_jax.conditioners.base import Conditioner
from diffusion_jax.core.condition import Condition


def label(num_classes: int, dim: int, *, null: bool = True) -> Conditioner:
    """Looks `batch["label"]` [B] int32 up in a table, whose last row is the null label.

    Args:
      num_classes: labels are 0 … num_classes - 1.
      dim: width of the vector, the network's time embedding.
      null: learn a null label, in row num_classes. Without, the table has num_classes rows as
        ADM's, and the null condition is zero, which no network was trained with: not for
        classifier-free guidance.

    Returns:
      A conditioner that fills `vector` [B, dim].

    Raises:
      ValueError: if num_classes or dim is below 1; at use, if labels are not integers [B].

    Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), section 3.1 (embedding added to the time
    embedding); Ho & Salimans 2022 (arXiv:2207.12598), section 3.2 (the null class).
    """
    if num_classes < 1 or dim < 1:
        raise ValueError(f"num_classes and dim must be at least 1, got {num_classes} and {dim}")

    def init(key):
        return {"embedding": jax.random.normal(key, (num_classes + null, dim))}

    def apply(params, batch, keys):
        del keys
        if "label" not in batch:
            raise ValueError(f"the batch has no 'label', only {sorted(batch)}")
        labels = batch["label"]
        if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(f"labels must be integers [B], got {labels.dtype} {labels.shape}")
        return Condition(vector=params["embedding"][labels])

    def unconditional(params, batch):
        row = params["embedding"][-1] if null else jnp.zeros(dim)
        return Condition(vector=jnp.broadcast_to(row, (batch["label"].shape[0], dim)))

    return Conditioner(init, apply, unconditional)
