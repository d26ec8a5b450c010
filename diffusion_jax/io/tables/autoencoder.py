"""Autoencoders of diffusers and of CompVis: their configurations and names as those of ours."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffusion_jax.io.mapping import Row, prefixed
from diffusion_jax.io.tables.options import (
    UnsupportedOption,
    complete,
    require,
    require_integers,
    require_lists,
)
from diffusion_jax.io.tables.unet import has_old_attention_names

# What the peer's classes share.
_BACKBONE: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "mid_block_add_attention": True,
}
KL_DEFAULTS: Mapping[str, Any] = {
    **_BACKBONE,
    "latent_channels": 4,
    "force_upcast": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
VQ_DEFAULTS: Mapping[str, Any] = {
    **_BACKBONE,
    "latent_channels": 3,
    "force_upcast": False,
    "num_vq_embeddings": 256,
    "vq_embed_dim": None,
    "norm_type": "group",
    "lookup_from_codebook": False,
}
TINY_DEFAULTS: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": (64, 64, 64, 64),
    "decoder_block_out_channels": (64, 64, 64, 64),
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "latent_channels": 4,
    "upsampling_scaling_factor": 2,
    "num_encoder_blocks": (1, 3, 3, 3),
    "num_decoder_blocks": (3, 3, 3, 1),
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "force_upcast": False,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    # The peer writes these widths a second time, and overwrites force_upcast by False.
    "block_out_channels": None,
}

# block type -> attention
_DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
_UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "mish": "mish"}

# The peer's norms have no other epsilon.
NORM_EPS = 1e-6


def _activation(full: Mapping[str, Any], owner: str) -> str:
    name = str(full["act_fn"]).lower()
    if name not in _ACTIVATIONS:
        raise UnsupportedOption(
            f"act_fn of {owner} must be one of {', '.join(_ACTIVATIONS)}, got {full['act_fn']!r}"
        )
    return _ACTIVATIONS[name]


def _attention(full: Mapping[str, Any], option: str, table: Mapping[str, bool]) -> list[bool]:
    types = list(full[option])
    for block in types:
        if block not in table:
            raise UnsupportedOption(
                f"{option} of an autoencoder must be made of {', '.join(table)}, got {block!r}"
            )
    if len(types) != len(full["block_out_channels"]):
        raise UnsupportedOption(
            f"{option} and block_out_channels must be equally long, "
            f"got {len(types)} and {len(full['block_out_channels'])}"
        )
    return [table[block] for block in types]


def _levels(widths: Sequence[int], num_blocks: int, attention: Sequence[bool]) -> tuple[dict, ...]:
    """Fields of our AutoencoderLevels, from fine to coarse."""
    return tuple(
        {"channels": channels, "num_blocks": num_blocks, "attention": attends}
        for channels, attends in zip(widths, attention, strict=True)
    )


def _backbone(full: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Fields of our AutoencoderConfig."""
    integers = ("in_channels", "out_channels", "latent_channels", "layers_per_block")
    require_integers(full, (*integers, "norm_num_groups"), owner)
    down = _attention(full, "down_block_types", _DOWN)
    up = _attention(full, "up_block_types", _UP)[::-1]
    size = full["sample_size"]
    widths, num_blocks = list(full["block_out_channels"]), full["layers_per_block"]
    return {
        "in_channels": full["in_channels"],
        "out_channels": full["out_channels"],
        "levels": _levels(widths, num_blocks, down),
        "up_levels": None if up == down else _levels(widths, num_blocks, up),
        "middle_attention": full["mid_block_add_attention"],
        "norm_groups": full["norm_num_groups"],
        "norm_eps": NORM_EPS,
        "act": _activation(full, owner),
        "scaling_factor": full["scaling_factor"],
        "sample_size": tuple(size) if isinstance(size, list | tuple) else size,
        "force_upcast": full["force_upcast"],
    }


