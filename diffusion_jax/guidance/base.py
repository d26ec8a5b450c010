"""Guidance as denoiser -> denoiser, and several of them in a row."""

from typing import Protocol

from diffusion_jax.core import struct
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import DenoiseFn


class Guide(Protocol):
    """(denoiser, null condition) -> denoiser. Implementations are dataclasses of `core.struct`.

    Source: none; a convention of this library.
    """

    def __call__(self, denoise: DenoiseFn, uncond: Condition) -> DenoiseFn: ...


@struct.dataclass
class Unguided:
    """Leaves the denoiser as it is.

    Source: none; a convention of this library.
    """

    def __call__(self, denoise: DenoiseFn, uncond: Condition) -> DenoiseFn:
        del uncond
        return denoise


@struct.dataclass
class Chain:
    """Applies several guides, the first one innermost: thresholds stand after guidance.

    Attributes:
      guides: in the order of application.

    Source: none; a convention of this library.
    """

    guides: tuple[Guide, ...] = ()

    def validate(self) -> None:
        """Checks the knobs of every guide; for values, not tracers."""
        for guide in self.guides:
            if hasattr(guide, "validate"):
                guide.validate()

    def __call__(self, denoise: DenoiseFn, uncond: Condition) -> DenoiseFn:
        for guide in self.guides:
            denoise = guide(denoise, uncond)
        return denoise
