"""DiT: a transformer over image patches whose norms are told the time."""

from collections.abc import Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import Array, Key
from diffusion_jax.models.attention import Attention
from diffusion_jax.models.blocks import Dropout, zeros_init
from diffusion_jax.models.embeddings import Fourier, Sinusoidal, TimeEmbedding
from diffusion_jax.models.feed_forward import HIDDEN_UNITS
from diffusion_jax.models.inputs import DType, at_least_one, check_inputs, with_image, with_vector
from diffusion_jax.models.layers import Dense, LayerNorm

xavier_init = nn.initializers.xavier_uniform()
# That of a dense layer over the whole patch, whose kernel is kept as [P, P, C, D].
patch_init = nn.initializers.variance_scaling(
    1.0, "fan_avg", "uniform", in_axis=(0, 1, 2), out_axis=3
)


@dataclass(frozen=True)
class DiTConfig:
    """A diffusion transformer; the default is the paper's DiT-S/2.

    Attributes:
      patch_size: side of the square patches, in pixels; must divide the image's sides.
      width: width of the tokens, also of the time embedding.
      depth: transformer blocks.
      num_heads: must divide the width.
      mlp_ratio: hidden width of the MLPs as a multiple of the width.
      out_channels: channels of the output, twice those of x where the variance is learned.
      position: "sincos" for the paper's fixed embedding, "learned" for a table that
        belongs to one image size.
      base_size: patches per side that fixed positions run over whatever the image's size,
        so that patches of a larger image lie closer together; None for positions one apart.
      activation: what the hidden units of the MLPs compute, a key of `HIDDEN_UNITS`.
      qkv_bias: biases of the projections to queries, keys and values.
      mlp_norm_eps: epsilon of the norms before the MLPs.
      mlp_norm_affine: scales and biases of these norms besides those that the time makes.
      time_features: what the time embedding is made of.
      time_channels: width of sinusoidal time features.
      shared_embedding: one time embedding for all blocks, as in the paper. Without, each
        block has its own and adds its own part of the vector, and the output layer uses those
        of the first block, as diffusers stores it.
      dropout: rate inside the MLPs, in [0, 1).
      attention_dropout: rate of what attention adds to the tokens, in [0, 1).
      needs_vector: refuse a condition without a vector.
      remat: recompute every block in the backward pass, for memory.

    Raises:
      ValueError: if a value is out of range.
    """

    patch_size: int = 2
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    out_channels: int = 3
    position: str = "sincos"
    base_size: int | None = None
    activation: str = "gelu_tanh"
    qkv_bias: bool = True
    mlp_norm_eps: float = 1e-6
    mlp_norm_affine: bool = False
    time_features: Sinusoidal | Fourier = Sinusoidal()
    time_channels: int = 256
    shared_embedding: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    needs_vector: bool = False
    remat: bool = False

    def __post_init__(self):
        at_least_one(self, "patch_size", "width", "depth", "num_heads", "out_channels")
        if self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of num_heads = {self.num_heads}, got {self.width}"
            )
        if self.position not in ("sincos", "learned"):
            raise ValueError(f"position must be 'sincos' or 'learned', got {self.position!r}")
        if self.position == "sincos" and self.width % 4:
            raise ValueError(f"sincos positions need a width that 4 divides, got {self.width}")
        if self.base_size is not None and (self.position != "sincos" or self.base_size < 1):
            raise ValueError(
                "base_size must be at least 1 and belongs to sincos positions, got "
                f"{self.base_size} and {self.position!r}"
            )
        if self.activation not in HIDDEN_UNITS:
            raise ValueError(
                f"activation must be one of {sorted(HIDDEN_UNITS)}, got {self.activation!r}"
            )
        for name in ("dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")

    @property
    def embed_dim(self) -> int:
        """Width of cond.vector: that of the time embedding, or of those of all blocks."""
        return self.width if self.shared_embedding else self.depth * self.width

    def build(self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32) -> "DiT":
        """The module, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return DiT(self, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))


def sincos_positions(
    height: int, width: int, dim: int, *, base_size: int | None = None
) -> np.ndarray:
    """Fixed embedding of a grid: the first half says the column, the second the row.

    Each half is [sin(p·f_k), cos(p·f_k)] with f_k = 10000^(-k / (dim / 4)).

    Args:
      height, width: of the grid, in patches.
      dim: width of the embedding, a multiple of 4.
      base_size: p runs over [0, base_size) in either direction; None for 0, 1, 2, …

    Returns:
      [height · width, dim] float32, row by row.

    Raises:
      ValueError: if `dim` is no multiple of 4.

    Source: Peebles & Xie 2023 (arXiv:2212.09748), section 3.2; Vaswani et al. 2017
    (arXiv:1706.03762), section 3.5.
    """
    if dim % 4:
        raise ValueError(f"dim must be a multiple of 4, got {dim}")
    frequencies = 10000.0 ** (-np.arange(dim // 4, dtype=np.float64) / (dim // 4))
    spacings = [1.0 if base_size is None else base_size / size for size in (height, width)]
    rows, columns = np.meshgrid(
        np.arange(height) * spacings[0], np.arange(width) * spacings[1], indexing="ij"
    )
    halves = []
    for position in (columns, rows):
        angles = position.reshape(-1, 1) * frequencies[None]
        halves += [np.sin(angles), np.cos(angles)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def patchify(x: Array, size: int) -> Array:
    """Cuts images into patches, [B, H, W, C] -> [B, H·W / size², size² · C], row by row."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * channels)


