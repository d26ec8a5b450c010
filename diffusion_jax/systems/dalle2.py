"""DALL-E 2 as phases: a text's embedding to that of an image, to a small image, to a larger one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffusion_jax.conditioners.clip_projection import CLIPProjectionConfig, clip_projection
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import Array, Batch, Key, NoiseLevel, Params, Prediction
from diffusion_jax.models.prior import restore_embedding
from diffusion_jax.samplers.base import Denoise
from diffusion_jax.systems.latent_diffusion import Denoise2D
from diffusion_jax.systems.phases import Compute, Control


@dataclass(frozen=True)
class EncodeCaptions(Compute):
    """Integers "ids" and "null_ids" [B, L] to "text_embedding" [B, D] and "text_tokens" [B, L, D].

    Those of "null_ids" have names that begin with "null_". The encoder sees padding as well.

    Attributes:
      module: CLIP's text tower with its projection.
      component: its name.

    Source: Ramesh et al. 2022 (arXiv:2204.06125), section 2.2.
    """

    module: nn.Module
    component: str = "text_encoder"

    reads: ClassVar[tuple[str, ...]] = ("ids", "null_ids")

    @property
    def components(self) -> tuple[str, ...]:
        return (self.component,)

    def __call__(self, params: Mapping[str, Params], batch: Batch, keys: Key) -> dict[str, Array]:
        del keys
        found = {}
        for null in ("", "null_"):
            if f"{null}ids" in batch:
                encoded = self.module.apply({"params": params[self.component]}, batch[f"{null}ids"])
                found[f"{null}text_embedding"] = encoded.projected
                found[f"{null}text_tokens"] = encoded.last
        return found


@dataclass(frozen=True)
class DenoiseEmbedding(Denoise2D):
    """Draws the embedding of an image [B, D], standardised, by a prior that is told a text.

    It reads what `EncodeCaptions` gives, and "text_mask" and "null_text_mask" [B, L] bool, True
    where a token is none of padding.

    Source: Ramesh et al. 2022 (arXiv:2204.06125), section 2.2.
    """

    def condition(self, params: Params, batch: Batch, *, null: bool) -> Condition:
        """The text, or the empty one."""
        del params
        names = ("text_embedding", "text_tokens", "text_mask")
        vector, tokens, mask = (batch[f"null_{name}" if null else name] for name in names)
        return Condition(vector=vector, tokens=tokens, token_mask=mask)


@dataclass(frozen=True)
class RestoreEmbedding(Compute):
    """A sample "prior_sample" [B, D] to "image_embedding", an embedding of CLIP's.

    Attributes:
      component: name of the prior, which has the embeddings' statistics.

    Source: Ramesh et al. 2022 (arXiv:2204.06125) diffuse the embedding itself; standardising it
    is of Karlo's released code.
    """

    component: str = "prior"

    reads: ClassVar[tuple[str, ...]] = ("prior_sample",)

    @property
    def components(self) -> tuple[str, ...]:
        return (self.component,)

    def __call__(self, params: Mapping[str, Params], batch: Batch, keys: Key) -> dict[str, Array]:
        del keys
        statistics = params[self.component]["codec"]
        return {"image_embedding": restore_embedding(statistics, batch["prior_sample"])}


@dataclass(frozen=True)
class ProjectEmbeddings(Compute):
    """ "image_embedding" and the text's entries to what the decoder is told.

    That is "vector" [B, V], "tokens" [B, N, C] and "token_mask" [B, N] and, where there is an
    empty text, the same of no image, with names that begin with "null_".

    Attributes:
      config: of the projection.
      module: the projection, for its dtype.
      component: its name.

    Source: Ramesh et al. 2022 (arXiv:2204.06125), section 2.1.
    """

    config: CLIPProjectionConfig
    module: nn.Module
    component: str = "text_proj"

    reads: ClassVar[tuple[str, ...]] = ("image_embedding",)

    @property
    def components(self) -> tuple[str, ...]:
        return (self.component,)

    def __call__(self, params: Mapping[str, Params], batch: Batch, keys: Key) -> dict[str, Array]:
        del keys
        project = clip_projection(self.config, dtype=self.module.dtype)
        told = {"": project.apply(params[self.component], batch, None)}
        if "null_text_embedding" in batch:
            told["null_"] = project.null(params[self.component], batch)
        return {
            f"{null}{slot}": getattr(condition, slot)
            for null, condition in told.items()
            for slot in ("vector", "tokens", "token_mask")
        }


@dataclass(frozen=True)
class ResizeLowRes(Compute):
    """An image "low_res" [B, h, w, C], clipped to [-1, 1], to "channels" of another size.

    It is resized by cubic convolution with a = -1/2 and antialiasing.

    Attributes:
      size: height and width.

    Source: Ramesh et al. 2022 (arXiv:2204.06125), section 2.1; how it is resized: Karlo's
    released code.
    """

    size: tuple[int, int]

    reads: ClassVar[tuple[str, ...]] = ("low_res",)

    @property
    def components(self) -> tuple[str, ...]:
        return ()

    def __call__(self, params: Mapping[str, Params], batch: Batch, keys: Key) -> dict[str, Array]:
        del params, keys
        image = jnp.clip(batch["low_res"], -1.0, 1.0)
        shape = (image.shape[0], *self.size, image.shape[-1])
        precision = jax.lax.Precision.HIGHEST
        return {"channels": jax.image.resize(image, shape, "bicubic", precision=precision)}


@dataclass(frozen=True)
class DenoiseLastApart(Denoise2D):
    """Draws with one network, and with another one in the grid's last step; without guidance.

    Attributes:
      last_module: the network of the last step, of the same configuration up to its sizes.
      last_component: its name.

    Source: none; Karlo's released code, whose last step is trained for by itself.
    """

    last_module: nn.Module = None
    last_component: str = "super_res_last"

    @property
    def components(self) -> tuple[str, ...]:
        return (self.component, self.last_component)

    def denoiser(self, params: Mapping[str, Params], batch: Batch, control: Control) -> Denoise:
        """Those of the two networks, told apart by the level's time."""
        first = super().denoiser(params, batch, control)
        apart = replace(self, module=self.last_module, component=self.last_component)
        last = super(DenoiseLastApart, apart).denoiser(params, batch, control)
        final = control.grid.levels.t[control.grid.stop - 1]

        def denoise(x: Array, level: NoiseLevel) -> Prediction:
            return jax.lax.cond(level.t <= final, last, first, x, level)

        return denoise
