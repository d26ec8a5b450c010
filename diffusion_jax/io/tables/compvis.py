"""The original latent diffusion and Stable Diffusion: options and names as those of ours."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_jax.io.mapping import MappingError, Row
from diffusion_jax.io.tables import openai
from diffusion_jax.io.tables.options import (
    UnsupportedOption,
    complete,
    require,
    require_integers,
    require_lists,
)
from diffusion_jax.io.tables.transformer import spatial_transformer_rows
from diffusion_jax.io.tables.unet_blocks import UNetForm

UNET = "openaimodel.UNetModel"
REQUIRED = openai.REQUIRED
UNET_DEFAULTS: Mapping[str, Any] = {
    **openai.UNET_DEFAULTS,
    "num_heads": -1,
    "use_bf16": False,
    "use_spatial_transformer": False,
    "transformer_depth": 1,
    "context_dim": None,
    "n_embed": None,
    "legacy": True,
    # Of the second version of Stable Diffusion.
    "disable_self_attentions": None,
    "num_attention_blocks": None,
    "disable_middle_self_attn": False,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
}
_SUPPORTED: Mapping[str, tuple] = {
    "dims": (2,),
    "n_embed": (None,),
    "num_attention_blocks": (None,),
}
# What a class-conditional UNet embeds -> our conditioner.
_SEQUENTIAL, _CONTINUOUS = "sequential", "continuous"


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    full = complete(config, UNET_DEFAULTS, UNET, required=REQUIRED)
    require(full, _SUPPORTED, UNET)
    require_integers(full, ("in_channels", "model_channels", "out_channels"), UNET)
    require_lists(full, ("attention_resolutions", "channel_mult"), UNET)
    mults = tuple(full["channel_mult"])
    if not mults or mults[0] != 1 or any(mult != int(mult) for mult in mults):
        raise UnsupportedOption(
            f"channel_mult of {UNET} must be integers and begin with 1, since the original's last "
            f"convolution reads model_channels, got {list(mults)}"
        )
    blocks = full["num_res_blocks"]
    blocks = [blocks] * len(mults) if isinstance(blocks, int) else list(blocks)
    if len(blocks) != len(mults):
        raise UnsupportedOption(
            f"num_res_blocks of {UNET} must be one number or one for each of the {len(mults)} "
            f"levels, got {blocks}"
        )
    _check_attention(full, len(mults))
    return {**full, "channel_mult": mults, "num_res_blocks": blocks}


def _check_attention(full: Mapping[str, Any], depth: int) -> None:
    require_integers(full, [o for o in ("num_heads", "num_head_channels") if full[o] != -1], UNET)
    if full["num_heads"] == full["num_head_channels"] == -1:
        raise UnsupportedOption(f"{UNET} needs num_heads or num_head_channels, got neither")
    if full["use_spatial_transformer"] != (full["context_dim"] is not None):
        raise UnsupportedOption(
            "use_spatial_transformer and context_dim belong together, got "
            f"{full['use_spatial_transformer']} and {full['context_dim']}"
        )
    # Tokens of a width for each transformer block would have to be a list of texts, too.
    width = full["context_dim"]
    if isinstance(width, list | tuple) and len(width) != 1:
        raise UnsupportedOption(f"context_dim of {UNET} must be one number, got {list(width)}")
    off = full["disable_self_attentions"]
    if off is not None and len(off) != depth:
        raise UnsupportedOption(
            f"disable_self_attentions must have an entry for each of the {depth} levels, got {off}"
        )


def _transformer(full: Mapping[str, Any], channels: int, tokens_only: bool) -> dict[str, Any]:
    """Fields of our SpatialTransformer at a width."""
    number, width = full["num_heads"], full["num_head_channels"]
    if width != -1:
        number = channels // width
        if number < 1:
            raise UnsupportedOption(
                f"num_head_channels must be at most {channels}, the width of a level, got {width}"
            )
    # What the original calls legacy widens the heads until they fill the width.
    by_width = width != -1 and (not full["legacy"] or channels % width == 0)
    return {
        "kind": "transformer",
        "num_heads": None if by_width else number,
        "head_dim": width if by_width else None,
        "depth": full["transformer_depth"],
        "tokens_only": tokens_only,
        "fuser": None,
    }


def _attention(full: Mapping[str, Any], channels: int, tokens_only: bool) -> bool | dict[str, Any]:
    if full["use_spatial_transformer"]:
        return _transformer(full, channels, tokens_only)
    return True


def _levels(full: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Fields of our LevelConfigs; attention_resolutions are factors of downsampling."""
    off = full["disable_self_attentions"] or [False] * len(full["channel_mult"])
    levels = []
    for i, (mult, blocks) in enumerate(
        zip(full["channel_mult"], full["num_res_blocks"], strict=True)
    ):
        channels = int(mult) * full["model_channels"]
        attends = 2**i in full["attention_resolutions"]
        levels.append(
            {
                "channels": channels,
                "num_blocks": blocks,
                "attention": attends and _attention(full, channels, off[i]),
            }
        )
    return levels


