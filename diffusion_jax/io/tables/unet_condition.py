"""diffusers' UNet2DConditionModel: its configuration and its names as those of our UNet."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_jax.io.mapping import Row, prefixed
from diffusion_jax.io.tables.options import UnsupportedOption, complete, require
from diffusion_jax.io.tables.transformer import spatial_transformer_rows
from diffusion_jax.io.tables.unet import label_rows
from diffusion_jax.io.tables.unet_blocks import (
    DOWN,
    OLD_PIXEL_ATTENTION,
    PIXEL_ATTENTION,
    UP,
    Block,
    UNetForm,
    activation,
    block_name,
    block_types,
    level_fields,
    network_rows,
    refuse,
    ways,
)

OWNER = "UNet2DConditionModel"
DEFAULTS: Mapping[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    ),
    "only_cross_attention": False,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "use_linear_projection": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "upcast_attention": False,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
    "addition_embed_type_num_heads": 64,
}

# Values of these options that our UNet computes; everything else is refused.
_SUPPORTED: Mapping[str, tuple] = {
    "center_input_sample": (False, True),
    "flip_sin_to_cos": (False, True),
    "freq_shift": (0, 1),
    "mid_block_type": (
        "UNetMidBlock2DCrossAttn",
        "UNetMidBlock2DSimpleCrossAttn",
        "UNetMidBlock2D",
        None,
    ),
    "downsample_padding": (0, 1),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False, None),
    "use_linear_projection": (False, True),
    "upcast_attention": (False, True, None),
    "class_embed_type": (None, "timestep", "identity", "projection", "simple_projection"),
    "addition_embed_type": (None, "text", "text_image", "text_time", "image", "image_hint"),
    "encoder_hid_dim_type": (None, "text_proj", "text_image_proj", "image_proj"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "resnet_skip_time_act": (False, True),
    "time_embedding_type": ("positional", "fourier"),
    "attention_type": ("default", "gated", "gated-text-image"),
    "class_embeddings_concat": (False, True),
    "mid_block_only_cross_attention": (None, False, True),
    "cross_attention_norm": (None, "layer_norm", "group_norm"),
}
_DOWN = {name: block for name, block in DOWN.items() if block.resample != "pyramid"}
_UP = {name: block for name, block in UP.items() if block.resample != "pyramid"}
_TEXT_NORMS = {None: None, "layer_norm": "layer", "group_norm": "group"}


def condition_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a UNet2DConditionModel, with diffusers' defaults and lists per block.

    Raises:
      UnsupportedOption: naming the option and the value that our UNet does not have.
    """
    full = complete(config, DEFAULTS, OWNER)
    if isinstance(full["freq_shift"], float) and full["freq_shift"].is_integer():
        full["freq_shift"] = int(full["freq_shift"])
    require(full, _SUPPORTED, OWNER)
    if full["encoder_hid_dim"] is not None and full["encoder_hid_dim_type"] is None:
        full["encoder_hid_dim_type"] = "text_proj"
    if full["norm_num_groups"] is None:
        raise refuse("norm_num_groups", None, "an integer")
    depth = len(full["block_out_channels"])
    only = full["only_cross_attention"]
    if full["mid_block_only_cross_attention"] is None:
        full["mid_block_only_cross_attention"] = only if isinstance(only, bool) else False
    for option, kind in (
        ("only_cross_attention", bool),
        ("layers_per_block", int),
        ("attention_head_dim", int),
        ("cross_attention_dim", int),
        ("transformer_layers_per_block", int),
    ):
        value = full[option]
        full[option] = [value] * depth if isinstance(value, kind) else value
        if not isinstance(full[option], list | tuple) or len(full[option]) != depth:
            raise refuse(option, value, f"one value or a list of {depth}, one for each block")
    return full


