"""diffusers' UNet2DModel: its configuration and its names as those of our UNet."""

from collections.abc import Mapping
from typing import Any

from diffusion_jax.io.mapping import Row
from diffusion_jax.io.tables.options import UnsupportedOption, complete, require
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
    has_old_attention_names,
    level_fields,
    network_rows,
    refuse,
    ways,
)

__all__ = [
    "DEFAULTS",
    "UnsupportedOption",
    "has_old_attention_names",
    "label_rows",
    "unet2d_config",
    "unet2d_options",
    "unet2d_rows",
]

OWNER = "UNet2DModel"
DEFAULTS: Mapping[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}

# Values of these options that our UNet computes; everything else is refused.
_SUPPORTED: Mapping[str, tuple] = {
    "center_input_sample": (False, True),
    "time_embedding_type": ("positional", "fourier", "learned"),
    "freq_shift": (0, 1),
    "flip_sin_to_cos": (False, True),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet", None),
    "upsample_type": ("conv", "resnet", None),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "add_attention": (False, True),
    "class_embed_type": (None, "timestep", "identity"),
}
_DOWN = {name: block for name, block in DOWN.items() if block.attention in (None, "pixels")}
_UP = {name: block for name, block in UP.items() if block.attention in (None, "pixels")}
# NCSN++'s blocks have these constants whatever the options say.
_PYRAMID_SCALE = 2.0**0.5
_PYRAMID_GROUPS = 32


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    full = complete(config, DEFAULTS, OWNER)
    if isinstance(full["freq_shift"], float) and full["freq_shift"].is_integer():
        full["freq_shift"] = int(full["freq_shift"])
    require(full, _SUPPORTED, OWNER)
    return full


def _heads(full: Mapping[str, Any], channels: int) -> tuple[int, int]:
    """(number of heads, width of a head) of the attention at a width."""
    width = full["attention_head_dim"] or channels
    if width > channels:
        raise refuse("attention_head_dim", width, f"at most {channels}, a block's width")
    return channels // width, width


def _attention(full: Mapping[str, Any], channels: int, groups: int | None) -> bool | dict[str, Any]:
    """Attention at a width; True where the network's own number of heads says it all."""
    number, width = _heads(full, channels)
    if groups is None and number * width == channels:
        return True
    return _pixels(number, width, channels, norm_groups=groups)


def _pixels(number: int, width: int, channels: int, **fields: Any) -> dict[str, Any]:
    head_dim = None if number * width == channels else width
    return {"kind": "pixels", "num_heads": number, "head_dim": head_dim, "norm": True} | fields


def _level(full: Mapping[str, Any], channels: int, block: Block, way: str) -> dict[str, Any]:
    pyramid = way == "pyramid"
    attention: bool | dict[str, Any] = False
    if block.attention:
        attention = _attention(full, channels, _PYRAMID_GROUPS if pyramid else None)
    return {
        "channels": channels,
        "num_blocks": full["layers_per_block"],
        "attention": attention,
        "resample": way,
        "out_scale": _PYRAMID_SCALE if pyramid else 1.0,
    }


def _levels(full: Mapping[str, Any]) -> dict[str, Any]:
    down, up = block_types(full, _DOWN, _UP)
    for option, blocks in (("downsample_type", down[:-1]), ("upsample_type", up[1:])):
        if full[option] is None and any(block.resample is None for block in blocks):
            raise refuse(option, None, "'conv' or 'resnet'")
    kinds = {"conv": "conv", "resnet": "block", None: "conv"}
    made = [
        [
            _level(full, channels, block, block.resample or kinds[full[option]])
            for channels, block in zip(full["block_out_channels"], blocks, strict=True)
        ]
        for option, blocks in (("downsample_type", down), ("upsample_type", up))
    ]
    if any(level["resample"] == "pyramid" for level in (*made[0], *made[1])):
        if full["in_channels"] != 3 or full["out_channels"] != 3:
            raise refuse(
                "in_channels and out_channels",
                (full["in_channels"], full["out_channels"]),
                "3 in a network with SkipDownBlock2D or SkipUpBlock2D",
            )
    elif full["norm_num_groups"] is None:
        raise refuse("norm_num_groups", None, "an integer")
    return level_fields(made[0], made[1], full["downsample_padding"])


