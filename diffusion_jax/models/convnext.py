"""ConvNeXt as a map of features: GLIGEN's encoder of edges, depths, normals and segmentations."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.core.types import Array
from diffusion_jax.models.inputs import DType
from diffusion_jax.models.layers import Conv, Dense
from diffusion_jax.models.pre_norm import layer_norm

weight_init = nn.initializers.truncated_normal(0.02)


@dataclass(frozen=True)
class ConvNeXtConfig:
    """A ConvNeXt without its head; the default is ConvNeXt-T.

    Attributes:
      depths: blocks of each stage.
      widths: channels of each stage.
      layer_scale: what the learned scale of every block's residual starts at.

    Raises:
      ValueError: if the two tuples differ in length or a number is below 1.
    """

    depths: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    layer_scale: float = 1e-6

    def __post_init__(self):
        if not self.depths or len(self.depths) != len(self.widths):
            raise ValueError(
                "depths and widths must have one number for each stage, got "
                f"depths = {self.depths} and widths = {self.widths}"
            )
        if min(*self.depths, *self.widths) < 1:
            raise ValueError(
                f"depths and widths must be at least 1, got {self.depths} and {self.widths}"
            )

    @property
    def stride(self) -> int:
        """Pixels of the image for a pixel of the result, in each direction."""
        return 2 ** (len(self.depths) + 1)

    def build(self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32) -> "ConvNeXt":
        """The module, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return ConvNeXt(self, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 convolution, norm and an MLP over the channels, as a scaled residual.

    x + γ · W2 gelu(W1 LN(dwconv(x))).

    Attributes:
      layer_scale: what γ starts at.
      dtype: dtype of activations; norm statistics are float32.
      param_dtype: dtype of the parameters.

    Source: Liu et al. 2022 (arXiv:2201.03545), figure 4.
    """

    layer_scale: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, H, W, C] -> [B, H, W, C]."""
        channels = x.shape[-1]
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        weights = {"kernel_init": weight_init, **types}
        h = Conv(
            channels, (7, 7), padding=3, feature_group_count=channels, name="depthwise", **weights
        )(x)
        h = layer_norm(1e-6, "norm", **types)(h)
        h = Dense(4 * channels, name="mlp_1", **weights)(h)
        h = Dense(channels, name="mlp_2", **weights)(nn.gelu(h, approximate=False))
        init = nn.initializers.constant(self.layer_scale)
        scale = self.param("layer_scale", init, (channels,), self.param_dtype)
        return x + scale.astype(self.dtype).reshape((1, 1, 1, channels)) * h


class ConvNeXt(nn.Module):
    """A convolutional network of transformer-like blocks, up to its last map of features.

    Attributes:
      config: the architecture.
      dtype: dtype of activations; norm statistics are float32.
      param_dtype: dtype of the parameters.

    Source: Liu et al. 2022 (arXiv:2201.03545), section 2 and table 9.
    """

    config: ConvNeXtConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Computes the features.

        Args:
          x: [B, H, W, C]; H and W multiples of the config's stride.

        Returns:
          [B, H / stride, W / stride, widths[-1]], neither normed nor pooled.

        Raises:
          ValueError: if x is no image of a fitting size.
        """
        config = self.config
        if x.ndim != 4 or x.shape[1] % config.stride or x.shape[2] % config.stride:
            raise ValueError(
                "x must be images [B, H, W, C] whose sides are multiples of "
                f"{config.stride}, got {x.shape}"
            )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = x.astype(self.dtype)
        for i, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            side = 2 if i else 4
            conv = Conv(
                width,
                (side, side),
                strides=side,
                padding="VALID",
                kernel_init=weight_init,
                name=f"downsample_{i}",
                **types,
            )
            norm = layer_norm(1e-6, f"norm_{i}", **types)
            h = conv(norm(h)) if i else norm(conv(h))
            for j in range(depth):
                block = ConvNeXtBlock(config.layer_scale, name=f"stage_{i}_block_{j}", **types)
                h = block(h)
        return h
