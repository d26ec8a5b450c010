"""transformers' CLIP: its configurations and its names as those of our towers."""

from collections.abc import Collection, Mapping
from typing import Any

from diffusion_jax.io.mapping import Row, Share, prefixed
from diffusion_jax.io.tables.options import UnsupportedOption, require_integers
from diffusion_jax.io.tables.pretrained_config import (
    our_activation,
    read_options,
    refuse,
    their_activation,
)

TEXT_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
VISION_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
# Dropout acts in training only, which these towers are not put through; logit_scale_init_value
# is what the file's logit_scale replaces.
_UNREAD = ("dropout", "attention_dropout", "is_decoder")
_WHOLE = ("text_config", "vision_config", "text_config_dict", "vision_config_dict")
_WHOLE_DEFAULTS = {**dict.fromkeys(_WHOLE), "projection_dim": 512}

# With this eos_token_id, which is no end of a text, transformers pools at the largest number.
LARGEST_NUMBER = 2

_FIELDS: Mapping[str, str] = {  # ours -> theirs, for both towers
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "norm_eps": "layer_norm_eps",
}
_TEXT_FIELDS = {**_FIELDS, "vocab_size": "vocab_size", "length": "max_position_embeddings"}
_VISION_FIELDS = {
    **_FIELDS,
    "channels": "num_channels",
    "image_size": "image_size",
    "patch_size": "patch_size",
}


def _fields(
    full: Mapping[str, Any], names: Mapping[str, str], *, projection: bool, owner: str
) -> dict[str, Any]:
    whole = (name for name in names.values() if name != "layer_norm_eps")
    require_integers(full, [*whole, *(("projection_dim",) if projection else ())], owner)
    if full["hidden_size"] % full["num_attention_heads"]:
        multiple = f"a multiple of num_attention_heads = {full['num_attention_heads']}"
        raise refuse("hidden_size", full["hidden_size"], multiple, owner)
    if not isinstance(full["layer_norm_eps"], float):
        raise refuse("layer_norm_eps", full["layer_norm_eps"], "a number", owner)
    return {
        **{ours: full[theirs] for ours, theirs in names.items()},
        "activation": our_activation("hidden_act", full["hidden_act"], owner),
        "projection": full["projection_dim"] if projection else None,
    }


def clip_text_config(config: Mapping[str, Any], *, projection: bool) -> dict[str, Any]:
    """Translates the config.json of a CLIPTextModel, or that of a whole CLIPModel for its texts.

    Args:
      config: the parsed file; missing options have transformers' defaults.
      projection: it is a CLIPTextModelWithProjection. Without, projection_dim has no meaning.

    Returns:
      Fields of our CLIPTextConfig as plain values.

    Raises:
      UnsupportedOption: naming the option and the value that our tower does not have.
    """
    owner = "CLIPTextModel"
    if config.get("text_config") is not None:
        config = config["text_config"]
    full = read_options(config, TEXT_DEFAULTS, owner, unread=_UNREAD)
    end_id = full["eos_token_id"]
    if not isinstance(end_id, int):
        raise refuse("eos_token_id", end_id, "one integer", owner)
    return {
        **_fields(full, _TEXT_FIELDS, projection=projection, owner=owner),
        "end_id": None if end_id == LARGEST_NUMBER else end_id,
    }


def clip_vision_config(config: Mapping[str, Any], *, projection: bool) -> dict[str, Any]:
    """Translates the config.json of a CLIPVisionModel, or that of a CLIPModel for its images.

    Args:
      config: the parsed file; missing options have transformers' defaults.
      projection: it is a CLIPVisionModelWithProjection. Without, projection_dim has no meaning.

    Returns:
      Fields of our CLIPVisionConfig as plain values.

    Raises:
      UnsupportedOption: naming the option and the value that our tower does not have.
    """
    if config.get("vision_config") is not None:
        config = config["vision_config"]
    owner = "CLIPVisionModel"
    full = read_options(config, VISION_DEFAULTS, owner, unread=_UNREAD)
    return _fields(full, _VISION_FIELDS, projection=projection, owner=owner)