def _middle(full: Mapping[str, Any]) -> dict[str, Any]:
    if full["mid_block_type"] is None:
        return {"middle_blocks": 0, "middle_attention": False}
    fields: dict[str, Any] = {"middle_out_scale": float(full["mid_block_scale_factor"])}
    groups = full["attn_norm_num_groups"]
    if not full["add_attention"]:
        return {**fields, "middle_attention": False, "middle_attention_groups": None}
    channels = full["block_out_channels"][-1]
    if groups is None and full["resnet_time_scale_shift"] == "scale_shift":
        number, width = _heads(full, channels)
        attention = _pixels(number, width, channels, norm=False, norm_groups=None)
        return {**fields, "middle_attention": attention, "middle_attention_groups": None}
    groups = None if groups == full["norm_num_groups"] else groups
    attention = _attention(full, channels, None)
    if attention is not True:
        return {**fields, "middle_attention": attention | {"norm_groups": groups}}
    return {**fields, "middle_attention": True, "middle_attention_groups": groups}


def _time(full: Mapping[str, Any]) -> dict[str, Any]:
    kind, width = full["time_embedding_type"], full["block_out_channels"][0]
    if kind == "fourier":
        features = {"num_frequencies": width, "scale": 16.0, "log": True, "cos_first": False}
    elif kind == "learned":
        if not isinstance(full["num_train_timesteps"], int):
            raise refuse("num_train_timesteps", full["num_train_timesteps"], "an integer")
        features = {"num_timesteps": full["num_train_timesteps"]}
    else:
        features = {"cos_first": full["flip_sin_to_cos"], "freq_shift": full["freq_shift"]}
    return {
        "time_embed_dim": full["time_embedding_dim"],
        "time_features": features,
        # These networks predict the score of σ, which this makes of what they compute.
        "divide_by_time": kind == "fourier",
    }


