"""Classifiers of noisy data: half a UNet for images, an MLP for anything small."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import Array, Key
from diffusion_jax.models.attention import AttentionPool
from diffusion_jax.models.blocks import GroupNorm, default_init, zeros_init
from diffusion_jax.models.encoder import Encoder
from diffusion_jax.models.inputs import DType, at_least_one, check_batch, check_no_condition
from diffusion_jax.models.layers import Dense
from diffusion_jax.models.levels import EncoderConfig
from diffusion_jax.models.mlp import Trunk, TrunkConfig

POOLS = ("attention", "adaptive", "spatial", "spatial_v2")


@dataclass(frozen=True)
class ClassifierConfig(EncoderConfig):
    """Half a UNet and a pool; ADM's own configurations are in `models/adm.py`.

    Attributes:
      num_classes: width of the result.
      pool: "attention" (CLIP's, what ADM was released with) reads the bottom for images of one
        size; "adaptive" averages the bottom; "spatial" and "spatial_v2" average the output of
        every block and put a hidden layer behind, the second with a norm in it.
      hidden: width of that hidden layer, for the spatial pools only; None for 2048.

    Raises:
      ValueError: if a value is out of range or two of them contradict each other.
    """

    num_classes: int = 10
    pool: str = "attention"
    hidden: int | None = None

    def __post_init__(self):
        super().__post_init__()
        at_least_one(self, "num_classes", "hidden")
        if self.reads_tokens or self.concat_vector:
            raise ValueError(
                "a classifier of noisy data reads x and t alone: its levels cannot attend to "
                "tokens, and there is no vector to concatenate"
            )
        if self.pool not in POOLS:
            raise ValueError(f"pool must be one of {POOLS}, got {self.pool!r}")
        if self.pool == "attention":
            self.heads(self.levels[-1].channels)
        if not self.pool.startswith("spatial") and self.hidden is not None:
            raise ValueError(
                f"hidden belongs to the pools 'spatial' and 'spatial_v2', got hidden = "
                f"{self.hidden} with pool = {self.pool!r}"
            )
        if self.pool == "spatial_v2" and self.hidden_width % self.norm_groups:
            raise ValueError(
                f"hidden must be a multiple of norm_groups = {self.norm_groups}, "
                f"got {self.hidden_width}"
            )

    @property
    def hidden_width(self) -> int:
        """Width of the hidden layer of the spatial pools."""
        return self.hidden or 2048

    def build(
        self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32
    ) -> "NoisyClassifier":
        """The module, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return NoisyClassifier(self, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))


class NoisyClassifier(Encoder):
    """p(y | x_t): the way down and the bottom of a UNet, a pool and a linear layer.

    Attributes:
      config: the architecture.
      dtype: dtype of activations; the pool and the last layer stay float32.
      param_dtype: dtype of the parameters.

    Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), section 4.1 and appendix I.
    """

    config: ClassifierConfig

    @nn.compact
    def __call__(
        self, x: Array, t: Array, cond: Condition = Condition(), *, keys: Key | None = None
    ) -> Array:
        """Classifies.

        Args:
          x: [B, H, W, C] noisy images; H and W multiples of 2^(levels - 1).
          t: [B] times as the classifier was trained with.
          cond: must fill no slot.
          keys: [B], one per example, in training; they switch dropout on.

        Returns:
          Logits [B, num_classes] float32.

        Raises:
          ValueError: if a shape does not fit, or the condition fills a slot.
        """
        check_batch(x, t, keys)
        check_no_condition(cond)
        bottom, skips, _ = self.encode(x, t, cond, keys=keys)
        if self.config.pool.startswith("spatial"):
            means = [h.astype(jnp.float32).mean((1, 2)) for h in [*skips, bottom]]
            return self._spatial(jnp.concatenate(means, axis=-1))
        return self._pooled(bottom)

    def _float32(self):
        return {"dtype": jnp.float32, "param_dtype": self.param_dtype}

    def _norm(self, name: str) -> GroupNorm:
        config = self.config
        return GroupNorm(config.norm_groups, config.norm_eps, name=name, **self._float32())

    def _pooled(self, h: Array) -> Array:
        """[B, H, W, C] -> [B, num_classes]."""
        config = self.config
        h = nn.silu(self._norm("norm_out")(h))
        if config.pool == "attention":
            num_heads = config.heads(h.shape[-1])
            return AttentionPool(num_heads, config.num_classes, name="pool", **self._float32())(h)
        last = Dense(config.num_classes, kernel_init=zeros_init, name="logits", **self._float32())
        return last(h.mean((1, 2)))

    def _spatial(self, h: Array) -> Array:
        """[B, F] -> [B, num_classes]."""
        config, options = self.config, {"kernel_init": default_init, **self._float32()}
        h = Dense(config.hidden_width, name="hidden", **options)(h)
        h = nn.relu(h) if config.pool == "spatial" else nn.silu(self._norm("norm_hidden")(h))
        return Dense(config.num_classes, name="logits", **options)(h)


@dataclass(frozen=True)
class MLPClassifierConfig(TrunkConfig):
    """A residual MLP, for vectors and for images as small as the digits.

    Attributes:
      num_classes: width of the result.

    Raises:
      ValueError: if a value is out of range.
    """

    num_classes: int = 10

    def __post_init__(self):
        super().__post_init__()
        at_least_one(self, "num_classes")

    def build(
        self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32
    ) -> "MLPClassifier":
        """The module, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return MLPClassifier(self, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))


class MLPClassifier(Trunk):
    """p(y | x_t) by a residual MLP over all numbers of an example; starts uniform.

    Attributes:
      config: the architecture.
      dtype: dtype of activations; the last layer stays float32.
      param_dtype: dtype of the parameters.

    Source: none; the smallest classifier that serves the library's conventions.
    """

    config: MLPClassifierConfig

    @nn.compact
    def __call__(
        self, x: Array, t: Array, cond: Condition = Condition(), *, keys: Key | None = None
    ) -> Array:
        """Classifies.

        Args:
          x: [B, ..., C] noisy data of one fixed shape.
          t: [B] times as the classifier was trained with.
          cond: must fill no slot.
          keys: [B], one per example, in training; they switch dropout on.

        Returns:
          Logits [B, num_classes] float32.

        Raises:
          ValueError: if a shape does not fit, or the condition fills a slot.
        """
        check_batch(x, t, keys)
        check_no_condition(cond)
        h = self.features(x, t, cond, keys=keys)
        last = Dense(
            self.config.num_classes,
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
            kernel_init=zeros_init,
            name="logits",
        )
        return last(h)
