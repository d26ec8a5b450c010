"""GLIGEN's configurations and names, the original ones and diffusers', as those of our modules."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusion_jax.io.mapping import Row, prefixed
from diffusion_jax.io.tables import openai
from diffusion_jax.io.tables.options import UnsupportedOption, complete, require_integers
from diffusion_jax.io.tables.transformer import spatial_transformer_rows

# "fuser_type" of the original UNet -> our kind of adapter.
FUSER_TYPES: Mapping[str, str] = {"gatedSA": "self", "gatedSA2": "self_resized", "gatedCA": "cross"}

# Class of the original adapters -> our kind.
FUSER_CLASSES: Mapping[str, str] = {
    "GatedSelfAttentionDense": "self",
    "GatedSelfAttentionDense2": "self_resized",
    "GatedCrossAttentionDense": "cross",
}

# "attention_type" of diffusers' UNet2DConditionModel -> our kind of position network.
ATTENTION_TYPES: Mapping[str, str] = {"gated": "text", "gated-text-image": "text_image"}


def _mlp_rows(source: str, target: str) -> tuple[Row, ...]:
    return (
        Row(f"{source}.0", f"{target}/in", "linear"),
        Row(f"{source}.2", f"{target}/hidden", "linear"),
        Row(f"{source}.4", f"{target}/out", "linear"),
    )


# ConvNeXt without its head, relative to its module.
CONVNEXT_ROWS: tuple[Row, ...] = (
    Row("downsample_layers.0.0", "downsample_0", "conv"),
    Row("downsample_layers.0.1", "norm_0", "norm"),
    *(Row(f"downsample_layers.{i}.0", f"norm_{i}", "norm") for i in (1, 2, 3)),
    *(Row(f"downsample_layers.{i}.1", f"downsample_{i}", "conv") for i in (1, 2, 3)),
    *prefixed(
        (
            Row("dwconv", "depthwise", "conv"),
            Row("norm", "norm", "norm"),
            Row("pwconv1", "mlp_1", "linear"),
            Row("pwconv2", "mlp_2", "linear"),
            Row("gamma", "layer_scale", "param"),
        ),
        source="stages.{i}.{j}.",
        target="stage_{i}_block_{j}/",
    ),
)

# Our kind of position network -> its names, relative to the module; also those of diffusers.
POSITION_NET_ROWS: Mapping[str, tuple[Row, ...]] = {
    "text": (
        *_mlp_rows("linears", "mlp"),
        Row("null_positive_feature", "null_text", "param"),
        Row("null_position_feature", "null_position", "param"),
    ),
    "text_image": (
        *_mlp_rows("linears_text", "mlp_text"),
        *_mlp_rows("linears_image", "mlp_image"),
        Row("null_text_feature", "null_text", "param"),
        Row("null_image_feature", "null_image", "param"),
        Row("null_position_feature", "null_position", "param"),
    ),
    "keypoint": (
        *_mlp_rows("linears", "mlp"),
        Row("person_embeddings", "person", "param"),
        Row("keypoint_embeddings", "keypoint", "param"),
        Row("null_person_feature", "null_person", "param"),
        Row("null_xy_feature", "null_position", "param"),
    ),
    "map": (
        Row("in_conv", "conv_in", "conv"),
        *prefixed(CONVNEXT_ROWS, source="convnext_tiny_backbone.", target="encoder/"),
        *_mlp_rows("linears", "mlp"),
        Row("null_feature", "null_feature", "param"),
        Row("pos_embedding", "position", "param"),
    ),
}

# A grounding downsampler, relative to its module.
DOWNSAMPLER_ROWS: tuple[Row, ...] = (
    Row("layers.0", "conv_1", "conv"),
    Row("layers.2", "conv_2", "conv"),
)


class Module(NamedTuple):
    """What the configuration of a position network or of a downsampler means here.

    Attributes:
      name: the original one, "text", "text_image", "keypoint", "canny", "depth", "hed", "normal"
        or "sem".
      kind: our kind of position network, or "downsampler".
      fields: of our configuration, as plain values.
      arguments: the original call's arguments -> those of our module.
    """

    name: str
    kind: str
    fields: dict[str, Any]
    arguments: Mapping[str, str]


REQUIRED = object()
# What the released code writes out in numbers; files of other sizes say it beside the options.
_CONSTANTS: Mapping[str, Any] = {"hidden": 512}
_CONVNEXT: Mapping[str, Any] = {
    "convnext_depths": (3, 3, 9, 3),
    "convnext_dims": (96, 192, 384, 768),
    "convnext_feature_dim": None,
}
_TEXT = {"in_dim": REQUIRED, "out_dim": REQUIRED, "fourier_freqs": 8, **_CONSTANTS}
_MAP = {"resize_input": 448, "out_dim": 768, **_CONSTANTS, **_CONVNEXT}

# Original module -> its options and their defaults.
_POSITION_NETS: Mapping[str, Mapping[str, Any]] = {
    "text": _TEXT,
    "text_image": _TEXT,
    "keypoint": {
        "max_persons_per_image": REQUIRED,
        "out_dim": REQUIRED,
        "fourier_freqs": 8,
        **_CONSTANTS,
    },
    "canny": _MAP,
    "depth": _MAP,
    "hed": _MAP,
    "normal": _MAP,
    "sem": {**_MAP, "in_dim": 152},
}

# Original module -> its call's arguments and ours.
_ARGUMENTS: Mapping[str, Mapping[str, str]] = {
    "text": {"boxes": "boxes", "masks": "mask", "positive_embeddings": "text"},
    "text_image": {
        "boxes": "boxes",
        "masks": "mask",
        "text_embeddings": "text",
        "text_masks": "text_mask",
        "image_embeddings": "image",
        "image_masks": "image_mask",
    },
    "keypoint": {"points": "points", "masks": "mask"},
    "canny": {"canny_edge": "map", "mask": "mask"},
    "depth": {"depth": "map", "mask": "mask"},
    "hed": {"hed_edge": "map", "mask": "mask"},
    "normal": {"normal": "map", "mask": "mask"},
    "sem": {"sem": "map", "mask": "mask"},
}

# What diffusers calls the arguments of its position networks.
DIFFUSERS_ARGUMENTS: Mapping[str, Mapping[str, str]] = {
    "text": _ARGUMENTS["text"],
    "text_image": {
        "boxes": "boxes",
        "masks": "mask",
        "phrases_embeddings": "text",
        "phrases_masks": "text_mask",
        "image_embeddings": "image",
        "image_masks": "image_mask",
    },
}

_DOWNSAMPLER = {"resize_input": 256, "out_dim": 8}
# Original module -> (options and their defaults, channels read, hidden channels, resizing).
_DOWNSAMPLERS: Mapping[str, tuple[Mapping[str, Any], int | None, int | None, str]] = {
    "canny": (_DOWNSAMPLER, 1, 4, "bicubic"),
    "depth": (_DOWNSAMPLER, 1, 4, "bicubic"),
    "normal": (_DOWNSAMPLER, 3, 4, "bicubic"),
    "sem": ({**_DOWNSAMPLER, "in_dim": 152}, None, 16, "nearest"),
    "hed": ({"out_dim": 1}, 1, None, "bicubic"),
}
# The only size of the downsampler of HED edges, which has no option for it.
_HED_SIZE = 64


def _module(target: str, suffix: str, known: Mapping[str, Any]) -> str:
    """The original module's name: "x.y.canny_grounding_net.PositionNet" -> "canny"."""
    match = re.search(rf"(?:^|[.\s])(\w+?)_{suffix}(?:\.|$)", target)
    if match is None or match[1] not in known:
        raise UnsupportedOption(
            f"target must be one of {', '.join(f'{name}_{suffix}' for name in sorted(known))}, "
            f"got {target!r}"
        )
    return match[1]


