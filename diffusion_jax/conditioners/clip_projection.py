"""DALL-E 2's decoder is told the CLIP embeddings of an image and a text, by one projection."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.conditioners.base import Conditioner
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import Array, Batch
from diffusion_jax.models.inputs import DType, at_least_one
from diffusion_jax.models.layers import Dense
from diffusion_jax.models.pre_norm import layer_norm


@dataclass(frozen=True)
class CLIPProjectionConfig:
    """Sizes of the projection; the default is Karlo's, for CLIP ViT-L/14.

    Attributes:
      num_extra_tokens: context tokens that the image's embedding becomes.
      embedding_dim: width of CLIP's embeddings and of its text tokens.
      vector_dim: width of cond.vector, that of the decoder's time embedding.
      token_dim: width of cond.tokens.

    Raises:
      ValueError: if a value is below 1.
    """

    num_extra_tokens: int = 4
    embedding_dim: int = 768
    vector_dim: int = 1280
    token_dim: int = 1536

    def __post_init__(self):
        at_least_one(self, "num_extra_tokens", "embedding_dim", "vector_dim", "token_dim")

    def build(
        self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32
    ) -> "CLIPProjection":
        """The module, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return CLIPProjection(self, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))


class CLIPProjection(nn.Module):
    """Image and text embedding as a vector; the image's as tokens before those of the text.

    vector = W_i z_i + W_t z_t;  tokens = [reshape(W_c z_i), norm(W_h h)].

    Attributes:
      config: the sizes.
      dtype: dtype of activations; the statistics of the norm stay float32.
      param_dtype: dtype of the parameters.

    Source: Ramesh et al. 2022 (arXiv:2204.06125), section 2.1.
    """

    config: CLIPProjectionConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Array | None, text: Array, hidden: Array) -> tuple[Array, Array]:
        """Projects.

        Args:
          image: [B, D] embeddings of images; None for the learned embedding of no image.
          text: [B, D] embeddings of texts.
          hidden: [B, L, D] tokens of the texts, the text tower's last layer.

        Returns:
          The vector [B, vector_dim] and the tokens [B, num_extra_tokens + L, token_dim].
        """
        config, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        null = self.param(
            "null_image", nn.initializers.zeros_init(), (config.embedding_dim,), self.param_dtype
        )
        image = jnp.broadcast_to(null, text.shape) if image is None else image
        image, text, hidden = (a.astype(self.dtype) for a in (image, text, hidden))
        vector = Dense(config.vector_dim, name="image_to_vector", **types)(image)
        vector = vector + Dense(config.vector_dim, name="text_to_vector", **types)(text)

        count = config.num_extra_tokens
        extra = Dense(count * config.token_dim, name="image_to_tokens", **types)(image)
        # The numbers of one token lie `count` apart in released weights.
        extra = jnp.swapaxes(extra.reshape(-1, config.token_dim, count), 1, 2)
        hidden = Dense(config.token_dim, name="text_to_tokens", **types)(hidden)
        hidden = layer_norm(1e-5, "token_norm", **types)(hidden)
        return vector, jnp.concatenate([extra, hidden], axis=1)


def clip_projection(config: CLIPProjectionConfig, *, dtype: DType = jnp.float32) -> Conditioner:
    """Conditions DALL-E 2's decoder on CLIP embeddings of an image and its caption.

    Reads batch["image_embedding"] [B, D], batch["text_embedding"] [B, D], batch["text_tokens"]
    [B, L, D] and, if there, batch["text_mask"] [B, L] bool, True where a token is none of
    padding. The null condition is the learned embedding of no image with the empty text, whose
    encodings are the same entries with "null_" before their names, [B, …] or [1, …].

    Args:
      config: the sizes; vector_dim is the decoder's embed_dim.
      dtype: of the activations, a dtype or its name.

    Returns:
      A conditioner that fills `vector` [B, vector_dim] and `tokens` [B, num_extra_tokens + L,
      token_dim], and `token_mask` if there is a mask of the text.

    Raises:
      ValueError: at use, if an entry of the batch is missing or of another shape.

    Source: Ramesh et al. 2022 (arXiv:2204.06125), section 2.1; the learned null embedding:
    released code of its reproduction Karlo.
    """
    module = config.build(dtype=dtype)

    def init(key):
        shape = (1, config.embedding_dim)
        return module.init(key, jnp.zeros(shape), jnp.zeros(shape), jnp.zeros((1, *shape)))[
            "params"
        ]

    def project(params, image, text, hidden, mask):
        vector, tokens = module.apply({"params": params}, image, text, hidden)
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (config.num_extra_tokens, 0)), constant_values=True)
        return Condition(vector=vector, tokens=tokens, token_mask=mask)

    def apply(params, batch, keys):
        del keys
        image = _entry(batch, "image_embedding", config, rank=2)
        text = _text(batch, config, "", image.shape[0])
        return project(params, image, *text)

    def null(params, batch):
        size = _entry(batch, "image_embedding", config, rank=2).shape[0]
        return project(params, None, *_text(batch, config, "null_", size))

    return Conditioner(init, apply, null)


def _entry(batch: Batch, name: str, config: CLIPProjectionConfig, *, rank: int) -> Array:
    if name not in batch:
        raise ValueError(f"the batch has no {name!r}, only {sorted(batch)}")
    value = jnp.asarray(batch[name])
    if value.ndim != rank or value.shape[-1] != config.embedding_dim:
        axes = "B, D" if rank == 2 else "B, L, D"
        raise ValueError(
            f"{name} must have shape [{axes}] with D = {config.embedding_dim}, got {value.shape}"
        )
    return value


def _text(
    batch: Batch, config: CLIPProjectionConfig, prefix: str, size: int
) -> tuple[Array, Array, Array | None]:
    """Embedding [B, D], tokens [B, L, D] and mask [B, L] of a text, for B = `size`."""
    text = _entry(batch, prefix + "text_embedding", config, rank=2)
    hidden = _entry(batch, prefix + "text_tokens", config, rank=3)
    mask = batch.get(prefix + "text_mask")
    values = [text, hidden] if mask is None else [text, hidden, jnp.asarray(mask)]
    if mask is not None and (values[2].shape != hidden.shape[:2] or values[2].dtype != jnp.bool_):
        raise ValueError(
            f"{prefix}text_mask must be bool of shape {hidden.shape[:2]}, got {values[2].dtype} "
            f"of shape {values[2].shape}"
        )
    if any(value.shape[0] not in (1, size) for value in values):
        raise ValueError(
            f"the {prefix}text's entries must be of {size} examples, as image_embedding is, or "
            f"of one, got {[value.shape for value in values]}"
        )
    values = [jnp.broadcast_to(value, (size, *value.shape[1:])) for value in values]
    return values[0], values[1], values[2] if mask is not None else None
