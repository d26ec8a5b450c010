"""The configurations that ADM was published with."""

from collections.abc import Sequence

from diffusion_jax.models.classifier import ClassifierConfig
from diffusion_jax.models.levels import LevelConfig
from diffusion_jax.models.unet import UNetConfig

# Width of every level in units of the model's width, by the size of the image.
CHANNEL_MULTS: dict[int, tuple[float, ...]] = {
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}


def _known(image_size: int, sizes: Sequence[int], what: str) -> None:
    if image_size not in sizes:
        raise ValueError(
            f"ADM has a {what} for images of {', '.join(map(str, sizes))} pixels, "
            f"got {image_size}; describe others by adm_levels"
        )


def adm_levels(
    image_size: int,
    *,
    width: int,
    depth: int,
    channel_mults: Sequence[float] | None = None,
    attention_resolutions: Sequence[int] = (32, 16, 8),
) -> tuple[LevelConfig, ...]:
    """Levels in ADM's terms.

    Args:
      image_size: height and width of the images, in pixels.
      width: channels of a level whose multiplier is 1.
      depth: residual blocks of a level on the way down.
      channel_mults: one multiplier per level; None for ADM's at 64, 128, 256 or 512 pixels.
      attention_resolutions: sizes, in pixels, at which there is self-attention. (The released
        constructor takes factors by which the image is downsampled instead.)

    Raises:
      ValueError: if there is no default for the size, or a level has no channels.

    Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), appendix I and the released code.
    """
    if channel_mults is None:
        _known(image_size, tuple(CHANNEL_MULTS), "default of channel_mults")
        channel_mults = CHANNEL_MULTS[image_size]
    factors = {image_size // resolution for resolution in attention_resolutions}
    return tuple(
        LevelConfig(int(mult * width), depth, attention=2**i in factors)
        for i, mult in enumerate(channel_mults)
    )


def adm_unet(image_size: int, *, class_conditional: bool = True) -> UNetConfig:
    """ADM's denoising network for ImageNet, eps and variance of RGB images.

    The release trains the one for 64 pixels with dropout 0.1, the others without. Weights of
    the one for 64 pixels are laid out in the "new" order of attention.

    Args:
      image_size: 64, 128, 256 or 512 pixels.
      class_conditional: refuse a condition without the class's vector. The network for 256
        pixels was released without classes too.

    Raises:
      ValueError: if there is none for the size.

    Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), appendix I and the released commands.
    """
    _known(image_size, tuple(CHANNEL_MULTS), "denoising network")
    small = image_size == 64
    width = 192 if small else 256
    return UNetConfig(
        levels=adm_levels(image_size, width=width, depth=3 if small else 2),
        out_channels=6,
        time_embed_dim=4 * width,
        time_channels=width,
        dropout=0.1 if small else 0.0,
        scale_shift=True,
        resample="block",
        num_heads=4 if image_size == 128 else None,
        head_dim=None if image_size == 128 else 64,
        needs_vector=class_conditional,
    )


def adm_upsampler(image_size: int) -> UNetConfig:
    """ADM's class-conditional upsampler: the low-resolution image arrives as cond.image.

    That image must have been resized to `image_size` bilinearly.

    Args:
      image_size: of the result: 256 (from 64) or 512 (from 128) pixels.

    Raises:
      ValueError: if there is none for the size.

    Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), appendix I and the released commands.
    """
    _known(image_size, (256, 512), "upsampler")
    levels = adm_levels(
        image_size,
        width=192,
        depth=2,
        channel_mults=CHANNEL_MULTS[256],
        attention_resolutions=(32, 16, 8) if image_size == 256 else (32, 16),
    )
    return UNetConfig(
        levels=levels,
        out_channels=6,
        scale_shift=True,
        resample="block",
        num_heads=4 if image_size == 256 else None,
        head_dim=None if image_size == 256 else 64,
        needs_vector=True,
    )


def adm_classifier(image_size: int, *, num_classes: int = 1000) -> ClassifierConfig:
    """ADM's classifier of noisy images, with the attention pool.

    Args:
      image_size: 64, 128, 256 or 512 pixels.
      num_classes: 1000 for ImageNet.

    Raises:
      ValueError: if there is none for the size.

    Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), appendix I and the released commands.
    """
    _known(image_size, tuple(CHANNEL_MULTS), "classifier")
    return ClassifierConfig(
        levels=adm_levels(image_size, width=128, depth=4 if image_size == 64 else 2),
        time_embed_dim=512,
        time_channels=128,
        scale_shift=True,
        resample="block",
        head_dim=64,
        num_classes=num_classes,
    )
