"""Image-to-image and inpainting as phases: what is drawn starts from an image, or keeps of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.forward import add_noise
from diffusion_jax.core.types import Array, Batch, Key, NoiseLevel, Params
from diffusion_jax.samplers import RePaint, Sampler
from diffusion_jax.samplers.base import Denoise, StepInfo
from diffusion_jax.systems.latent_diffusion import Denoise2D
from diffusion_jax.systems.phases import Compute, Control


@dataclass(frozen=True)
class DenoiseFromImage(Denoise2D):
    """Starts from "image_latents" [B, h, w, c] with noise of the grid's first level that is run.

    Attributes:
      from_noise: start from pure noise instead; of inpainting at strength 1.
      noisy: start from "start_latents" [B, h, w, c] as they are; of a network that goes on where
        another one stopped.

    Source: Meng et al. 2022 (arXiv:2108.01073), algorithm 1; noisy: Podell et al. 2023
    (arXiv:2307.01952), section 2.5.
    """

    from_noise: bool = False
    noisy: bool = False

    def begin(self, params: Mapping[str, Params], batch: Batch, keys: Key, control: Control) -> Any:
        if self.from_noise:
            return super().begin(params, batch, keys, control)
        if self.noisy:
            return batch["start_latents"]
        level = control.grid.level(control.grid.start)
        return add_noise(batch["image_latents"], self.unit_noise(batch, keys), level)


@struct.dataclass
class KeepKnown:
    """A sampler that puts known latents in, noised with one noise, before each call but the first.

    So the network always sees what is known at the level of its call; after the last step the
    known part is clean.

    Attributes:
      control: the sampler that takes the steps, its grid, and how it ends.
      known: [B, ...] clean latents.
      noise: [B, ...] with which they are noised.
      mask: [B, ...] with one channel; 1 where the latents are drawn, 0 where they are known.

    Source: none; Stable Diffusion's inpainting in diffusers, without a network made for it.
    """

    control: Control
    known: Array
    noise: Array
    mask: Array

    def init(self, x_T: Array) -> Any:
        """The sampler's state."""
        return self.control.sampler.init(x_T)

    def _merged(self, x: Array, level: NoiseLevel | None) -> Array:
        if level is None:
            # Not scaled as the rest of the last x is.
            known = self.known / self.control.end_scale
        else:
            known = add_noise(self.known, self.noise, level)
        return (1.0 - self.mask) * known + self.mask * x

    def step(
        self,
        keys: Key,
        denoise: Denoise,
        state: Any,
        level: NoiseLevel,
        next_level: NoiseLevel,
        info: StepInfo,
    ) -> Any:
        """The sampler's step, then the known latents at the level of the next one."""
        calls = []

        def merging(x: Array, level: NoiseLevel):
            calls.append(None)
            return denoise(x if len(calls) == 1 else self._merged(x, level), level)

        state = self.control.sampler.step(keys, merging, state, level, next_level, info)
        following = self.control.grid.level(info.index + 1)
        x = jax.lax.cond(
            info.index + 1 < self.control.last,
            lambda x: self._merged(x, following),
            lambda x: self._merged(x, None),
            state.x,
        )
        return state.replace(x=x)


@dataclass(frozen=True)
class DenoiseKeeping(DenoiseFromImage):
    """Draws where "mask" [B, h, w, 1] is 1 and keeps "image_latents" elsewhere."""

    def sampler(self, batch: Batch, keys: Key, control: Control) -> Sampler:
        """The call's sampler with `KeepKnown` around it."""
        noise = self.unit_noise(batch, keys)
        known, mask = batch["image_latents"], batch["mask"]
        return KeepKnown(control, known, noise, mask)


@dataclass(frozen=True)
class MaskChannels(Compute):
    """ "mask" [B, h, w, 1] and "known_latents" to "channels", the mask first.

    Source: Rombach et al. 2022 (arXiv:2112.10752), section 4.5.
    """

    reads: ClassVar[tuple[str, ...]] = ("known_latents",)

    @property
    def components(self) -> tuple[str, ...]:
        return ()

    def __call__(self, params: Mapping[str, Params], batch: Batch, keys: Key) -> dict[str, Array]:
        del params, keys
        return {"channels": jnp.concatenate([batch["mask"], batch["known_latents"]], axis=-1)}


@dataclass(frozen=True)
class RePaintPixels(Denoise2D):
    """Draws pixels where "known" [B, H, W, 1] is False and keeps "image" elsewhere.

    Source: Lugmayr et al. 2022 (arXiv:2201.09865), algorithm 1.
    """

    def sampler(self, batch: Batch, keys: Key, control: Control) -> Sampler:
        """The call's sampler with `RePaint` around it."""
        del keys
        return RePaint(control.sampler, batch["image"], batch["known"], share_noise=True)
