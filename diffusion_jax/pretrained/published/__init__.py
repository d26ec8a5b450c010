"""The original files that were published, with the arguments that their networks are made with."""

from collections.abc import Mapping

from diffusion_jax.pretrained.published.base import Published
from diffusion_jax.pretrained.published.gligen import GLIGEN
from diffusion_jax.pretrained.published.latent_diffusion import (
    FIRST_STAGES,
    LATENT_DIFFUSION,
    STABLE_DIFFUSION,
)
from diffusion_jax.pretrained.published.openai import ADM, GLIDE

__all__ = ["PUBLISHED", "Published"]

# FAMILY/NAME, the names being those that the files, folders or repositories were given.
PUBLISHED: Mapping[str, Published] = {
    f"{family}/{name}": published
    for family, table in (
        ("guided-diffusion", ADM),
        ("glide", GLIDE),
        ("latent-diffusion", FIRST_STAGES),
        ("latent-diffusion", LATENT_DIFFUSION),
        ("stable-diffusion", STABLE_DIFFUSION),
        ("gligen", GLIGEN),
    )
    for name, published in table.items()
}
