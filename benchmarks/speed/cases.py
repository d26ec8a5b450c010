"""What is timed, and the variants that take turns at it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

# glibc keeps freed memory instead of giving it back, and asks for huge pages; see __main__.
ALLOCATOR = {
    "GLIBC_TUNABLES": ":".join(
        (
            "glibc.malloc.mmap_threshold=17179869184",
            "glibc.malloc.trim_threshold=17179869184",
            "glibc.malloc.hugetlb=1",
        )
    )
}


class Variant(NamedTuple):
    """One of those that are compared.

    Attributes:
      name: in tables.
      side: module of this package that runs it, "theirs" or "ours".
      compiled: whether diffusers' network goes through torch.compile.
      allocator: whether the process is started with ALLOCATOR.
      cache: of compiled programs: "cold", empty in each process; "warm", filled by an earlier one;
        "shared", filled by earlier ones as they go on a GPU, and empty in each on a CPU.
    """

    name: str
    side: str
    compiled: bool = False
    allocator: bool = False
    cache: str = "shared"


class Case(NamedTuple):
    """One row of what is timed.

    Attributes:
      kind: the function of both sides that prepares it.
      options: of diffusers' network, and others that the kind reads.
      batch: examples of a call.
      only_on: the device that it is run on by default; None for each.
      default: whether it is run where --only does not name it.
    """

    kind: str
    options: Mapping[str, Any] = {}
    batch: int = 1
    only_on: str | None = None
    default: bool = True


STEADY = (
    Variant("diffusers", "theirs"),
    Variant("diffusers, compiled", "theirs", compiled=True),
    Variant("this library", "ours"),
    Variant("diffusers, allocator", "theirs", allocator=True),
    Variant("this library, allocator", "ours", allocator=True),
)
FIRST_CALL = (
    Variant("diffusers, compiled", "theirs", compiled=True, cache="cold"),
    Variant("this library", "ours", cache="cold"),
    Variant("diffusers, compiled, second start", "theirs", compiled=True, cache="warm"),
    Variant("this library, second start", "ours", cache="warm"),
)
PLAIN = (Variant("diffusers", "theirs"), Variant("this library", "ours"))
VARIANTS = {
    "unet": STEADY,
    "train": STEADY,
    "text_to_image": STEADY,
    "first_call": FIRST_CALL,
    "sampler": PLAIN,
    "import": PLAIN,
}

# UNet2DConditionModel's own defaults are Stable Diffusion 1.5's, but for the width of the text.
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
MID = {**SD15, "block_out_channels": (128, 256, 512, 512)}
TINY = {
    **SD15,
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
# The config.json of google/ddpm-cifar10-32, 35,746,307 parameters.
CIFAR10 = {
    "sample_size": 32,
    "attention_head_dim": None,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
PROMPT, STEPS = "an astronaut riding a horse", 50
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
TINY_VAE = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}

CASES = {
    "unet-mid": Case("unet", {"unet": MID}, 2),
    "unet-sd15": Case("unet", {"unet": SD15}, 2),
    "train-cifar10": Case("train", {"unet": CIFAR10}, 8),
    "first-call-mid": Case("first_call", {"unet": MID}, 2, only_on="cpu"),
    "first-call-sd15": Case("first_call", {"unet": SD15}, 2),
    "sampler": Case("sampler", {"grid_in_call": False}),
    "sampler-and-grid": Case("sampler", {"grid_in_call": True}),
    "import": Case("import", {"use": False}),
    "import-and-use": Case("import", {"use": True}),
    "text-to-image-sd15": Case("text_to_image", {"unet": SD15, "vae": VAE}, only_on="cuda"),
    # Seconds each, to try the scripts themselves.
    "unet-tiny": Case("unet", {"unet": TINY}, 2, default=False),
    "train-tiny": Case(
        "train", {"unet": {**CIFAR10, "block_out_channels": (32, 32, 32, 32)}}, 2, default=False
    ),
    "first-call-tiny": Case("first_call", {"unet": TINY}, 2, default=False),
    "text-to-image-tiny": Case(
        "text_to_image", {"unet": TINY, "vae": TINY_VAE, "text_layers": 2}, default=False
    ),
}


def default_cases(device: str) -> tuple[str, ...]:
    """The names of what is run where nothing is asked for."""
    return tuple(
        name for name, case in CASES.items() if case.default and case.only_on in (None, device)
    )


def default_variants(kind: str, device: str) -> tuple[Variant, ...]:
    """On a CPU without torch.compile but where compiling is timed; elsewhere without allocator."""
    if kind == "first_call":
        return FIRST_CALL
    skipped = "compiled" if device == "cpu" else "allocator"
    return tuple(variant for variant in VARIANTS[kind] if not getattr(variant, skipped))
