"""diffusers' PriorTransformer and UnCLIPTextProjModel: their options and names as ours."""

from collections.abc import Mapping
from typing import Any

from diffusion_jax.io.mapping import Row, prefixed
from diffusion_jax.io.tables.options import (
    UnsupportedOption,
    complete,
    require,
    require_integers,
)
from diffusion_jax.io.tables.transformer import SELF_ATTENTION_BLOCK_ROWS

PRIOR = "PriorTransformer"
PRIOR_DEFAULTS: Mapping[str, Any] = {
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "num_layers": 20,
    "embedding_dim": 768,
    "num_embeddings": 77,
    "additional_embeddings": 4,
    "dropout": 0.0,
    "time_embed_act_fn": "silu",
    "norm_in_type": None,
    "embedding_proj_norm_type": None,
    "encoder_hid_proj_type": "linear",
    "added_emb_type": "prd",
    "time_embed_dim": None,
    "embedding_proj_dim": None,
    "clip_embed_dim": None,
}
_PRIOR_SUPPORTED: Mapping[str, tuple] = {
    "norm_in_type": (None, "layer"),
    "embedding_proj_norm_type": (None, "layer"),
    "encoder_hid_proj_type": (None, "linear"),
    "added_emb_type": (None, "prd"),
}
# diffusers' names of activations, in any case, -> ours.
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "mish": "mish"}


def prior_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the config.json of a PriorTransformer.

    Args:
      config: the parsed file; keys that start with "_" are metadata, missing ones have
        diffusers' defaults.

    Returns:
      Fields of our PriorConfig.

    Raises:
      UnsupportedOption: naming the option and the value that our prior does not have.
    """
    full = complete(config, PRIOR_DEFAULTS, PRIOR)
    require(full, _PRIOR_SUPPORTED, PRIOR)
    sizes = ("num_attention_heads", "attention_head_dim", "num_layers", "embedding_dim")
    require_integers(full, (*sizes, "num_embeddings"), PRIOR)
    activation = str(full["time_embed_act_fn"]).lower()
    if activation not in _ACTIVATIONS:
        raise UnsupportedOption(
            f"time_embed_act_fn of {PRIOR} must be one of {sorted(_ACTIVATIONS)}, "
            f"got {full['time_embed_act_fn']!r}"
        )
    return {
        "data_dim": full["embedding_dim"],
        "vector_dim": full["embedding_proj_dim"] or None,
        "out_dim": full["clip_embed_dim"] or None,
        "num_text_tokens": full["num_embeddings"],
        "num_other_tokens": full["additional_embeddings"],
        "width": full["num_attention_heads"] * full["attention_head_dim"],
        "depth": full["num_layers"],
        "num_heads": full["num_attention_heads"],
        "time_hidden": full["time_embed_dim"] or None,
        "time_activation": _ACTIVATIONS[activation],
        "token_projection": full["encoder_hid_proj_type"] == "linear",
        "vector_norm": full["embedding_proj_norm_type"] == "layer",
        "norm_in": full["norm_in_type"] == "layer",
        "query": full["added_emb_type"] == "prd",
        "dropout": full["dropout"],
    }


def prior_options(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a PriorTransformer, back from the fields of our PriorConfig."""
    return {
        "_class_name": PRIOR,
        "num_attention_heads": fields["num_heads"],
        "attention_head_dim": fields["width"] // fields["num_heads"],
        "num_layers": fields["depth"],
        "embedding_dim": fields["data_dim"],
        "num_embeddings": fields["num_text_tokens"],
        "additional_embeddings": fields["num_other_tokens"],
        "dropout": fields["dropout"],
        "time_embed_act_fn": fields["time_activation"],
        "norm_in_type": "layer" if fields["norm_in"] else None,
        "embedding_proj_norm_type": "layer" if fields["vector_norm"] else None,
        "encoder_hid_proj_type": "linear" if fields["token_projection"] else None,
        "added_emb_type": "prd" if fields["query"] else None,
        "time_embed_dim": fields["time_hidden"],
        "embedding_proj_dim": fields["vector_dim"],
        "clip_embed_dim": fields["out_dim"],
    }


_BLOCK = (
    Row("norm1", "norm_1", "norm"),
    *SELF_ATTENTION_BLOCK_ROWS,
)
_NETWORK = (
    Row("encoder_hidden_states_proj", "token_in", "linear"),
    Row("embedding_proj_norm", "vector_norm", "norm"),
    Row("embedding_proj", "vector_in", "linear"),
    Row("time_embedding.linear_1", "time_1", "linear"),
    Row("time_embedding.linear_2", "time_2", "linear"),
    Row("proj_in", "x_in", "linear"),
    Row("prd_embedding", "query", "param"),
    Row("positional_embedding", "positions", "param"),
    Row("norm_in", "norm_in", "norm"),
    *prefixed(_BLOCK, source="transformer_blocks.{i}.", target="block_{i}/"),
    Row("norm_out", "norm_out", "norm"),
    Row("proj_to_clip_embeddings", "out", "linear"),
)
# The table of a PriorTransformer, whatever its configuration: the network, and the statistics
# of the embeddings that it was trained on.
PRIOR_ROWS = (
    *prefixed(_NETWORK, target="network/"),
    Row("clip_mean", "codec/mean", "param"),
    Row("clip_std", "codec/std", "param"),
)

TEXT_PROJECTION = "UnCLIPTextProjModel"
TEXT_PROJECTION_DEFAULTS: Mapping[str, Any] = {
    "clip_extra_context_tokens": 4,
    "clip_embeddings_dim": 768,
    "time_embed_dim": None,  # no default: a file has to say it
    "cross_attention_dim": None,
}


def text_projection_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the config.json of an UnCLIPTextProjModel.

    Args:
      config: the parsed file; keys that start with "_" are metadata.

    Returns:
      Fields of our CLIPProjectionConfig.

    Raises:
      UnsupportedOption: naming an unknown option, or one that is missing or out of range.
    """
    full = complete(config, TEXT_PROJECTION_DEFAULTS, TEXT_PROJECTION)
    require_integers(full, tuple(TEXT_PROJECTION_DEFAULTS), TEXT_PROJECTION)
    return {
        "num_extra_tokens": full["clip_extra_context_tokens"],
        "embedding_dim": full["clip_embeddings_dim"],
        "vector_dim": full["time_embed_dim"],
        "token_dim": full["cross_attention_dim"],
    }


def text_projection_options(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of an UnCLIPTextProjModel, back from our CLIPProjectionConfig's fields."""
    return {
        "_class_name": TEXT_PROJECTION,
        "clip_extra_context_tokens": fields["num_extra_tokens"],
        "clip_embeddings_dim": fields["embedding_dim"],
        "time_embed_dim": fields["vector_dim"],
        "cross_attention_dim": fields["token_dim"],
    }


# The table of an UnCLIPTextProjModel.
TEXT_PROJECTION_ROWS = (
    Row("learned_classifier_free_guidance_embeddings", "null_image", "param"),
    Row("embedding_proj", "text_to_vector", "linear"),
    Row("clip_image_embeddings_project_to_time_embeddings", "image_to_vector", "linear"),
    Row("clip_extra_context_tokens_proj", "image_to_tokens", "linear"),
    Row("encoder_hidden_states_proj", "text_to_tokens", "linear"),
    Row("text_encoder_hidden_states_norm", "token_norm", "norm"),
)
