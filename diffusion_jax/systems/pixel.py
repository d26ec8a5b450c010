"""What diffusion over pixels needs beside its networks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from diffusion_jax.core.types import Array, Batch, Key, Params
from diffusion_jax.systems.latent_diffusion import to_unit
from diffusion_jax.systems.phases import Compute


@dataclass(frozen=True)
class ToImages(Compute):
    """Samples "latents" [B, H, W, C] in [-1, 1] to images "images" in [0, 1]."""

    reads: ClassVar[tuple[str, ...]] = ("latents",)

    @property
    def components(self) -> tuple[str, ...]:
        return ()

    def __call__(self, params: Mapping[str, Params], batch: Batch, keys: Key) -> dict[str, Array]:
        del params, keys
        return {"images": to_unit(batch["latents"])}
