"""What diffusers' UNet2DModel and UNet2DConditionModel share: types of blocks, and names."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from diffusion_jax.io.mapping import Row, prefixed
from diffusion_jax.io.tables.options import UnsupportedOption


class UNetForm(NamedTuple):
    """What the configuration of one of diffusers' UNets means here.

    Attributes:
      unet: fields of our UNetConfig as JSON values; parts carry their name as "kind".
      in_channels: channels of x, with cond.image if there is one.
      conditioners: part -> (key of `CONDITIONERS`, its options) of what the network is told:
        "label", "addition", "guidance" and "tokens".
      kept: options of the file that change no number, and how it is laid out.
    """

    unet: dict[str, Any]
    in_channels: int
    conditioners: dict[str, tuple[str, dict[str, Any]]]
    kept: dict[str, Any]


class Block(NamedTuple):
    """A type of block.

    Attributes:
      attention: kind of attention behind every residual block, None for none.
      resample: how it changes the resolution; None where an option of the network decides.
    """

    attention: str | None
    resample: str | None


DOWN: Mapping[str, Block] = {
    "DownBlock2D": Block(None, "conv"),
    "ResnetDownsampleBlock2D": Block(None, "block"),
    "AttnDownBlock2D": Block("pixels", None),
    "CrossAttnDownBlock2D": Block("transformer", "conv"),
    "SimpleCrossAttnDownBlock2D": Block("text", "block"),
    "SkipDownBlock2D": Block(None, "pyramid"),
    "AttnSkipDownBlock2D": Block("pixels", "pyramid"),
}
UP: Mapping[str, Block] = {
    "UpBlock2D": Block(None, "conv"),
    "ResnetUpsampleBlock2D": Block(None, "block"),
    "AttnUpBlock2D": Block("pixels", None),
    "CrossAttnUpBlock2D": Block("transformer", "conv"),
    "SimpleCrossAttnUpBlock2D": Block("text", "block"),
    "SkipUpBlock2D": Block(None, "pyramid"),
    "AttnSkipUpBlock2D": Block("pixels", "pyramid"),
}

# diffusers' names of activations -> ours.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "mish": "mish", "relu": "relu"}


def refuse(option: str, value: Any, expected: str) -> UnsupportedOption:
    """The error for an option's value."""
    return UnsupportedOption(f"{option} must be {expected} for our UNet, got {value!r}")


def activation(full: Mapping[str, Any], option: str) -> str | None:
    """Our name of the activation that an option names; None for None.

    Raises:
      UnsupportedOption: if it is another one.
    """
    value = full[option]
    if value is None:
        return None
    if not isinstance(value, str) or value.lower() not in ACTIVATIONS:
        raise refuse(option, value, "one of " + ", ".join(ACTIVATIONS))
    return ACTIVATIONS[value.lower()]


def block_types(
    full: Mapping[str, Any], down: Mapping[str, Block], up: Mapping[str, Block]
) -> tuple[list[Block], list[Block]]:
    """The blocks on the way down and on the way up, both from the finest to the coarsest.

    Raises:
      UnsupportedOption: for an unknown type, or lists of different lengths.
    """
    names = {option: full[option] for option in ("down_block_types", "up_block_types")}
    depth = len(full["block_out_channels"])
    if any(len(types) != depth for types in names.values()) or not depth:
        raise UnsupportedOption(
            f"down_block_types, up_block_types and block_out_channels must be equally long, "
            f"got {len(names['down_block_types'])}, {len(names['up_block_types'])} and {depth}"
        )
    found: list[list[Block]] = []
    for (option, types), table in zip(names.items(), (down, up), strict=True):
        # Early files have this prefix before every type.
        known = [str(block).removeprefix("UNetRes") for block in types]
        for block in known:
            if block not in table:
                raise refuse(option, block, "made of " + ", ".join(table))
        found.append([table[block] for block in known])
    return found[0], found[1][::-1]


def level_fields(
    down: Sequence[dict[str, Any]], up: Sequence[dict[str, Any]], padding: int
) -> dict[str, Any]:
    """Fields of our UNetConfig about the levels, each with its `resample`.

    Args:
      down, up: fields of our LevelConfigs, from the finest to the coarsest.
      padding: downsample_padding of the file.
    """
    found = {level["resample"] for level in (*down, *up)}
    common = found.pop() if len(found) == 1 else "conv"
    if not found:
        down = [{**level, "resample": None} for level in down]
        up = [{**level, "resample": None} for level in up]
    fields: dict[str, Any] = {"resample": common}
    fields["levels"] = list(down)
    fields["up_levels"] = None if list(up) == list(down) else list(up)
    convolves = any((level["resample"] or common) == "conv" for level in down)
    fields["downsample_padding"] = "asymmetric" if convolves and padding == 0 else "symmetric"
    return fields


