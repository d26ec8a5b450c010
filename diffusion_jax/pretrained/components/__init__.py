"""The released classes of network that are read and written here, by their names in files."""

from collections.abc import Mapping

from diffusion_jax.pretrained.components.autoencoder import (
    AUTOENCODER_KL,
    AUTOENCODER_TINY,
    VQ_MODEL,
)
from diffusion_jax.pretrained.components.base import Component
from diffusion_jax.pretrained.components.clip_image_projection import CLIP_IMAGE_PROJECTION
from diffusion_jax.pretrained.components.compvis import (
    COMPVIS_UNET,
    FIRST_STAGES,
    LATENT_DIFFUSION,
    LATENT_DIFFUSION_CLASS,
    UNET_CLASS,
)
from diffusion_jax.pretrained.components.dit import DIT
from diffusion_jax.pretrained.components.encoders import ENCODERS
from diffusion_jax.pretrained.components.glide import GLIDE
from diffusion_jax.pretrained.components.gligen import GLIGEN_CLASS, GLIGEN_UNET
from diffusion_jax.pretrained.components.openai import GUIDED_DIFFUSION
from diffusion_jax.pretrained.components.prior import CLIP_PROJECTION, PRIOR
from diffusion_jax.pretrained.components.unet import UNET2D, UNET2D_CONDITION

__all__ = ["COMPONENTS", "ORIGINALS", "Component"]

# Layouts of the code that came with a paper, whose files hold weights and no config.json. Keys are
# the full names of its classes.
ORIGINALS: Mapping[str, Component] = {
    **GUIDED_DIFFUSION,
    **GLIDE,
    UNET_CLASS: COMPVIS_UNET,
    LATENT_DIFFUSION_CLASS: LATENT_DIFFUSION,
    **FIRST_STAGES,
    GLIGEN_CLASS: GLIGEN_UNET,
}

# Keys are what `_class_name` of a diffusers config.json and `architectures` of a transformers
# config.json say. One row per class; no string of a file becomes code outside this table.
COMPONENTS: Mapping[str, Component] = {
    "UNet2DModel": UNET2D,
    "UNet2DConditionModel": UNET2D_CONDITION,
    "AutoencoderKL": AUTOENCODER_KL,
    "VQModel": VQ_MODEL,
    "AutoencoderTiny": AUTOENCODER_TINY,
    "PriorTransformer": PRIOR,
    "UnCLIPTextProjModel": CLIP_PROJECTION,
    "CLIPImageProjection": CLIP_IMAGE_PROJECTION,
    "DiTTransformer2DModel": DIT,
    "Transformer2DModel": DIT,
    **ENCODERS,
    **ORIGINALS,
}
