"""Attention: the function, the multi-head module over tokens, the block over pixels."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.core.types import Array
from diffusion_jax.models.blocks import GroupNorm, default_init, zeros_init
from diffusion_jax.models.inputs import at_least_one
from diffusion_jax.models.layers import Dense

Implementation = Literal["plain", "tiled", "xla", "cudnn"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("plain", "tiled", "xla", "cudnn")

# Logits at a time at most. Allocators return larger blocks to the system and get their pages anew
# in every call, which takes a CPU longer than the products or a loop.
TILE_BYTES = 16 * 2**20


def _choose(q: Array, k: Array, mask: Array | None) -> Implementation:
    backend = jax.default_backend()
    if backend == "cpu":
        batch, queries, heads, _ = q.shape
        logit_bytes = 4 * batch * heads * queries * k.shape[1]
        return "tiled" if logit_bytes > TILE_BYTES else "plain"
    if backend == "gpu" and mask is None and _fits_cudnn(q, k):
        return "cudnn"
    return "xla"


def _fits_cudnn(q: Array, k: Array) -> bool:
    """cuDNN's flash attention: Ampere or newer, half precision, even lengths, small heads."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype:
        return False
    if q.shape[1] % 2 or k.shape[1] % 2 or q.shape[-1] % 8 or q.shape[-1] > 128:
        return False
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    return bool(re.fullmatch(r"\d+\.\d+", capability)) and float(capability) >= 8.0


