"""diffusers' UNet2DModel: its configuration and its names as those of our UNet."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from diffusion_jax.io.mapping import Row, prefixed


class UnsupportedOption(ValueError):
    """A checkpoint's configuration asks for something that our UNet does not have."""


class UNet2D(NamedTuple):
    """What a UNet2DModel configuration means here.

    Attributes:
      unet: fields of our UNetConfig as plain values; `levels` holds the fields of its
        LevelConfigs, `time_features` those of a Sinusoidal.
      in_channels: channels of x, with cond.image if there is one.
      num_classes: rows of the class embedding table, None without one. cond.vector of a
        class-conditional model is that table's row of the label.
    """

    unet: dict[str, Any]
    in_channels: int
    num_classes: int | None


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
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (0, 1),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
}

# block type -> (attention, resampling; None where downsample_type or upsample_type decides)
_DOWN = {
    "DownBlock2D": (False, "conv"),
    "ResnetDownsampleBlock2D": (False, "resnet"),
    "AttnDownBlock2D": (True, None),
}
_UP = {
    "UpBlock2D": (False, "conv"),
    "ResnetUpsampleBlock2D": (False, "resnet"),
    "AttnUpBlock2D": (True, None),
}


def _refuse(option: str, value: Any, expected: str) -> UnsupportedOption:
    return UnsupportedOption(f"{option} must be {expected} for our UNet, got {value!r}")


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    unknown = sorted(set(given) - set(DEFAULTS))
    if unknown:
        raise UnsupportedOption(f"unknown options of a UNet2DModel: {unknown}")
    full = {**DEFAULTS, **given}
    for option, values in _SUPPORTED.items():
        if full[option] not in values:
            raise _refuse(option, full[option], " or ".join(repr(value) for value in values))
    if not isinstance(full["norm_num_groups"], int):
        raise _refuse("norm_num_groups", full["norm_num_groups"], "an integer")
    return full


def _blocks(full: Mapping[str, Any]) -> tuple[list[bool], str]:
    """(attention of each level from fine to coarse, "conv" or "resnet")."""
    down, up = list(full["down_block_types"]), list(full["up_block_types"])
    depth = len(full["block_out_channels"])
    if len(down) != depth or len(up) != depth:
        raise UnsupportedOption(
            f"down_block_types, up_block_types and block_out_channels must be equally long, "
            f"got {len(down)}, {len(up)} and {depth}"
        )
    for option, types, table in (("down_block_types", down, _DOWN), ("up_block_types", up, _UP)):
        for block in types:
            if block not in table:
                raise _refuse(option, block, "made of " + ", ".join(table))
    attention = [_DOWN[block][0] for block in down]
    if attention != [_UP[block][0] for block in reversed(up)]:
        raise _refuse("up_block_types", up, "the mirror image of down_block_types")
    # The last block of either way does not resample, so its type says nothing about it.
    kinds = {_DOWN[block][1] or full["downsample_type"] for block in down[:-1]}
    kinds |= {_UP[block][1] or full["upsample_type"] for block in up[:-1]}
    if len(kinds) > 1:
        raise _refuse("the resampling of the blocks", sorted(kinds), "the same in all of them")
    return attention, kinds.pop() if kinds else "conv"


def _middle_groups(full: Mapping[str, Any]) -> int | None:
    """Groups of the middle attention's norm; None where they are those of every norm."""
    groups = full["attn_norm_num_groups"]
    if not full["add_attention"] or groups == full["norm_num_groups"]:
        return None
    if groups is None and full["resnet_time_scale_shift"] == "scale_shift":
        # diffusers builds this attention without a norm.
        raise _refuse("attn_norm_num_groups", groups, "given where scale_shift is used")
    return groups


