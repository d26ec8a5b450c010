"""The original files that were published, with the arguments that their networks are made with."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffusion_jax.models.adm import CHANNEL_MULTS
from diffusion_jax.pretrained.components.compvis import LATENT_DIFFUSION_CLASS, UNET_CLASS
from diffusion_jax.pretrained.components.glide import MODULE as GLIDE
from diffusion_jax.pretrained.components.gligen import GLIGEN_CLASS
from diffusion_jax.pretrained.components.openai import MODULE as GUIDED_DIFFUSION


class Published(NamedTuple):
    """A file of weights that was published without a config.json.

    Attributes:
      class_name: of the network in it, a key of `ORIGINALS`.
      config: arguments of the class, or of a latent diffusion its settings.
      file: where it was published: a URL, or OWNER/NAME:FILE on the Hugging Face hub. All but
        safetensors have to be converted first.
    """

    class_name: str
    config: Mapping[str, Any]
    file: str


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
    return Published(GUIDED_DIFFUSION + kind, config, url)


def _adm_unet(name: str, size: int, *, num_classes: int | None = 1000, **others) -> Published:
    given = {"channel_mult": list(CHANNEL_MULTS[size]), "num_classes": num_classes, **others}
    return _adm(name, "UNetModel", size, 256, 2, **given)


def _adm_classifier(size: int, depth: int = 2) -> Published:
    given = {"channel_mult": list(CHANNEL_MULTS[size]), "out_channels": 1000, "pool": "attention"}
    return _adm(f"{size}x{size}_classifier", "EncoderUNetModel", size, 128, depth, **given)


_FOUR_HEADS = {"num_heads": 4, "num_head_channels": -1}

# Dhariwal & Nichol 2021 (arXiv:2105.05233): the flags of the released commands.
_ADM: Mapping[str, Published] = {
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
    return Published(GLIDE + kind, config, url)


# Nichol et al. 2021 (arXiv:2112.10741): the defaults of the released constructor.
_GLIDE: Mapping[str, Published] = {
    "base": _glide("base", "Text2ImUNet", 64, 3),
    "upsample": _glide("upsample", "SuperResText2ImUNet", 256, 2),
    "base-inpaint": _glide("base_inpaint", "InpaintText2ImUNet", 64, 3),
    "upsample-inpaint": _glide("upsample_inpaint", "SuperResInpaintText2ImUnet", 256, 2),
}


def _part(target: str, **params) -> dict[str, Any]:
    return {"target": target, "params": params}


def _first_stage(kind: str, channels: int, channel_mult: Sequence[int], **others) -> dict[str, Any]:
    attention = others.pop("attention", ())
    kl = kind == "AutoencoderKL"
    network = {
        "double_z": kl, "z_channels": channels, "resolution": 256, "in_channels": 3, "out_ch": 3,
        "ch": 128, "ch_mult": list(channel_mult), "num_res_blocks": 2,
        "attn_resolutions": list(attention), "dropout": 0.0,
    }  # fmt: skip
    if "attn_type" in others:
        network["attn_type"] = others.pop("attn_type")
    return _part(f"ldm.models.autoencoder.{kind}", embed_dim=channels, ddconfig=network, **others)


_KL_8 = _first_stage("AutoencoderKL", 4, (1, 2, 4, 4))
_VQ_4 = _first_stage("VQModelInterface", 3, (1, 2, 4), n_embed=8192)
_VQ_4_NO_ATTENTION = _first_stage(
    "VQModelInterface", 3, (1, 2, 4), n_embed=8192, attn_type="none"
)  # fmt: skip
_VQ_8 = _first_stage("VQModelInterface", 4, (1, 2, 2, 4), n_embed=16384, attention=(32,))


def _encoder(name: str, **params) -> dict[str, Any]:
    return _part(f"ldm.modules.encoders.modules.{name}", **params)


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
    params = {
        "linear_start": betas[0],
        "linear_end": betas[1],
        "timesteps": 1000,
        "unet_config": {"target": UNET_CLASS, "params": dict(unet)},
        "first_stage_config": first_stage,
        "cond_stage_config": text,
        **others,
    }
    settings = {"model": {"target": target, "params": params}}
    return Published(LATENT_DIFFUSION_CLASS, settings, file)


_LDM_FILES = "https://ommer-lab.com/files/latent-diffusion/"
_UNCONDITIONAL = "__is_unconditional__"
_FACES = _unet(224, (1, 2, 3, 4), (8, 4, 2), num_head_channels=32)
# Latents of the first stages that divide height and width by 8.
_FOUR = {"image_size": 32, "in_channels": 4, "out_channels": 4}
_LARGE = {
    **_unet(320, (1, 2, 4, 4), (4, 2, 1), num_heads=8, use_checkpoint=True, legacy=False),
    **_FOUR,
}

# Rombach et al. 2022 (arXiv:2112.10752): the settings beside the released files.
_LATENT_DIFFUSION: Mapping[str, Published] = {
    "celeba256": _latent(f"{_LDM_FILES}celeba.zip", _FACES, _VQ_4, _UNCONDITIONAL),
    "ffhq256": _latent(f"{_LDM_FILES}ffhq.zip", _FACES, _VQ_4, _UNCONDITIONAL),
    "lsun_beds256": _latent(f"{_LDM_FILES}lsun_bedrooms.zip", _FACES, _VQ_4, _UNCONDITIONAL),
    "lsun_churches256": _latent(
        f"{_LDM_FILES}lsun_churches.zip",
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
        f"{_LDM_FILES}cin.zip",
        _unet(256, (1, 2, 4), (4, 2, 1), num_head_channels=32, **_told(512), **_FOUR),
        _VQ_8,
        _encoder("ClassEmbedder", embed_dim=512),
    ),
    "cin256-v2": _latent(
        f"{_LDM_FILES}nitro/cin/model.ckpt",
        _unet(192, (1, 2, 3, 5), (8, 4, 2), num_heads=1, **_told(512)),
        _VQ_4,
        _encoder("ClassEmbedder", n_classes=1001, embed_dim=512),
    ),
    "text2img256": _latent(
        f"{_LDM_FILES}text2img.zip",
        _unet(192, (1, 2, 3, 5), (8, 4, 2), num_head_channels=32, **_told(640)),
        _VQ_4,
        _encoder("BERTEmbedder", n_embed=640, n_layer=32),
    ),
    "text2img-large": _latent(
        f"{_LDM_FILES}nitro/txt2img-f8-large/model.ckpt",
        {**_LARGE, **_told(1280)},
        _KL_8,
        _encoder("BERTEmbedder", n_embed=1280, n_layer=32),
        betas=(0.00085, 0.012),
        scale_factor=0.18215,
    ),
    "bsr_sr": _latent(
        f"{_LDM_FILES}sr_bsr.zip",
        _unet(160, (1, 2, 2, 4), (16, 8), in_channels=6, num_head_channels=32),
        _VQ_4,
        {"target": "torch.nn.Identity"},
        betas=(0.0015, 0.0155),
    ),
    "inpainting_big": _latent(
        f"{_LDM_FILES}inpainting_big.zip",
        _unet(
            256, (1, 2, 3, 4), (8, 4, 2), in_channels=7, num_heads=8, resblock_updown=True
        ),
        _VQ_4_NO_ATTENTION,
        "__is_first_stage__",
        betas=(0.0015, 0.0205),
    ),
}  # fmt: skip


def _stable_diffusion(file: str, *, target: str = LATENT_DIFFUSION_CLASS, **unet) -> Published:
    return _latent(
        file,
        {**_LARGE, **_told(768), **unet},
        _KL_8,
        _encoder("FrozenCLIPEmbedder"),
        betas=(0.00085, 0.012),
        target=target,
        scale_factor=0.18215,
    )


# Of every version 1.1 … 1.5, with or without averages.
_STABLE_DIFFUSION: Mapping[str, Published] = {
    "v1": _stable_diffusion(
        "stable-diffusion-v1-5/stable-diffusion-v1-5:v1-5-pruned-emaonly.safetensors"
    ),
    "v1-inpainting": _stable_diffusion(
        "stable-diffusion-v1-5/stable-diffusion-inpainting:sd-v1-5-inpainting.ckpt",
        target="ldm.models.diffusion.ddpm.LatentInpaintDiffusion",
        in_channels=9,
    ),
}


def _gligen(name: str, kind: str, *, inpaint: bool = False, channels: int | None = None, **params):
    """A network on top of Stable Diffusion 1.4; maps of `channels` join its input as well."""
    modules = f"ldm.modules.diffusionmodules.{kind}_grounding_"
    known = {name: value for name, value in _LARGE.items() if name != "legacy"}
    config = {
        **known,
        "transformer_depth": 1,
        "context_dim": 768,
        "fuser_type": "gatedSA",
        "inpaint_mode": inpaint,
        "grounding_tokenizer": _part(f"{modules}net.PositionNet", out_dim=768, **params),
    }
    if channels is not None:
        # Edges by HED are read at the size of the latents.
        down = {n: v for n, v in params.items() if kind != "hed"}
        config["grounding_downsampler"] = _part(
            f"{modules}downsampler.GroundingDownsampler", out_dim=channels, **down
        )
    file = f"gligen/gligen-{name}:diffusion_pytorch_model.bin"
    return Published(GLIGEN_CLASS, config, file)


_MAP = {"resize_input": 256, "channels": 8}

# Li et al. 2023 (arXiv:2301.07093): the settings of the released code. Each file holds four
# networks; the UNet is converted by --key model.
_GLIGEN: Mapping[str, Published] = {
    "generation-text-box": _gligen("generation-text-box", "text", in_dim=768),
    "generation-text-image-box": _gligen("generation-text-image-box", "text_image", in_dim=768),
    "generation-keypoint": _gligen("generation-keypoint", "keypoint", max_persons_per_image=8),
    "inpainting-text-box": _gligen("inpainting-text-box", "text", inpaint=True, in_dim=768),
    "inpainting-text-image-box": _gligen(
        "inpainting-text-image-box", "text_image", inpaint=True, in_dim=768
    ),
    "generation-hed": _gligen("generation-hed", "hed", resize_input=256, channels=1),
    "generation-canny": _gligen("generation-canny", "canny", **_MAP),
    "generation-depth": _gligen("generation-depth", "depth", **_MAP),
    "generation-sem": _gligen("generation-sem", "sem", in_dim=152, **_MAP),
    "generation-normal": _gligen("generation-normal", "normal", **_MAP),
}

# FAMILY/NAME, the names being those that the files, folders or repositories were given.
PUBLISHED: Mapping[str, Published] = {
    f"{family}/{name}": published
    for family, table in (
        ("guided-diffusion", _ADM),
        ("glide", _GLIDE),
        ("latent-diffusion", _LATENT_DIFFUSION),
        ("stable-diffusion", _STABLE_DIFFUSION),
        ("gligen", _GLIGEN),
    )
    for name, published in table.items()
}
