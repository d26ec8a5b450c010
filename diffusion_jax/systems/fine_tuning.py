"""The loss by which a released latent diffusion goes on learning: captions, images, one UNet."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from diffusion_jax.core.arrays import fold_in_each
from diffusion_jax.core.condition import drop
from diffusion_jax.core.lora import merge_lora
from diffusion_jax.core.schedules import NoiseSchedule
from diffusion_jax.core.types import Array, Batch, Key, LossFn, Metrics, Params
from diffusion_jax.losses import Loss, ScheduleTimes, Simple
from diffusion_jax.systems.latent_diffusion import Denoise2D, EncodeImage, EncodeTexts, scaled


@dataclass(frozen=True)
class FineTuning:
    """What is trained of a text-to-image pipeline, and how.

    Parameters are {"unet", "text_encoder", "vae"} and, where there is one, "lora", of the UNet.
    A batch holds "image" [B, H, W, 3] in [-1, 1] or, computed before, "image_mean" and
    "image_std" [B, h, w, c], the posterior of its latents; and "ids" [B, L] or "tokens"
    [B, L, D].

    Attributes:
      denoise: the UNet with its parameterization and time input.
      texts: encodes captions.
      images: encodes images.
      schedule: of the noise.
      null_ids: [L] integers of the text that stands for no caption.
      caption_dropout: probability of training an example without its caption, in [0, 1).
      loss: what the UNet learns.

    Source: Rombach et al. 2022 (arXiv:2112.10752), eq. 3; LoRA: Hu et al. 2021
    (arXiv:2106.09685).
    """

    denoise: Denoise2D
    texts: EncodeTexts
    images: EncodeImage
    schedule: NoiseSchedule
    null_ids: tuple[int, ...]
    caption_dropout: float = 0.1
    loss: Loss = Simple()

    def __post_init__(self):
        if not 0.0 <= self.caption_dropout < 1.0:
            raise ValueError(f"caption_dropout must lie in [0, 1), got {self.caption_dropout}")

    def build(self) -> LossFn:
        """(params, batch, keys [B]) -> (mean loss, metrics)."""
        x0_loss = ScheduleTimes().wrap(
            self.loss.per_example(
                self.denoise.network,
                self.schedule,
                self.denoise.parameterization,
                time_input=self.denoise.time_input,
            ),
            self.schedule,
        )

        def loss(params: Params, batch: Batch, keys: Key) -> tuple[Array, Metrics]:
            unet = params["unet"]
            if "lora" in params:
                unet = merge_lora(unet, params["lora"])
            frozen = jax.lax.stop_gradient(
                {name: params[name] for name in ("text_encoder", "vae") if name in params}
            )
            x0 = self._latents(frozen, batch, fold_in_each(keys, 0))
            told = self._told(frozen, batch)
            cond = self.denoise.condition(unet, told, null=False)
            if self.caption_dropout:
                null = self.denoise.condition(unet, told, null=True)
                cond = drop(fold_in_each(keys, 1), cond, null, self.caption_dropout)
            return x0_loss({"network": unet["network"]}, x0, cond, fold_in_each(keys, 2))

        return loss

    def _latents(self, params: Mapping[str, Params], batch: Batch, keys: Key) -> Array:
        if "image_mean" in batch:
            mean, std = batch["image_mean"], batch["image_std"]
            encoded = mean + std * self.images.noise(keys, mean)
            return scaled(self.images.config, encoded)
        return self.images(params, batch, keys)[self.images.target]

    def _told(self, params: Mapping[str, Params], batch: Batch) -> Batch:
        """Tokens of the captions, and of no caption for every example."""
        told = dict(batch)
        if self.caption_dropout:
            told["null_ids"] = jnp.asarray(self.null_ids, jnp.int32)[None]
        encoded = self.texts(params, told, jnp.zeros(0)) if {"ids", "null_ids"} & set(told) else {}
        told |= encoded
        if "null_tokens" in told:
            shape = told["tokens"].shape[:1] + told["null_tokens"].shape[1:]
            told["null_tokens"] = jnp.broadcast_to(told["null_tokens"], shape)
        return told
