"""OpenAI's guided-diffusion: its constructors' arguments and its names as those of our networks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from diffusion_jax.io.mapping import Row, Share, prefixed
from diffusion_jax.io.tables import options
from diffusion_jax.io.tables.options import UnsupportedOption


class ADMUNet(NamedTuple):
    """What the arguments of UNetModel or SuperResModel mean here.

    Attributes:
      unet: fields of our UNetConfig as plain values; `levels` holds the fields of its
        LevelConfigs, `time_features` those of a Sinusoidal.
      in_channels: channels of x and of cond.image together.
      image_channels: channels of cond.image, the low-resolution image resized bilinearly
        (half-pixel centres, no antialiasing) to the size of x; 0 without one.
      num_classes: rows of the class embedding table, None without one. cond.vector of a
        class-conditional model is that table's row of the label.
      dtype: name of the dtype of the activations.
    """

    unet: dict[str, Any]
    in_channels: int
    image_channels: int
    num_classes: int | None
    dtype: str


class ADMClassifier(NamedTuple):
    """What the arguments of EncoderUNetModel mean here.

    Attributes:
      classifier: fields of our ClassifierConfig as plain values, as in `ADMUNet.unet`.
      in_channels: channels of x.
      image_size: height and width of x; the attention pool takes no other.
      dtype: name of the dtype of the activations.
    """

    classifier: dict[str, Any]
    in_channels: int
    image_size: int
    dtype: str


# (width, "down", "mid" or "up") -> the rows of the attention there.
AttentionRows = Callable[[int, str], tuple[Row, ...]]

REQUIRED = (
    "image_size",
    "in_channels",
    "model_channels",
    "out_channels",
    "num_res_blocks",
    "attention_resolutions",
)
DEFAULTS: Mapping[str, Any] = {
    "dropout": 0,
    "channel_mult": (1, 2, 4, 8),
    "conv_resample": True,
    "dims": 2,
    "use_checkpoint": False,
    "use_fp16": False,
    "num_heads": 1,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "use_new_attention_order": False,
}
UNET_DEFAULTS = {**DEFAULTS, "num_classes": None}
CLASSIFIER_DEFAULTS = {**DEFAULTS, "pool": "adaptive"}
POOLS = ("adaptive", "attention", "spatial", "spatial_v2")


def complete(
    config: Mapping[str, Any], defaults: Mapping[str, Any], required: Sequence[str] = REQUIRED
) -> dict[str, Any]:
    """Arguments of a constructor with its defaults.

    Raises:
      UnsupportedOption: naming what is unknown, missing or of another kind, and what is not for
        images.
    """
    owner = "the network"
    full = options.complete(config, defaults, owner, required=required)
    if full["dims"] != 2:
        raise UnsupportedOption(
            f"dims must be 2, since our networks are for images, got {full['dims']}"
        )
    if not isinstance(full["num_res_blocks"], int):
        raise UnsupportedOption(
            f"num_res_blocks must be one number for all levels, got {full['num_res_blocks']!r}"
        )
    integers = ("image_size", "in_channels", "model_channels", "out_channels")
    options.require_integers(full, [name for name in integers if name in full], owner)
    options.require_lists(full, ("attention_resolutions", "channel_mult"), owner)
    return full


def resample_of(full: Mapping[str, Any]) -> str:
    """The `resample` of our EncoderConfig."""
    if full["resblock_updown"]:
        return "block"
    return "conv" if full["conv_resample"] else "pool"


def level_fields(full: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Fields of our LevelConfigs; attention_resolutions are factors of downsampling here."""
    return tuple(
        {
            "channels": int(mult * full["model_channels"]),
            "num_blocks": full["num_res_blocks"],
            "attention": 2**i in full["attention_resolutions"],
        }
        for i, mult in enumerate(full["channel_mult"])
    )


