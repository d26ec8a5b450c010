"""Inception v3 of the Fréchet Inception distance: features, spatial features, class scores."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.types import Array, Params
from diffusion_jax.metrics.features import POOL, SPATIAL, Feature
from diffusion_jax.metrics.preprocess import Resize, Rounding, resize_matrix, to_byte_range

SIZE = 299
# The lower precision that accelerators multiply with by default shifts the distance.
_EXACT = jax.lax.Precision.HIGHEST
_NORM_EPS = 1e-3
_SPATIAL_CHANNELS = 7


class InceptionOutputs(NamedTuple):
    """What one pass of the network gives.

    Attributes:
      pool3: [B, 2048] mean over the image of the last block.
      spatial: [B, H, W, 7], the first channels in the middle of the network (Mixed_6d), 17x17
        for 299x299 images: the features of sFID.
      logits: [B, K] class scores.
      logits_unbiased: [B, K] class scores without the last bias.
    """

    pool3: Array
    spatial: Array
    logits: Array
    logits_unbiased: Array


class _FrozenNorm(nn.Module):
    """Batch normalization with stored statistics, which are parameters like any other."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, H, W, C] -> [B, H, W, C]."""
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.param("mean", nn.initializers.zeros, shape)
        var = self.param("var", nn.initializers.ones, shape)
        slope = scale * jax.lax.rsqrt(var + _NORM_EPS)
        return x * slope[None, None, None] + (bias - mean * slope)[None, None, None]


class _Conv(nn.Module):
    """Convolution without bias, normalization, ReLU."""

    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: Literal["SAME", "VALID"] = "SAME"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, H, W, C] -> [B, H', W', channels]."""
        strides = (self.stride, self.stride)
        x = nn.Conv(
            self.channels,
            self.kernel,
            strides,
            padding=self.padding,
            use_bias=False,
            precision=_EXACT,
            name="conv",
        )(x)
        return nn.relu(_FrozenNorm(name="norm")(x))


def _shrink(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")


class _Block(nn.Module):
    """What the mixed blocks share: chains of convolutions side by side."""

    pad_in_average: bool

    def chain(self, x: Array, prefix: str, *layers: tuple) -> Array:
        """Applies layers (channels, kernel[, stride]) named prefix + "_1", "_2", …"""
        for index, (channels, kernel, *stride) in enumerate(layers, 1):
            padding = "VALID" if stride else "SAME"
            x = _Conv(channels, kernel, *stride, padding=padding, name=f"{prefix}_{index}")(x)
        return x

    def pool_branch(self, x: Array, channels: int, *, pool: str = "average") -> Array:
        if pool == "max":
            x = nn.max_pool(x, (3, 3), (1, 1), "SAME")
        else:
            x = nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=self.pad_in_average)
        return _Conv(channels, name="branch_pool")(x)


class _BlockA(_Block):
    pool_channels: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, H, W, C] -> [B, H, W, 224 + pool_channels]."""
        return jnp.concatenate(
            [
                _Conv(64, name="branch1x1")(x),
                self.chain(x, "branch5x5", (48, (1, 1)), (64, (5, 5))),
                self.chain(x, "branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
                self.pool_branch(x, self.pool_channels),
            ],
            axis=-1,
        )


class _BlockB(_Block):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, H, W, C] -> [B, H', W', C + 480] with H' = (H - 1) // 2."""
        return jnp.concatenate(
            [
                _Conv(384, (3, 3), 2, "VALID", name="branch3x3")(x),
                self.chain(x, "branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3), 2)),
                _shrink(x),
            ],
            axis=-1,
        )


class _BlockC(_Block):
    channels: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """x: [B, H, W, C] -> ([B, H, W, 768], its first branch [B, H, W, 192])."""
        c, row, column = self.channels, (1, 7), (7, 1)
        first = _Conv(192, name="branch1x1")(x)
        double = ((c, (1, 1)), (c, column), (c, row), (c, column), (192, row))
        branches = [
            first,
            self.chain(x, "branch7x7", (c, (1, 1)), (c, row), (192, column)),
            self.chain(x, "branch7x7dbl", *double),
            self.pool_branch(x, 192),
        ]
        return jnp.concatenate(branches, axis=-1), first


class _BlockD(_Block):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, H, W, C] -> [B, H', W', C + 512] with H' = (H - 1) // 2."""
        seven = ((192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3), 2))
        return jnp.concatenate(
            [
                self.chain(x, "branch3x3", (192, (1, 1)), (320, (3, 3), 2)),
                self.chain(x, "branch7x7x3", *seven),
                _shrink(x),
            ],
            axis=-1,
        )