def autoencoder_kl_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the config.json of an AutoencoderKL.

    Args:
      config: the parsed file; keys that start with "_" are metadata, missing ones have
        diffusers' defaults.

    Returns:
      Fields of our AutoencoderKLConfig as plain values; `levels` and `up_levels` hold the fields
      of their AutoencoderLevels.

    Raises:
      UnsupportedOption: naming the option and the value that our network does not have.
    """
    owner = "an AutoencoderKL"
    full = complete(config, KL_DEFAULTS, owner)
    mean, std = full["latents_mean"], full["latents_std"]
    return {
        **_backbone(full, owner),
        "latent_channels": full["latent_channels"],
        "quant_conv": full["use_quant_conv"],
        "post_quant_conv": full["use_post_quant_conv"],
        "shift_factor": full["shift_factor"],
        "latents_mean": None if mean is None else tuple(mean),
        "latents_std": None if std is None else tuple(std),
    }


def vq_model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the config.json of a VQModel, as `autoencoder_kl_config` does.

    Returns:
      Fields of our VQModelConfig as plain values.

    Raises:
      UnsupportedOption: naming the option and the value that our network does not have.
    """
    owner = "a VQModel"
    full = complete(config, VQ_DEFAULTS, owner)
    require(full, {"norm_type": ("group", "spatial")}, owner)
    require_integers(full, ("num_vq_embeddings",), owner)
    bottom, width = full["latent_channels"], full["vq_embed_dim"]
    width = bottom if width is None else width
    if full["norm_type"] == "spatial" and width != bottom:
        raise UnsupportedOption(
            "vq_embed_dim of a VQModel with norm_type 'spatial' must be latent_channels = "
            f"{bottom}, or the peer cannot decode, got {width}"
        )
    return {
        **_backbone(full, owner),
        "latent_channels": width,
        "z_channels": None if width == bottom else bottom,
        "num_codes": full["num_vq_embeddings"],
        "norm": full["norm_type"],
        "lookup_from_codebook": full["lookup_from_codebook"],
    }


def autoencoder_tiny_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the config.json of an AutoencoderTiny, as `autoencoder_kl_config` does.

    Returns:
      Fields of our AutoencoderTinyConfig as plain values.

    Raises:
      UnsupportedOption: naming the option and the value that our network does not have.
    """
    owner = "an AutoencoderTiny"
    full = complete(config, TINY_DEFAULTS, owner)
    integers = ("in_channels", "out_channels", "latent_channels", "upsampling_scaling_factor")
    require_integers(full, integers, owner)
    require(full, {"upsample_fn": ("nearest", "bilinear", "bicubic")}, owner)
    fields = {}
    for half in ("encoder", "decoder"):
        option, counts = f"{half}_block_out_channels", tuple(full[f"num_{half}_blocks"])
        widths = list(full[option])
        if len(set(widths)) != 1 or len(widths) != len(counts):
            raise UnsupportedOption(
                f"{option} of an AutoencoderTiny must be {len(counts)} times the same width, "
                f"since its convolutions keep the width, got {widths}"
            )
        fields[f"{half}_channels"], fields[f"{half}_blocks"] = widths[0], counts
    again = full["block_out_channels"]
    if again is not None and list(again) != list(full["decoder_block_out_channels"]):
        raise UnsupportedOption(
            "block_out_channels of an AutoencoderTiny must be decoder_block_out_channels = "
            f"{list(full['decoder_block_out_channels'])}, got {list(again)}"
        )
    return {
        **fields,
        "in_channels": full["in_channels"],
        "out_channels": full["out_channels"],
        "latent_channels": full["latent_channels"],
        "act": _activation(full, owner),
        "upsample": full["upsample_fn"],
        "upsample_factor": full["upsampling_scaling_factor"],
        "latent_magnitude": full["latent_magnitude"],
        "latent_shift": full["latent_shift"],
        "scaling_factor": full["scaling_factor"],
        "shift_factor": full["shift_factor"],
    }


def _refuse_unless(same: bool, what: str, value: Any) -> None:
    if not same:
        raise UnsupportedOption(f"diffusers has no autoencoder with {what}, got {value!r}")


def _backbone_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    levels, up_levels = fields["levels"], fields["up_levels"] or fields["levels"]
    widths = [level["channels"] for level in levels]
    counts = {level["num_blocks"] for level in (*levels, *up_levels)}
    _refuse_unless(len(counts) == 1, "levels of different depth", sorted(counts))
    _refuse_unless(
        widths == [level["channels"] for level in up_levels], "halves of different width", widths
    )
    eps = fields["norm_eps"]
    _refuse_unless(eps == NORM_EPS, f"norm_eps other than {NORM_EPS}", eps)
    size = fields["sample_size"]
    names = {attends: name for name, attends in _DOWN.items()}
    up_names = {attends: name for name, attends in _UP.items()}
    return {
        "in_channels": fields["in_channels"],
        "out_channels": fields["out_channels"],
        "down_block_types": [names[level["attention"]] for level in levels],
        "up_block_types": [up_names[level["attention"]] for level in reversed(up_levels)],
        "block_out_channels": widths,
        "layers_per_block": counts.pop(),
        "act_fn": fields["act"],
        "norm_num_groups": fields["norm_groups"],
        "sample_size": list(size) if isinstance(size, tuple) else size,
        "scaling_factor": fields["scaling_factor"],
        "mid_block_add_attention": fields["middle_attention"],
        "force_upcast": fields["force_upcast"],
    }


def autoencoder_kl_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `autoencoder_kl_config`: plain fields of our configuration -> a config.json.

    Raises:
      UnsupportedOption: if diffusers has no such autoencoder.
    """
    bottom = fields["z_channels"]
    _refuse_unless(bottom in (None, fields["latent_channels"]), "its own z_channels", bottom)
    mean, std = fields["latents_mean"], fields["latents_std"]
    return {
        "_class_name": "AutoencoderKL",
        **_backbone_json(fields),
        "latent_channels": fields["latent_channels"],
        "use_quant_conv": fields["quant_conv"],
        "use_post_quant_conv": fields["post_quant_conv"],
        "shift_factor": fields["shift_factor"],
        "latents_mean": None if mean is None else list(mean),
        "latents_std": None if std is None else list(std),
    }


