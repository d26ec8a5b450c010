"""The configurations that DiT was published with."""

from diffusion_jax.models.dit import DiTConfig

# size -> (depth, width, heads)
SIZES: dict[str, tuple[int, int, int]] = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PATCH_SIZES = (2, 4, 8)


def latent_dit(size: str = "XL", *, patch_size: int = 2) -> DiTConfig:
    """DiT-S, -B, -L or -XL for the latents of Stable Diffusion's autoencoder.

    It predicts eps and the variance of 4 channels, is told a class, and serves images of 256
    (latents of 32) and 512 pixels (64) alike.

    Args:
      size: "S", "B", "L" or "XL".
      patch_size: 2, 4 or 8 latent pixels.

    Raises:
      ValueError: if the paper has no such network.

    Source: Peebles & Xie 2023 (arXiv:2212.09748), table 1 and section 3.2.
    """
    if size not in SIZES or patch_size not in PATCH_SIZES:
        raise ValueError(
            f"DiT was published in sizes {', '.join(SIZES)} with patches of "
            f"{', '.join(map(str, PATCH_SIZES))}, got {size!r} and {patch_size}"
        )
    depth, width, num_heads = SIZES[size]
    return DiTConfig(
        patch_size=patch_size,
        width=width,
        depth=depth,
        num_heads=num_heads,
        out_channels=8,
        needs_vector=True,
    )