def unpatchify(tokens: Array, size: int, *, height: int, width: int) -> Array:
    """Undoes `patchify`, [B, H·W / size², size² · C] -> [B, H, W, C]."""
    x = tokens.reshape(tokens.shape[0], height // size, width // size, size, size, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(tokens.shape[0], height, width, -1)


def _modulate(h: Array, shift: Array, scale: Array) -> Array:
    return h * (1.0 + scale) + shift


class PatchEmbed(nn.Module):
    """One token per patch, a dense layer over its pixels.

    Attributes:
      patch_size: side of the square patches.
      width: width of the tokens.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters; the kernel has shape [P, P, C, width].

    Source: Peebles & Xie 2023 (arXiv:2212.09748), section 3.2, patchify.
    """

    patch_size: int
    width: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, H, W, C] -> [B, H·W / patch_size², width], row by row."""
        size = self.patch_size
        shape = (size, size, x.shape[-1], self.width)
        kernel = self.param("kernel", patch_init, shape, self.param_dtype)
        bias = self.param("bias", zeros_init, (self.width,), self.param_dtype)
        # A product of matrices, since patches do not overlap.
        h = patchify(x, size).astype(self.dtype) @ kernel.astype(self.dtype).reshape(-1, self.width)
        return h + bias.astype(self.dtype)[None, None]


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero: the time makes the norms' shifts, scales and gates.

    All six start at zero, so that a new block is the identity.

    Attributes:
      num_heads: attention heads.
      mlp_ratio: hidden width of the MLP as a multiple of the width.
      dropout: rate inside the MLP.
      attention_dropout: rate of what attention adds to the tokens.
      activation: what the MLP's hidden units compute, a key of `HIDDEN_UNITS`.
      qkv_bias: biases of the projections to queries, keys and values.
      mlp_norm_eps: epsilon of the norm before the MLP.
      mlp_norm_affine: scale and bias of that norm besides those that the time makes.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.

    Source: Peebles & Xie 2023 (arXiv:2212.09748), section 3.2, adaLN-Zero block.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation: str = "gelu_tanh"
    qkv_bias: bool = True
    mlp_norm_eps: float = 1e-6
    mlp_norm_affine: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, emb: Array, keys: Key | None = None) -> Array:
        """x: [B, N, C] tokens, emb: [B, E], keys: [B] or None -> [B, N, C]."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width, affine = x.shape[-1], self.mlp_norm_affine
        emb = nn.silu(emb.astype(self.dtype))
        modulation = Dense(6 * width, kernel_init=zeros_init, name="modulation", **types)(emb)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(
            modulation[:, None, :], 6, axis=-1
        )
        # Two passes: E[x²] - E[x]² loses the small variance of a token with a large mean.
        exact = {"use_fast_variance": False, **types}
        norm = LayerNorm(1e-6, use_bias=False, use_scale=False, name="norm_1", **exact)
        h = _modulate(norm(x), shift_1, scale_1)
        attention = Attention(
            self.num_heads, xavier_init, qkv_bias=self.qkv_bias, name="attn", **types
        )
        h = Dropout(self.attention_dropout, name="attn_dropout")(attention(h), keys)
        x = x + gate_1 * h

        norm = LayerNorm(
            self.mlp_norm_eps, use_bias=affine, use_scale=affine, name="norm_2", **exact
        )
        h = _modulate(norm(x), shift_2, scale_2)
        units = HIDDEN_UNITS[self.activation]
        hidden = units.inputs * int(width * self.mlp_ratio)
        h = units.apply(Dense(hidden, kernel_init=xavier_init, name="mlp_1", **types)(h))
        h = Dropout(self.dropout, name="dropout")(h, keys)
        return x + gate_2 * Dense(width, kernel_init=xavier_init, name="mlp_2", **types)(h)