def _complete(params: Mapping[str, Any], defaults: Mapping[str, Any], owner: str) -> dict[str, Any]:
    options = complete(params, defaults, owner)
    missing = sorted(name for name, value in options.items() if value is REQUIRED)
    if missing:
        raise UnsupportedOption(f"{owner} needs the options {', '.join(missing)}")
    integers = [name for name in options if not name.startswith("convnext")]
    require_integers(options, integers, owner)
    return options


def position_net_config(target: str, params: Mapping[str, Any]) -> Module:
    """Translates the configuration of a position network, original `grounding_tokenizer`.

    Args:
      target: dotted name of the original class; its module's name tells the kind,
        "ldm.modules.diffusionmodules.text_grounding_net.PositionNet".
      params: its constructor's arguments. The widths that the released code fixes may be given
        as `hidden`, `convnext_depths` and `convnext_dims`.

    Raises:
      UnsupportedOption: naming the option, if the class or an option is unknown, or a value
        is none of its.
    """
    name = _module(target, "grounding_net", _POSITION_NETS)
    options = _complete(params, _POSITION_NETS[name], f"{name}_grounding_net.PositionNet")
    fields = {"out_dim": options["out_dim"], "hidden": options["hidden"]}
    if name in ("text", "text_image", "keypoint"):
        fields["num_frequencies"] = options["fourier_freqs"]
    if name == "text":
        return Module(name, "text", {**fields, "text_dim": options["in_dim"]}, _ARGUMENTS[name])
    if name == "text_image":
        return Module(
            name, "text_image", {**fields, "feature_dim": options["in_dim"]}, _ARGUMENTS[name]
        )
    if name == "keypoint":
        # COCO's 17 keypoints are a constant of the original code.
        fields |= {"max_persons": options["max_persons_per_image"], "num_keypoints": 17}
        return Module(name, "keypoint", fields, _ARGUMENTS[name])
    fields |= {
        "size": options["resize_input"],
        "num_classes": options.get("in_dim"),
        "encoder": _convnext(options, name),
    }
    return Module(name, "map", fields, _ARGUMENTS[name])