def vq_model_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `vq_model_config`: plain fields of our configuration -> a config.json.

    Raises:
      UnsupportedOption: if diffusers has no such autoencoder.
    """
    width = fields["latent_channels"]
    weights = fields["commitment_weight"], fields["codebook_weight"]
    _refuse_unless(weights == (1.0, 0.25), "weights of the loss other than 1 and 0.25", weights)
    return {
        "_class_name": "VQModel",
        **_backbone_json(fields),
        "latent_channels": width if fields["z_channels"] is None else fields["z_channels"],
        "vq_embed_dim": width,
        "num_vq_embeddings": fields["num_codes"],
        "norm_type": fields["norm"],
        "lookup_from_codebook": fields["lookup_from_codebook"],
    }


def autoencoder_tiny_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `autoencoder_tiny_config`: plain fields of our configuration -> a config.json."""
    widths = {
        f"{half}_block_out_channels": [fields[f"{half}_channels"]] * len(fields[f"{half}_blocks"])
        for half in ("encoder", "decoder")
    }
    return {
        "_class_name": "AutoencoderTiny",
        **widths,
        "in_channels": fields["in_channels"],
        "out_channels": fields["out_channels"],
        "act_fn": fields["act"],
        "upsample_fn": fields["upsample"],
        "latent_channels": fields["latent_channels"],
        "upsampling_scaling_factor": fields["upsample_factor"],
        "num_encoder_blocks": list(fields["encoder_blocks"]),
        "num_decoder_blocks": list(fields["decoder_blocks"]),
        "latent_magnitude": fields["latent_magnitude"],
        "latent_shift": fields["latent_shift"],
        "scaling_factor": fields["scaling_factor"],
        "shift_factor": fields["shift_factor"],
        "force_upcast": False,
    }


