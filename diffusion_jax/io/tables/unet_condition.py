"""diffusers' UNet2DConditionModel: its configuration and its names as those of our UNet."""

from collections.abc import Mapping
from typing import Any

from diffusion_jax.io.tables.options import complete, require
from diffusion_jax.io.tables.unet_blocks import (
    DOWN,
    UP,
    Block,
    UNetForm,
    activation,
    block_types,
    level_fields,
    refuse,
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
    "class_embeddings_concat": (False, True, None),
    "mid_block_only_cross_attention": (None, False, True),
    "cross_attention_norm": (None, "layer_norm", "group_norm"),
}
CONDITION_DOWN = {name: block for name, block in DOWN.items() if block.resample != "pyramid"}
CONDITION_UP = {name: block for name, block in UP.items() if block.resample != "pyramid"}
TEXT_NORMS = {None: None, "layer_norm": "layer", "group_norm": "group"}


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
        "text_norm": TEXT_NORMS[full["cross_attention_norm"]],
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
    down, up = block_types(full, CONDITION_DOWN, CONDITION_UP)
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
        "concat_vector": bool(full["class_embeddings_concat"]),
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
    down, up = block_types(full, CONDITION_DOWN, CONDITION_UP)
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