class DiT(nn.Module):
    """Diffusion transformer; its output starts at zero.

    Attributes:
      config: the architecture.
      dtype: dtype of activations; softmax and the time embedding stay float32.
      param_dtype: dtype of the parameters.

    Source: Peebles & Xie 2023 (arXiv:2212.09748), section 3.2.
    """

    config: DiTConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Condition, *, keys: Key | None = None) -> Array:
        """Predicts.

        Args:
          x: [B, H, W, C] noisy images; H and W multiples of the patch size.
          t: [B] times as the network was trained with.
          cond: vector [B, embed_dim] is added to the time embedding (part i to that of block
            i where they have their own), image [B, H, W, C'] is concatenated to x.
          keys: [B], one per example, in training; they switch dropout on.

        Returns:
          [B, H, W, out_channels] of `dtype`.

        Raises:
          ValueError: if a shape does not fit, or the condition fills a slot that is not read.
        """
        config, patch = self.config, self.config.patch_size
        self._check_size(x)
        check_inputs(
            x, t, cond, keys=keys, embed_dim=config.embed_dim, needs_vector=config.needs_vector
        )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embeddings = self._embeddings(t, cond)
        h = PatchEmbed(patch, config.width, name="patch_in", **types)(with_image(x, cond))
        h = h + self._positions(x.shape[1] // patch, x.shape[2] // patch).astype(self.dtype)
        block = nn.remat(DiTBlock) if config.remat else DiTBlock
        for i, emb in enumerate(embeddings):
            h = block(
                config.num_heads,
                config.mlp_ratio,
                config.dropout,
                config.attention_dropout,
                config.activation,
                config.qkv_bias,
                config.mlp_norm_eps,
                config.mlp_norm_affine,
                name=f"block_{i}",
                **types,
            )(h, emb, keys)

        emb = nn.silu(embeddings[0].astype(self.dtype))
        final = Dense(2 * config.width, kernel_init=zeros_init, name="modulation_out", **types)
        shift, scale = jnp.split(final(emb)[:, None, :], 2, axis=-1)
        h = LayerNorm(
            1e-6,
            use_bias=False,
            use_scale=False,
            use_fast_variance=False,
            name="norm_out",
            **types,
        )(h)
        size = patch * patch * config.out_channels
        h = Dense(size, kernel_init=zeros_init, name="patch_out", **types)(
            _modulate(h, shift, scale)
        )
        return unpatchify(h, patch, height=x.shape[1], width=x.shape[2])

    def _embeddings(self, t: Array, cond: Condition) -> Sequence[Array]:
        """What each block is told, [B, width] for every one of them."""
        config = self.config
        options = (config.time_features, config.time_channels, config.width, self.param_dtype)
        if config.shared_embedding:
            emb = with_vector(TimeEmbedding(*options, name="time_embed")(t), cond)
            return [emb] * config.depth
        times = [TimeEmbedding(*options, name=f"time_embed_{i}")(t) for i in range(config.depth)]
        return jnp.split(with_vector(jnp.concatenate(times, axis=-1), cond), config.depth, axis=-1)

    def _positions(self, rows: int, columns: int) -> Array:
        """[1, rows · columns, width]."""
        width = self.config.width
        if self.config.position == "sincos":
            table = sincos_positions(rows, columns, width, base_size=self.config.base_size)
            return jnp.asarray(table)[None]
        shape = (1, rows * columns, width)
        return self.param("positions", nn.initializers.normal(0.02), shape, self.param_dtype)

    def _check_size(self, x: Array) -> None:
        patch = self.config.patch_size
        if x.ndim != 4:
            raise ValueError(f"x must be images of shape [B, H, W, C], got {x.shape}")
        if x.shape[1] % patch or x.shape[2] % patch:
            raise ValueError(
                f"height and width must be multiples of patch_size = {patch}, "
                f"got {x.shape[1]} x {x.shape[2]}"
            )