def encoder_fields(full: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of our EncoderConfig, of arguments none of which is missing."""
    by_width = full["num_head_channels"] != -1
    return {
        "levels": level_fields(full),
        "time_embed_dim": 4 * full["model_channels"],
        "time_channels": full["model_channels"],
        "time_features": {"cos_first": True, "freq_shift": 0},
        "norm_groups": 32,
        "norm_eps": 1e-5,
        "dropout": float(full["dropout"]),
        "scale_shift": full["use_scale_shift_norm"],
        "resample": resample_of(full),
        "num_heads": None if by_width else full["num_heads"],
        "head_dim": full["num_head_channels"] if by_width else None,
        "remat": full["use_checkpoint"],
    }


def encoder_options(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that `encoder_fields` reads: the translation back, which loses what they miss.

    Raises:
      UnsupportedOption: if the levels differ in their number of blocks.
    """
    width, levels = fields["time_channels"], fields["levels"]
    blocks = {level["num_blocks"] for level in levels}
    if len(blocks) != 1:
        raise UnsupportedOption(
            f"the original network has one number of blocks for all levels, got {sorted(blocks)}"
        )
    mults = [level["channels"] / width for level in levels]
    by_width = fields["head_dim"] is not None
    return {
        "model_channels": width,
        "channel_mult": [int(mult) if mult == int(mult) else mult for mult in mults],
        "num_res_blocks": blocks.pop(),
        "attention_resolutions": [2**i for i, level in enumerate(levels) if level["attention"]],
        "dropout": fields["dropout"],
        "use_scale_shift_norm": fields["scale_shift"],
        "resblock_updown": fields["resample"] == "block",
        "conv_resample": fields["resample"] != "pool",
        "num_heads": 1 if by_width else fields["num_heads"],
        "num_head_channels": fields["head_dim"] if by_width else -1,
        "use_checkpoint": fields["remat"],
    }


def dtype_of(full: Mapping[str, Any]) -> str:
    """Name of the dtype of the activations."""
    return "float16" if full["use_fp16"] else "float32"


def adm_unet_config(config: Mapping[str, Any], *, super_resolution: bool = False) -> ADMUNet:
    """Translates the arguments of a UNetModel's constructor.

    Args:
      config: the arguments by name; missing ones have the constructor's defaults.
      super_resolution: they are those of a SuperResModel, which reads a low-resolution image
        of in_channels channels as well.

    Returns:
      The same network in our terms.

    Raises:
      UnsupportedOption: naming what is unknown, missing or not for images.
    """
    full = complete(config, UNET_DEFAULTS)
    upsample = full["num_heads_upsample"]
    # With heads of a given width their numbers are not read.
    ignored = full["num_head_channels"] != -1 or upsample in (-1, full["num_heads"])
    unet = {
        **encoder_fields(full),
        "out_channels": full["out_channels"],
        "num_heads_up": None if ignored else upsample,
        "needs_vector": full["num_classes"] is not None,
    }
    image_channels = full["in_channels"] if super_resolution else 0
    in_channels = full["in_channels"] + image_channels
    return ADMUNet(unet, in_channels, image_channels, full["num_classes"], dtype_of(full))


def adm_classifier_config(config: Mapping[str, Any]) -> ADMClassifier:
    """Translates the arguments of an EncoderUNetModel's constructor.

    Args:
      config: the arguments by name; missing ones have the constructor's defaults.
        num_heads_upsample has no meaning without a way up.

    Returns:
      The same classifier in our terms.

    Raises:
      UnsupportedOption: naming what is unknown, missing or not for images.
    """
    full = complete(config, CLASSIFIER_DEFAULTS)
    if full["pool"] not in POOLS:
        raise UnsupportedOption(f"pool must be one of {POOLS}, got {full['pool']!r}")
    if full["pool"] == "attention" and full["num_head_channels"] == -1:
        raise UnsupportedOption("the pool 'attention' needs num_head_channels, got -1")
    classifier = {
        **encoder_fields(full),
        "num_classes": full["out_channels"],
        "pool": full["pool"],
    }
    return ADMClassifier(classifier, full["in_channels"], full["image_size"], dtype_of(full))


def adm_unet_options(
    unet: Mapping[str, Any], in_channels: int, num_classes: int | None
) -> dict[str, Any]:
    """The arguments of a UNetModel or SuperResModel: `adm_unet_config` backwards.

    Args:
      unet: fields of our UNetConfig as plain values.
      in_channels: channels of x alone.
      num_classes: as in `ADMUNet`.

    Raises:
      UnsupportedOption: if the levels differ in their number of blocks.
    """
    up = unet["num_heads_up"]
    return {
        **encoder_options(unet),
        "in_channels": in_channels,
        "out_channels": unet["out_channels"],
        "num_heads_upsample": -1 if up is None else up,
        "num_classes": num_classes,
    }


def adm_classifier_options(classifier: Mapping[str, Any], in_channels: int) -> dict[str, Any]:
    """The arguments of an EncoderUNetModel but image_size: `adm_classifier_config` backwards.

    Args:
      classifier: fields of our ClassifierConfig as plain values.
      in_channels: channels of x.

    Raises:
      UnsupportedOption: if the levels differ in their number of blocks.
    """
    return {
        **encoder_options(classifier),
        "in_channels": in_channels,
        "out_channels": classifier["num_classes"],
        "pool": classifier["pool"],
    }


_RES_BLOCK = (
    Row("in_layers.0", "norm_1", "norm"),
    Row("in_layers.2", "conv_1", "conv"),
    Row("emb_layers.1", "time", "linear"),
    Row("out_layers.0", "norm_2", "norm"),
    Row("out_layers.3", "conv_2", "conv"),
    Row("skip_connection", "shortcut", "conv"),
)
_DOWN = {"block": _RES_BLOCK, "conv": (Row("op", "conv", "conv"),), "pool": ()}
_UP = {"block": _RES_BLOCK, "conv": (Row("conv", "conv", "conv"),), "pool": ()}
_TIME = (
    Row("time_embed.0", "time_embed/dense_1", "linear"),
    Row("time_embed.2", "time_embed/dense_2", "linear"),
)
_POOLS = {
    "adaptive": (Row("out.0", "norm_out", "norm"), Row("out.3", "logits", "conv1x1_as_linear")),
    "attention": (
        Row("out.0", "norm_out", "norm"),
        Row("out.2.positional_embedding", "pool/position", "transposed"),
        Row("out.2.c_proj", "pool/attention/out", "conv1d_as_linear"),
    ),
    "spatial": (Row("out.0", "hidden", "linear"), Row("out.2", "logits", "linear")),
    "spatial_v2": (
        Row("out.0", "hidden", "linear"),
        Row("out.1", "norm_hidden", "norm"),
        Row("out.3", "logits", "linear"),
    ),
}

# The class embedding of a UNetModel: the table of a label conditioner.
LABEL_ROWS = (Row("label_emb.weight", "embedding", "param"),)


def qkv_rows(source: str, target: str, *, heads: int | None) -> tuple[Row, ...]:
    """One convolution of width 1 that makes queries, keys and values.

    Both layouts have the same shape, so the wrong one loads without complaint.

    Args:
      source: its name.
      target: the path of our Attention.
      heads: their number where each head's queries, keys and values lie together (the
        "legacy" order, most releases); None where all queries come first (the "new" order).
    """
    return tuple(
        Row(source, f"{target}/{name}", "conv1d_as_linear", Share(i, 3, heads or 1))
        for i, name in enumerate(("query", "key", "value"))
    )


def head_count(full: Mapping[str, Any], channels: int, part: str) -> int:
    """Heads of a fused attention of UNetModel.

    Args:
      full: arguments, none missing.
      channels: width of the attention.
      part: "up" on the way up, else "down" or "mid".
    """
    if full["num_head_channels"] != -1:
        return channels // full["num_head_channels"]
    up = full["num_heads_upsample"]
    return up if part == "up" and up != -1 else full["num_heads"]


def self_attention_rows(heads: int | None) -> tuple[Row, ...]:
    """An AttentionBlock; `heads` as in `qkv_rows`."""
    return (
        Row("norm", "norm", "norm"),
        *qkv_rows("qkv", "attention", heads=heads),
        Row("proj_out", "attention/out", "conv1d_as_linear"),
    )


def _attention_rows(full: Mapping[str, Any]) -> AttentionRows:
    legacy = not full["use_new_attention_order"]

    def rows(channels: int, part: str) -> tuple[Row, ...]:
        return self_attention_rows(head_count(full, channels, part) if legacy else None)

    return rows


def encoder_rows(
    levels: Sequence[Mapping[str, Any]], resample: str, attention: AttentionRows
) -> list[Row]:
    """The way down and the bottom. Blocks are numbered through, convolutions included.

    Args:
      levels: fields of our LevelConfigs as plain values.
      resample: of our EncoderConfig.
      attention: (width, "down" or "mid") -> the rows of an attention there.
    """
    rows = [*_TIME, Row("input_blocks.0.0", "conv_in", "conv")]
    block = 1
    for i, level in enumerate(levels):
        inner = attention(level["channels"], "down") if level["attention"] else ()
        for j in range(level["num_blocks"]):
            source, target = f"input_blocks.{block}", f"down_{i}"
            rows += prefixed(_RES_BLOCK, source=f"{source}.0.", target=f"{target}/res_{j}/")
            rows += prefixed(inner, source=f"{source}.1.", target=f"{target}/attn_{j}/")
            block += 1
        if i < len(levels) - 1:
            change, source = _DOWN[resample], f"input_blocks.{block}.0."
            rows += prefixed(change, source=source, target=f"down_{i}/downsample/")
            block += 1
    inner = attention(levels[-1]["channels"], "mid")
    rows += prefixed(_RES_BLOCK, source="middle_block.0.", target="mid/res_0/")
    rows += prefixed(inner, source="middle_block.1.", target="mid/attn/")
    rows += prefixed(_RES_BLOCK, source="middle_block.2.", target="mid/res_1/")
    return rows


def decoder_rows(
    levels: Sequence[Mapping[str, Any]], resample: str, attention: AttentionRows
) -> list[Row]:
    """The way up; the change of resolution is the last module of its level's last block.

    Args:
      levels: as of `encoder_rows`.
      resample: of our EncoderConfig.
      attention: (width, "up") -> the rows of an attention there.
    """
    rows, block = [], 0
    for i, level in enumerate(reversed(levels)):
        inner = attention(level["channels"], "up") if level["attention"] else ()
        for j in range(level["num_blocks"] + 1):
            source, target = f"output_blocks.{block}", f"up_{i}"
            rows += prefixed(_RES_BLOCK, source=f"{source}.0.", target=f"{target}/res_{j}/")
            rows += prefixed(inner, source=f"{source}.1.", target=f"{target}/attn_{j}/")
            if j == level["num_blocks"] and i < len(levels) - 1:
                last = f"{source}.{2 if level['attention'] else 1}."
                rows += prefixed(_UP[resample], source=last, target=f"{target}/upsample/")
            block += 1
    return [*rows, Row("out.0", "norm_out", "norm"), Row("out.2", "conv_out", "conv")]


def adm_unet_rows(config: Mapping[str, Any]) -> tuple[Row, ...]:
    """The table of the weights of a UNetModel or SuperResModel; the classes' is `LABEL_ROWS`.

    Args:
      config: arguments as of `adm_unet_config`; the blocks' numbers and the order of the
        attention's weights depend on them.

    Raises:
      UnsupportedOption: as `adm_unet_config`.
    """
    full = complete(config, UNET_DEFAULTS)
    table = (level_fields(full), resample_of(full), _attention_rows(full))
    return (*encoder_rows(*table), *decoder_rows(*table))


def adm_classifier_rows(config: Mapping[str, Any]) -> tuple[Row, ...]:
    """The table of the weights of an EncoderUNetModel.

    Args:
      config: arguments as of `adm_classifier_config`.

    Raises:
      UnsupportedOption: as `adm_classifier_config`.
    """
    full = complete(config, CLASSIFIER_DEFAULTS)
    pool = adm_classifier_config(config).classifier["pool"]
    rows = _POOLS[pool]
    if pool == "attention":
        # The pool has the new order whatever the blocks have.
        rows += qkv_rows("out.2.qkv_proj", "pool/attention", heads=None)
    return (*encoder_rows(level_fields(full), resample_of(full), _attention_rows(full)), *rows)
