"""Images as further channels of x: one of low resolution, one of which some pixels are known."""

import jax.numpy as jnp

from diffusion_jax.conditioners.base import Conditioner
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.resize import bilinear_resize
from diffusion_jax.core.types import Array


def _images(batch, name: str, channels: int | None = None) -> Array:
    if name not in batch:
        raise ValueError(f"the batch has no {name!r}, only {sorted(batch)}")
    images = jnp.asarray(batch[name])
    if images.ndim != 4 or channels not in (None, images.shape[-1]):
        raise ValueError(
            f"batch[{name!r}] must be images [B, H, W, {channels or 'C'}], got {images.shape}"
        )
    return images


def _parameterless(read) -> Conditioner:
    """What is seen is no condition to guide towards, so the null condition sees it too."""
    return Conditioner(
        init=lambda key: {},
        apply=lambda params, batch, keys: read(batch),
        null=lambda params, batch: read(batch),
    )


def low_res(size: tuple[int, int]) -> Conditioner:
    """Resizes `batch["low_res"]` [B, h, w, C], in [-1, 1], to the size of x.

    Bilinear, pixel centres aligned (half-pixel), without antialiasing. The null condition is
    the same image: guidance is towards other conditions.

    Args:
      size: height and width of x, in pixels.

    Returns:
      A conditioner that fills `image` [B, H, W, C].

    Raises:
      ValueError: if a size is below 1; at use, if low_res is missing or no image.

    Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), section 3.1 (upsampling); Nichol et al.
    2021 (arXiv:2112.10741), section 4.
    """
    if min(size) < 1:
        raise ValueError(f"size must be a height and a width of at least 1, got {size}")

    def read(batch):
        return Condition(image=bilinear_resize(_images(batch, "low_res"), *size))

    return _parameterless(read)


def known_pixels() -> Conditioner:
    """Shows known · image and known for inpainting.

    known is `batch["known_mask"]` [B, H, W, 1], 1 or True where a pixel is known, and image
    `batch["known_image"]` [B, H, W, C] in [-1, 1]; a mask of zeros makes a network for
    inpainting one that generates. The null condition is the same: guidance is towards other
    conditions.

    Returns:
      A conditioner that fills `image` [B, H, W, C + 1].

    Raises:
      ValueError: at use, if an image is missing, has another rank or the two do not fit.

    Source: Nichol et al. 2021 (arXiv:2112.10741), section 4.2.
    """

    def read(batch):
        image = _images(batch, "known_image")
        known = _images(batch, "known_mask", 1).astype(image.dtype)
        if known.shape[:3] != image.shape[:3]:
            raise ValueError(
                f"known_mask must have the size of known_image, got {known.shape} and {image.shape}"
            )
        return Condition(image=jnp.concatenate([image * known, known], axis=-1))

    return _parameterless(read)
