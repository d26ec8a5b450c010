"""Latent diffusion as phases: texts to tokens, tokens to latents, latents to images, and back."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Protocol

import jax.numpy as jnp
from flax import linen as nn

from diffusion_jax.conditioners import Conditioner
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.denoiser import make_denoiser, network_time
from diffusion_jax.core.parameterization import Parameterization
from diffusion_jax.core.types import Array, Batch, Key, NoiseLevel, Params
from diffusion_jax.guidance import Chain
from diffusion_jax.models.autoencoder import diagonal_gaussian
from diffusion_jax.samplers.base import Denoise
from diffusion_jax.systems.phases import Compute, Control, Draw, noise_for
from diffusion_jax.systems.tiling import sliced, tiled


@dataclass(frozen=True)
class EncodeTexts(Compute):
    """Integers "ids" and "null_ids" [B, L] to "tokens" and "null_tokens" [B, L, D].

    Masks "ids_mask" and "null_ids_mask" are given to the encoder where there are any; the
    denoiser attends to all tokens, padding as well, as Stable Diffusion was trained.

    Attributes:
      module: of the text encoder.
      component: its name.
      skip: blocks at the end that are left out for "ids", see `CLIPTextTower`; never for
        "null_ids", as diffusers' clip_skip.
    """

    module: nn.Module
    component: str = "text_encoder"
    skip: int = 0

    reads: ClassVar[tuple[str, ...]] = ("ids", "null_ids")

    @property
    def components(self) -> tuple[str, ...]:
        return (self.component,)

    def __call__(self, params: Mapping[str, Params], batch: Batch, keys: Key) -> dict[str, Array]:
        found = {}
        for ids, tokens, skip in (("ids", "tokens", self.skip), ("null_ids", "null_tokens", 0)):
            if ids in batch:
                # Encoders other than CLIP's have no such argument.
                options = {"skip": skip} if skip else {}
                encoded = self.module.apply(
                    {"params": params[self.component]},
                    batch[ids],
                    batch.get(f"{ids}_mask"),
                    **options,
                )
                found[tokens] = encoded.last
        return found


@dataclass(frozen=True)
class EncodeTextsTwice(Compute):
    """Integers of two encoders to tokens side by side, and the second one's projection.

    "ids" and "ids_2" [B, L] become "tokens" [B, L, D₁ + D₂], hidden states before the last block,
    without the final norm, and "text_embedding" [B, D]; "null_ids" and "null_ids_2" likewise, to
    names that begin with "null_". Where there are no null_ids but "null_zeros", these are zero.

    Attributes:
      modules: of the text encoders.
      encoders: their names.
      skip: blocks at the end that are left out for "ids" and "ids_2", at least 1.

    Source: Podell et al. 2023 (arXiv:2307.01952), section 2.1.
    """

    modules: tuple[nn.Module, ...]
    encoders: tuple[str, ...]
    skip: int = 1

    reads: ClassVar[tuple[str, ...]] = ("ids", "ids_2", "null_ids", "null_ids_2")

    @property
    def components(self) -> tuple[str, ...]:
        return self.encoders

    def __call__(self, params: Mapping[str, Params], batch: Batch, keys: Key) -> dict[str, Array]:
        del keys
        found = {}
        for null, skip in (("", self.skip), ("null_", 1)):
            # A refiner has one encoder alone, the second.
            names = ("ids", "ids_2")[-len(self.encoders) :]
            if f"{null}{names[0]}" in batch:
                sides = [
                    module.apply({"params": params[encoder]}, batch[f"{null}{ids}"])
                    for module, encoder, ids in zip(self.modules, self.encoders, names, strict=True)
                ]
                hidden = [side.hidden[-1 - skip] for side in sides]
                found[f"{null}tokens"] = jnp.concatenate(hidden, axis=-1)
                found[f"{null}text_embedding"] = sides[-1].projected
        if "null_zeros" in batch:
            for name in ("tokens", "text_embedding"):
                found[f"null_{name}"] = jnp.zeros_like(found[name])
        return found


class ConditionedNetwork(Protocol):
    """The configuration of a network that comes with its conditioner; hashable."""

    def conditioner(self, **options: Any) -> Conditioner: ...


@dataclass(frozen=True)
class Denoise2D(Draw):
    """Draws by a UNet that is told what its conditioner reads in the batch.

    "channels" [B, H, W, C] of the batch are concatenated to x, in both branches of guidance.

    Attributes:
      config: of the network, for its conditioner.
      module: the network.
      parameterization: what it says.
      time_input: what it is told about a level.
      learned_variance: what a second half of its output's channels means, see `make_denoiser`.
      drop_variance: leave out the second half of its output's channels.
      component: its name.
      typed: the configuration's conditioner is told a dtype; that of labels alone is not.
    """

    config: ConditionedNetwork = None
    module: nn.Module = None
    parameterization: Parameterization = None
    time_input: Callable[[NoiseLevel], Array] = network_time
    learned_variance: str | None = None
    drop_variance: bool = False
    component: str = "unet"
    typed: bool = True

    @property
    def components(self) -> tuple[str, ...]:
        return (self.component,)

    def network(self, params, x, t, cond, *, keys=None):
        """The network's output [B, H, W, C] for its parameters."""
        output = self.module.apply({"params": params["network"]}, x, t, cond, keys=keys)
        return output[..., : self.shape[-1]] if self.drop_variance else output

    def condition(self, params: Params, batch: Batch, *, null: bool) -> Condition:
        """The condition, or that of the unconditional branch."""
        options = {"dtype": self.module.dtype} if self.typed else {}
        conditioner = self.config.conditioner(**options)
        told = params.get("conditioner", {})
        if null:
            condition = conditioner.null(told, batch)
        else:
            condition = conditioner.apply(told, batch, None)
        if "channels" in batch:
            condition = condition.replace(image=batch["channels"])
        return condition

    def denoiser(self, params: Mapping[str, Params], batch: Batch, control: Control) -> Denoise:
        own = params[self.component]
        make = make_denoiser(
            self.network,
            self.parameterization,
            time_input=self.time_input,
            learned_variance=self.learned_variance,
        )
        cond = self.condition(own, batch, null=False)
        null = self.condition(own, batch, null=True) if control.guided else cond
        denoise = Chain((control.guide, control.threshold))(make(own), null)
        return lambda x, level: denoise(x, level, cond)


