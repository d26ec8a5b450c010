"""The diffusion prior of DALL-E 2: from a text to the CLIP embedding of an image."""

from collections.abc import Mapping
from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import Array, Key
from diffusion_jax.models.attention import Attention
from diffusion_jax.models.blocks import ACTIVATIONS, Dropout, default_init, zeros_init
from diffusion_jax.models.embeddings import sinusoidal_embedding
from diffusion_jax.models.feed_forward import HIDDEN_UNITS
from diffusion_jax.models.inputs import DType, at_least_one, check_batch
from diffusion_jax.models.layers import Dense
from diffusion_jax.models.pre_norm import layer_norm

READS = ("vector", "tokens", "token_mask")


@dataclass(frozen=True)
class PriorConfig:
    """A diffusion prior; the default is Karlo's, for CLIP ViT-L/14.

    Attributes:
      data_dim: width of x and of the text's tokens.
      vector_dim: width of cond.vector, the text's embedding; None for data_dim.
      out_dim: width of the output; None for data_dim.
      num_text_tokens: tokens that a mask speaks about, the first of the sequence.
      num_other_tokens: tokens behind them. The positions that are learned are those of
        num_text_tokens + num_other_tokens tokens: of the whole sequence, or of x alone where
        that is as many.
      width: width of the sequence.
      depth: transformer blocks.
      num_heads: must divide the width.
      time_hidden: hidden width of the time embedding; None for the width.
      time_activation: of the time embedding's hidden layer, a key of `ACTIVATIONS`.
      token_projection: bring the text's tokens, which are then needed, from data_dim to the
        width. Without, they may be missing and have the width already.
      vector_norm: a norm before the projection of cond.vector.
      norm_in: a norm before the first block.
      query: a learned last token, whose place in the output is the prediction. Without, the
        prediction stands in the places of x.
      dropout: rate of what attention adds, and inside the MLPs, in [0, 1).
      remat: recompute every block in the backward pass, for memory.

    Raises:
      ValueError: if a value is out of range.
    """

    data_dim: int = 768
    vector_dim: int | None = None
    out_dim: int | None = None
    num_text_tokens: int = 77
    num_other_tokens: int = 4
    width: int = 2048
    depth: int = 20
    num_heads: int = 32
    time_hidden: int | None = None
    time_activation: str = "silu"
    token_projection: bool = True
    vector_norm: bool = False
    norm_in: bool = False
    query: bool = True
    dropout: float = 0.0
    remat: bool = False

    def __post_init__(self):
        at_least_one(self, "data_dim", "width", "depth", "num_heads", "num_text_tokens")
        at_least_one(self, "vector_dim", "out_dim", "time_hidden")
        if self.num_other_tokens < 0:
            raise ValueError(f"num_other_tokens must be at least 0, got {self.num_other_tokens}")
        if self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of num_heads = {self.num_heads}, got {self.width}"
            )
        if self.time_activation not in ACTIVATIONS:
            raise ValueError(
                f"time_activation must be one of {sorted(ACTIVATIONS)}, "
                f"got {self.time_activation!r}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")

    @property
    def embed_dim(self) -> int:
        """Width of cond.vector."""
        return self.vector_dim or self.data_dim

    @property
    def num_positions(self) -> int:
        """Tokens that have a learned position."""
        return self.num_text_tokens + self.num_other_tokens

    def build(self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32) -> "Prior":
        """The module, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return Prior(self, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))


def standardize_embedding(statistics: Mapping[str, Array], embedding: Array) -> Array:
    """x0 = (z - mean) / std: a CLIP embedding as the prior diffuses it.

    Args:
      statistics: "mean" and "std", [1, D] each, over the embeddings of the training images.
      embedding: z, [B, ..., D].

    Returns:
      [B, ..., D].

    Source: Ramesh et al. 2022 (arXiv:2204.06125) diffuse the embedding itself; by its
    statistics it is scaled in Karlo's released code.
    """
    mean, std = (_per_dimension(statistics[name], embedding) for name in ("mean", "std"))
    return (embedding - mean) / std


def restore_embedding(statistics: Mapping[str, Array], x0: Array) -> Array:
    """z = x0 · std + mean: the CLIP embedding of a sample, the inverse of the above.

    Args:
      statistics: "mean" and "std", [1, D] each.
      x0: [B, ..., D].

    Returns:
      [B, ..., D].
    """
    mean, std = (_per_dimension(statistics[name], x0) for name in ("mean", "std"))
    return x0 * std + mean


def _per_dimension(statistic: Array, x: Array) -> Array:
    return statistic.reshape((1,) * (x.ndim - 1) + (-1,)).astype(x.dtype)


def causal_mask(token_mask: Array, num_tokens: int) -> Array:
    """Who may attend to whom where some tokens are padding.

    A token sees itself and those before it, except for padding. One that would see nothing
    (padding that nothing precedes) sees the tokens against which only one of the two rules
    speaks, as the finite penalties of the released code have it.

    Args:
      token_mask: [B, M] bool, True where one of the first M tokens is none of padding.
      num_tokens: N, at least M; the others are no padding.

    Returns:
      [B, 1, N, N] bool, True where a query (third axis) may attend to a key (fourth).

    Source: Ramesh et al. 2022 (arXiv:2204.06125), section 2.2 (causal); the penalties are those
    of released code.
    """
    missing = num_tokens - token_mask.shape[1]
    padding = jnp.pad(~token_mask, ((0, 0), (0, missing)))
    later = ~jnp.tri(num_tokens, dtype=bool)
    penalty = padding[:, None, :].astype(jnp.int32) + later[None].astype(jnp.int32)
    return (penalty == penalty.min(-1, keepdims=True))[:, None]


class PriorBlock(nn.Module):
    """Transformer block with the norms first: attention, then an MLP four times as wide.

    Attributes:
      num_heads: attention heads.
      dropout: rate of what attention adds, and inside the MLP.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.

    Source: Ramesh et al. 2022 (arXiv:2204.06125), section 2.2; Radford et al. 2019, section 2.3.
    """

    num_heads: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None, keys: Key | None = None) -> Array:
        """x: [B, N, C], mask: [B, 1, N, N] bool or None, keys: [B] or None -> [B, N, C]."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = x.shape[-1]
        h = layer_norm(1e-5, "norm_1", **types)(x)
        h = Attention(self.num_heads, name="attn", **types)(h, mask=mask)
        x = x + Dropout(self.dropout, name="attn_dropout")(h, keys)

        h = layer_norm(1e-5, "norm_2", **types)(x)
        h = Dense(4 * width, kernel_init=default_init, name="mlp_1", **types)(h)
        h = Dropout(self.dropout, name="dropout")(HIDDEN_UNITS["gelu"].apply(h), keys)
        return x + Dense(width, kernel_init=default_init, name="mlp_2", **types)(h)