def _norm(source: str, target: str) -> tuple[Row, ...]:
    """A group norm, or the spatial norm that takes its place."""
    return (
        Row(source, target, "norm"),
        Row(f"{source}.norm_layer", f"{target}/norm", "norm"),
        Row(f"{source}.conv_y", f"{target}/scale", "conv"),
        Row(f"{source}.conv_b", f"{target}/shift", "conv"),
    )


_RES_BLOCK = (
    *_norm("norm1", "norm_1"),
    Row("conv1", "conv_1", "conv"),
    *_norm("norm2", "norm_2"),
    Row("conv2", "conv_2", "conv"),
    Row("conv_shortcut", "shortcut", "conv"),
)
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
_OLD_PROJECTIONS = ("query", "key", "value", "proj_attn")
_TARGETS = ("query", "key", "value", "out")
_QUANTIZER = (
    Row("quant_conv", "quant_conv", "conv"),
    Row("post_quant_conv", "post_quant_conv", "conv"),
    Row("quantize.embedding.weight", "codebook", "param"),
)


def autoencoder_rows(names: Iterable[str] = ()) -> tuple[Row, ...]:
    """The table of an AutoencoderKL's or a VQModel's weights, whatever its configuration.

    Args:
      names: of the file's tensors; older files call the parts of attention "query",
        "proj_attn" …
    """
    projections = _OLD_PROJECTIONS if has_old_attention_names(names) else _PROJECTIONS
    attention = (
        Row("group_norm", "norm", "norm"),
        *_norm("spatial_norm", "norm")[1:],
        *(
            Row(source, f"attention/{target}", "linear")
            for source, target in zip(projections, _TARGETS, strict=True)
        ),
    )
    conv = (Row("conv", "conv", "conv"),)
    rows = list(_QUANTIZER)
    for half, blocks, change in (
        ("encoder", "down", "downsample"),
        ("decoder", "up", "upsample"),
    ):
        level, ours = f"{blocks}_blocks.{{i}}.", f"{blocks}_{{i}}/"
        places = (
            (_RES_BLOCK, level + "resnets.{j}.", ours + "res_{j}/"),
            (attention, level + "attentions.{j}.", ours + "attn_{j}/"),
            (conv, f"{level}{change}rs.0.", f"{ours}{change}/"),
            (_RES_BLOCK, "mid_block.resnets.{j}.", "mid/res_{j}/"),
            (attention, "mid_block.attentions.0.", "mid/attn/"),
        )
        part = [Row("conv_in", "conv_in", "conv"), Row("conv_out", "conv_out", "conv")]
        part += _norm("conv_norm_out", "norm_out")
        for block, source, target in places:
            part += prefixed(block, source=source, target=target)
        rows += prefixed(part, source=f"{half}.", target=f"{half}/")
    return tuple(rows)


def autoencoder_tiny_rows(
    encoder_blocks: Sequence[int], decoder_blocks: Sequence[int]
) -> tuple[Row, ...]:
    """The table of an AutoencoderTiny's weights: its layers are numbered through.

    Args:
      encoder_blocks: blocks of each level of the encoder.
      decoder_blocks: blocks of each level of the decoder.
    """
    encoder = _numbered(encoder_blocks, "down", first=0, between=1)
    # The decoder's first convolution has an activation behind it, and before the others there
    # is an upsampling.
    decoder = _numbered(decoder_blocks, "up", first=1, between=2)
    return prefixed(encoder, source="encoder.layers.", target="encoder/") + prefixed(
        decoder, source="decoder.layers.", target="decoder/"
    )


def _numbered(counts: Sequence[int], change: str, *, first: int, between: int) -> tuple[Row, ...]:
    """Rows of one half; `first` layers without weights follow conv_in, `between` - 1 precede
    every change of resolution."""
    rows, at = [Row("0", "conv_in", "conv")], first
    for i, count in enumerate(counts):
        if i > 0:
            at += between
            rows.append(Row(str(at), f"{change}_{i}", "conv"))
        for j in range(count):
            at += 1
            rows += [Row(f"{at}.conv.{2 * k}", f"block_{i}_{j}/conv_{k}", "conv") for k in range(3)]
    rows.append(Row(str(at + 1), "conv_out", "conv"))
    return tuple(rows)


