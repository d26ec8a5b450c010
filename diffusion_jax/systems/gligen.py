"""GLIGEN as phases: features of the boxes' texts and images, and inpainting inside of boxes."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn

from diffusion_jax.core import struct
from diffusion_jax.core.arrays import fold_in_each, per_image_normal
from diffusion_jax.core.forward import add_noise
from diffusion_jax.core.types import Array, Batch, Key, NoiseLevel, Params, Prediction
from diffusion_jax.samplers import Sampler
from diffusion_jax.samplers.base import Denoise, StepInfo
from diffusion_jax.systems.latent_diffusion import Denoise2D
from diffusion_jax.systems.phases import Compute, Control

# Folded into the keys of a step, from which the wrapped sampler draws, with small numbers.
_KNOWN_REGION = 0xFFFFFFFE


@dataclass(frozen=True)
class EncodeBoxTexts(Compute):
    """Integers "box_ids" [B, M, L] with "box_ids_mask" to "box_text" [B, M, D], pooled.

    Attributes:
      module: of the text encoder.
      component: its name.

    Source: Li et al. 2023 (arXiv:2301.07093), section 4.2.
    """

    module: nn.Module
    component: str = "text_encoder"

    reads: ClassVar[tuple[str, ...]] = ("box_ids",)

    @property
    def components(self) -> tuple[str, ...]:
        return (self.component,)

    def __call__(self, params: Mapping[str, Params], batch: Batch, keys: Key) -> dict[str, Array]:
        del keys
        ids, mask = batch["box_ids"], batch["box_ids_mask"]
        flat = (ids.reshape((-1, ids.shape[-1])), mask.reshape((-1, ids.shape[-1])))
        pooled = self.module.apply({"params": params[self.component]}, *flat).pooled
        return {"box_text": pooled.reshape((*ids.shape[:2], -1))}


@dataclass(frozen=True)
class EncodeBoxImages(Compute):
    """Images "box_pixels" [B, N, H, W, 3] of the first N of M boxes to "box_image" [B, M, D].

    The embeddings of CLIP's image tower are brought to where those of texts are by a matrix, and
    to a length of "box_norm" [B].

    Attributes:
      encoder: CLIP's image tower with its projection.
      project: the matrix.
      names: of both.

    Source: Li et al. 2023 (arXiv:2301.07093), section 4.2 and released code.
    """

    encoder: nn.Module
    project: nn.Module
    names: tuple[str, str] = ("image_encoder", "image_project")

    reads: ClassVar[tuple[str, ...]] = ("box_pixels",)

    @property
    def components(self) -> tuple[str, ...]:
        return self.names

    def __call__(self, params: Mapping[str, Params], batch: Batch, keys: Key) -> dict[str, Array]:
        del keys
        pixels = batch["box_pixels"]
        encoder, project = ({"params": params[name]} for name in self.names)
        embeds = self.encoder.apply(encoder, pixels.reshape((-1, *pixels.shape[2:]))).projected
        embeds = self.project.apply(project, embeds).astype(jnp.float32)
        embeds = embeds / jnp.linalg.norm(embeds, axis=-1, keepdims=True)
        embeds = embeds.reshape((*pixels.shape[:2], -1)) * batch["box_norm"][:, None, None]
        missing = batch["boxes"].shape[1] - pixels.shape[1]
        return {"box_image": jnp.pad(embeds, ((0, 0), (0, missing), (0, 0)))}


@dataclass(frozen=True)
class OutsideChannels(Compute):
    """ "image_latents" and "outside" [B, h, w, 1] to "channels": latents outside of boxes, mask."""

    reads: ClassVar[tuple[str, ...]] = ("outside",)

    @property
    def components(self) -> tuple[str, ...]:
        return ()

    def __call__(self, params: Mapping[str, Params], batch: Batch, keys: Key) -> dict[str, Array]:
        del params, keys
        outside = batch["outside"]
        known = batch["image_latents"] * outside
        return {"channels": jnp.concatenate([known, outside], axis=-1)}


@struct.dataclass
class KeepOutside:
    """A sampler that puts known latents in, with new noise, before each call of the network.

    A step starts from what its first call sees.

    Attributes:
      sampler: takes the steps.
      known: [B, ...] clean latents.
      mask: bool, of x's rank and broadcasting to it; True = known.

    Source: Li et al. 2023 (arXiv:2301.07093), section 4.3 and released code; where a step calls
    the network more than once, diffusers.
    """

    sampler: Sampler
    known: Array
    mask: Array

    def init(self, x_T: Array) -> Any:
        """The sampler's state."""
        return self.sampler.init(x_T)

    def step(
        self,
        keys: Key,
        denoise: Denoise,
        state: Any,
        level: NoiseLevel,
        next_level: NoiseLevel,
        info: StepInfo,
    ) -> Any:
        """The sampler's step of what is merged."""
        calls = itertools.count()

        def merged(x: Array, level: NoiseLevel, call: int) -> Array:
            noise = per_image_normal(fold_in_each(keys, _KNOWN_REGION - call), x)
            return jnp.where(self.mask, add_noise(self.known, noise, level), x)

        def merging(x: Array, level: NoiseLevel) -> Prediction:
            call = next(calls)
            return denoise(merged(x, level, call) if call else x, level)

        state = state.replace(x=merged(state.x, level, 0))
        return self.sampler.step(keys, merging, state, level, next_level, info)


@dataclass(frozen=True)
class DenoiseInBoxes(Denoise2D):
    """Draws where "outside" [B, h, w, 1] is 0 and keeps "image_latents" elsewhere.

    Source: Li et al. 2023 (arXiv:2301.07093), section 4.3.
    """

    def sampler(self, batch: Batch, keys: Key, control: Control) -> Sampler:
        """The call's sampler with `KeepOutside` around it."""
        del keys
        return KeepOutside(control.sampler, batch["image_latents"], batch["outside"] > 0.5)