def unet2d_config(config: Mapping[str, Any]) -> UNet2D:
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
    attention, kind = _blocks(full)
    resample = "block" if kind == "resnet" else "conv"
    asymmetric = resample == "conv" and full["downsample_padding"] == 0
    num_classes = full["num_class_embeds"]
    unet = {
        "levels": tuple(
            {"channels": channels, "num_blocks": full["layers_per_block"], "attention": attends}
            for channels, attends in zip(full["block_out_channels"], attention, strict=True)
        ),
        "out_channels": full["out_channels"],
        "time_embed_dim": full["time_embedding_dim"],
        "time_features": {
            "cos_first": full["flip_sin_to_cos"],
            "freq_shift": full["freq_shift"],
        },
        "norm_groups": full["norm_num_groups"],
        "norm_eps": full["norm_eps"],
        "dropout": full["dropout"],
        "scale_shift": full["resnet_time_scale_shift"] == "scale_shift",
        "resample": resample,
        "downsample_padding": "asymmetric" if asymmetric else "symmetric",
        "middle_attention": full["add_attention"],
        "middle_attention_groups": _middle_groups(full),
        "head_dim": full["attention_head_dim"],
        "needs_vector": num_classes is not None,
    }
    return UNet2D(unet, full["in_channels"], num_classes)


_RES_BLOCK = (
    Row("norm1", "norm_1", "norm"),
    Row("conv1", "conv_1", "conv"),
    Row("time_emb_proj", "time", "linear"),
    Row("norm2", "norm_2", "norm"),
    Row("conv2", "conv_2", "conv"),
    Row("conv_shortcut", "shortcut", "conv"),
)
_ATTENTION = (
    Row("group_norm", "norm", "norm"),
    Row("to_q", "attention/query", "linear"),
    Row("to_k", "attention/key", "linear"),
    Row("to_v", "attention/value", "linear"),
    Row("to_out.0", "attention/out", "linear"),
)
_OLD_ATTENTION = (
    Row("group_norm", "norm", "norm"),
    Row("query", "attention/query", "linear"),
    Row("key", "attention/key", "linear"),
    Row("value", "attention/value", "linear"),
    Row("proj_attn", "attention/out", "linear"),
)
_CONV = (Row("conv", "conv", "conv"),)


def unet2d_rows(*, old_attention_names: bool = False) -> tuple[Row, ...]:
    """The table of a UNet2DModel's weights, whatever its configuration.

    Args:
      old_attention_names: "query", "proj_attn" … as in older files, google/ddpm-cifar10-32
        among them; `has_old_attention_names` tells.
    """
    attention = _OLD_ATTENTION if old_attention_names else _ATTENTION
    places = (
        (_RES_BLOCK, "down_blocks.{i}.resnets.{j}.", "down_{i}/res_{j}/"),
        (attention, "down_blocks.{i}.attentions.{j}.", "down_{i}/attn_{j}/"),
        (_RES_BLOCK + _CONV, "down_blocks.{i}.downsamplers.0.", "down_{i}/downsample/"),
        (_RES_BLOCK, "mid_block.resnets.{j}.", "mid/res_{j}/"),
        (attention, "mid_block.attentions.0.", "mid/attn/"),
        (_RES_BLOCK, "up_blocks.{i}.resnets.{j}.", "up_{i}/res_{j}/"),
        (attention, "up_blocks.{i}.attentions.{j}.", "up_{i}/attn_{j}/"),
        (_RES_BLOCK + _CONV, "up_blocks.{i}.upsamplers.0.", "up_{i}/upsample/"),
    )
    rows = [
        Row("conv_in", "conv_in", "conv"),
        Row("time_embedding.linear_1", "time_embed/dense_1", "linear"),
        Row("time_embedding.linear_2", "time_embed/dense_2", "linear"),
        Row("conv_norm_out", "norm_out", "norm"),
        Row("conv_out", "conv_out", "conv"),
    ]
    for block, source, target in places:
        rows += prefixed(block, source=source, target=target)
    return tuple(rows)


def has_old_attention_names(names: Iterable[str]) -> bool:
    """Whether a file names its attention as early versions of diffusers did."""
    return any(".proj_attn." in name for name in names)


# The class embedding of a UNet2DModel: the table of a label conditioner.
CLASS_EMBEDDING_ROWS = (Row("class_embedding.weight", "embedding", "param"),)