def _conditioners(full: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    width = full["block_out_channels"][0]
    dim, kind = full["time_embedding_dim"] or 4 * width, full["class_embed_type"]
    if kind == "identity":
        return {"label": ("given_vector", {"dim": dim})}
    if kind == "timestep":
        if full["time_embedding_type"] != "positional":
            raise refuse("time_embedding_type", full["time_embedding_type"], "'positional' there")
        features = {"cos_first": full["flip_sin_to_cos"], "freq_shift": full["freq_shift"]}
        return {"label": ("noise_level", {"channels": width, "dim": dim, **features})}
    if full["num_class_embeds"] is None:
        return {}
    classes = full["num_class_embeds"]
    return {"label": ("label", {"num_classes": classes, "dim": dim, "null": False})}


def unet2d_config(config: Mapping[str, Any]) -> UNetForm:
    """Translates the config.json of a UNet2DModel.

    Args:
      config: the parsed file; keys that start with "_" are metadata, missing ones have
        diffusers' defaults.

    Returns:
      The same network in our terms.

    Raises:
      UnsupportedOption: naming the option and the value that our UNet does not have.
    """
    full = _complete(config)
    act = activation(full, "act_fn") or "silu"
    conditioners = _conditioners(full)
    unet = {
        **_levels(full),
        **_time(full),
        **_middle(full),
        "out_channels": full["out_channels"],
        "act": act,
        "outer_act": None if act == "silu" else "silu",
        "norm_groups": full["norm_num_groups"],
        "norm_eps": full["norm_eps"],
        "dropout": full["dropout"],
        "scale_shift": full["resnet_time_scale_shift"] == "scale_shift",
        "center_input": full["center_input_sample"],
        "head_dim": full["attention_head_dim"],
        "needs_vector": bool(conditioners),
    }
    kept = {"sample_size": full["sample_size"], "num_train_timesteps": full["num_train_timesteps"]}
    return UNetForm(unet, full["in_channels"], conditioners, kept)


def _written_middle(unet: Mapping[str, Any]) -> dict[str, Any]:
    if unet["middle_blocks"] == 0:
        return {"mid_block_type": None}
    attention, groups = unet["middle_attention"], unet["middle_attention_groups"]
    options = {
        "mid_block_scale_factor": unet["middle_out_scale"],
        "add_attention": bool(attention),
    }
    if isinstance(attention, Mapping):
        groups = attention["norm_groups"]
        if not attention["norm"]:
            return options
    if groups is None and attention and unet["scale_shift"]:
        groups = unet["norm_groups"]
    return {**options, "attn_norm_num_groups": groups}


def unet2d_options(form: UNetForm) -> dict[str, Any]:
    """The config.json of a UNet2DModel: `unet2d_config` backwards.

    Args:
      form: with every field of our UNetConfig.

    Raises:
      UnsupportedOption: if UNet2DModel has no such block, feature of the time or conditioner.
    """
    unet = form.unet
    down, up = ways(unet)
    kinds = {"conv": "conv", "block": "resnet"}
    options: dict[str, Any] = {
        "_class_name": OWNER,
        **form.kept,
        "in_channels": form.in_channels,
        "out_channels": unet["out_channels"],
        "center_input_sample": unet["center_input"],
        "time_embedding_dim": unet["time_embed_dim"],
        "block_out_channels": [level["channels"] for level in down],
        "layers_per_block": down[0]["num_blocks"],
        "down_block_types": [block_name(level, _DOWN) for level in down],
        "up_block_types": [block_name(level, _UP) for level in reversed(up)],
        "downsample_padding": 0 if unet["downsample_padding"] == "asymmetric" else 1,
        "dropout": unet["dropout"],
        "act_fn": unet["act"],
        "attention_head_dim": unet["head_dim"],
        "norm_num_groups": unet["norm_groups"],
        "norm_eps": unet["norm_eps"],
        "resnet_time_scale_shift": "scale_shift" if unet["scale_shift"] else "default",
        **_written_middle(unet),
    }
    for option, levels in (("downsample_type", down), ("upsample_type", up)):
        attending = [level["resample"] for level in levels if level["attention"]]
        found = {kinds[way] for way in attending if way in kinds}
        if len(found) > 1:
            raise UnsupportedOption(f"{OWNER} has one {option} for all blocks with attention")
        options[option] = found.pop() if found else "conv"
    features = unet["time_features"]
    if "num_frequencies" in features:
        options["time_embedding_type"] = "fourier"
    elif "num_timesteps" in features:
        options |= {
            "time_embedding_type": "learned",
            "num_train_timesteps": features["num_timesteps"],
        }
    else:
        options |= {
            "flip_sin_to_cos": features["cos_first"],
            "freq_shift": features["freq_shift"],
        }
    for kind, fields in form.conditioners.values():
        if kind == "label":
            options["num_class_embeds"] = fields["num_classes"]
        elif kind in ("given_vector", "noise_level"):
            options["class_embed_type"] = "identity" if kind == "given_vector" else "timestep"
        else:
            raise UnsupportedOption(f"{OWNER} has no conditioner {kind!r}")
    return options


def unet2d_rows(unet: Mapping[str, Any], *, old_attention_names: bool = False) -> tuple[Row, ...]:
    """The table of a UNet2DModel's weights.

    Args:
      unet: fields of our UNetConfig, as in `UNetForm`.
      old_attention_names: "query", "proj_attn" … as in older files, google/ddpm-cifar10-32
        among them; `has_old_attention_names` tells.
    """
    rows = OLD_PIXEL_ATTENTION if old_attention_names else PIXEL_ATTENTION
    return network_rows(unet, lambda attention: rows)


def label_rows(kind: str) -> tuple[Row, ...]:
    """The table of a class embedding, relative to the module "class_embedding".

    Args:
      kind: of conditioner, a key of `CONDITIONERS`.
    """
    if kind == "label":
        return (Row("class_embedding.weight", "embedding", "param"),)
    if kind == "linear_vector":
        return (Row("class_embedding", "dense", "linear"),)
    return (
        Row("class_embedding.linear_1", "dense_1", "linear"),
        Row("class_embedding.linear_2", "dense_2", "linear"),
    )