def _depth(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _depths_up(full: Mapping[str, Any]) -> list[Any]:
    """Transformer blocks on the way up, from the coarsest to the finest."""
    given = full["reverse_transformer_layers_per_block"]
    depths = full["transformer_layers_per_block"]
    if given is not None:
        if not isinstance(given, list | tuple) or len(given) != len(depths):
            raise refuse(
                "reverse_transformer_layers_per_block", given, f"None or a list of {len(depths)}"
            )
        return [_depth(value) for value in given]
    if any(isinstance(value, list | tuple) for value in depths):
        raise refuse(
            "reverse_transformer_layers_per_block",
            None,
            "given where transformer_layers_per_block has lists in it",
        )
    return list(reversed(depths))


def _transformer(full: Mapping[str, Any], heads: int, depth: Any, only: bool) -> dict[str, Any]:
    return {
        "kind": "transformer",
        "num_heads": heads,
        "depth": _depth(depth),
        "tokens_only": only,
        "fuser": None if full["attention_type"] == "default" else "self",
    }


def _text(full: Mapping[str, Any], head_dim: int, only: bool) -> dict[str, Any]:
    return {
        "kind": "text",
        "head_dim": head_dim,
        "text_norm": _TEXT_NORMS[full["cross_attention_norm"]],
        "text_only": only,
    }


def _pixels(channels: int, head_dim: int) -> dict[str, Any]:
    number = channels // head_dim
    if number < 1:
        raise refuse("attention_head_dim", head_dim, f"at most {channels}, the block's width")
    inner = None if number * head_dim == channels else head_dim
    return {"kind": "pixels", "num_heads": number, "head_dim": inner}


def _level(
    full: Mapping[str, Any], block: Block, index: int, *, depth: Any, head_dim: int
) -> dict[str, Any]:
    """Fields of our LevelConfig.

    Args:
      full: the options.
      block: its type.
      index: of the level, from the finest.
      depth: its transformer blocks.
      head_dim: what the block takes as the width of a head, where it does.
    """
    channels, only = full["block_out_channels"][index], full["only_cross_attention"][index]
    attention: bool | dict[str, Any] = False
    if block.attention == "transformer":
        attention = _transformer(full, full["attention_head_dim"][index], depth, only)
    elif block.attention == "text":
        attention = _text(full, head_dim, only)
    elif block.attention == "pixels":
        attention = _pixels(channels, head_dim)
    # Only blocks that change the resolution inside of a residual block have these options.
    inside = block.resample == "block"
    return {
        "channels": channels,
        "num_blocks": full["layers_per_block"][index],
        "attention": attention,
        "resample": block.resample or "conv",
        "out_scale": float(full["resnet_out_scale_factor"]) if inside else 1.0,
        "time_act": not (inside and full["resnet_skip_time_act"]),
    }


def _levels(full: Mapping[str, Any]) -> dict[str, Any]:
    down, up = block_types(full, _DOWN, _UP)
    heads, depths_up = full["attention_head_dim"], _depths_up(full)
    count = len(down)
    made = [
        _level(
            full,
            block,
            i,
            depth=full["transformer_layers_per_block"][i],
            head_dim=heads[i],
        )
        for i, block in enumerate(down)
    ]
    made_up = [
        # diffusers does not reverse the widths of heads for the way up, though their numbers.
        _level(full, block, i, depth=depths_up[count - 1 - i], head_dim=heads[count - 1 - i])
        for i, block in enumerate(up)
    ]
    return level_fields(made, made_up, full["downsample_padding"])


def _middle(full: Mapping[str, Any]) -> dict[str, Any]:
    kind, heads = full["mid_block_type"], full["attention_head_dim"][-1]
    if kind is None:
        return {"middle_blocks": 0, "middle_attention": False}
    fields: dict[str, Any] = {"middle_out_scale": float(full["mid_block_scale_factor"])}
    if kind == "UNetMidBlock2D":
        return {**fields, "middle_blocks": 1, "middle_attention": False}
    if kind == "UNetMidBlock2DSimpleCrossAttn":
        only = full["mid_block_only_cross_attention"]
        return {
            **fields,
            "middle_attention": _text(full, heads, only),
            "middle_time_act": not full["resnet_skip_time_act"],
        }
    depth = full["transformer_layers_per_block"][-1]
    depth = depth[0] if isinstance(depth, list | tuple) else depth
    return {**fields, "middle_attention": _transformer(full, heads, depth, False)}


def _time_width(full: Mapping[str, Any]) -> tuple[int, int]:
    """(width of the time embedding, width of its features)."""
    width, given = full["block_out_channels"][0], full["time_embedding_dim"]
    if full["time_embedding_type"] == "positional":
        return given or 4 * width, width
    embed = given or 2 * width
    if embed % 2:
        raise refuse("time_embedding_dim", embed, "even with Fourier features")
    return embed, embed


def _time(full: Mapping[str, Any]) -> dict[str, Any]:
    embed, _ = _time_width(full)
    if full["time_embedding_type"] == "positional":
        features = {"cos_first": full["flip_sin_to_cos"], "freq_shift": full["freq_shift"]}
        embed = full["time_embedding_dim"]
    else:
        features = {
            "num_frequencies": embed // 2,
            "scale": 1.0,
            "log": False,
            "cos_first": full["flip_sin_to_cos"],
        }
    return {
        "time_embed_dim": embed,
        "time_features": features,
        "time_act_last": activation(full, "timestep_post_act"),
        "embed_act": activation(full, "time_embedding_act_fn"),
        "concat_vector": full["class_embeddings_concat"],
    }


def _given(full: Mapping[str, Any], option: str, because: str) -> int:
    if not isinstance(full[option], int):
        raise refuse(option, full[option], f"an integer with {because}")
    return full[option]


def token_dim(full: Mapping[str, Any]) -> int:
    """Width of the tokens that the blocks attend to.

    Raises:
      UnsupportedOption: if blocks expect tokens of different widths.
    """
    down, up = block_types(full, _DOWN, _UP)
    reads = ("text", "transformer")
    used = [
        width
        for i, width in enumerate(full["cross_attention_dim"])
        if down[i].attention in reads or up[i].attention in reads
    ]
    if full["mid_block_type"] not in (None, "UNetMidBlock2D"):
        used.append(full["cross_attention_dim"][-1])
    widths = set(used or full["cross_attention_dim"][:1])
    if len(widths) != 1 or not isinstance(next(iter(widths)), int):
        raise refuse(
            "cross_attention_dim",
            full["cross_attention_dim"],
            "the same integer for all blocks that attend to the one text",
        )
    return widths.pop()


def _label(full: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    dim, channels = _time_width(full)
    kind = full["class_embed_type"]
    features = "projection_class_embeddings_input_dim"
    if kind is None:
        number = full["num_class_embeds"]
        if number is None:
            return None
        return "label", {"num_classes": number, "dim": dim, "null": False}
    if kind == "identity":
        return "given_vector", {"dim": dim}
    if kind in ("projection", "simple_projection"):
        name = "projected_vector" if kind == "projection" else "linear_vector"
        width = _given(full, features, f"class_embed_type {kind!r}")
        return name, {"features": width, "dim": dim}
    if full["time_embedding_type"] != "positional":
        raise refuse("time_embedding_type", full["time_embedding_type"], "'positional' there")
    return "noise_level", {
        "channels": channels,
        "dim": dim,
        "cos_first": full["flip_sin_to_cos"],
        "freq_shift": full["freq_shift"],
        "act": activation(full, "act_fn"),
    }


def _addition(full: Mapping[str, Any], tokens: int) -> tuple[str, dict[str, Any]] | None:
    kind, (dim, _) = full["addition_embed_type"], _time_width(full)
    if kind is None:
        return None
    if full["class_embeddings_concat"]:
        raise refuse("class_embeddings_concat", True, f"False with addition_embed_type {kind!r}")
    because = f"addition_embed_type {kind!r}"
    if kind == "text":
        width = full["encoder_hid_dim"] or tokens
        heads = full["addition_embed_type_num_heads"]
        return "pooled_tokens", {"features": width, "dim": dim, "num_heads": heads}
    if kind == "text_image":
        return "text_image_vector", {"text_dim": tokens, "image_dim": tokens, "dim": dim}
    if kind == "text_time":
        return "text_and_sizes", {
            "features": _given(full, "projection_class_embeddings_input_dim", because),
            "channels": _given(full, "addition_time_embed_dim", because),
            "dim": dim,
            "cos_first": full["flip_sin_to_cos"],
            "freq_shift": full["freq_shift"],
        }
    name = "image_vector" if kind == "image" else "image_hint"
    return name, {"image_dim": _given(full, "encoder_hid_dim", because), "dim": dim}


def _tokens(full: Mapping[str, Any], dim: int) -> tuple[str, dict[str, Any]]:
    kind = full["encoder_hid_dim_type"]
    if kind is None:
        return "given_tokens", {"dim": dim}
    width = _given(full, "encoder_hid_dim", f"encoder_hid_dim_type {kind!r}")
    if kind == "text_proj":
        return "projected_tokens", {"features": width, "dim": dim}
    if kind == "text_image_proj":
        return "text_image_tokens", {"text_dim": width, "image_dim": dim, "dim": dim}
    return "image_tokens", {"image_dim": width, "dim": dim}


def _conditioners(full: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    dim = token_dim(full)
    parts = {"label": _label(full), "addition": _addition(full, dim)}
    if full["time_cond_proj_dim"] is not None:
        _, channels = _time_width(full)
        options = {"features": full["time_cond_proj_dim"], "channels": channels}
        parts["guidance"] = ("guidance_scale", options)
    parts["tokens"] = _tokens(full, dim)
    return {name: part for name, part in parts.items() if part is not None}


def unet2d_condition_config(config: Mapping[str, Any]) -> UNetForm:
    """Translates the config.json of a UNet2DConditionModel.

    Its position network is a matter of `io.tables.gligen.unet2d_condition_grounding`.

    Args:
      config: the parsed file; keys that start with "_" are metadata, missing ones have
        diffusers' defaults.

    Returns:
      The same network in our terms.

    Raises:
      UnsupportedOption: naming the option and the value that our UNet does not have.
    """
    full = condition_options(config)
    conditioners = _conditioners(full)
    unet = {
        **_levels(full),
        **_time(full),
        **_middle(full),
        "out_channels": full["out_channels"],
        "act": activation(full, "act_fn") or "silu",
        "norm_groups": full["norm_num_groups"],
        "norm_eps": full["norm_eps"],
        "dropout": full["dropout"],
        "scale_shift": full["resnet_time_scale_shift"] == "scale_shift",
        "conv_in_kernel": full["conv_in_kernel"],
        "conv_out_kernel": full["conv_out_kernel"],
        "center_input": full["center_input_sample"],
        "needs_vector": bool(conditioners.keys() & {"label", "addition"}),
    }
    kept = {
        "sample_size": full["sample_size"],
        "upcast_attention": full["upcast_attention"],
        "use_linear_projection": full["use_linear_projection"],
    }
    return UNetForm(unet, full["in_channels"], conditioners, kept)


def _kind(attention: Any) -> str | None:
    return attention["kind"] if isinstance(attention, Mapping) else None


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
        kind = _kind(attention)
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
        return attention["depth"] if _kind(attention) == "transformer" else None

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
            if _kind(attention) == "transformer":
                flags.add(attention["tokens_only"])
            elif _kind(attention) == "text":
                flags.add(attention["text_only"])
                norms.add(attention["text_norm"])
        if len(flags) > 1:
            raise UnsupportedOption(f"{OWNER} has one only_cross_attention for both ways")
        only.append(flags.pop() if flags else False)
    middle = unet["middle_attention"]
    if _kind(middle) == "text":
        norms.add(middle["text_norm"])
    if len(norms) > 1:
        raise UnsupportedOption(f"{OWNER} has one cross_attention_norm, got {sorted(norms)}")
    names = {ours: theirs for theirs, ours in _TEXT_NORMS.items()}
    return {
        "only_cross_attention": _same(only),
        "mid_block_only_cross_attention": _kind(middle) == "text" and middle["text_only"],
        "cross_attention_norm": names[norms.pop()] if norms else None,
    }


def _written_middle(unet: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {"transformer": "UNetMidBlock2DCrossAttn", "text": "UNetMidBlock2DSimpleCrossAttn"}
    if unet["middle_blocks"] == 0:
        return {"mid_block_type": None}
    kind = _kind(unet["middle_attention"])
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
        "down_block_types": [block_name(level, _DOWN) for level in down],
        "up_block_types": [block_name(level, _UP) for level in reversed(up)],
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
    return network_rows(unet, lambda attention: kinds.get(str(_kind(attention)), pixels))


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