def _one_head(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """q, k, v: [..., N, D]; mask broadcastable to the logits."""
    # Half of the scale on each side keeps the logits inside the range of half precision.
    scale = q.shape[-1] ** -0.25
    logits = jnp.einsum(
        "...qd,...kd->...qk", q * scale, k * scale, preferred_element_type=jnp.float32
    )
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    # Dividing the sums over the keys instead of the weights spares two passes over all weights.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    sums = jnp.einsum(
        "...qk,...kd->...qd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return (sums / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)


def _plain(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
    return jnp.swapaxes(_one_head(q, k, v, mask), 1, 2)


def _tiled(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Some queries of one head of one example at a time, so that their logits stay in the cache."""
    batch, queries, heads, _ = q.shape
    tiles = -(-queries * k.shape[1] * 4 // TILE_BYTES)
    rows = -(-queries // tiles)
    tiles = -(-queries // rows)
    # What fills up the last tile is cut off in the end.
    filled = (0, tiles * rows - queries)
    masks = None if mask is None else jnp.asarray(mask)
    masks_queries = masks is not None and masks.shape[2] > 1
    if masks_queries:
        masks = jnp.pad(masks, ((0, 0), (0, 0), filled, (0, 0)), constant_values=True)

    def flat(a):
        return jnp.swapaxes(a, 1, 2).reshape((batch * heads,) + (a.shape[1], a.shape[3]))

    def head(args):
        index, q_i, k_i, v_i = args
        mask_i = None
        if masks is not None:
            example = index // heads if masks.shape[0] > 1 else 0
            mask_i = masks[example, index % heads if masks.shape[1] > 1 else 0]

        # Recomputed in the backward pass: stored logits are what tiling avoids.
        @jax.checkpoint
        def tile(begin):
            q_t = jax.lax.dynamic_slice_in_dim(q_i, begin, rows)
            mask_t = jax.lax.dynamic_slice_in_dim(mask_i, begin, rows) if masks_queries else mask_i
            return _one_head(q_t, k_i, v_i, mask_t)

        out = jax.lax.map(tile, rows * jnp.arange(tiles))
        return out.reshape(tiles * rows, -1)[:queries]

    padded = jnp.pad(flat(q), ((0, 0), filled, (0, 0)))
    out = jax.lax.map(head, (jnp.arange(batch * heads), padded, flat(k), flat(v)))
    return jnp.swapaxes(out.reshape((batch, heads) + out.shape[1:]), 1, 2)


def dot_product_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    implementation: Implementation | None = None,
) -> Array:
    """softmax(q kᵀ / √D) v for every head, with a float32 softmax.

    Args:
      q: [B, N, H, D] queries.
      k: [B, M, H, D] keys.
      v: [B, M, H, D] values.
      mask: bool, broadcastable to [B, H, N, M] and of that rank; True where a query may
        attend to a key. Every query must be allowed at least one key.
      implementation: "plain" holds all logits, "tiled" at most 16 MiB of those of one head of one
        example (but one row at least), "xla" and "cudnn" are JAX's own. None picks by platform
        and size. All agree to rounding.

    Returns:
      [B, N, H, D] of v's dtype.

    Raises:
      ValueError: if the shapes do not fit or the implementation is unknown.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), eq. 1.
    """
    _check_shapes(q, k, v, mask)
    implementation = _choose(q, k, mask) if implementation is None else implementation
    if implementation == "plain":
        return _plain(q, k, v, mask)
    if implementation == "tiled":
        return _tiled(q, k, v, mask)
    check_implementation(implementation)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError unless it is None or one of IMPLEMENTATIONS."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)} or None, "
            f"got {implementation!r}"
        )


def _check_shapes(q: Array, k: Array, v: Array, mask: Array | None) -> None:
    fits = q.ndim == k.ndim == v.ndim == 4 and k.shape == v.shape
    if not fits or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            "q must have shape [B, N, H, D], k and v [B, M, H, D], "
            f"got q {q.shape}, k {k.shape} and v {v.shape}"
        )
    if mask is None:
        return
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    broadcasts = mask.ndim == 4 and all(m in (1, f) for m, f in zip(mask.shape, full, strict=True))
    if mask.dtype != jnp.bool_ or not broadcasts:
        raise ValueError(
            f"mask must be bool of a shape that broadcasts to [B, H, N, M] = {full}, "
            f"got {mask.dtype} of shape {mask.shape}"
        )


class Attention(nn.Module):
    """Multi-head attention over tokens, of a sequence to itself or to another one.

    Attributes:
      num_heads: must divide the width of the tokens, unless head_dim is given.
      out_init: initializer of the output projection.
      out_features: width of the result; None for that of the tokens.
      head_dim: width of a head; None for the width of the tokens / num_heads.
      qkv_bias: biases of the projections to queries, keys and values.
      implementation: see `dot_product_attention`.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.2.2.
    """

    num_heads: int
    out_init: nn.initializers.Initializer = default_init
    out_features: int | None = None
    head_dim: int | None = None
    qkv_bias: bool = True
    implementation: Implementation | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, context: Array | None = None, *, mask: Array | None = None
    ) -> Array:
        """Attends from x to context.

        Args:
          x: [B, N, C] tokens that ask.
          context: [B, M, D] tokens that answer; None for x itself.
          mask: bool, broadcastable to [B, H, N, M]; True where x may attend.

        Returns:
          [B, N, out_features].

        Raises:
          ValueError: if C is no multiple of `num_heads` and there is no `head_dim`.
        """
        width = x.shape[-1]
        if self.head_dim is None and width % self.num_heads:
            raise ValueError(
                f"the width of the tokens must be a multiple of num_heads = {self.num_heads}, "
                f"got {width}"
            )
        context = x if context is None else context
        head_dim = self.head_dim or width // self.num_heads
        inner = self.num_heads * head_dim
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def heads(name, tokens):
            h = Dense(inner, self.qkv_bias, kernel_init=default_init, name=name, **options)(tokens)
            return h.reshape(h.shape[:2] + (self.num_heads, head_dim))

        q, k, v = heads("query", x), heads("key", context), heads("value", context)
        h = dot_product_attention(q, k, v, mask=mask, implementation=self.implementation)
        h = h.reshape((*x.shape[:2], inner))
        features = self.out_features or width
        return Dense(features, kernel_init=self.out_init, name="out", **options)(h)


@dataclass(frozen=True)
class PixelAttention:
    """Self-attention between pixels whose heads or norm are not those of the network.

    Attributes:
      num_heads: number of heads.
      head_dim: width of a head; None for the number of channels / num_heads. It says nothing of
        their number, unlike that of the network and of the other attentions: head_dim=64 alone
        is a single head of 64.
      norm: whether there is a group norm before it.
      norm_groups: groups of the norm; None for those of the network.

    Raises:
      ValueError: if a number is below 1, or there are groups and no norm.
    """

    num_heads: int = 1
    head_dim: int | None = None
    norm: bool = True
    norm_groups: int | None = None

    def __post_init__(self):
        at_least_one(self, "num_heads", "head_dim", "norm_groups")
        if self.norm_groups is not None and not self.norm:
            raise ValueError(f"norm_groups belongs to norm=True, got {self.norm_groups}")


class AttentionBlock(nn.Module):
    """Self-attention between all pixels of an image, as a residual.

    The output projection starts at zero, so that a new block is the identity.

    Attributes:
      num_heads: must divide the number of channels, unless head_dim is given.
      norm_groups: groups of the norm, see `GroupNorm`.
      norm_eps: epsilon of the norm.
      norm: class of the norm, which takes the arguments of a `GroupNorm`; None for no norm.
      head_dim: width of a head; None for the number of channels / num_heads.
      out_scale: what the sum with the pixels is divided by.
      implementation: of the attention, see `dot_product_attention`.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.

    Source: Ho et al. 2020 (arXiv:2006.11239), appendix B; Dhariwal & Nichol 2021
    (arXiv:2105.05233), section 3 for several heads.
    """

    num_heads: int
    norm_groups: int | None
    norm_eps: float = 1e-5
    norm: Callable[..., nn.Module] | None = GroupNorm
    head_dim: int | None = None
    out_scale: float = 1.0
    implementation: Implementation | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, latent: Array | None = None) -> Array:
        """Attends.

        Args:
          x: [B, H, W, C].
          latent: what the norm is told besides the image; None for a `GroupNorm`.

        Returns:
          [B, H, W, C].
        """
        batch, height, width, channels = x.shape
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        told = () if latent is None else (latent,)
        h = x
        if self.norm is not None:
            h = self.norm(self.norm_groups, self.norm_eps, name="norm", **options)(x, *told)
        h = h.reshape(batch, height * width, channels)
        attention = Attention(
            self.num_heads,
            zeros_init,
            head_dim=self.head_dim,
            implementation=self.implementation,
            name="attention",
            **options,
        )
        h = x + attention(h).reshape(x.shape)
        return h if self.out_scale == 1.0 else h / self.out_scale


class AttentionPool(nn.Module):
    """One vector of an image: the mean pixel asks all pixels and itself.

    The learned positions fix the size of the image. The projection of queries, keys and values
    is followed by one to the width of the result; there is no residual.

    Attributes:
      num_heads: must divide the number of channels.
      features: width of the result.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.

    Source: Radford et al. 2021 (arXiv:2103.00020), section 2.4; Dhariwal & Nichol 2021
    (arXiv:2105.05233), section 4.1, for a classifier.
    """

    num_heads: int
    features: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, H, W, C] -> [B, features]."""
        batch, height, width, channels = x.shape
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        tokens = x.reshape(batch, height * width, channels).astype(self.dtype)
        tokens = jnp.concatenate([tokens.mean(1, keepdims=True), tokens], axis=1)
        init = nn.initializers.normal(channels**-0.5)
        shape = (height * width + 1, channels)
        position = self.param("position", init, shape, self.param_dtype)
        tokens = tokens + position.astype(self.dtype)[None]
        # The other queries would be discarded afterwards, so they are never made.
        attention = Attention(
            self.num_heads, out_features=self.features, name="attention", **options
        )
        return attention(tokens[:, :1], tokens)[:, 0]
