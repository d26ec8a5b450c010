"""LoRA: kernels with a trainable product of low rank beside frozen ones, for any network."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion_jax.core.params import by_glob
from diffusion_jax.core.types import Array, Key, Params

# The projections of every attention of a transformer block, which diffusers' scripts adapt.
ATTENTION = tuple(f"**/attn_*/{name}/kernel" for name in ("query", "key", "value", "out"))


def init_lora(key: Key, params: Params, *, rank: int, targets: Sequence[str] = ATTENTION) -> Params:
    """A LoRA that changes nothing yet: down ~ N(0, 1 / rank²), up = 0.

    Args:
      key: [] key.
      params: of the network, arrays or shapes.
      rank: r, at least 1.
      targets: globs of the kernels that are adapted, see `core.params.by_glob`.

    Returns:
      For every kernel [in, out] or [h, w, in, out] that is adapted, at its module's place,
      {"down": [in, r] or [h, w, in, r], "up": [r, out]}, float32.

    Raises:
      ValueError: if the rank is below 1, a pattern matches nothing, or a leaf is no kernel.

    Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1; the standard deviation: diffusers'
    training scripts.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    chosen, found = by_glob(params, *targets), {}
    for index, (path, leaf) in enumerate(sorted(flatten_dict(dict(params)).items())):
        if not chosen(path):
            continue
        if path[-1] != "kernel" or leaf.ndim not in (2, 4):
            raise ValueError(
                f"LoRA adapts kernels of dense layers and convolutions, not {'/'.join(path)} of "
                f"shape {leaf.shape}"
            )
        down = jax.random.normal(jax.random.fold_in(key, index), (*leaf.shape[:-1], rank)) / rank
        found[(*path[:-1], "down")] = down
        found[(*path[:-1], "up")] = jnp.zeros((rank, leaf.shape[-1]))
    return unflatten_dict(found)


def merge_lora(params: Params, lora: Params, scale: Array | float = 1.0) -> Params:
    """The parameters with W + scale · down · up in place of every adapted kernel W.

    Pure: inside of a loss, gradients reach `down` and `up`, and none is taken of `params` that
    are not differentiated. A convolution's `down` is a convolution of the same size, its `up` one
    of 1x1.

    Args:
      params: of the network.
      lora: as `init_lora` makes it; α / r of the paper is part of `up`.
      scale: 1 for as it was trained, 0 for the network without it.

    Returns:
      A tree like `params`, of the same dtypes.

    Raises:
      ValueError: if an adapted module is not there, or a shape does not fit.

    Source: Hu et al. 2021 (arXiv:2106.09685), eq. 3.
    """
    flat = dict(flatten_dict(dict(params), keep_empty_nodes=True))
    parts: dict[tuple[str, ...], dict[str, Array]] = {}
    for path, leaf in flatten_dict(dict(lora)).items():
        parts.setdefault(path[:-1], {})[path[-1]] = leaf
    for module, part in parts.items():
        path = (*module, "kernel")
        if set(part) != {"down", "up"} or path not in flat:
            raise ValueError(
                f"{'/'.join(module)} must be an adapted module of the network with down and up, "
                f"got {sorted(part)}" + ("" if path in flat else " for a module that is not there")
            )
        kernel, down, up = flat[path], part["down"], part["up"]
        fits = down.ndim == kernel.ndim and up.ndim == 2 and down.shape[-1] == up.shape[0]
        if not fits or (*down.shape[:-1], up.shape[1]) != kernel.shape:
            raise ValueError(
                f"{'/'.join(path)} has shape {kernel.shape}, its LoRA {down.shape} and {up.shape}"
            )
        change = jnp.tensordot(down, up, 1, precision=jax.lax.Precision.HIGHEST)
        flat[path] = (kernel + scale * change.astype(jnp.float32)).astype(kernel.dtype)
    return unflatten_dict(flat)
