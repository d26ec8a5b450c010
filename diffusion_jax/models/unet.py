"""One UNet for DDPM, ADM, NCSN++, latent diffusion, GLIDE and DeepFloyd IF, level by level."""

from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.core.arrays import per_example
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import Array, Key
from diffusion_jax.models.blocks import (
    ACTIVATIONS,
    GroupNorm,
    Upsample,
    fir_upsample,
    nearest_upsample,
    zeros_init,
)
from diffusion_jax.models.encoder import Encoder, Part
from diffusion_jax.models.inputs import READS, DType, at_least_one, check_inputs
from diffusion_jax.models.layers import Conv
from diffusion_jax.models.levels import (
    EncoderConfig,
    LevelConfig,
    check_odd,
    split_heads,
)


@dataclass(frozen=True)
class UNetConfig(EncoderConfig):
    """A UNet; the default has the widths of DDPM's for CIFAR-10 and ADM's conventions.

    DDPM itself has time_features=Sinusoidal(cos_first=False, freq_shift=1), norm_eps=1e-6 and
    downsample_padding="asymmetric". ADM's own configurations are in `models/adm.py`.

    Attributes:
      out_channels: channels of the output, twice those of x where the variance is learned.
      up_levels: the levels on the way up, again from the finest to the coarsest, where they are
        not `levels`; each has as many blocks as its counterpart on the way down.
      num_heads_up: heads of the attention on the way up; None for those of the way down.
      conv_out_kernel: height and width of the last convolution's kernel, odd.
      divide_by_time: divide the output by t, as networks do that are told σ and predict the
        score (NCSN++).
      needs_vector: refuse a condition without a vector.

    Raises:
      ValueError: if a value is out of range or two of them contradict each other.
    """

    out_channels: int = 3
    up_levels: tuple[LevelConfig, ...] | None = None
    num_heads_up: int | None = None
    conv_out_kernel: int = 3
    divide_by_time: bool = False
    needs_vector: bool = False

    def __post_init__(self):
        super().__post_init__()
        at_least_one(self, "out_channels", "num_heads_up", "conv_out_kernel")
        check_odd(self, "conv_out_kernel")
        numbers = [level.num_blocks for level in self.levels]
        if [level.num_blocks for level in self.way_up] != numbers:
            raise ValueError(
                f"up_levels must have as many blocks as levels, {numbers}, since every skip is "
                f"read once, got {[level.num_blocks for level in self.way_up]}"
            )
        self.check_levels(self.way_up, heads=self.heads_up, more=1)

    @property
    def way_up(self) -> tuple[LevelConfig, ...]:
        """The levels on the way up, from the finest to the coarsest."""
        return self.levels if self.up_levels is None else self.up_levels

    def resamplings(self) -> Iterator[str]:
        """How the resolution is changed, every time that it is, on both ways."""
        yield from super().resamplings()
        yield from (self.resample_of(level) for level in self.way_up[1:])

    def all_levels(self) -> Iterator[LevelConfig]:
        """Every level of both ways, and the bottom."""
        yield from super().all_levels()
        yield from self.way_up

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
        """Heads of this level's attention where its specification says nothing."""
        return self.config.heads_up(self.level.channels)

    @nn.compact
    def __call__(
        self,
        h: Array,
        skips: list[Array],
        emb: Array,
        cond: Condition,
        image: Array | None = None,
        *,
        size: tuple[int, int] | None = None,
        keys: Key | None,
    ) -> tuple[Array, Array | None]:
        """Applies one residual block to each skip.

        Args:
          h: [B, H, W, C].
          skips: [B, H, W, C_j] each, in the order in which they are read.
          emb: [B, E].
          cond: what attention reads.
          image: [B, H / 2, W / 2, out_channels] the output so far, which a pyramid adds to;
            None for zero.
          size: H' and W' of the next level; None for twice H and W.
          keys: [B] or None.

        Returns:
          [B, H', W', channels], and the output so far.
        """
        pyramid = self.resample == "pyramid"
        for j, skip in enumerate(skips):
            groups = self._groups_in(h, skip)
            h = jnp.concatenate([h, skip], axis=-1)
            h = self.res_block(f"res_{j}", norm_groups_in=groups)(h, emb, keys)
            if not pyramid:
                h = self.attend(f"attn_{j}", h, cond, place=j)
        if pyramid:
            h = self.attend("attn_0", h, cond)
            image = None if image is None else fir_upsample(image)
        if self.last:
            return h, image
        if self.resample == "block":
            return self.res_block("upsample", resample="up")(h, emb, keys), image
        if self.resample == "pool":
            return nearest_upsample(h), image
        if pyramid:
            seen = self._image(h)
            image = seen if image is None else image + seen
            return self.res_block("upsample", resample="fir_up")(h, emb, keys), image
        return Upsample(name="upsample", **self.types())(h, size), image

    def _groups_in(self, h: Array, skip: Array) -> int | None:
        """Groups of the norm of both together; None for those of every norm."""
        if self.resample != "pyramid" or not self.level.attention:
            return None
        # Released networks with attention count the groups of h and of a quarter of the skip.
        return min(h.shape[-1] + skip.shape[-1] // 4, 32)

    def _image(self, h: Array) -> Array:
        """What a pyramid adds to the output at this resolution, [B, H, W, C] -> [B, H, W, 3]."""
        h = nn.silu(GroupNorm(None, self.config.norm_eps, name="image_norm", **self.types())(h))
        conv = Conv(self.config.out_channels, (3, 3), padding=1, name="image", **self.types())
        return conv(h)


class UNet(Encoder):
    """UNet that predicts noise, data or velocity from a noisy image and the time.

    Attributes:
      config: the architecture.
      dtype: dtype of activations; norms, softmax and the time embedding stay float32.
      param_dtype: dtype of the parameters.

    Source: Ho et al. 2020 (arXiv:2006.11239), appendix B; Dhariwal & Nichol 2021
    (arXiv:2105.05233), section 3; Song et al. 2021 (arXiv:2011.13456), appendix H; Rombach et al.
    2022 (arXiv:2112.10752), appendix E.2.1.
    """

    config: UNetConfig

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Condition, *, keys: Key | None = None) -> Array:
        """Predicts.

        Args:
          x: [B, H, W, C] noisy images; H and W multiples of 2^(levels - 1), or any where
            convolutions change the resolution.
          t: [B] times as the network was trained with.
          cond: vector [B, embed_dim] is added to the time embedding, image [B, H, W, C']
            is concatenated to x, tokens [B, L, D] are attended to.
          keys: [B], one per example, in training; they switch dropout on.

        Returns:
          [B, H, W, out_channels] of `dtype`.

        Raises:
          ValueError: if a shape does not fit, or the condition fills a slot that is not read.
        """
        config, types = self.config, self.types()
        self._check(x, t, cond, keys)
        h, skips, emb = self.encode(x, t, cond, keys=keys)
        image = None
        for i, level in enumerate(reversed(config.way_up)):
            taken = [skips.pop() for _ in range(level.num_blocks + 1)]
            last = i == len(config.way_up) - 1
            size = None if last else skips[-1].shape[1:3]
            up = UpLevel(config, level, last=last, name=f"up_{i}", **types)
            h, image = up(h, taken, emb, cond, image, size=size, keys=keys)

        h = GroupNorm(config.norm_groups, config.norm_eps, name="norm_out", **types)(h)
        h = ACTIVATIONS[config.outer_act or config.act](h)
        out = Conv(
            config.out_channels,
            (config.conv_out_kernel, config.conv_out_kernel),
            padding=(config.conv_out_kernel - 1) // 2,
            kernel_init=zeros_init,
            name="conv_out",
            **types,
        )(h)
        out = out if image is None else out + image
        if config.divide_by_time:
            out = (out / per_example(jnp.asarray(t, jnp.float32), out)).astype(out.dtype)
        return out

    def _check(self, x: Array, t: Array, cond: Condition, keys: Key | None) -> None:
        config = self.config
        reads = (*READS, "time")
        reads += ("tokens", "token_mask") if config.reads_tokens else ()
        reads += ("grounding",) if config.reads_grounding else ()
        check_inputs(
            x,
            t,
            cond,
            keys=keys,
            embed_dim=config.embed_dim,
            needs_vector=config.needs_vector or config.concat_vector,
            needs_tokens=config.reads_tokens,
            reads=reads,
        )