def clip_config(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Translates the config.json of a CLIPModel.

    Args:
      config: the parsed file. Where it has a text_config_dict or a vision_config_dict, as older
        files do, that says everything about its tower, missing options included.

    Returns:
      "text" and "vision": fields of our CLIPTextConfig and CLIPVisionConfig.

    Raises:
      UnsupportedOption: naming the option and the value that our towers do not have.
    """
    full = read_options(config, _WHOLE_DEFAULTS, "CLIPModel", unread=("logit_scale_init_value",))

    def tower(name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
        older = full[f"{name}_dict"]
        known = {} if older is None else {**defaults, **older}
        # The projections of a whole model are as wide as it says itself.
        return {**(full[name] or {}), **known, "projection_dim": full["projection_dim"]}

    return {
        "text": clip_text_config(tower("text_config", TEXT_DEFAULTS), projection=True),
        "vision": clip_vision_config(tower("vision_config", VISION_DEFAULTS), projection=True),
    }


def _written(fields: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    written = {theirs: fields[ours] for ours, theirs in names.items()}
    written["hidden_act"] = their_activation(fields["activation"])
    if fields["projection"] is not None:
        written["projection_dim"] = fields["projection"]
    return written


def write_clip_text_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`clip_text_config` backwards: the config.json of a text tower.

    Raises:
      UnsupportedOption: if texts end with a token whose number transformers reads as "the
        largest number".
    """
    if fields["end_id"] == LARGEST_NUMBER:
        raise UnsupportedOption(
            f"end_id must not be {LARGEST_NUMBER} in a file for transformers, which pools such "
            "texts at their largest number; give the token another number"
        )
    end_id = LARGEST_NUMBER if fields["end_id"] is None else fields["end_id"]
    projected = fields["projection"] is not None
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "eos_token_id": end_id,
        **_written(fields, _TEXT_FIELDS),
    }


def write_clip_vision_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`clip_vision_config` backwards: the config.json of an image tower."""
    projected = fields["projection"] is not None
    return {
        "architectures": ["CLIPVisionModelWithProjection" if projected else "CLIPVisionModel"],
        "model_type": "clip_vision_model",
        **_written(fields, _VISION_FIELDS),
    }


def write_clip_config(fields: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`clip_config` backwards: the config.json of both towers."""
    towers = {
        "text_config": write_clip_text_config(fields["text"]),
        "vision_config": write_clip_vision_config(fields["vision"]),
    }
    for tower in towers.values():
        del tower["architectures"]
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": fields["text"]["projection"],
        **towers,
    }


_BLOCK = (
    Row("layer_norm1", "norm_1", "norm"),
    Row("self_attn.q_proj", "attention/query", "linear"),
    Row("self_attn.k_proj", "attention/key", "linear"),
    Row("self_attn.v_proj", "attention/value", "linear"),
    Row("self_attn.out_proj", "attention/out", "linear"),
    Row("layer_norm2", "norm_2", "norm"),
    Row("mlp.fc1", "dense_1", "linear"),
    Row("mlp.fc2", "dense_2", "linear"),
)
_BLOCKS = prefixed(_BLOCK, source="encoder.layers.{i}.", target="block_{i}/")
_TEXT = (
    Row("embeddings.token_embedding", "token_embed", "embed"),
    Row("embeddings.position_embedding.weight", "position", "param"),
    *_BLOCKS,
    Row("final_layer_norm", "norm_out", "norm"),
)
_VISION = (
    Row("embeddings.class_embedding", "class_token", "param"),
    Row("embeddings.patch_embedding", "patch_in", "conv"),
    Row("embeddings.position_embedding.weight", "position", "param"),
    Row("pre_layrnorm", "norm_in", "norm"),
    *_BLOCKS,
    Row("post_layernorm", "norm_out", "norm"),
)