def _pixel_heads(full: Mapping[str, Any]) -> dict[str, Any]:
    """Heads of attention between pixels: of the whole network."""
    if full["num_head_channels"] != -1:
        return {"num_heads": None, "head_dim": full["num_head_channels"], "num_heads_up": None}
    up, down = full["num_heads_upsample"], full["num_heads"]
    # Otherwise the original gives the way up heads of a width, and their number goes unread.
    reads_up = full["legacy"] and up not in (-1, down)
    return {"num_heads": down, "head_dim": None, "num_heads_up": up if reads_up else None}


def _conditioners(full: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    told: dict[str, tuple[str, dict[str, Any]]] = {}
    if full["use_spatial_transformer"]:
        width = full["context_dim"]
        width = width[0] if isinstance(width, list | tuple) else width
        told["tokens"] = ("given_tokens", {"dim": width})
    if full["num_classes"] is not None:
        told["label"] = _label(full)
    return told


def _label(full: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The conditioner of the class embedding."""
    classes, dim = full["num_classes"], 4 * full["model_channels"]
    if classes == _CONTINUOUS:
        return "linear_vector", {"features": 1, "dim": dim, "name": "label"}
    if classes == _SEQUENTIAL:
        width = full["adm_in_channels"]
        if not isinstance(width, int):
            raise UnsupportedOption(
                f"adm_in_channels must be an integer where num_classes is {classes!r}, got {width}"
            )
        return "projected_vector", {"features": width, "dim": dim, "name": "label"}
    if not isinstance(classes, int) or isinstance(classes, bool):
        raise UnsupportedOption(
            f"num_classes of {UNET} must be None, an integer, {_CONTINUOUS!r} or {_SEQUENTIAL!r}, "
            f"got {classes!r}"
        )
    return "label", {"num_classes": classes, "dim": dim, "null": False}


def compvis_unet_config(config: Mapping[str, Any]) -> UNetForm:
    """Translates the arguments of ldm.modules.diffusionmodules.openaimodel.UNetModel.

    Args:
      config: the arguments by name, of CompVis' repository or of Stability AI's; missing ones
        have the constructor's defaults.

    Returns:
      The same network in our terms.

    Raises:
      UnsupportedOption: naming the option and the value that our network does not have.
    """
    full = _complete(config)
    transformer = full["use_spatial_transformer"]
    heads = {"num_heads": None, "head_dim": None, "num_heads_up": None}
    bottom = int(full["channel_mult"][-1]) * full["model_channels"]
    unet = {
        **(heads if transformer else _pixel_heads(full)),
        "levels": _levels(full),
        "middle_attention": _attention(full, bottom, full["disable_middle_self_attn"]),
        "time_embed_dim": 4 * full["model_channels"],
        "time_channels": full["model_channels"],
        "time_features": {"cos_first": True, "freq_shift": 0},
        "norm_groups": 32,
        "norm_eps": 1e-5,
        "dropout": float(full["dropout"]),
        "scale_shift": full["use_scale_shift_norm"],
        "resample": openai.resample_of(full),
        "out_channels": full["out_channels"],
        "needs_vector": full["num_classes"] is not None,
        "remat": full["use_checkpoint"],
    }
    kept = {
        "image_size": full["image_size"],
        "use_new_attention_order": full["use_new_attention_order"],
        "use_linear_in_transformer": full["use_linear_in_transformer"],
    }
    return UNetForm(unet, full["in_channels"], _conditioners(full), kept)


def _written_heads(unet: Mapping[str, Any], specs: Sequence[tuple[int, Any]]) -> dict[str, Any]:
    """Options of the heads; specs are (width, attention)."""
    if not any(isinstance(spec, Mapping) for _, spec in specs):
        up = unet["num_heads_up"]
        if unet["head_dim"] is not None:
            return {"num_head_channels": unet["head_dim"]}
        return {
            "num_heads": unet["num_heads"] or 1,
            "num_heads_upsample": -1 if up is None else up,
        }
    numbers = {spec["num_heads"] for _, spec in specs}
    widths = {spec["head_dim"] for _, spec in specs}
    if numbers == {None} and len(widths) == 1:
        return {"num_head_channels": widths.pop(), "legacy": False}
    if len(numbers) == 1:
        return {"num_heads": numbers.pop(), "legacy": False}
    for width in range(1, max(channels for channels, _ in specs) + 1):
        made = [channels // width for channels, _ in specs]
        wanted = [spec["num_heads"] or channels // spec["head_dim"] for channels, spec in specs]
        if made == wanted:
            return {"num_head_channels": width}
    raise UnsupportedOption(f"{UNET} has one width of heads or one number of them for all levels")


def compvis_unet_options(form: UNetForm) -> dict[str, Any]:
    """The arguments of UNetModel: `compvis_unet_config` backwards.

    Args:
      form: with every field of our UNetConfig.

    Raises:
      UnsupportedOption: if UNetModel has no such attention or conditioner.
    """
    unet, levels = form.unet, form.unet["levels"]
    width = unet["time_channels"]
    specs = [(level["channels"], level["attention"]) for level in levels if level["attention"]]
    specs.append((levels[-1]["channels"], unet["middle_attention"]))
    transformers = [spec for _, spec in specs if isinstance(spec, Mapping)]
    if transformers and len(transformers) < len(specs):
        raise UnsupportedOption(f"{UNET} has one kind of attention for all levels")
    off = [bool(level["attention"]) and level["attention"] is not True and
           level["attention"]["tokens_only"] for level in levels]  # fmt: skip
    blocks = [level["num_blocks"] for level in levels]
    options = {
        **form.kept,
        "in_channels": form.in_channels,
        "out_channels": unet["out_channels"],
        "model_channels": width,
        "channel_mult": [level["channels"] // width for level in levels],
        "num_res_blocks": blocks[0] if len(set(blocks)) == 1 else blocks,
        "attention_resolutions": [2**i for i, level in enumerate(levels) if level["attention"]],
        "dropout": unet["dropout"],
        "use_scale_shift_norm": unet["scale_shift"],
        "resblock_updown": unet["resample"] == "block",
        "conv_resample": unet["resample"] != "pool",
        "use_checkpoint": unet["remat"],
        "use_spatial_transformer": bool(transformers),
        **_written_heads(unet, specs),
        **_written_classes(form),
    }
    if transformers:
        options["context_dim"] = form.conditioners["tokens"][1]["dim"]
        options["transformer_depth"] = transformers[0]["depth"]
        options["disable_self_attentions"] = off if any(off) else None
        options["disable_middle_self_attn"] = transformers[-1]["tokens_only"]
    return options


def _written_classes(form: UNetForm) -> dict[str, Any]:
    if "label" not in form.conditioners:
        return {}
    kind, fields = form.conditioners["label"]
    if kind == "label":
        return {"num_classes": fields["num_classes"]}
    if kind == "linear_vector" and fields["features"] == 1:
        return {"num_classes": _CONTINUOUS}
    if kind == "projected_vector":
        return {"num_classes": _SEQUENTIAL, "adm_in_channels": fields["features"]}
    raise UnsupportedOption(f"{UNET} has no conditioner {kind!r}")


def compvis_unet_rows(config: Mapping[str, Any]) -> tuple[Row, ...]:
    """The table of a UNetModel's weights, without what embeds its classes.

    Args:
      config: arguments as of `compvis_unet_config`; the blocks' numbers depend on them.

    Raises:
      UnsupportedOption: as `compvis_unet_config`.
    """
    full = _complete(config)
    linear = full["use_linear_in_transformer"]
    transformer = spatial_transformer_rows(linear_projections=linear)

    def attention(channels: int, part: str) -> tuple[Row, ...]:
        if full["use_spatial_transformer"]:
            return transformer
        if full["use_new_attention_order"]:
            return openai.self_attention_rows(None)
        up = full["num_heads_upsample"] if full["legacy"] else -1
        heads = openai.head_count({**full, "num_heads_upsample": up}, channels, part)
        return openai.self_attention_rows(heads)

    table = (_levels(full), openai.resample_of(full), attention)
    return (*openai.encoder_rows(*table), *openai.decoder_rows(*table))


# The class embedding of a UNetModel, by our kind of conditioner.
LABEL_ROWS: Mapping[str, tuple[Row, ...]] = {
    "label": openai.LABEL_ROWS,
    "linear_vector": (Row("label_emb", "dense", "linear"),),
    "projected_vector": (
        Row("label_emb.0.0", "dense_1", "linear"),
        Row("label_emb.0.2", "dense_2", "linear"),
    ),
}


def with_averages(
    tensors: Mapping[str, Any], *, model: str = "model.", ema: str = "model_ema."
) -> dict[str, Any]:
    """A checkpoint whose network's weights are their moving averages.

    Averages lie beside the weights under the same names without dots, so that the weights' names
    are what tells them: "model.a.0.bias" has its average in "model_ema.a0bias".

    Args:
      tensors: of the whole file, by name.
      model: what precedes the network's names.
      ema: what precedes the averages' names.

    Returns:
      The tensors without averages and their counters.

    Raises:
      MappingError: if averages are missing, of another shape or left over, or two weights have
        the same name without dots.
    """
    counters = {ema + "decay", ema + "num_updates"}
    averages = {name for name in tensors if name.startswith(ema)} - counters
    if not averages:
        raise MappingError(f"there are no averages: no tensor's name begins with {ema!r}")
    result, problems, owners = {}, [], {}
    for name, tensor in tensors.items():
        if name.startswith(ema):
            continue
        result[name] = tensor
        if not name.startswith(model):
            continue
        source = ema + name.removeprefix(model).replace(".", "")
        if source in owners:
            problems.append(f"{source} is the average of {owners[source]} and of {name}")
        elif source not in averages:
            problems.append(f"missing: {source} (for {name})")
        elif tuple(tensors[source].shape) != tuple(tensor.shape):
            problems.append(
                f"{source} has shape {tuple(tensors[source].shape)}, expected that of {name}, "
                f"{tuple(tensor.shape)}"
            )
        owners[source] = name
        result[name] = tensors[source] if source in averages else tensor
    problems += [f"unexpected: {name}" for name in sorted(averages - set(owners))]
    if problems:
        raise MappingError(
            f"the averages do not fit the weights, {len(problems)} problem(s):\n  "
            + "\n  ".join(problems)
        )
    return result
