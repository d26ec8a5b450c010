"""The files of GLIGEN."""

from collections.abc import Mapping

from diffusion_jax.pretrained.components.gligen import GLIGEN_CLASS
from diffusion_jax.pretrained.published.base import Published, part
from diffusion_jax.pretrained.published.latent_diffusion import LARGE


def _gligen(name: str, kind: str, *, inpaint: bool = False, channels: int | None = None, **params):
    """A network on top of Stable Diffusion 1.4; maps of `channels` join its input as well."""
    modules = f"ldm.modules.diffusionmodules.{kind}_grounding_"
    known = {name: value for name, value in LARGE.items() if name != "legacy"}
    config = {
        **known,
        "transformer_depth": 1,
        "context_dim": 768,
        "fuser_type": "gatedSA",
        "inpaint_mode": inpaint,
        "grounding_tokenizer": part(f"{modules}net.PositionNet", out_dim=768, **params),
    }
    if channels is not None:
        # Edges by HED are read at the size of the latents.
        down = {n: v for n, v in params.items() if kind != "hed"}
        config["grounding_downsampler"] = part(
            f"{modules}downsampler.GroundingDownsampler", out_dim=channels, **down
        )
    file = f"gligen/gligen-{name}:diffusion_pytorch_model.bin"
    return Published(GLIGEN_CLASS, config, file)


_MAP = {"resize_input": 256, "channels": 8}

# Li et al. 2023 (arXiv:2301.07093): the settings of the released code. Each file holds four
# networks; the UNet is converted by --key model.
GLIGEN: Mapping[str, Published] = {
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