def _convnext(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    depths, widths = tuple(options["convnext_depths"]), tuple(options["convnext_dims"])
    if len(depths) != 4 or len(widths) != 4:
        raise UnsupportedOption(
            f"a ConvNeXt has 4 stages, got convnext_depths = {depths} and convnext_dims = {widths}"
        )
    if options["convnext_feature_dim"] not in (None, widths[-1]):
        raise UnsupportedOption(
            f"convnext_feature_dim of {name}_grounding_net must be the last of convnext_dims, "
            f"{widths[-1]}, got {options['convnext_feature_dim']}"
        )
    return {"depths": depths, "widths": widths}


def downsampler_config(target: str, params: Mapping[str, Any]) -> Module:
    """Translates the configuration of a downsampler, original `grounding_downsampler`.

    Args:
      target: dotted name of the original class; its module's name tells the kind,
        "ldm.modules.diffusionmodules.canny_grounding_downsampler.GroundingDownsampler".
      params: its constructor's arguments.

    Raises:
      UnsupportedOption: naming the option, if the class or an option is unknown, or a value
        is none of its.
    """
    name = _module(target, "grounding_downsampler", _DOWNSAMPLERS)
    defaults, channels, hidden, resize = _DOWNSAMPLERS[name]
    options = _complete(params, defaults, f"{name}_grounding_downsampler.GroundingDownsampler")
    if name == "hed" and options["out_dim"] != 1:
        raise UnsupportedOption(
            f"out_dim of hed_grounding_downsampler must be 1, got {options['out_dim']}"
        )
    fields = {
        "size": options.get("resize_input", _HED_SIZE),
        "in_channels": options.get("in_dim", channels),
        "hidden": hidden,
        "out_channels": options["out_dim"],
        "resize": resize,
    }
    return Module(name, "downsampler", fields, {"grounding_extra_input": "map"})


_PACKAGE = "ldm.modules.diffusionmodules."


def _changed(params: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is the default, since the released code has no options for it."""
    return {name: value for name, value in params.items() if value != defaults[name]}


def position_net_options(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The original configuration of a position network: `position_net_config` backwards.

    Args:
      name, fields: as in `Module`.

    Returns:
      {"target": …, "params": …}.

    Raises:
      UnsupportedOption: if a person has not 17 keypoints.
    """
    if fields.get("num_keypoints", 17) != 17:
        raise UnsupportedOption(
            f"the original network has 17 keypoints, got {fields['num_keypoints']}"
        )
    defaults, params = _POSITION_NETS[name], {"hidden": fields["hidden"]}
    if name in ("text", "text_image", "keypoint"):
        params["fourier_freqs"] = fields["num_frequencies"]
    else:
        params["convnext_depths"] = tuple(fields["encoder"]["depths"])
        params["convnext_dims"] = tuple(fields["encoder"]["widths"])
    params = {"out_dim": fields["out_dim"], **_changed(params, defaults)}
    for option, field in (
        ("in_dim", "text_dim"),
        ("in_dim", "feature_dim"),
        ("in_dim", "num_classes"),
        ("max_persons_per_image", "max_persons"),
        ("resize_input", "size"),
    ):
        if fields.get(field) is not None:
            params[option] = fields[field]
    return {"target": f"{_PACKAGE}{name}_grounding_net.PositionNet", "params": params}


def downsampler_options(fields: Mapping[str, Any], *, name: str) -> dict[str, Any]:
    """The original configuration of a downsampler: `downsampler_config` backwards.

    Args:
      fields: as in `Module`.
      name: the class to prefer, since those of edges and of depths do the same.

    Returns:
      {"target": …, "params": …}.

    Raises:
      UnsupportedOption: if no original downsampler is like this.
    """
    fitting = [
        each
        for each, (_, channels, hidden, resize) in _DOWNSAMPLERS.items()
        if (hidden, resize) == (fields["hidden"], fields["resize"])
        and channels in (None, fields["in_channels"])
        and (hidden is not None or fields["size"] == _HED_SIZE)
    ]
    if not fitting:
        raise UnsupportedOption(f"there is no original downsampler with {dict(fields)}")
    name = name if name in fitting else fitting[0]
    values = {
        "resize_input": fields["size"],
        "in_dim": fields["in_channels"],
        "out_dim": fields["out_channels"],
    }
    params = {option: values[option] for option in _DOWNSAMPLERS[name][0]}
    target = f"{_PACKAGE}{name}_grounding_downsampler.GroundingDownsampler"
    return {"target": target, "params": params}


def unet2d_condition_grounding(config: Mapping[str, Any]) -> Module | None:
    """The position network of diffusers' UNet2DConditionModel; None without one.

    Args:
      config: the model's options, with defaults filled in.

    Raises:
      UnsupportedOption: if `attention_type` is unknown, or the blocks differ in
        `cross_attention_dim`.
    """
    kind = config["attention_type"]
    if kind == "default":
        return None
    if kind not in ATTENTION_TYPES:
        raise UnsupportedOption(
            f"attention_type must be 'default' or one of {', '.join(ATTENTION_TYPES)}, got {kind!r}"
        )
    widths = config["cross_attention_dim"]
    widths = (widths,) if isinstance(widths, int) else tuple(widths)
    if len(set(widths)) != 1:
        raise UnsupportedOption(
            "cross_attention_dim must be the same for every block of a grounded UNet, since all "
            f"blocks read the same grounding tokens, got {widths}"
        )
    name = ATTENTION_TYPES[kind]
    feature = "text_dim" if name == "text" else "feature_dim"
    fields = {feature: widths[0], "out_dim": widths[0], "hidden": 512, "num_frequencies": 8}
    return Module(name, name, fields, DIFFUSERS_ARGUMENTS[name])


class GLIGEN(NamedTuple):
    """What the arguments of GLIGEN's UNetModel mean here.

    Attributes:
      unet: fields of our UNetConfig as plain values, as in `ADMUNet.unet`. Every attention of it
        is a `SpatialTransformer`, that at the bottom included.
      transformer: fields of that SpatialTransformer.
      token_dim: width of the text's tokens.
      in_channels: channels of x.
      grounding: the position network.
      downsampler: what the map becomes in cond.image; None without.
      inpaint: cond.image ends with known · image and known, see `known_pixels`.
    """

    unet: dict[str, Any]
    transformer: dict[str, Any]
    token_dim: int
    in_channels: int
    grounding: Module
    downsampler: Module | None
    inpaint: bool

    @property
    def image_channels(self) -> int:
        """Channels of cond.image, 0 without one."""
        down = 0 if self.downsampler is None else self.downsampler.fields["out_channels"]
        return down + (self.in_channels + 1) * self.inpaint


_UNET_REQUIRED = (*openai.REQUIRED, "context_dim", "fuser_type", "grounding_tokenizer")
_UNET_DEFAULTS: Mapping[str, Any] = {
    **{
        option: openai.DEFAULTS[option]
        for option in (
            "dropout", "channel_mult", "conv_resample", "dims", "use_checkpoint",
            "use_scale_shift_norm",
        )
    },
    "num_heads": 8,
    "transformer_depth": 1,
    "inpaint_mode": False,
    "grounding_downsampler": None,
}  # fmt: skip
# Options of the networks that GLIGEN's was derived from.
_UNET_FIXED: Mapping[str, Any] = {
    "num_head_channels": -1,
    "resblock_updown": False,
    "use_fp16": False,
}


def _instance(options: Mapping[str, Any], option: str, translate) -> Module:
    """A nested configuration {"target": …, "params": …}."""
    value = options[option]
    if not isinstance(value, Mapping) or set(value) - {"target", "params"} or "target" not in value:
        raise UnsupportedOption(f"{option} must have a target and its params, got {value!r}")
    return translate(value["target"], value.get("params") or {})


def gligen_unet_config(config: Mapping[str, Any]) -> GLIGEN:
    """Translates the arguments of GLIGEN's UNetModel.

    Args:
      config: the arguments by name; missing ones have the constructor's defaults.

    Returns:
      The same network in our terms.

    Raises:
      UnsupportedOption: naming what is unknown, missing or not for images.
    """
    full = openai.complete(config, _UNET_DEFAULTS, _UNET_REQUIRED)
    require_integers(full, ("context_dim", "num_heads", "transformer_depth"), "UNetModel")
    if full["fuser_type"] not in FUSER_TYPES:
        raise UnsupportedOption(
            f"fuser_type must be one of {', '.join(FUSER_TYPES)}, got {full['fuser_type']!r}"
        )
    downsampler = None
    if full["grounding_downsampler"] is not None:
        downsampler = _instance(full, "grounding_downsampler", downsampler_config)
    unet = {
        **openai.encoder_fields({**full, **_UNET_FIXED}),
        "out_channels": full["out_channels"],
        "middle_attention": True,
    }
    transformer = {
        "num_heads": full["num_heads"],
        "depth": full["transformer_depth"],
        "fuser": FUSER_TYPES[full["fuser_type"]],
    }
    return GLIGEN(
        unet,
        transformer,
        full["context_dim"],
        full["in_channels"],
        _instance(full, "grounding_tokenizer", position_net_config),
        downsampler,
        bool(full["inpaint_mode"]),
    )


def gligen_unet_options(form: GLIGEN) -> dict[str, Any]:
    """The arguments of GLIGEN's UNetModel: `gligen_unet_config` backwards.

    Raises:
      UnsupportedOption: if the levels differ in their number of blocks.
    """
    encoder = openai.encoder_options(form.unet)
    fuser_types = {kind: name for name, kind in FUSER_TYPES.items()}
    options = {
        **{name: value for name, value in encoder.items() if name not in _UNET_FIXED},
        # The size of the latents, which the network does not read.
        "image_size": 64,
        "in_channels": form.in_channels,
        "out_channels": form.unet["out_channels"],
        "num_heads": form.transformer["num_heads"],
        "transformer_depth": form.transformer["depth"],
        "context_dim": form.token_dim,
        "fuser_type": fuser_types[form.transformer["fuser"]],
        "inpaint_mode": form.inpaint,
        "grounding_tokenizer": position_net_options(form.grounding.name, form.grounding.fields),
    }
    if form.downsampler is not None:
        down = form.downsampler
        options["grounding_downsampler"] = downsampler_options(down.fields, name=down.name)
    return options


def gligen_unet_rows(form: GLIGEN) -> tuple[Row, ...]:
    """The table of GLIGEN's UNetModel with its position network and its downsampler.

    Targets lie below "network/", "conditioner/grounding/" and "conditioner/channels/".

    Args:
      form: the translated configuration.
    """
    levels, resample = form.unet["levels"], form.unet["resample"]

    def attention(channels: int, part: str) -> tuple[Row, ...]:
        del channels, part
        return spatial_transformer_rows()

    network = (
        *openai.encoder_rows(levels, resample, attention),
        *openai.decoder_rows(levels, resample, attention),
    )
    return (
        *prefixed(network, target="network/"),
        *prefixed(
            POSITION_NET_ROWS[form.grounding.kind],
            source="position_net.",
            target="conditioner/grounding/",
        ),
        *prefixed(DOWNSAMPLER_ROWS, source="downsample_net.", target="conditioner/channels/"),
    )