class Latents(Protocol):
    """What an autoencoder's configuration says about the latents of a diffusion."""

    scaling_factor: float

    @property
    def factor(self) -> int: ...


def scaled(config: Latents, latents: Array) -> Array:
    """What the diffusion sees of an autoencoder's latents: (z - shift) · scaling_factor.

    With the configuration's mean and std of the channels: (z - mean) · scaling_factor / std.

    Source: Rombach et al. 2022 (arXiv:2112.10752), appendix G.
    """
    mean, std = _mean_std(config)
    return (latents - mean) * config.scaling_factor / std


def unscaled(config: Latents, latents: Array) -> Array:
    """`scaled` backwards.

    Source: Rombach et al. 2022 (arXiv:2112.10752), appendix G.
    """
    mean, std = _mean_std(config)
    return latents / config.scaling_factor * std + mean


def _mean_std(config: Latents) -> tuple[Array | float, Array | float]:
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        return jnp.asarray(mean)[None, None, None], jnp.asarray(std)[None, None, None]
    return getattr(config, "shift_factor", None) or 0.0, 1.0


@dataclass(frozen=True)
class EncodeImage(Compute):
    """An image "image" [B, H, W, C] in [-1, 1] to "image_latents", drawn from its posterior.

    Attributes:
      config: of the autoencoder.
      module: the autoencoder.
      component: its name.
      purpose: which noise it is drawn with, one of PURPOSES.
      source, target: names of what is read and given.
      one_by_one: one image after the other, for memory.
      tile: height and width of the overlapping parts that images are encoded in, in pixels, for
        memory; None for the whole.
    """

    config: Latents
    module: nn.Module
    component: str = "vae"
    purpose: str = "posterior"
    source: str = "image"
    target: str = "image_latents"
    one_by_one: bool = False
    tile: int | None = None

    @property
    def components(self) -> tuple[str, ...]:
        return (self.component,)

    def needed(self, batch: Batch) -> bool:
        return self.source in batch

    def noise(self, keys: Key, like: Array) -> Array:
        """The noise that latents are drawn with, like [B, h, w, c]."""
        return noise_for(self.purpose, keys, like)

    def __call__(self, params: Mapping[str, Params], batch: Batch, keys: Key) -> dict[str, Array]:
        variables = {"params": params[self.component]}

        def encode(image: Array, *, method: str = "encode") -> Any:
            return self.module.apply(variables, image, method=method)

        if self.tile is not None:
            is_gaussian = hasattr(self.module, "moments")
            method = "moments" if is_gaussian else "encode"
            scale = Fraction(1, self.config.factor)
            parts = tiled(
                functools.partial(encode, method=method),
                tile=self.tile,
                overlap=self.tile // 4,
                scale=scale,
            )
            encode = (lambda image: diagonal_gaussian(parts(image))) if is_gaussian else parts
        encode = sliced(encode) if self.one_by_one else encode
        encoded = encode(batch[self.source])
        if hasattr(encoded, "logvar"):
            encoded = encoded.mean + encoded.std * self.noise(keys, encoded.mean)
        return {self.target: scaled(self.config, encoded.astype(jnp.float32))}


@dataclass(frozen=True)
class DecodeLatents(Compute):
    """Latents "latents" [B, h, w, c] to images "images" [B, H, W, C] in [0, 1].

    Attributes:
      config: of the autoencoder.
      module: the autoencoder.
      component: its name.
      apply_scale: undo the configuration's factor first; LDM's super-resolution does not.
      one_by_one: one image after the other, for memory.
      tile: height and width of the overlapping parts that latents are decoded in, for memory;
        None for the whole.
    """

    config: Latents
    module: nn.Module
    component: str = "vae"
    apply_scale: bool = True
    one_by_one: bool = False
    tile: int | None = None

    reads: ClassVar[tuple[str, ...]] = ("latents",)

    @property
    def components(self) -> tuple[str, ...]:
        return (self.component,)

    def __call__(self, params: Mapping[str, Params], batch: Batch, keys: Key) -> dict[str, Array]:
        latents = batch["latents"]
        latents = unscaled(self.config, latents) if self.apply_scale else latents
        variables = {"params": params[self.component]}

        def decode(latents: Array) -> Any:
            return self.module.apply(variables, latents, method="decode")

        if self.tile is not None:
            overlap, scale = self.tile // 4, self.config.factor
            decode = tiled(decode, tile=self.tile, overlap=overlap, scale=scale)
        decode = sliced(decode) if self.one_by_one else decode
        return {"images": to_unit(decode(latents))}


def to_unit(image: Array) -> Array:
    """Images in [-1, 1] as float32 ones in [0, 1], clipped.

    Source: none; a convention of this library.
    """
    return jnp.clip(image.astype(jnp.float32) / 2.0 + 0.5, 0.0, 1.0)
