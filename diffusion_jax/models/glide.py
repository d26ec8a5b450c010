"""The configurations that GLIDE was published with."""

from dataclasses import replace

from diffusion_jax.models.adm import CHANNEL_MULTS, adm_levels
from diffusion_jax.models.text_attention import TextAttention
from diffusion_jax.models.text_transformer import TextTransformerConfig
from diffusion_jax.models.unet import UNetConfig

WIDTH = 192


def glide_unet(image_size: int) -> UNetConfig:
    """GLIDE's denoising network, eps and variance of RGB images: ADM with a text.

    Text and its vector come from `glide_text`. The network for 256 pixels is an upsampler, which
    is shown an image of 64 pixels by `low_res`. Those for inpainting have the same configuration
    and are shown the known pixels by `known_pixels`, before the image of low resolution.

    Args:
      image_size: 64 or 256 pixels.

    Raises:
      ValueError: if there is none for the size.

    Source: Nichol et al. 2021 (arXiv:2112.10741), section 4, in the released sizes.
    """
    if image_size not in (64, 256):
        raise ValueError(
            f"GLIDE has networks for images of 64 and 256 pixels, got {image_size}; "
            "describe others by adm_levels"
        )
    levels = adm_levels(
        image_size,
        width=WIDTH,
        depth=3 if image_size == 64 else 2,
        channel_mults=CHANNEL_MULTS[image_size],
    )
    text = TextAttention()
    return UNetConfig(
        levels=tuple(replace(level, attention=level.attention and text) for level in levels),
        out_channels=6,
        time_embed_dim=4 * WIDTH,
        time_channels=WIDTH,
        dropout=0.1,
        scale_shift=True,
        resample="block",
        middle_attention=text,
        head_dim=64,
        needs_vector=True,
    )


def glide_text_encoder() -> TextTransformerConfig:
    """The text encoder of every released network of GLIDE.

    Source: Nichol et al. 2021 (arXiv:2112.10741), section 4.1, in the released size.
    """
    return TextTransformerConfig(vector_dim=4 * WIDTH)
