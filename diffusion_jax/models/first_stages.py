"""The published autoencoders that diffusions are trained in, by their names."""

from collections.abc import Mapping

from diffusion_jax.models.autoencoder import AutoencoderKLConfig, AutoencoderLevel
from diffusion_jax.models.tiny_autoencoder import AutoencoderTinyConfig
from diffusion_jax.models.vq import VQModelConfig


def _levels(*multiples: int, attention: tuple[int, ...] = ()) -> tuple[AutoencoderLevel, ...]:
    """Widths as multiples of 128; `attention` are the levels that attend."""
    return tuple(
        AutoencoderLevel(128 * multiple, attention=i in attention)
        for i, multiple in enumerate(multiples)
    )


# "kl-f8" divides height and width by 8. Every one of these has two residual blocks a level.
FIRST_STAGES: Mapping[str, AutoencoderKLConfig | VQModelConfig | AutoencoderTinyConfig] = {
    # Rombach et al. 2022 (arXiv:2112.10752), table 8: latent diffusion.
    "kl-f4": AutoencoderKLConfig(levels=_levels(1, 2, 4), latent_channels=3, sample_size=256),
    "kl-f8": AutoencoderKLConfig(levels=_levels(1, 2, 4, 4), sample_size=256),
    "kl-f16": AutoencoderKLConfig(
        levels=_levels(1, 1, 2, 2, 4, attention=(4,)), latent_channels=16, sample_size=256
    ),
    "kl-f32": AutoencoderKLConfig(
        levels=_levels(1, 1, 2, 2, 4, 4, attention=(4, 5)), latent_channels=64, sample_size=256
    ),
    "vq-f4": VQModelConfig(levels=_levels(1, 2, 4), sample_size=256),
    "vq-f4-noattn": VQModelConfig(levels=_levels(1, 2, 4), middle_attention=False, sample_size=256),
    "vq-f8": VQModelConfig(
        levels=_levels(1, 2, 2, 4, attention=(3,)),
        latent_channels=4,
        num_codes=16384,
        sample_size=256,
    ),
    "vq-f8-n256": VQModelConfig(
        levels=_levels(1, 2, 2, 4, attention=(3,)),
        latent_channels=4,
        num_codes=256,
        sample_size=256,
    ),
    "vq-f16": VQModelConfig(
        levels=_levels(1, 1, 2, 2, 4, attention=(4,)),
        latent_channels=8,
        num_codes=16384,
        sample_size=256,
    ),
    # Stable Diffusion 1 and 2, then XL: "kl-f8" with other weights.
    "sd": AutoencoderKLConfig(levels=_levels(1, 2, 4, 4), sample_size=512),
    "sdxl": AutoencoderKLConfig(
        levels=_levels(1, 2, 4, 4), sample_size=1024, scaling_factor=0.13025
    ),
    # Zheng et al. 2022 (arXiv:2209.09002): MoVQ, as Kandinsky 2 has it.
    "movq": VQModelConfig(
        levels=_levels(1, 2, 2, 4, attention=(3,)),
        latent_channels=4,
        num_codes=16384,
        norm="spatial",
        scaling_factor=0.18215,
    ),
    # Bohan 2023 (https://github.com/madebyollin/taesd): for SD, and likewise for SDXL.
    "taesd": AutoencoderTinyConfig(),
}
