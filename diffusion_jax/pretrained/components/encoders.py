"""Encoders of texts and images: transformers' CLIP and T5, diffusers' LDMBert."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.core.types import Params
from diffusion_jax.io.mapping import Row
from diffusion_jax.io.tables import clip, ldm_bert, t5
from diffusion_jax.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from diffusion_jax.models.ldm_bert import LDMBertConfig
from diffusion_jax.models.t5 import T5Config
from diffusion_jax.pretrained.components.base import Component


def _ids() -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, 1), jnp.int32)


def _images(config: CLIPVisionConfig) -> jax.ShapeDtypeStruct:
    shape = (1, config.image_size, config.image_size, config.channels)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _shapes(config: Any, *inputs: jax.ShapeDtypeStruct) -> Params:
    return jax.eval_shape(config.build().init, jax.random.key(0), *inputs)["params"]


def text_shapes(config: Any) -> Params:
    """Shapes of the parameters of a module that reads [B, N] integers."""
    return _shapes(config, _ids())


def _vision_shapes(config: CLIPVisionConfig) -> Params:
    return _shapes(config, _images(config))


def _read_clip(config: Mapping[str, Any]) -> CLIPConfig:
    fields = clip.clip_config(config)
    return CLIPConfig(CLIPTextConfig(**fields["text"]), CLIPVisionConfig(**fields["vision"]))


def _plain(write: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    return lambda config: write(dataclasses.asdict(config))


def _clip_text(projection: bool) -> Component:
    return Component(
        read=lambda config: CLIPTextConfig(**clip.clip_text_config(config, projection=projection)),
        write=_plain(clip.write_clip_text_config),
        shapes=text_shapes,
        rows=lambda config, names: clip.clip_text_rows(names),
        ignore=clip.TEXT_IGNORED,
    )


def _clip_vision(projection: bool) -> Component:
    return Component(
        read=lambda config: CLIPVisionConfig(
            **clip.clip_vision_config(config, projection=projection)
        ),
        write=_plain(clip.write_clip_vision_config),
        shapes=_vision_shapes,
        rows=lambda config, names: clip.clip_vision_rows(names),
        ignore=clip.VISION_IGNORED,
    )


def _t5_rows(config: T5Config, names: Collection[str]) -> Sequence[Row]:
    del names
    return t5.t5_rows(gated=config.gated)


CLIP_TEXT = _clip_text(projection=False)
CLIP_TEXT_WITH_PROJECTION = _clip_text(projection=True)
CLIP_VISION = _clip_vision(projection=False)
CLIP_VISION_WITH_PROJECTION = _clip_vision(projection=True)
CLIP = Component(
    read=_read_clip,
    write=_plain(clip.write_clip_config),
    shapes=lambda config: _shapes(config, _ids(), _images(config.vision)),
    rows=lambda config, names: clip.CLIP_ROWS,
    ignore=clip.POSITION_IDS,
)
T5_ENCODER = Component(
    read=lambda config: T5Config(**t5.t5_config(config)),
    write=_plain(t5.write_t5_config),
    shapes=text_shapes,
    rows=_t5_rows,
    ignore=t5.IGNORED,
)
LDM_BERT = Component(
    read=lambda config: LDMBertConfig(**ldm_bert.ldm_bert_config(config)),
    write=_plain(ldm_bert.write_ldm_bert_config),
    shapes=text_shapes,
    rows=lambda config, names: ldm_bert.LDM_BERT_ROWS,
)

# Names in `architectures`. Of a whole T5 only the encoder is read.
ENCODERS: Mapping[str, Component] = {
    "CLIPTextModel": CLIP_TEXT,
    "CLIPTextModelWithProjection": CLIP_TEXT_WITH_PROJECTION,
    "CLIPVisionModel": CLIP_VISION,
    "CLIPVisionModelWithProjection": CLIP_VISION_WITH_PROJECTION,
    "CLIPModel": CLIP,
    "T5EncoderModel": T5_ENCODER,
    "T5ForConditionalGeneration": T5_ENCODER,
    "LDMBertModel": LDM_BERT,
}