class _BlockE(_Block):
    pool: Literal["max", "average"] = "average"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, H, W, C] -> [B, H, W, 2048]."""

        def fork(x, prefix):
            return [
                _Conv(384, (1, 3), name=f"{prefix}a")(x),
                _Conv(384, (3, 1), name=f"{prefix}b")(x),
            ]

        short = self.chain(x, "branch3x3", (384, (1, 1)))
        long = self.chain(x, "branch3x3dbl", (448, (1, 1)), (384, (3, 3)))
        branches = [
            _Conv(320, name="branch1x1")(x),
            *fork(short, "branch3x3_2"),
            *fork(long, "branch3x3dbl_3"),
            self.pool_branch(x, 192, pool=self.pool),
        ]
        return jnp.concatenate(branches, axis=-1)


class Inception(nn.Module):
    """Inception v3 in evaluation, with the outputs that image metrics read.

    Attributes:
      num_classes: rows of the last layer, K.
      pad_in_average: whether the zeros around the image count in 3x3 averages.
      last_pool: what the pooling branch of the last block computes.

    Source: Szegedy et al. 2015 (arXiv:1512.00567), table 1.
    """

    num_classes: int
    pad_in_average: bool
    last_pool: Literal["max", "average"]

    @nn.compact
    def __call__(self, x: Array) -> InceptionOutputs:
        """Applies the network.

        Args:
          x: [B, H, W, 3] in [-1, 1], H and W at least 75; the metrics use 299.

        Returns:
          pool3 [B, 2048], spatial [B, H', W', 7], logits [B, K] and logits_unbiased [B, K].

        Raises:
          ValueError: if the images have another number of channels or are too small.
        """
        if x.ndim != 4 or x.shape[-1] != 3 or min(x.shape[1:3]) < 75:
            raise ValueError(
                f"Inception needs images [B, H, W, 3] of at least 75x75 pixels, got {x.shape}; "
                "repeat the channel of grey images three times"
            )
        padded, classes = self.pad_in_average, self.num_classes
        x = _Conv(32, (3, 3), 2, "VALID", name="conv_1a")(x)
        x = _Conv(32, (3, 3), 1, "VALID", name="conv_2a")(x)
        x = _shrink(_Conv(64, (3, 3), name="conv_2b")(x))
        x = _Conv(80, name="conv_3b")(x)
        x = _shrink(_Conv(192, (3, 3), 1, "VALID", name="conv_4a")(x))
        for name, channels in (("5b", 32), ("5c", 64), ("5d", 64)):
            x = _BlockA(padded, channels, name=f"mixed_{name}")(x)
        x = _BlockB(padded, name="mixed_6a")(x)
        first = {}
        for name, channels in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            x, first[name] = _BlockC(padded, channels, name=f"mixed_{name}")(x)
        x = _BlockD(padded, name="mixed_7a")(x)
        x = _BlockE(padded, name="mixed_7b")(x)
        x = _BlockE(padded, self.last_pool, name="mixed_7c")(x)
        pool3 = jnp.mean(x, axis=(1, 2))
        unbiased = nn.Dense(classes, use_bias=False, precision=_EXACT, name="fc")(pool3)
        bias = self.param("fc_bias", nn.initializers.zeros, (classes,))
        spatial = first["6d"][..., :_SPATIAL_CHANNELS]
        return InceptionOutputs(pool3, spatial, unbiased + bias[None], unbiased)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One of the Inception networks in use, and how an image is prepared for it.

    Attributes:
      network: the network.
      resize: filter that brings images to 299x299, see `preprocess.resize_matrix`.
      offset, scale: bytes b in [0, 255] become (b - offset) / scale.
      score_bias: whether class probabilities for the inception score use the last bias.
    """

    network: Inception
    resize: Resize
    offset: float
    scale: float
    score_bias: bool


_GRAPH_2015 = Inception(num_classes=1008, pad_in_average=False, last_pool="max")
_TORCHVISION = Inception(num_classes=1000, pad_in_average=True, last_pool="average")

VARIANTS: Mapping[str, Variant] = {
    # The graph of 2015-12-05 as TensorFlow runs it: the evaluators of ADM and torch-fidelity.
    "tf-2015": Variant(_GRAPH_2015, "bilinear-corner", 128.0, 128.0, False),
    # The same weights as pytorch-fid runs them.
    "pytorch-fid": Variant(_GRAPH_2015, "bilinear", 127.5, 127.5, False),
    # Other weights: torchvision's own.
    "torchvision": Variant(_TORCHVISION, "bilinear", 127.5, 127.5, True),
}