class Prior(nn.Module):
    """Diffusion prior: a transformer over the text, the time and the noisy embedding.

    The sequence is the text's tokens, its embedding, the time, x, and a learned query. Where a
    mask is given a token attends to itself and those before it, without one to all of them; both
    are conventions of released weights. The output starts at zero.

    Attributes:
      config: the architecture.
      dtype: dtype of activations; norm statistics, softmax and time embedding stay float32.
      param_dtype: dtype of the parameters.

    Source: Ramesh et al. 2022 (arXiv:2204.06125), section 2.2.
    """

    config: PriorConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Condition, *, keys: Key | None = None) -> Array:
        """Predicts x0.

        Args:
          x: [B, D] noisy embeddings, or [B, N, D] for N of them per example.
          t: [B] times as the network was trained with.
          cond: vector [B, V], the text's embedding (or several, [B, M, V]); tokens [B, L, D],
            the text's (of the network's width where the configuration has no projection);
            token_mask [B, num_text_tokens] bool, True where the sequence's first tokens are
            none of padding, which makes attention causal.
          keys: [B], one per example, in training; they switch dropout on.

        Returns:
          [B, out_dim] of `dtype`, or [B, N, out_dim] where x has three axes and the
          configuration no query.

        Raises:
          ValueError: if a shape does not fit, if the vector or tokens that are needed are
            missing, or if the condition fills a slot that is not read.
        """
        config = self.config
        self._check(x, t, cond, keys)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        context, h = self._sequence(x, t, cond)
        h = jnp.concatenate([context, h], axis=1)
        h = self._with_positions(h, context.shape[1], x.shape[1] if x.ndim == 3 else 1)
        mask = self._mask(cond, h.shape[1])
        if config.norm_in:
            h = layer_norm(1e-5, "norm_in", **types)(h)
        block = nn.remat(PriorBlock) if config.remat else PriorBlock
        for i in range(config.depth):
            h = block(config.num_heads, config.dropout, name=f"block_{i}", **types)(h, mask, keys)

        h = h[:, -1:] if config.query else h[:, context.shape[1] :]
        h = layer_norm(1e-5, "norm_out", **types)(h)
        h = Dense(config.out_dim or config.data_dim, kernel_init=zeros_init, name="out", **types)(h)
        return h[:, 0] if config.query or x.ndim == 2 else h

    def _sequence(self, x: Array, t: Array, cond: Condition) -> tuple[Array, Array]:
        """What stands before x, and x with what follows it; [B, ., width] each."""
        config, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def project(name, tokens):
            tokens = tokens if tokens.ndim == 3 else tokens[:, None]
            dense = Dense(config.width, kernel_init=default_init, name=name, **types)
            return dense(tokens.astype(self.dtype))

        vector = cond.vector
        if config.vector_norm:
            vector = layer_norm(1e-5, "vector_norm", **types)(vector)
        context = [project("vector_in", vector), self._time(t).astype(self.dtype)[:, None]]
        if cond.tokens is not None:
            tokens = cond.tokens.astype(self.dtype)
            projected = project("token_in", tokens) if config.token_projection else tokens
            context.insert(0, projected)
        rest = [project("x_in", x)]
        if config.query:
            init = nn.initializers.normal(0.02)
            query = self.param("query", init, (1, 1, config.width), self.param_dtype)
            rest.append(jnp.broadcast_to(query.astype(self.dtype), (x.shape[0], 1, config.width)))
        return jnp.concatenate(context, axis=1), jnp.concatenate(rest, axis=1)

    def _time(self, t: Array) -> Array:
        """[B, width] float32."""
        config = self.config
        options = {"dtype": jnp.float32, "param_dtype": self.param_dtype}
        h = sinusoidal_embedding(t, config.width)
        h = Dense(config.time_hidden or config.width, name="time_1", **options)(h)
        h = ACTIVATIONS[config.time_activation](h)
        return Dense(config.width, name="time_2", **options)(h)

    def _with_positions(self, h: Array, before: int, num_x: int) -> Array:
        """h [B, N, width] plus the learned positions, of everything or of x's tokens alone."""
        count = self.config.num_positions
        shape = (1, count, self.config.width)
        table = self.param("positions", nn.initializers.normal(0.02), shape, self.param_dtype)
        total = h.shape[1]
        if count not in (total, num_x):
            raise ValueError(
                f"there are {count} learned positions (num_text_tokens + num_other_tokens), which "
                f"must be those of the whole sequence or of x, got a sequence of {total} tokens of "
                f"which {num_x} are x's and {before} stand before it"
            )
        if count != total:
            table = jnp.pad(table, ((0, 0), (before, total - before - count), (0, 0)))
        return h + table.astype(h.dtype)

    def _mask(self, cond: Condition, total: int) -> Array | None:
        if cond.token_mask is None:
            return None
        if total != self.config.num_positions:
            raise ValueError(
                "a token_mask is for sequences whose tokens all have a learned position, got "
                f"{total} tokens and {self.config.num_positions} positions"
            )
        return causal_mask(cond.token_mask, total)

    def _check(self, x: Array, t: Array, cond: Condition, keys: Key | None) -> None:
        config = self.config
        check_batch(x, t, keys)
        batch = x.shape[0]
        if x.ndim > 3 or x.shape[-1] != config.data_dim:
            raise ValueError(
                f"x must have shape [B, {config.data_dim}] or [B, N, {config.data_dim}], "
                f"got {x.shape}"
            )
        unread = sorted(set(cond.slots()) - set(READS))
        if unread:
            raise ValueError(
                f"this network reads the slots {list(READS)} of a condition, got {unread} as well"
            )
        vector, tokens, mask = cond.vector, cond.tokens, cond.token_mask
        if vector is None:
            raise ValueError("cond.vector must hold the text's embedding, got None")
        fits = vector.ndim in (2, 3) and vector.shape[-1] == config.embed_dim
        if not fits or vector.shape[0] != batch:
            raise ValueError(
                f"cond.vector must have shape [{batch}, {config.embed_dim}] or "
                f"[{batch}, M, {config.embed_dim}], got {vector.shape}"
            )
        width = config.data_dim if config.token_projection else config.width
        if tokens is None:
            if config.token_projection:
                raise ValueError(
                    "cond.tokens must hold the text's tokens, got None; a network without text "
                    "is configured with token_projection=False"
                )
        elif tokens.ndim != 3 or (tokens.shape[0], tokens.shape[2]) != (batch, width):
            raise ValueError(
                f"cond.tokens must have shape [{batch}, L, {width}], got {tokens.shape}"
            )
        if mask is not None and (
            mask.shape != (batch, config.num_text_tokens) or mask.dtype != jnp.bool_
        ):
            raise ValueError(
                f"cond.token_mask must be bool of shape [{batch}, {config.num_text_tokens}] "
                f"(num_text_tokens), got {mask.dtype} of shape {mask.shape}"
            )
