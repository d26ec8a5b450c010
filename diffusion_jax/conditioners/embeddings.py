"""Embeddings of what released UNets are told: labels, noise levels, sizes, texts and images.

Every one reads its inputs from the batch by name. The unconditional branch reads them as
`batch["null_" + name]`, a negative prompt's tokens for example; what has no negative, as sizes
and noise levels, is the same in both branches.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.conditioners.base import Conditioner
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import Array, Batch
from diffusion_jax.models.condition_embeddings import (
    HintEncoder,
    ImageEmbedding,
    ImageTokens,
    LinearEmbedding,
    MLPEmbedding,
    PooledTokens,
    TextImageEmbedding,
    TextImageTokens,
)
from diffusion_jax.models.embeddings import sinusoidal_embedding
from diffusion_jax.models.inputs import DType


def _read(batch: Batch, names: Sequence[str]) -> list[Array]:
    missing = [name for name in names if name not in batch]
    if missing:
        raise ValueError(f"the batch has no {', '.join(missing)}, only {sorted(batch)}")
    return [jnp.asarray(batch[name]) for name in names]


def _conditioner(
    fill: Callable[..., Condition],
    names: Sequence[str],
    init: Callable[[jax.Array], Any] = lambda key: {},
    *,
    shared: Sequence[str] = (),
) -> Conditioner:
    """A conditioner of a function (parameters, inputs …) -> Condition.

    Args:
      fill: the function.
      names: of the inputs in the batch.
      init: makes the parameters.
      shared: those of the names that are the same in the unconditional branch where the batch
        has none of its own for it.
    """

    def apply(params, batch, keys):
        del keys
        return fill(params, *_read(batch, names))

    def null(params, batch):
        own = [n if n in shared and f"null_{n}" not in batch else f"null_{n}" for n in names]
        return fill(params, *_read(batch, own))

    return Conditioner(init, apply, null)


def _init(module: nn.Module, *shapes: tuple[int, ...]) -> Callable[[jax.Array], Any]:
    def init(key):
        # Compiled, so that only the parameters are computed.
        return jax.jit(module.init)(key, *(jnp.zeros(shape) for shape in shapes))["params"]

    return init


def _vector(module: nn.Module, inputs: Mapping[str, tuple[int, ...]]) -> Conditioner:
    """A module of the inputs, by name and shape, that gives cond.vector."""

    def fill(params, *values):
        return Condition(vector=module.apply({"params": params}, *values))

    return _conditioner(fill, tuple(inputs), _init(module, *inputs.values()))


def given_vector(dim: int, *, name: str = "vector") -> Conditioner:
    """Passes `batch[name]` [B, dim] on as `vector`, which has been embedded elsewhere.

    Raises:
      ValueError: at use, if the batch lacks it or it has another width.

    Source: Ramesh et al. 2022 (arXiv:2204.06125), section 2.1, where the embedding is a part of
    another network.
    """

    def fill(params, vector):
        del params
        if vector.ndim != 2 or vector.shape[1] != dim:
            raise ValueError(f"{name} must have shape [B, {dim}], got {vector.shape}")
        return Condition(vector=vector)

    return _conditioner(fill, (name,))


def projected_vector(
    features: int, dim: int, *, name: str = "vector", dtype: DType = jnp.float32
) -> Conditioner:
    """Two layers with SiLU over `batch[name]` [B, features].

    Args:
      features: width of what is read.
      dim: width of the vector, the network's time embedding.
      name: of what is read.
      dtype: of the vector.

    Returns:
      A conditioner that fills `vector` [B, dim].

    Source: none; the class embedding "projection" of diffusers.
    """
    return _vector(MLPEmbedding(dim, jnp.dtype(dtype)), {name: (1, features)})


def linear_vector(
    features: int, dim: int, *, name: str = "vector", dtype: DType = jnp.float32
) -> Conditioner:
    """One linear layer over `batch[name]` [B, features].

    Args:
      features: width of what is read.
      dim: width of the vector, the network's time embedding.
      name: of what is read.
      dtype: of the vector.

    Returns:
      A conditioner that fills `vector` [B, dim].

    Source: none; the class embedding "simple_projection" of diffusers.
    """
    return _vector(LinearEmbedding(dim, jnp.dtype(dtype)), {name: (1, features)})


def noise_level(
    channels: int,
    dim: int,
    *,
    cos_first: bool = True,
    freq_shift: int = 0,
    act: str = "silu",
    name: str = "noise_level",
) -> Conditioner:
    """Embeds the noise level of a low-resolution image as times are embedded, in float32.

    Args:
      channels: width of the sinusoidal features of `batch[name]` [B].
      dim: width of the vector, the network's time embedding.
      cos_first: cosines before sines.
      freq_shift: see `sinusoidal_embedding`.
      act: activation of the hidden layer.
      name: of what is read.

    Returns:
      A conditioner that fills `vector` [B, dim].

    Source: Ho et al. 2022 (arXiv:2106.15282), section 4.1; Saharia et al. 2022 (arXiv:2205.11487),
    section 2.5.
    """
    module = MLPEmbedding(dim, act=act)

    def fill(params, level):
        h = sinusoidal_embedding(level, channels, cos_first=cos_first, freq_shift=freq_shift)
        return Condition(vector=module.apply({"params": params}, h))

    return _conditioner(fill, (name,), _init(module, (1, channels)), shared=(name,))


def pooled_tokens(
    features: int, dim: int, *, num_heads: int = 64, dtype: DType = jnp.float32
) -> Conditioner:
    """Pools `batch["tokens"]` [B, L, features] by attention.

    Args:
      features: width of the tokens.
      dim: width of the vector, the network's time embedding.
      num_heads: attention heads; must divide `features`.
      dtype: of the vector.

    Returns:
      A conditioner that fills `vector` [B, dim].

    Source: Saharia et al. 2022 (arXiv:2205.11487), section 2.4.
    """
    module = PooledTokens(dim, jnp.dtype(dtype), num_heads=num_heads)
    return _vector(module, {"tokens": (1, 1, features)})


def text_image_vector(
    text_dim: int, image_dim: int, dim: int, *, dtype: DType = jnp.float32
) -> Conditioner:
    """Embeds `batch["text_embedding"]` [B, text_dim] and `batch["image_embedding"]` [B, image_dim].

    Args:
      text_dim: width of the text's embedding.
      image_dim: width of the image's embedding.
      dim: width of the vector, the network's time embedding.
      dtype: of the vector.

    Returns:
      A conditioner that fills `vector` [B, dim].

    Source: Ramesh et al. 2022 (arXiv:2204.06125), section 2.1; Kandinsky 2.1's released code.
    """
    inputs = {"text_embedding": (1, text_dim), "image_embedding": (1, image_dim)}
    return _vector(TextImageEmbedding(dim, jnp.dtype(dtype)), inputs)


def image_vector(image_dim: int, dim: int, *, dtype: DType = jnp.float32) -> Conditioner:
    """Embeds `batch["image_embedding"]` [B, image_dim].

    Args:
      image_dim: width of the image's embedding.
      dim: width of the vector, the network's time embedding.
      dtype: of the vector.

    Returns:
      A conditioner that fills `vector` [B, dim].

    Source: Ramesh et al. 2022 (arXiv:2204.06125), section 2.1; Kandinsky 2.2's released code.
    """
    return _vector(ImageEmbedding(dim, jnp.dtype(dtype)), {"image_embedding": (1, image_dim)})


def image_hint(image_dim: int, dim: int, *, dtype: DType = jnp.float32) -> Conditioner:
    """Embeds `batch["image_embedding"]` [B, image_dim] and encodes `batch["hint"]`.

    The hint [B, 8H, 8W, 3], a map of depths for example, is the same in the unconditional branch.

    Args:
      image_dim: width of the image's embedding.
      dim: width of the vector, the network's time embedding.
      dtype: of the vector and of the channels.

    Returns:
      A conditioner that fills `vector` [B, dim] and `image` [B, H, W, 4].

    Source: Zhang et al. 2023 (arXiv:2302.05543), section 3.3; Kandinsky 2.2's released code.
    """
    embed, encode = ImageEmbedding(dim, jnp.dtype(dtype)), HintEncoder(dtype=jnp.dtype(dtype))

    def init(key):
        key_embed, key_encode = jax.random.split(key)
        return {
            "embed": _init(embed, (1, image_dim))(key_embed),
            "encode": _init(encode, (1, 8, 8, 3))(key_encode),
        }

    def fill(params, image, hint):
        return Condition(
            vector=embed.apply({"params": params["embed"]}, image),
            image=encode.apply({"params": params["encode"]}, hint),
        )

    return _conditioner(fill, ("image_embedding", "hint"), init, shared=("hint",))


def text_and_sizes(
    features: int,
    channels: int,
    dim: int,
    *,
    cos_first: bool = True,
    freq_shift: int = 0,
    dtype: DType = jnp.float32,
) -> Conditioner:
    """Embeds `batch["text_embedding"]` [B, D] and the numbers `batch["sizes"]` [B, N].

    The numbers, original height and width, top and left of the crop, target height and width in
    pixels, or an aesthetic score in place of the last two, become sinusoidal features side by side
    behind the text's, D + N · channels in all.

    Args:
      features: D + N · channels.
      channels: width of the features of a number.
      dim: width of the vector, the network's time embedding.
      cos_first: cosines before sines.
      freq_shift: see `sinusoidal_embedding`.
      dtype: of the vector.

    Returns:
      A conditioner that fills `vector` [B, dim].

    Raises:
      ValueError: at use, if D + N · channels is not `features`.

    Source: Podell et al. 2023 (arXiv:2307.01952), sections 2.1 and 2.2.
    """
    module = MLPEmbedding(dim, jnp.dtype(dtype))

    def fill(params, text, sizes):
        h = sinusoidal_embedding(
            sizes.reshape(-1), channels, cos_first=cos_first, freq_shift=freq_shift
        )
        h = jnp.concatenate([text, h.reshape(text.shape[0], -1).astype(text.dtype)], axis=1)
        if h.shape[1] != features:
            raise ValueError(
                f"text_embedding and {channels} features of each of the sizes must be {features} "
                f"wide together, got text_embedding {text.shape} and sizes {sizes.shape}"
            )
        return Condition(vector=module.apply({"params": params}, h))

    names = ("text_embedding", "sizes")
    return _conditioner(fill, names, _init(module, (1, features)), shared=("sizes",))


def guidance_scale(
    features: int, channels: int, *, name: str = "guidance", dtype: DType = jnp.float32
) -> Conditioner:
    """Projects an embedding of the guidance scale to the features of the time.

    Networks distilled from guided ones are told the scale. A batch without it fills nothing.

    Args:
      features: width of `batch[name]` [B, features].
      channels: width of the features of the network's time.
      name: of what is read.
      dtype: of the result.

    Returns:
      A conditioner that fills `time` [B, channels].

    Source: Meng et al. 2023 (arXiv:2210.03142), section 3.1; Luo et al. 2023 (arXiv:2310.04378),
    section 4.1.
    """
    module = LinearEmbedding(channels, jnp.dtype(dtype), bias=False)

    def fill(params, scale):
        return Condition(time=module.apply({"params": params}, scale))

    return where_given(
        name, _conditioner(fill, (name,), _init(module, (1, features)), shared=(name,))
    )


def _masked(
    make: Callable[..., Array],
    names: Sequence[str],
    init: Callable[[jax.Array], Any] = lambda key: {},
    *,
    before: int = 0,
) -> Conditioner:
    """Tokens, with the mask of the text's where the batch has one.

    Args:
      make: (parameters, inputs …) -> tokens [B, before + L, D].
      names: of the inputs in the batch.
      init: makes the parameters.
      before: tokens before those of the text, all of which are there.
    """

    def condition(params, batch, prefix):
        tokens = make(params, *_read(batch, [prefix + name for name in names]))
        mask = batch.get(f"{prefix}token_mask") if "tokens" in names else None
        if mask is not None:
            mask = jnp.pad(jnp.asarray(mask, bool), ((0, 0), (before, 0)), constant_values=True)
        return Condition(tokens=tokens, token_mask=mask)

    def apply(params, batch, keys):
        del keys
        return condition(params, batch, "")

    return Conditioner(init, apply, lambda params, batch: condition(params, batch, "null_"))


def given_tokens(dim: int) -> Conditioner:
    """Passes `batch["tokens"]` [B, L, dim] on, with `batch["token_mask"]` [B, L] if it is there.

    Raises:
      ValueError: at use, if the batch lacks the tokens or they have another width.

    Source: Rombach et al. 2022 (arXiv:2112.10752), section 3.3.
    """

    def make(params, tokens):
        del params
        if tokens.ndim != 3 or tokens.shape[2] != dim:
            raise ValueError(f"tokens must have shape [B, L, {dim}], got {tokens.shape}")
        return tokens

    return _masked(make, ("tokens",))


def projected_tokens(features: int, dim: int, *, dtype: DType = jnp.float32) -> Conditioner:
    """One linear layer over `batch["tokens"]` [B, L, features]; `batch["token_mask"]` is kept.

    Args:
      features: width of the text's tokens.
      dim: width of the network's tokens.
      dtype: of the tokens.

    Returns:
      A conditioner that fills `tokens` [B, L, dim] and, with a mask, `token_mask`.

    Source: Saharia et al. 2022 (arXiv:2205.11487), appendix D, and DeepFloyd IF's released code.
    """
    module = LinearEmbedding(dim, jnp.dtype(dtype))

    def make(params, tokens):
        return module.apply({"params": params}, tokens)

    return _masked(make, ("tokens",), _init(module, (1, 1, features)))


def text_image_tokens(
    text_dim: int, image_dim: int, dim: int, *, num_tokens: int = 10, dtype: DType = jnp.float32
) -> Conditioner:
    """Tokens of `batch["image_embedding"]` [B, image_dim], then of `batch["tokens"]`.

    Args:
      text_dim: width of the text's tokens.
      image_dim: width of the image's embedding.
      dim: width of the network's tokens.
      num_tokens: tokens of the image.
      dtype: of the tokens.

    Returns:
      A conditioner that fills `tokens` [B, num_tokens + L, dim] and, with a mask, `token_mask`.

    Source: Ramesh et al. 2022 (arXiv:2204.06125), section 2.1; Kandinsky 2.1's released code.
    """
    module = TextImageTokens(dim, jnp.dtype(dtype), num_tokens=num_tokens)

    def make(params, tokens, image):
        return module.apply({"params": params}, tokens, image)

    init = _init(module, (1, 1, text_dim), (1, image_dim))
    return _masked(make, ("tokens", "image_embedding"), init, before=num_tokens)


def image_tokens(
    image_dim: int, dim: int, *, num_tokens: int = 32, dtype: DType = jnp.float32
) -> Conditioner:
    """Tokens of `batch["image_embedding"]` [B, image_dim].

    Args:
      image_dim: width of the image's embedding.
      dim: width of the network's tokens.
      num_tokens: tokens of the image.
      dtype: of the tokens.

    Returns:
      A conditioner that fills `tokens` [B, num_tokens, dim].

    Source: Ramesh et al. 2022 (arXiv:2204.06125), section 2.1; Kandinsky 2.2's released code.
    """
    module = ImageTokens(dim, jnp.dtype(dtype), num_tokens=num_tokens)

    def make(params, image):
        return module.apply({"params": params}, image)

    return _masked(make, ("image_embedding",), _init(module, (1, image_dim)))


def where_given(name: str, conditioner: Conditioner) -> Conditioner:
    """A conditioner that fills nothing where the batch has no `batch[name]`.

    Args:
      name: of what the conditioner reads.
      conditioner: of batches that have it.

    Source: none; a convention of this library.
    """

    def apply(params, batch, keys):
        return conditioner.apply(params, batch, keys) if name in batch else Condition()

    def null(params, batch):
        return conditioner.null(params, batch) if name in batch else Condition()

    return Conditioner(conditioner.init, apply, null)
