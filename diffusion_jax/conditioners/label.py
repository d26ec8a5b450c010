"""Class labels as a learned vector, with a learned null class."""

import jax
import jax.numpy as jnp

from diffusion_jax.conditioners.base import Conditioner
from diffusion_jax.core.condition import Condition


def label(num_classes: int, dim: int) -> Conditioner:
    """Looks `batch["label"]` [B] int32 up in a table of num_classes + 1 rows; the last is null.

    Args:
      num_classes: labels are 0 … num_classes - 1.
      dim: width of the vector, the network's time embedding.

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
        return {"embedding": jax.random.normal(key, (num_classes + 1, dim))}

    def apply(params, batch, keys):
        del keys
        if "label" not in batch:
            raise ValueError(f"the batch has no 'label', only {sorted(batch)}")
        labels = batch["label"]
        if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(f"labels must be integers [B], got {labels.dtype} {labels.shape}")
        return Condition(vector=params["embedding"][labels])

    def null(params, batch):
        rows = params["embedding"][-1]
        return Condition(vector=jnp.broadcast_to(rows, (batch["label"].shape[0], dim)))

    return Conditioner(init, apply, null)
