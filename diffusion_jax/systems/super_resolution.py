"""Super-resolution: an image of low resolution, with noise, beside what is drawn."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from diffusion_jax.core.condition import Condition
from diffusion_jax.core.forward import add_noise
from diffusion_jax.core.resize import bilinear_resize_corners
from diffusion_jax.core.schedules import NoiseSchedule
from diffusion_jax.core.types import Array, Batch, Key, Params
from diffusion_jax.systems.latent_diffusion import Denoise2D
from diffusion_jax.systems.phases import Compute, noise_for


@dataclass(frozen=True)
class NoiseLowRes(Compute):
    """An image "low_res" [B, h, w, C] in [-1, 1] to "channels": x_t of its own process.

    t is "noise_level" [B], which the network is told as well.

    Attributes:
      schedule: of that noise.
      size: height and width that the image is resized to first, corners aligned; None to keep it.

    Source: Ho et al. 2022 (arXiv:2106.15282), section 4.1; Saharia et al. 2022
    (arXiv:2205.11487), section 2.5.
    """

    schedule: NoiseSchedule
    size: tuple[int, int] | None = None

    reads: ClassVar[tuple[str, ...]] = ("low_res",)

    @property
    def components(self) -> tuple[str, ...]:
        return ()

    def __call__(self, params: Mapping[str, Params], batch: Batch, keys: Key) -> dict[str, Array]:
        del params
        image = jnp.asarray(batch["low_res"], jnp.float32)
        image = image if self.size is None else bilinear_resize_corners(image, *self.size)
        level = self.schedule(batch["noise_level"])
        return {"channels": add_noise(image, noise_for("low_res", keys, image), level)}


@dataclass(frozen=True)
class DenoiseNoised(Denoise2D):
    """A denoiser whose vector says the noise of a low-resolution image.

    It is the same in the unconditional branch: guidance is towards the text alone.
    """

    def condition(self, params: Params, batch: Batch, *, null: bool) -> Condition:
        condition = super().condition(params, batch, null=null)
        if not null:
            return condition
        return condition.replace(vector=super().condition(params, batch, null=False).vector)
