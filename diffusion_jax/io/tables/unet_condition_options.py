"""diffusers' UNet2DConditionModel: its configuration out of ours."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_jax.io.tables.options import UnsupportedOption
from diffusion_jax.io.tables.unet_blocks import UNetForm, attention_kind, block_name, ways
from diffusion_jax.io.tables.unet_condition import CONDITION_DOWN, CONDITION_UP, OWNER, TEXT_NORMS


def _written_heads(unet: Mapping[str, Any], down: Sequence[Any], up: Sequence[Any]) -> list[int]:
    """attention_head_dim of every block; where a block does not say, what the others do, or 8."""
    count = len(down)
    found: dict[int, int] = {}
    # (index in the list for numbers of heads, for widths of heads, the level's attention, width)
    entries = [(i, i, level["attention"], level["channels"]) for i, level in enumerate(down)]
    entries += [
        (i, count - 1 - i, level["attention"], level["channels"]) for i, level in enumerate(up)
    ]
    entries.append((count - 1, count - 1, unet["middle_attention"], down[-1]["channels"]))
    for number_at, width_at, attention, channels in entries:
        kind = attention_kind(attention)
        if kind == "transformer":
            index, value = number_at, attention["num_heads"]
        elif kind == "text":
            index, value = width_at, attention["head_dim"]
        elif kind == "pixels":
            index = width_at
            value = attention["head_dim"] or channels // attention["num_heads"]
        else:
            continue
        if not isinstance(value, int) or found.setdefault(index, value) != value:
            raise UnsupportedOption(
                f"attention_head_dim of block {index} would have to be {value} and "
                f"{found.get(index)}; {OWNER} has one number for both ways"
            )
    other = next(iter(found.values())) if len(set(found.values())) == 1 else 8
    return [found.get(i, other) for i in range(count)]


def _same(values: Sequence[Any]) -> Any:
    """One value where all are equal, else the list."""
    return values[0] if all(value == values[0] for value in values) else list(values)


def _written_depths(
    unet: Mapping[str, Any], down: Sequence[Any], up: Sequence[Any]
) -> dict[str, Any]:
    def depth(attention):
        return attention["depth"] if attention_kind(attention) == "transformer" else None

    ways_down = [depth(level["attention"]) for level in down]
    ways_up = [depth(level["attention"]) for level in up]
    if ways_down[-1] is None:
        ways_down[-1] = depth(unet["middle_attention"])
    nested = any(isinstance(value, list) for value in (*ways_down, *ways_up))
    merged = [a if a is not None else b for a, b in zip(ways_down, ways_up, strict=True)]
    merged = [1 if value is None else value for value in merged]
    mirrored = all(b in (None, a) for a, b in zip(merged, ways_up, strict=True))
    if mirrored and not nested:
        return {"transformer_layers_per_block": _same(merged)}
    return {
        "transformer_layers_per_block": merged,
        "reverse_transformer_layers_per_block": [
            a if b is None else b for a, b in zip(merged[::-1], ways_up[::-1], strict=True)
        ],
    }


def _written_attention(
    unet: Mapping[str, Any], down: Sequence[Any], up: Sequence[Any]
) -> dict[str, Any]:
    only: list[bool] = []
    norms = set()
    for a, b in zip(down, up, strict=True):
        flags = set()
        for attention in (a["attention"], b["attention"]):
            if attention_kind(attention) == "transformer":
                flags.add(attention["tokens_only"])
            elif attention_kind(attention) == "text":
                flags.add(attention["text_only"])
                norms.add(attention["text_norm"])
        if len(flags) > 1:
            raise UnsupportedOption(f"{OWNER} has one only_cross_attention for both ways")
        only.append(flags.pop() if flags else False)
    middle = unet["middle_attention"]
    if attention_kind(middle) == "text":
        norms.add(middle["text_norm"])
    if len(norms) > 1:
        raise UnsupportedOption(f"{OWNER} has one cross_attention_norm, got {sorted(norms)}")
    names = {ours: theirs for theirs, ours in TEXT_NORMS.items()}
    return {
        "only_cross_attention": _same(only),
        "mid_block_only_cross_attention": attention_kind(middle) == "text" and middle["text_only"],
        "cross_attention_norm": names[norms.pop()] if norms else None,
    }


def _written_middle(unet: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {"transformer": "UNetMidBlock2DCrossAttn", "text": "UNetMidBlock2DSimpleCrossAttn"}
    if unet["middle_blocks"] == 0:
        return {"mid_block_type": None}
    kind = attention_kind(unet["middle_attention"])
    name = "UNetMidBlock2D" if unet["middle_blocks"] == 1 else kinds.get(str(kind))
    if name is None:
        raise UnsupportedOption(f"{OWNER} has no bottom with attention {kind}")
    return {"mid_block_type": name, "mid_block_scale_factor": unet["middle_out_scale"]}


def _written_conditioners(form: UNetForm) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for kind, fields in form.conditioners.values():
        if kind not in _WRITTEN:
            raise UnsupportedOption(f"{OWNER} has no conditioner {kind!r}")
        constants, renamed = _WRITTEN[kind]
        options |= constants
        options |= {theirs: fields[ours] for ours, theirs in renamed.items()}
    return options


# Kind of conditioner -> (options that say so, its fields that are options).
_WRITTEN: Mapping[str, tuple[Mapping[str, Any], Mapping[str, str]]] = {
    "label": ({}, {"num_classes": "num_class_embeds"}),
    "given_vector": ({"class_embed_type": "identity"}, {}),
    "noise_level": ({"class_embed_type": "timestep"}, {}),
    "projected_vector": (
        {"class_embed_type": "projection"},
        {"features": "projection_class_embeddings_input_dim"},
    ),
    "linear_vector": (
        {"class_embed_type": "simple_projection"},
        {"features": "projection_class_embeddings_input_dim"},
    ),
    "pooled_tokens": (
        {"addition_embed_type": "text"},
        {"num_heads": "addition_embed_type_num_heads"},
    ),
    "text_image_vector": ({"addition_embed_type": "text_image"}, {}),
    "text_and_sizes": (
        {"addition_embed_type": "text_time"},
        {
            "features": "projection_class_embeddings_input_dim",
            "channels": "addition_time_embed_dim",
        },
    ),
    "image_vector": ({"addition_embed_type": "image"}, {"image_dim": "encoder_hid_dim"}),
    "image_hint": ({"addition_embed_type": "image_hint"}, {"image_dim": "encoder_hid_dim"}),
    "guidance_scale": ({}, {"features": "time_cond_proj_dim"}),
    "given_tokens": ({}, {"dim": "cross_attention_dim"}),
    "projected_tokens": (
        {"encoder_hid_dim_type": "text_proj"},
        {"features": "encoder_hid_dim", "dim": "cross_attention_dim"},
    ),
    "text_image_tokens": (
        {"encoder_hid_dim_type": "text_image_proj"},
        {"text_dim": "encoder_hid_dim", "dim": "cross_attention_dim"},
    ),
    "image_tokens": (
        {"encoder_hid_dim_type": "image_proj"},
        {"image_dim": "encoder_hid_dim", "dim": "cross_attention_dim"},
    ),
}


def unet2d_condition_options(form: UNetForm) -> dict[str, Any]:
    """The config.json of a UNet2DConditionModel: `unet2d_condition_config` backwards.

    Args:
      form: with every field of our UNetConfig.

    Raises:
      UnsupportedOption: if UNet2DConditionModel has no such block or conditioner.
    """
    unet = form.unet
    down, up = ways(unet)
    inside = [level for level in (*down, *up) if level["resample"] == "block"]
    features, embed = unet["time_features"], unet["time_embed_dim"]
    options = {
        "_class_name": OWNER,
        **form.kept,
        "in_channels": form.in_channels,
        "out_channels": unet["out_channels"],
        "center_input_sample": unet["center_input"],
        "flip_sin_to_cos": features["cos_first"],
        "freq_shift": features.get("freq_shift", 0),
        "time_embedding_type": "fourier" if "num_frequencies" in features else "positional",
        "time_embedding_dim": embed,
        "timestep_post_act": unet["time_act_last"],
        "time_embedding_act_fn": unet["embed_act"],
        "class_embeddings_concat": unet["concat_vector"],
        "block_out_channels": [level["channels"] for level in down],
        "layers_per_block": _same([level["num_blocks"] for level in down]),
        "down_block_types": [block_name(level, CONDITION_DOWN) for level in down],
        "up_block_types": [block_name(level, CONDITION_UP) for level in reversed(up)],
        "downsample_padding": 0 if unet["downsample_padding"] == "asymmetric" else 1,
        "dropout": unet["dropout"],
        "act_fn": unet["act"],
        "norm_num_groups": unet["norm_groups"],
        "norm_eps": unet["norm_eps"],
        "resnet_time_scale_shift": "scale_shift" if unet["scale_shift"] else "default",
        "conv_in_kernel": unet["conv_in_kernel"],
        "conv_out_kernel": unet["conv_out_kernel"],
        "attention_head_dim": _same(_written_heads(unet, down, up)),
        "resnet_skip_time_act": not all(level["time_act"] for level in inside)
        or not unet["middle_time_act"],
        "resnet_out_scale_factor": inside[0]["out_scale"] if inside else 1.0,
        **_written_depths(unet, down, up),
        **_written_attention(unet, down, up),
        **_written_middle(unet),
        **_written_conditioners(form),
    }
    return options
