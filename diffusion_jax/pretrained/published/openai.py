"""The files of guided-diffusion (ADM) and GLIDE."""

from collections.abc import Mapping, Sequence

from diffusion_jax.models.adm import CHANNEL_MULTS
from diffusion_jax.pretrained.components.glide import MODULE as GLIDE_MODULE
from diffusion_jax.pretrained.components.openai import MODULE as ADM_MODULE
from diffusion_jax.pretrained.published.base import Published


def _openai(size: int, width: int, depth: int, *, attention: Sequence[int] = (32, 16, 8), **others):
    """Arguments that the networks of ADM and of GLIDE have in common."""
    return {
        "in_channels": 3,
        "model_channels": width,
        "out_channels": 6,
        "num_res_blocks": depth,
        "attention_resolutions": [size // resolution for resolution in attention],
        "channel_mult": list(CHANNEL_MULTS[min(size, 256)]),
        "num_head_channels": 64,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        **others,
    }


def _adm(name: str, kind: str, size: int, width: int, depth: int, **others) -> Published:
    config = {"image_size": size, **_openai(size, width, depth, **others)}
    url = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/{name}.pt"
    return Published(ADM_MODULE + kind, config, url)


def _adm_unet(name: str, size: int, *, num_classes: int | None = 1000, **others) -> Published:
    given = {"channel_mult": list(CHANNEL_MULTS[size]), "num_classes": num_classes, **others}
    return _adm(name, "UNetModel", size, 256, 2, **given)


def _adm_classifier(size: int, depth: int = 2) -> Published:
    given = {"channel_mult": list(CHANNEL_MULTS[size]), "out_channels": 1000, "pool": "attention"}
    return _adm(f"{size}x{size}_classifier", "EncoderUNetModel", size, 128, depth, **given)


_FOUR_HEADS = {"num_heads": 4, "num_head_channels": -1}

# Dhariwal & Nichol 2021 (arXiv:2105.05233): the flags of the released commands.
ADM: Mapping[str, Published] = {
    "64x64_diffusion": _adm(
        "64x64_diffusion", "UNetModel", 64, 192, 3,
        dropout=0.1, num_classes=1000, use_new_attention_order=True,
    ),
    "128x128_diffusion": _adm_unet("128x128_diffusion", 128, **_FOUR_HEADS),
    "256x256_diffusion": _adm_unet("256x256_diffusion", 256),
    "256x256_diffusion_uncond": _adm_unet("256x256_diffusion_uncond", 256, num_classes=None),
    "512x512_diffusion": _adm_unet("512x512_diffusion", 512),
    "64_256_upsampler": _adm(
        "64_256_upsampler", "SuperResModel", 256, 192, 2, num_classes=1000, **_FOUR_HEADS
    ),
    "128_512_upsampler": _adm(
        "128_512_upsampler", "SuperResModel", 512, 192, 2, num_classes=1000, attention=(32, 16)
    ),
    "64x64_classifier": _adm_classifier(64, depth=4),
    "128x128_classifier": _adm_classifier(128),
    "256x256_classifier": _adm_classifier(256),
    "512x512_classifier": _adm_classifier(512),
    "lsun_bedroom": _adm_unet("lsun_bedroom", 256, num_classes=None, dropout=0.1),
    "lsun_cat": _adm_unet("lsun_cat", 256, num_classes=None, dropout=0.1),
    "lsun_horse": _adm_unet("lsun_horse", 256, num_classes=None, dropout=0.1),
    "lsun_horse_nodropout": _adm_unet("lsun_horse_nodropout", 256, num_classes=None),
}  # fmt: skip

_TEXT = {
    "text_ctx": 128,
    "xf_width": 512,
    "xf_layers": 16,
    "xf_heads": 8,
    "xf_final_ln": True,
    "xf_padding": True,
    "n_vocab": 50257,
}


def _glide(name: str, kind: str, size: int, depth: int) -> Published:
    config = {**_TEXT, **_openai(size, 192, depth, dropout=0.1)}
    url = f"https://openaipublic.blob.core.windows.net/diffusion/dec-2021/{name}.pt"
    return Published(GLIDE_MODULE + kind, config, url)


# Nichol et al. 2021 (arXiv:2112.10741): the defaults of the released constructor.
GLIDE: Mapping[str, Published] = {
    "base": _glide("base", "Text2ImUNet", 64, 3),
    "upsample": _glide("upsample", "SuperResText2ImUNet", 256, 2),
    "base-inpaint": _glide("base_inpaint", "InpaintText2ImUNet", 64, 3),
    "upsample-inpaint": _glide("upsample_inpaint", "SuperResInpaintText2ImUnet", 256, 2),
}