# Numbers of the positions, which count from zero.
POSITION_IDS = ("*position_ids",)
# What a file of a whole CLIPModel holds beside one tower.
TEXT_IGNORED = (*POSITION_IDS, "vision_model.*", "visual_projection.*", "text_projection.*")
VISION_IGNORED = (*POSITION_IDS, "text_model.*", "text_projection.*", "visual_projection.*")
TEXT_IGNORED += ("logit_scale",)
VISION_IGNORED += ("logit_scale",)


def _prefix(prefix: str, names: Collection[str]) -> str:
    """The published prefix, unless a file does without, as transformers 5 writes it."""
    return prefix if not names or any(name.startswith(prefix) for name in names) else ""


def clip_text_rows(names: Collection[str] = ()) -> tuple[Row, ...]:
    """The table of a text tower's weights, with its projection.

    Args:
      names: those of the file's tensors, which tell whether they start with "text_model."; none
        gives the published layout, which does.
    """
    rows = prefixed(_TEXT, source=_prefix("text_model.", names))
    return (*rows, Row("text_projection", "project", "linear"))


def clip_vision_rows(names: Collection[str] = ()) -> tuple[Row, ...]:
    """The table of an image tower's weights, with its projection.

    Args:
      names: those of the file's tensors, which tell whether they start with "vision_model.";
        none gives the published layout, which does.
    """
    rows = prefixed(_VISION, source=_prefix("vision_model.", names))
    return (*rows, Row("visual_projection", "project", "linear"))


# The table of a whole CLIPModel's weights.
CLIP_ROWS: tuple[Row, ...] = (
    *prefixed(clip_text_rows(), target="text/"),
    *prefixed(clip_vision_rows(), target="vision/"),
    Row("logit_scale", "logit_scale", "param"),
)


def _original_blocks(source: str) -> tuple[Row, ...]:
    """Blocks as OpenAI's and OpenCLIP's code names them."""
    qkv = [
        row
        for i, name in enumerate(("query", "key", "value"))
        for row in (
            Row("attn.in_proj_weight", f"attention/{name}/kernel", "transposed", Share(i, 3)),
            Row("attn.in_proj_bias", f"attention/{name}/bias", "param", Share(i, 3)),
        )
    ]
    rows = (
        Row("ln_1", "norm_1", "norm"),
        *qkv,
        Row("attn.out_proj", "attention/out", "linear"),
        Row("ln_2", "norm_2", "norm"),
        Row("mlp.c_fc", "dense_1", "linear"),
        Row("mlp.c_proj", "dense_2", "linear"),
    )
    return prefixed(rows, source=f"{source}transformer.resblocks.{{i}}.", target="block_{i}/")


# The tables of OpenAI's original weights and of OpenCLIP's, "cond_stage_model.model." before them
# in the original files of Stable Diffusion 2. Files may hold `ORIGINAL_IGNORED` as well.
OPEN_CLIP_TEXT_ROWS: tuple[Row, ...] = (
    Row("token_embedding", "token_embed", "embed"),
    Row("positional_embedding", "position", "param"),
    *_original_blocks(""),
    Row("ln_final", "norm_out", "norm"),
    Row("text_projection", "project/kernel", "param"),
)
OPEN_CLIP_VISION_ROWS: tuple[Row, ...] = (
    Row("visual.class_embedding", "class_token", "param"),
    Row("visual.conv1", "patch_in", "conv"),
    Row("visual.positional_embedding", "position", "param"),
    Row("visual.ln_pre", "norm_in", "norm"),
    *_original_blocks("visual."),
    Row("visual.ln_post", "norm_out", "norm"),
    Row("visual.proj", "project/kernel", "param"),
)
OPEN_CLIP_ROWS: tuple[Row, ...] = (
    *prefixed(OPEN_CLIP_TEXT_ROWS, target="text/"),
    *prefixed(OPEN_CLIP_VISION_ROWS, target="vision/"),
    Row("logit_scale", "logit_scale", "param"),
)
# Numbers that the sizes repeat, and the causal mask.
ORIGINAL_IGNORED = ("*input_resolution", "*context_length", "*vocab_size", "*attn_mask")