def variant(name: str) -> Variant:
    """The entry of `VARIANTS` with this name.

    Raises:
      ValueError: if there is none.
    """
    if name not in VARIANTS:
        raise ValueError(f"the Inception variant must be one of {sorted(VARIANTS)}, got {name!r}")
    return VARIANTS[name]


def inception_shapes(name: str) -> Params:
    """The parameter tree of a variant as shapes, which a converter fills.

    Args:
      name: a key of `VARIANTS`.

    Raises:
      ValueError: if there is no such variant.
    """
    image = jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32)
    return jax.eval_shape(variant(name).network.init, jax.random.key(0), image)["params"]


@functools.partial(jax.jit, static_argnames="rounding")
def _prepare(images: Array, matrices, affine, *, rounding: Rounding) -> Array:
    (rows, columns), (offset, scale) = matrices, affine
    values = to_byte_range(images, rounding)
    values = jnp.einsum("ih,bhwc->biwc", rows, values, precision=_EXACT)
    values = jnp.einsum("jw,biwc->bijc", columns, values, precision=_EXACT)
    return (values - offset) / scale


@functools.partial(jax.jit, static_argnames="network")
def _apply(params: Params, x: Array, *, network: Inception) -> InceptionOutputs:
    return cast(InceptionOutputs, network.apply({"params": params}, x))


@dataclasses.dataclass(frozen=True)
class InceptionFeatures:
    """Inception features of images, as a `FeatureFn`.

    Runs where the images lie: sharded images are computed sharded, if `params` were put on
    all of their devices before.

    Attributes:
      params: the tree of `inception_shapes(variant)`. Its weights come from a safetensors file
        with the names of torchvision's Inception3 ("Mixed_5b.branch1x1.conv.weight",
        "Mixed_5b.branch1x1.bn.running_mean", "fc.weight" …), through the table
        io/tables/inception.py. The released files are pickles, which this library does not
        open: pt_inception-2015-12-05-6726825d for "pytorch-fid" and "tf-2015",
        inception_v3_google-0cc3c7bd for "torchvision".
      variant: a key of `VARIANTS`; only equal variants compare.
      output: "pool3" for [B, 2048], or "spatial" for sFID's [B, 2023].
      rounding: how [-1, 1] becomes 8 bits, see `preprocess.to_byte_range`. Real images were
        8 bits before and need "nearest", which gives them back.
    """

    params: Params
    variant: str
    output: Literal["pool3", "spatial"] = "pool3"
    rounding: Rounding = "nearest"

    def __post_init__(self):
        variant(self.variant)
        if self.output not in ("pool3", "spatial"):
            raise ValueError(f"output must be 'pool3' or 'spatial', got {self.output!r}")

    @property
    def feature(self) -> Feature:
        """What these features declare."""
        name = POOL if self.output == "pool3" else SPATIAL
        return Feature(name, self.variant, variant(self.variant).resize)

    def outputs(self, images: Array) -> InceptionOutputs:
        """Everything at once for images [B, H, W, 3] in [-1, 1] of any size.

        Raises:
          ValueError: if the images have another shape.
        """
        if np.ndim(images) != 4 or np.shape(images)[-1] != 3:
            raise ValueError(
                f"Inception needs images [B, H, W, 3], got {np.shape(images)}; repeat the channel "
                "of grey images three times"
            )
        which = variant(self.variant)
        height, width = np.shape(images)[1:3]
        matrices = tuple(resize_matrix(n, SIZE, method=which.resize) for n in (height, width))
        affine = (which.offset, which.scale)
        x = _prepare(images, matrices, affine, rounding=self.rounding)
        return _apply(self.params, x, network=which.network)

    def __call__(self, images: Array) -> Array:
        """images [B, H, W, 3] in [-1, 1] -> features [B, D] float32."""
        return self.select(self.outputs(images))

    def select(self, outputs: InceptionOutputs) -> Array:
        """The features [B, D] among all outputs, so that one pass serves several metrics."""
        if self.output == "pool3":
            return outputs.pool3
        return outputs.spatial.reshape(len(outputs.spatial), -1)

    def probabilities(self, outputs: InceptionOutputs) -> Array:
        """Class probabilities [B, K] for the inception score.

        The graph of 2015 is scored without its last bias, as every evaluator of it does.
        """
        biased = variant(self.variant).score_bias
        return jax.nn.softmax(outputs.logits if biased else outputs.logits_unbiased, axis=-1)