def ways(unet: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The levels on the way down and up with their `resample` filled in: `level_fields` undone."""
    down, up = (
        [{**level, "resample": level["resample"] or unet["resample"]} for level in levels]
        for levels in (unet["levels"], unet["up_levels"] or unet["levels"])
    )
    return down, up


def attention_kind(attention: bool | Mapping[str, Any]) -> str | None:
    """Kind of a level's attention where a specification says it, None for True and False."""
    return attention["kind"] if isinstance(attention, Mapping) else None


def block_name(level: Mapping[str, Any], table: Mapping[str, Block]) -> str:
    """The type of block that a level is.

    Raises:
      UnsupportedOption: if there is none.
    """
    attention = level["attention"]
    kind = attention_kind(attention) or ("pixels" if attention else None)
    for resample in (level["resample"], None):
        for name, block in table.items():
            if block == Block(kind, resample):
                return name
    raise UnsupportedOption(
        f"diffusers has no block with attention {kind} and resample {level['resample']!r}"
    )


RES_BLOCK = (
    Row("norm1", "norm_1", "norm"),
    Row("conv1", "conv_1", "conv"),
    Row("time_emb_proj", "time", "linear"),
    Row("norm2", "norm_2", "norm"),
    Row("conv2", "conv_2", "conv"),
    Row("conv_shortcut", "shortcut", "conv"),
)
PIXEL_ATTENTION = (
    Row("group_norm", "norm", "norm"),
    Row("to_q", "attention/query", "linear"),
    Row("to_k", "attention/key", "linear"),
    Row("to_v", "attention/value", "linear"),
    Row("to_out.0", "attention/out", "linear"),
)
OLD_PIXEL_ATTENTION = (
    Row("group_norm", "norm", "norm"),
    Row("query", "attention/query", "linear"),
    Row("key", "attention/key", "linear"),
    Row("value", "attention/value", "linear"),
    Row("proj_attn", "attention/out", "linear"),
)
CONV = (Row("conv", "conv", "conv"),)


_CHANGE = RES_BLOCK + CONV


def _resampling_rows(unet: Mapping[str, Any]) -> tuple[Row, ...]:
    """The rows of what changes the resolution, level by level."""
    down, up = ways(unet)
    rows: list[Row] = []
    for i, level in enumerate(down):
        block, target = f"down_blocks.{i}", f"down_{i}"
        if level["resample"] != "pyramid":
            rows += prefixed(
                _CHANGE, source=f"{block}.downsamplers.0.", target=f"{target}/downsample/"
            )
            continue
        rows += prefixed(RES_BLOCK, source=f"{block}.resnet_down.", target=f"{target}/downsample/")
        rows.append(Row(f"{block}.skip_conv", f"{target}/image", "conv1x1_as_linear"))
    for i, level in enumerate(reversed(up)):
        block, target = f"up_blocks.{i}", f"up_{i}"
        if level["resample"] != "pyramid":
            rows += prefixed(_CHANGE, source=f"{block}.upsamplers.0.", target=f"{target}/upsample/")
            continue
        rows += prefixed(RES_BLOCK, source=f"{block}.resnet_up.", target=f"{target}/upsample/")
        rows.append(Row(f"{block}.skip_norm", f"{target}/image_norm", "norm"))
        rows.append(Row(f"{block}.skip_conv", f"{target}/image", "conv"))
    return tuple(rows)


def network_rows(
    unet: Mapping[str, Any], attention: Callable[[bool | Mapping[str, Any]], Sequence[Row]]
) -> tuple[Row, ...]:
    """The rows of a UNet.

    Args:
      unet: fields of our UNetConfig.
      attention: a level's attention -> the rows of one of its modules.
    """
    rows = [
        Row("conv_in", "conv_in", "conv"),
        Row("time_embedding.linear_1", "time_embed/dense_1", "linear"),
        Row("time_embedding.linear_2", "time_embed/dense_2", "linear"),
        Row("time_proj.weight", "time_embed/fourier/weight", "param"),
        Row("time_proj", "time_embed/learned", "embed"),
        *prefixed(RES_BLOCK, source="down_blocks.{i}.resnets.{j}.", target="down_{i}/res_{j}/"),
        *prefixed(RES_BLOCK, source="mid_block.resnets.{j}.", target="mid/res_{j}/"),
        *prefixed(RES_BLOCK, source="up_blocks.{i}.resnets.{j}.", target="up_{i}/res_{j}/"),
        *_resampling_rows(unet),
        Row("conv_norm_out", "norm_out", "norm"),
        Row("conv_out", "conv_out", "conv"),
    ]
    down, up = ways(unet)
    middle = unet["middle_attention"]
    rows += prefixed(attention(middle), source="mid_block.attentions.0.", target="mid/attn/")
    for way, levels in (("down", down), ("up", up[::-1])):
        for i, level in enumerate(levels):
            source, target = f"{way}_blocks.{i}.attentions.{{j}}.", f"{way}_{i}/attn_{{j}}/"
            rows += prefixed(attention(level["attention"]), source=source, target=target)
    return tuple(rows)


def has_old_attention_names(names: Iterable[str]) -> bool:
    """Whether a file names its attention as early versions of diffusers did."""
    return any(".proj_attn." in name for name in names)