# CompVis' latent-diffusion.

_DDCONFIG: Mapping[str, Any] = {
    "ch_mult": (1, 2, 4, 8),
    "dropout": 0.0,
    "resamp_with_conv": True,
    "use_linear_attn": False,
    "attn_type": "vanilla",
    "give_pre_end": False,
    "tanh_out": False,
    "double_z": True,
}
_DDCONFIG_REQUIRED = (
    "ch",
    "out_ch",
    "num_res_blocks",
    "attn_resolutions",
    "in_channels",
    "resolution",
    "z_channels",
)
_DDCONFIG_SUPPORTED: Mapping[str, tuple] = {
    "resamp_with_conv": (True,),
    "use_linear_attn": (False,),
    "attn_type": ("vanilla", "vanilla-xformers", "none"),
    "give_pre_end": (False,),
    "tanh_out": (False,),
}
# Arguments of CompVis' classes that say how they were trained, or where from.
_TRAINING = (
    "lossconfig",
    "ckpt_path",
    "ignore_keys",
    "image_key",
    "colorize_nlabels",
    "monitor",
    "batch_resize_range",
    "scheduler_config",
    "lr_g_factor",
    "use_ema",
    "sane_index_shape",
)
# Weights that files with a first stage may hold and that no autoencoder has.
COMPVIS_IGNORE = ("loss.*", "model_ema.*", "colorize")


