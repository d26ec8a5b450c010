"""The configuration of a UNet's way down and bottom, level by level."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from diffusion_jax.models.attention import Implementation, PixelAttention, check_implementation
from diffusion_jax.models.blocks import ACTIVATIONS
from diffusion_jax.models.embeddings import Fourier, Learned, Sinusoidal
from diffusion_jax.models.inputs import at_least_one
from diffusion_jax.models.text_attention import TextAttention
from diffusion_jax.models.transformer import SpatialTransformer

RESAMPLE = ("conv", "block", "pool", "pyramid")


def check_odd(config: object, name: str) -> None:
    """Raises ValueError unless this field, a kernel that keeps the resolution, is odd."""
    if getattr(config, name) % 2 == 0:
        raise ValueError(f"{name} must be odd, got {getattr(config, name)}")


def split_heads(channels: int, num_heads: int | None, head_dim: int | None) -> int:
    """Number of heads of a width, from their number or from their width; 1 with neither.

    Raises:
      ValueError: if both are given, or if they do not divide the width.
    """
    if num_heads is not None and head_dim is not None:
        raise ValueError(
            "give num_heads or head_dim or neither, "
            f"got num_heads = {num_heads} and head_dim = {head_dim}"
        )
    if channels % (num_heads or head_dim or 1):
        raise ValueError(
            f"channels = {channels} cannot be split into heads with num_heads = "
            f"{num_heads}, head_dim = {head_dim}"
        )
    return channels // head_dim if head_dim else num_heads or 1


@dataclass(frozen=True)
class LevelConfig:
    """One resolution of a UNet.

    Attributes:
      channels: width of the level.
      num_blocks: residual blocks on the way down; the way up has one more.
      attention: what follows every residual block: nothing, self-attention of the pixels as the
        network configures it (True) or as said here, attention to a text in the same softmax,
        or transformer blocks.
      resample: how this level changes the resolution, see `EncoderConfig`; None for the way of
        the network.
      out_scale: what a residual block divides its sum with the shortcut by.
      time_act: the residual blocks apply the activation to the time embedding.

    Raises:
      ValueError: if a number is out of range.
    """

    channels: int
    num_blocks: int = 2
    attention: bool | PixelAttention | TextAttention | SpatialTransformer = False
    resample: str | None = None
    out_scale: float = 1.0
    time_act: bool = True

    def __post_init__(self):
        at_least_one(self, "channels", "num_blocks")
        if self.resample is not None and self.resample not in RESAMPLE:
            raise ValueError(f"resample must be None or one of {RESAMPLE}, got {self.resample!r}")
        if not self.out_scale > 0.0:
            raise ValueError(f"out_scale must be positive, got {self.out_scale}")


@dataclass(frozen=True)
class EncoderConfig:
    """What a UNet and a half-UNet classifier have in common.

    Attributes:
      levels: from the finest resolution to the coarsest; each halves the one before.
      time_embed_dim: width of the time embedding; None for 4 · levels[0].channels.
      time_channels: width of its features; None for levels[0].channels.
      time_features: what the time embedding is made of.
      time_act_last: activation behind the time embedding's second layer; None for none.
      embed_act: activation of the time embedding plus cond.vector; None for none. It suits
        levels without `time_act`.
      concat_vector: cond.vector is concatenated to the time embedding instead of added.
      act: activation of the residual blocks: "silu", "gelu", "mish" or "relu".
      outer_act: activation in the time embedding and before the last convolution; None for act.
      norm_groups: groups of every norm; must divide every width. None for a quarter of the
        width, at most 32.
      norm_eps: epsilon of every norm.
      dropout: rate inside the residual blocks, in [0, 1).
      scale_shift: the time scales and shifts the norm instead of being added (ADM).
      resample: "conv" changes resolution by a convolution, "block" inside a residual
        block (ADM), "pool" without parameters, "pyramid" inside a residual block by a smoothing
        filter, beside which the image itself is made coarser and added, and on the way up made
        finer and added to (NCSN++; its norms have a quarter of the width as groups).
      downsample_padding: "symmetric" or "asymmetric", of the convolution on the way down,
        see `Downsample`.
      conv_in_kernel: height and width of the first convolution's kernel, odd.
      center_input: x lies in [0, 1] and is centred first, x ← 2 x - 1.
      middle_blocks: residual blocks at the bottom; 0 for no bottom.
      middle_attention: what is between the two blocks at the bottom, as in a level.
      middle_attention_groups: groups of its norm; None for norm_groups.
      middle_out_scale: `out_scale` of the bottom.
      middle_time_act: `time_act` of the bottom.
      num_heads: heads of every attention. At most one of num_heads and head_dim may be
        given; with neither there is a single head.
      head_dim: width of a head.
      remat: recompute every block in the backward pass, for memory.
      attention_implementation: see `dot_product_attention`; None picks by platform and size.

    Raises:
      ValueError: if a value is out of range or two of them contradict each other.
    """

    levels: tuple[LevelConfig, ...] = (
        LevelConfig(128),
        LevelConfig(256, attention=True),
        LevelConfig(256),
        LevelConfig(256),
    )
    time_embed_dim: int | None = None
    time_channels: int | None = None
    time_features: Sinusoidal | Fourier | Learned = Sinusoidal()
    time_act_last: str | None = None
    embed_act: str | None = None
    concat_vector: bool = False
    act: str = "silu"
    outer_act: str | None = None
    norm_groups: int | None = 32
    norm_eps: float = 1e-5
    dropout: float = 0.0
    scale_shift: bool = False
    resample: str = "conv"
    downsample_padding: str = "symmetric"
    conv_in_kernel: int = 3
    center_input: bool = False
    middle_blocks: int = 2
    middle_attention: bool | PixelAttention | TextAttention | SpatialTransformer = True
    middle_attention_groups: int | None = None
    middle_out_scale: float = 1.0
    middle_time_act: bool = True
    num_heads: int | None = None
    head_dim: int | None = None
    remat: bool = False
    attention_implementation: Implementation | None = None

    def __post_init__(self):
        if not isinstance(self.levels, tuple) or not self.levels:
            raise ValueError(f"levels must be a non-empty tuple of LevelConfig, got {self.levels}")
        at_least_one(self, "norm_groups", "time_embed_dim", "time_channels", "conv_in_kernel")
        at_least_one(self, "num_heads", "head_dim", "middle_attention_groups")
        check_odd(self, "conv_in_kernel")
        check_implementation(self.attention_implementation)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.time_channels is not None and isinstance(self.time_features, Fourier):
            raise ValueError(
                "time_channels belongs to sinusoidal features; Fourier features have their "
                f"num_frequencies, got time_channels = {self.time_channels}"
            )
        for name in ("act", "outer_act", "time_act_last", "embed_act"):
            value = getattr(self, name)
            if value not in ACTIVATIONS and (value is not None or name == "act"):
                raise ValueError(f"{name} must be one of {list(ACTIVATIONS)}, got {value!r}")
        self._check_resampling()
        self._check_middle()
        self.check_levels(self.levels)

    def _check_resampling(self):
        if self.resample not in RESAMPLE:
            raise ValueError(f"resample must be one of {RESAMPLE}, got {self.resample!r}")
        if self.downsample_padding not in ("symmetric", "asymmetric"):
            raise ValueError(
                "downsample_padding must be 'symmetric' or 'asymmetric', "
                f"got {self.downsample_padding!r}"
            )
        ways = {self.resample_of(level) for level in self.levels}
        if "conv" not in ways and self.downsample_padding != "symmetric":
            raise ValueError(
                f"downsample_padding belongs to resample='conv', got resample={self.resample!r}"
            )

    def _check_middle(self):
        groups = self.middle_attention_groups
        if self.middle_blocks not in (0, 1, 2):
            raise ValueError(f"middle_blocks must be 0, 1 or 2, got {self.middle_blocks}")
        if self.middle_blocks == 0 and (self.middle_out_scale != 1.0 or not self.middle_time_act):
            raise ValueError(
                "middle_out_scale and middle_time_act belong to blocks, got middle_blocks = 0 with "
                f"{self.middle_out_scale} and {self.middle_time_act}"
            )
        if groups is not None and self.middle_attention is not True:
            raise ValueError(
                "middle_attention_groups belongs to middle_attention=True, "
                f"got middle_attention={self.middle_attention}"
            )
        if self.middle_attention and self.middle_blocks < 2:
            raise ValueError(
                "middle_attention stands between two blocks, "
                f"got middle_blocks = {self.middle_blocks}; set middle_attention=False"
            )
        if groups is not None and self.levels[-1].channels % groups:
            raise ValueError(
                f"middle_attention_groups must divide {self.levels[-1].channels}, got {groups}"
            )
        if self.middle is not None:
            self.check_levels((self.middle,), places=1)

    def check_levels(
        self,
        levels: tuple[LevelConfig, ...],
        *,
        heads: Callable[[int], int] | None = None,
        places: int | None = None,
        more: int = 0,
    ) -> None:
        """Raises ValueError if this network cannot have the levels.

        Args:
          levels: from the finest to the coarsest.
          heads: of a width, where a level does not say it; None for `heads` of the network.
          places: attentions of a level; None for one behind each residual block.
          more: residual blocks that a level has beside its num_blocks.
        """
        pyramids = [self.resample_of(level) == "pyramid" for level in levels]
        if sorted(pyramids, reverse=True) != pyramids:
            raise ValueError(
                "levels with resample='pyramid' must be the finest ones, since the image is handed "
                f"from each to the next, got {[self.resample_of(level) for level in levels]}"
            )
        for level in levels:
            self._check_width(level, heads or self.heads)
            spec = level.attention
            depth = getattr(spec, "depth", 1)
            wanted = level.num_blocks + more if places is None else places
            if isinstance(depth, tuple) and len(depth) != wanted:
                raise ValueError(
                    f"depth must be one number or {wanted}, one behind each residual block, "
                    f"got {depth}"
                )

    def _check_width(self, level: LevelConfig, heads: Callable[[int], int]) -> None:
        pyramid = self.resample_of(level) == "pyramid"
        if self.norm_groups is not None and not pyramid and level.channels % self.norm_groups:
            raise ValueError(
                f"every width must be a multiple of norm_groups = {self.norm_groups}, "
                f"got channels = {level.channels}"
            )
        spec = level.attention
        if spec is True:
            heads(level.channels)
        elif isinstance(spec, PixelAttention):
            if spec.head_dim is None:
                split_heads(level.channels, spec.num_heads, None)
            if level.channels % (spec.norm_groups or 1):
                raise ValueError(
                    f"norm_groups of an attention must divide channels = {level.channels}, "
                    f"got {spec.norm_groups}"
                )
        elif isinstance(spec, TextAttention | SpatialTransformer):
            says_nothing = spec.num_heads is spec.head_dim is None
            spec.heads(level.channels, heads(level.channels) if says_nothing else 1)

    @property
    def embed_dim(self) -> int:
        """Width of the time embedding and of cond.vector."""
        return self.time_embed_dim or 4 * self.levels[0].channels

    @property
    def middle(self) -> LevelConfig | None:
        """The bottom as a level; None if there is none."""
        if self.middle_blocks == 0:
            return None
        channels, attention = self.levels[-1].channels, self.middle_attention
        if attention is True and self.middle_attention_groups is not None:
            groups = self.middle_attention_groups
            attention = PixelAttention(self.heads(channels), norm_groups=groups)
        return LevelConfig(
            channels,
            self.middle_blocks,
            attention,
            # The bottom keeps its resolution; its norms are those of convolutional levels.
            resample="conv",
            out_scale=self.middle_out_scale,
            time_act=self.middle_time_act,
        )

    def resample_of(self, level: LevelConfig) -> str:
        """How a level changes the resolution."""
        return level.resample or self.resample

    def resamplings(self) -> Iterator[str]:
        """How the resolution is changed, every time that it is."""
        return (self.resample_of(level) for level in self.levels[:-1])

    def all_levels(self) -> Iterator[LevelConfig]:
        """Every level, and the bottom."""
        yield from self.levels
        if self.middle is not None:
            yield self.middle

    @property
    def reads_tokens(self) -> bool:
        """Whether some level attends to cond.tokens."""
        kinds = (TextAttention, SpatialTransformer)
        return any(isinstance(level.attention, kinds) for level in self.all_levels())

    @property
    def reads_grounding(self) -> bool:
        """Whether some level has GLIGEN's adapters."""
        return any(getattr(level.attention, "fuser", None) for level in self.all_levels())

    def heads(self, channels: int) -> int:
        """Attention heads at a width.

        Raises:
          ValueError: if the width cannot be split as configured.
        """
        return split_heads(channels, self.num_heads, self.head_dim)
