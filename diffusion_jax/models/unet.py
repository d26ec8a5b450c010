"""The UNet of DDPM and ADM, described level by level."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import Array, Key
from diffusion_jax.models.blocks import (
    GroupNorm,
    Upsample,
    nearest_upsample,
    zeros_init,
)
from diffusion_jax.models.encoder import (
    Encoder,
    EncoderConfig,
    Part,
    at_least_one,
    split_heads,
)
from diffusion_jax.models.inputs import DType, check_inputs


@dataclass(frozen=True)
class UNetConfig(EncoderConfig):
    """A UNet; the default has the widths of DDPM's for CIFAR-10 and ADM's conventions.

    DDPM itself has time_features=Sinusoidal(cos_first=False, freq_shift=1), norm_eps=1e-6 and
    downsample_padding="asymmetric". ADM's own configurations are in `models/adm.py`.

    Attributes:
      out_channels: channels of the output, twice those of x where the variance is learned.
      num_heads_up: heads of the attention on the way up; None for those of the way down.
      needs_vector: refuse a condition without a vector.

    Raises:
      ValueError: if a value is out of range or two of them contradict each other.
    """

    out_channels: int = 3
    num_heads_up: int | None = None
    needs_vector: bool = False

    def __post_init__(self):
        super().__post_init__()
        at_least_one(self, "out_channels", "num_heads_up")
        for level in self.levels:
            if level.attention:
                self.heads_up(level.channels)

    def heads_up(self, channels: int) -> int:
        """Attention heads at a width on the way up.

        Raises:
          ValueError: if the width cannot be split as configured.
        """
        return split_heads(channels, self.num_heads_up or self.num_heads, self.head_dim)

    def build(self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32) -> "UNet":
        """The module, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return UNet(self, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))


class UpLevel(Part):
    """One level on the way up; ends by doubling the resolution unless it is the last.

    Attributes:
      config: the whole UNet.
      level: this level.
      last: keep the resolution.
      dtype: dtype of activations.
      param_dtype: dtype of the parameters.
    """

    config: UNetConfig
    last: bool = False

    def num_heads(self) -> int:
        """Heads of this level's attention."""
        return self.config.heads_up(self.level.channels)

    @nn.compact
    def __call__(self, h: Array, skips: list[Array], emb: Array, *, keys: Key | None) -> Array:
        """Applies one residual block to each skip.

        Args:
          h: [B, H, W, C].
          skips: [B, H, W, C_j] each, in the order in which they are read.
          emb: [B, E].
          keys: [B] or None.

        Returns:
          [B, H', W', channels].
        """
        for j, skip in enumerate(skips):
            h = jnp.concatenate([h, skip], axis=-1)
            h = self.res_block(f"res_{j}")(h, emb, keys)
            if self.level.attention:
                h = self.attention(f"attn_{j}")(h)
        if self.last:
            return h
        if self.config.resample == "block":
            return self.res_block("upsample", resample="up")(h, emb, keys)
        if self.config.resample == "pool":
            return nearest_upsample(h)
        return Upsample(name="upsample", **self.types())(h)


class UNet(Encoder):
    """UNet that predicts noise, data or velocity from a noisy image and the time.

    Attributes:
      config: the architecture.
      dtype: dtype of activations; norms, softmax and the time embedding stay float32.
      param_dtype: dtype of the parameters.

    Source: Ho et al. 2020 (arXiv:2006.11239), appendix B; Dhariwal & Nichol 2021
    (arXiv:2105.05233), section 3.
    """

    config: UNetConfig

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Condition, *, keys: Key | None = None) -> Array:
        """Predicts.

        Args:
          x: [B, H, W, C] noisy images; H and W multiples of 2^(levels - 1).
          t: [B] times as the network was trained with.
          cond: vector [B, embed_dim] is added to the time embedding, image [B, H, W, C']
            is concatenated to x.
          keys: [B], one per example, in training; they switch dropout on.

        Returns:
          [B, H, W, out_channels] of `dtype`.

        Raises:
          ValueError: if a shape does not fit, or the condition fills a slot that is not read.
        """
        config, types = self.config, self.types()
        check_inputs(
            x, t, cond, keys=keys, embed_dim=config.embed_dim, needs_vector=config.needs_vector
        )
        h, skips, emb = self.encode(x, t, cond, keys=keys)
        for i, level in enumerate(reversed(config.levels)):
            taken = [skips.pop() for _ in range(level.num_blocks + 1)]
            last = i == len(config.levels) - 1
            up = UpLevel(config, level, last=last, name=f"up_{i}", **types)
            h = up(h, taken, emb, keys=keys)

        h = nn.silu(GroupNorm(config.norm_groups, config.norm_eps, name="norm_out", **types)(h))
        return nn.Conv(
            config.out_channels, (3, 3), padding=1, kernel_init=zeros_init, name="conv_out", **types
        )(h)