def _compvis_arguments(params: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
    """The completed ddconfig; raises UnsupportedOption for unknown or missing arguments."""
    known = {"ddconfig", *names, *_TRAINING}
    unknown = sorted(set(params) - known)
    missing = sorted({"ddconfig", "embed_dim"} - set(params))
    if unknown or missing:
        raise UnsupportedOption(
            f"arguments of a first stage must be among {sorted(known)}, "
            f"unknown: {unknown}; missing: {missing}"
        )
    owner = "a first stage's ddconfig"
    full = complete(params["ddconfig"], _DDCONFIG, owner, required=_DDCONFIG_REQUIRED)
    require(full, _DDCONFIG_SUPPORTED, owner)
    require_integers(params, ("embed_dim",), "a first stage")
    lists = ("ch_mult", "attn_resolutions")
    require_lists(full, lists, owner)
    require_integers(full, [o for o in _DDCONFIG_REQUIRED if o not in lists], owner)
    if full["dropout"] != 0:
        raise UnsupportedOption(f"dropout of {owner} must be 0, got {full['dropout']!r}")
    return full


def _compvis_backbone(full: Mapping[str, Any]) -> dict[str, Any]:
    widths = [full["ch"] * multiple for multiple in full["ch_mult"]]
    depth, attends = len(widths), full["attn_type"] != "none"
    fine = [full["resolution"] // 2**i for i in range(depth)]
    # The decoder counts up from the coarsest, which differs where halving left a remainder.
    coarse = [fine[-1] * 2 ** (depth - 1 - i) for i in range(depth)]
    down, up = (
        [attends and resolution in full["attn_resolutions"] for resolution in resolutions]
        for resolutions in (fine, coarse)
    )
    return {
        "in_channels": full["in_channels"],
        "out_channels": full["out_ch"],
        "levels": _levels(widths, full["num_res_blocks"], down),
        "up_levels": None if up == down else _levels(widths, full["num_res_blocks"], up),
        "middle_attention": attends,
        "norm_groups": 32,
        "norm_eps": NORM_EPS,
        "act": "silu",
        "sample_size": full["resolution"],
    }


def _compvis_channels(params: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, Any]:
    width, bottom = params["embed_dim"], full["z_channels"]
    return {"latent_channels": width, "z_channels": None if width == bottom else bottom}


def compvis_kl_config(
    params: Mapping[str, Any], *, scaling_factor: float = 1.0, shift_factor: float | None = None
) -> dict[str, Any]:
    """Translates the arguments of `ldm.models.autoencoder.AutoencoderKL`.

    Args:
      params: `first_stage_config.params` of a YAML file.
      scaling_factor: `scale_factor` of the diffusion around it.
      shift_factor: what that diffusion subtracts before, or None.

    Returns:
      Fields of our AutoencoderKLConfig as plain values.

    Raises:
      UnsupportedOption: naming the argument and the value that our network does not have.
    """
    full = _compvis_arguments(params, ("embed_dim",))
    require(full, {"double_z": (True,)}, "an AutoencoderKL's ddconfig")
    return {
        **_compvis_backbone(full),
        **_compvis_channels(params, full),
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
    }


def compvis_vq_config(params: Mapping[str, Any], *, scaling_factor: float = 1.0) -> dict[str, Any]:
    """Translates the arguments of `ldm.models.autoencoder.VQModel` and VQModelInterface.

    Args:
      params: `first_stage_config.params` of a YAML file.
      scaling_factor: `scale_factor` of the diffusion around it.

    Returns:
      Fields of our VQModelConfig as plain values.

    Raises:
      UnsupportedOption: naming the argument and the value that our network does not have.
    """
    full = _compvis_arguments(params, ("embed_dim", "n_embed", "remap"))
    require(full, {"double_z": (False,)}, "a VQModel's ddconfig")
    require({"remap": None, **params}, {"remap": (None,)}, "a VQModel")
    require_integers({"n_embed": None, **params}, ("n_embed",), "a VQModel")
    return {
        **_compvis_backbone(full),
        **_compvis_channels(params, full),
        "num_codes": params["n_embed"],
        "scaling_factor": scaling_factor,
    }


_COMPVIS_RES_BLOCK = (
    Row("norm1", "norm_1", "norm"),
    Row("conv1", "conv_1", "conv"),
    Row("norm2", "norm_2", "norm"),
    Row("conv2", "conv_2", "conv"),
    Row("nin_shortcut", "shortcut", "conv"),
)
_COMPVIS_ATTENTION = (
    Row("norm", "norm", "norm"),
    Row("q", "attention/query", "conv1x1_as_linear"),
    Row("k", "attention/key", "conv1x1_as_linear"),
    Row("v", "attention/value", "conv1x1_as_linear"),
    Row("proj_out", "attention/out", "conv1x1_as_linear"),
)


def compvis_autoencoder_rows(num_levels: int) -> tuple[Row, ...]:
    """The table of a first stage's weights, Gaussian or with a codebook.

    In a file of a whole latent diffusion its names begin with "first_stage_model."; the globs
    `COMPVIS_IGNORE`, behind that prefix, are weights that nobody needs.

    Args:
      num_levels: levels of either half, which are numbered from fine to coarse in both.
    """
    conv = (Row("conv", "conv", "conv"),)
    rows = list(_QUANTIZER)
    for half, ours, change in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        places = [
            (_COMPVIS_RES_BLOCK, "mid.block_1.", "mid/res_0/"),
            (_COMPVIS_RES_BLOCK, "mid.block_2.", "mid/res_1/"),
            (_COMPVIS_ATTENTION, "mid.attn_1.", "mid/attn/"),
        ]
        for i in range(num_levels):
            theirs = f"{ours}.{i if half == 'encoder' else num_levels - 1 - i}."
            places += [
                (_COMPVIS_RES_BLOCK, theirs + "block.{j}.", f"{ours}_{i}/res_{{j}}/"),
                (_COMPVIS_ATTENTION, theirs + "attn.{j}.", f"{ours}_{i}/attn_{{j}}/"),
                (conv, f"{theirs}{change}.", f"{ours}_{i}/{change}/"),
            ]
        part = [
            Row("conv_in", "conv_in", "conv"),
            Row("norm_out", "norm_out", "norm"),
            Row("conv_out", "conv_out", "conv"),
        ]
        for block, source, target in places:
            part += prefixed(block, source=source, target=target)
        rows += prefixed(part, source=f"{half}.", target=f"{half}/")
    return tuple(rows)
