"""diffusers' UNet2DConditionModel: its names as those of our UNet and conditioners."""

from collections.abc import Mapping
from typing import Any

from diffusion_jax.io.mapping import Row, prefixed
from diffusion_jax.io.tables.transformer import spatial_transformer_rows
from diffusion_jax.io.tables.unet import label_rows
from diffusion_jax.io.tables.unet_blocks import (
    OLD_PIXEL_ATTENTION,
    PIXEL_ATTENTION,
    attention_kind,
    network_rows,
)

_TEXT_ATTENTION = (
    Row("group_norm", "norm", "norm"),
    Row("norm_cross", "text_norm", "norm"),
    Row("to_q", "attention/query", "linear"),
    Row("to_k", "attention/key", "linear"),
    Row("to_v", "attention/value", "linear"),
    Row("add_k_proj", "attention/text_key", "linear"),
    Row("add_v_proj", "attention/text_value", "linear"),
    Row("to_out.0", "attention/out", "linear"),
)


def unet2d_condition_rows(
    unet: Mapping[str, Any], *, linear_projection: bool, old_attention_names: bool = False
) -> tuple[Row, ...]:
    """The table of a UNet2DConditionModel's weights, without those of its embeddings.

    Args:
      unet: fields of our UNetConfig, as in `UNetForm`.
      linear_projection: the file's option use_linear_projection: the projections around
        transformer blocks are linear layers instead of 1x1 convolutions.
      old_attention_names: see `has_old_attention_names`.
    """
    pixels = OLD_PIXEL_ATTENTION if old_attention_names else PIXEL_ATTENTION
    kinds = {
        "transformer": spatial_transformer_rows(linear_projections=linear_projection),
        "text": _TEXT_ATTENTION,
    }
    return network_rows(unet, lambda attention: kinds.get(str(attention_kind(attention)), pixels))


_NORMED = (Row("image_proj", "image_proj", "linear"), Row("image_norm", "norm", "norm"))
# Kind of conditioner -> its names in the file and relative to its part of the tree.
CONDITIONER_ROWS: Mapping[str, tuple[Row, ...]] = {
    **{
        kind: label_rows(kind)
        for kind in ("label", "noise_level", "projected_vector", "linear_vector")
    },
    "pooled_tokens": prefixed(
        (
            Row("norm1", "norm_in", "norm"),
            Row("pool.positional_embedding", "position", "param"),
            Row("pool.q_proj", "query", "linear"),
            Row("pool.k_proj", "key", "linear"),
            Row("pool.v_proj", "value", "linear"),
            Row("proj", "proj", "linear"),
            Row("norm2", "norm_out", "norm"),
        ),
        source="add_embedding.",
    ),
    "text_image_vector": prefixed(
        (
            Row("text_proj", "text_proj", "linear"),
            Row("text_norm", "norm", "norm"),
            Row("image_proj", "image_proj", "linear"),
        ),
        source="add_embedding.",
    ),
    "text_and_sizes": (
        Row("add_embedding.linear_1", "dense_1", "linear"),
        Row("add_embedding.linear_2", "dense_2", "linear"),
    ),
    "image_vector": prefixed(_NORMED, source="add_embedding."),
    "image_hint": (
        *prefixed(_NORMED, source="add_embedding.", target="embed/"),
        *(
            Row(f"add_embedding.input_hint_block.{2 * i}", f"encode/conv_{i}", "conv")
            for i in range(8)
        ),
    ),
    "guidance_scale": (Row("time_embedding.cond_proj", "dense", "linear"),),
    "projected_tokens": (Row("encoder_hid_proj", "dense", "linear"),),
    "text_image_tokens": (
        Row("encoder_hid_proj.image_embeds", "image_proj", "linear"),
        Row("encoder_hid_proj.text_proj", "text_proj", "linear"),
    ),
    "image_tokens": (
        Row("encoder_hid_proj.image_embeds", "image_proj", "linear"),
        Row("encoder_hid_proj.norm", "norm", "norm"),
    ),
}
