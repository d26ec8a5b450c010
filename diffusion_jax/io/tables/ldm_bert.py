"""The text encoder of latent diffusion: diffusers' LDMBertModel and the original BERTEmbedder."""

from collections.abc import Mapping
from typing import Any

from diffusion_jax.io.mapping import Row, prefixed
from diffusion_jax.io.tables.options import UnsupportedOption, complete, require_integers
from diffusion_jax.io.tables.pretrained_config import (
    our_activation,
    read_options,
    their_activation,
)

_OWNER = "LDMBertModel"

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 30522,
    "max_position_embeddings": 77,
    "encoder_layers": 32,
    "encoder_ffn_dim": 5120,
    "encoder_attention_heads": 8,
    "head_dim": 64,
    "activation_function": "gelu",
    "d_model": 1280,
}
_ALIASES: Mapping[str, str] = {
    "hidden_size": "d_model",
    "num_attention_heads": "encoder_attention_heads",
}
# Dropout acts in training only. diffusers stores the others and never reads them.
_UNREAD = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "classifier_dropout",
    "encoder_layerdrop",
    "init_std",
    "num_hidden_layers",
    "scale_embedding",
)
_FIELDS: Mapping[str, str] = {  # ours -> theirs
    "vocab_size": "vocab_size",
    "length": "max_position_embeddings",
    "width": "d_model",
    "num_layers": "encoder_layers",
    "num_heads": "encoder_attention_heads",
    "head_dim": "head_dim",
    "mlp_width": "encoder_ffn_dim",
}


def ldm_bert_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the config.json of an LDMBertModel.

    Args:
      config: the parsed file; missing options have diffusers' defaults.

    Returns:
      Fields of our LDMBertConfig as plain values.

    Raises:
      UnsupportedOption: naming the option and the value that our encoder does not have.
    """
    full = read_options(config, DEFAULTS, _OWNER, unread=_UNREAD, aliases=_ALIASES)
    require_integers(full, tuple(_FIELDS.values()), _OWNER)
    activation = our_activation("activation_function", full["activation_function"], _OWNER)
    fields = {ours: full[theirs] for ours, theirs in _FIELDS.items()}
    return {**fields, "activation": activation, "logits": True}


def write_ldm_bert_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`ldm_bert_config` backwards: the config.json of an LDMBertModel.

    Raises:
      UnsupportedOption: if the projection to the vocabulary was left out.
    """
    if not fields["logits"]:
        raise UnsupportedOption(f"a file of an {_OWNER} holds to_logits; logits must be True")
    return {
        "architectures": [_OWNER],
        "model_type": "ldmbert",
        **{theirs: fields[ours] for ours, theirs in _FIELDS.items()},
        "num_hidden_layers": fields["num_layers"],
        "activation_function": their_activation(fields["activation"]),
    }


# Where it runs, whether texts or tokens are passed in, and dropout in training.
_EMBEDDER_UNREAD = ("device", "use_tokenizer", "embedding_dropout")
_EMBEDDER_DEFAULTS: Mapping[str, Any] = {
    "n_embed": None,
    "n_layer": None,
    "vocab_size": 30522,
    "max_seq_len": 77,
    **dict.fromkeys(_EMBEDDER_UNREAD),
}


def bert_embedder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the arguments of the constructor of the original BERTEmbedder.

    Args:
      config: the arguments by name, n_embed and n_layer among them; others have the
        constructor's defaults. Heads are 8 of width 64 whatever the width.

    Returns:
      Fields of our LDMBertConfig as plain values.

    Raises:
      UnsupportedOption: naming what is unknown, missing or no number.
    """
    full = complete(config, _EMBEDDER_DEFAULTS, "BERTEmbedder")
    numbers = ("n_embed", "n_layer", "vocab_size", "max_seq_len")
    require_integers(full, numbers, "BERTEmbedder")
    return {
        "vocab_size": full["vocab_size"],
        "length": full["max_seq_len"],
        "width": full["n_embed"],
        "num_layers": full["n_layer"],
        "num_heads": 8,
        "head_dim": 64,
        "mlp_width": 4 * full["n_embed"],
        "activation": "gelu",
        "logits": True,
    }


_BLOCK = (
    Row("self_attn_layer_norm", "norm_1", "norm"),
    Row("self_attn.q_proj", "attention/query", "linear"),
    Row("self_attn.k_proj", "attention/key", "linear"),
    Row("self_attn.v_proj", "attention/value", "linear"),
    Row("self_attn.out_proj", "attention/out", "linear"),
    Row("final_layer_norm", "norm_2", "norm"),
    Row("fc1", "dense_1", "linear"),
    Row("fc2", "dense_2", "linear"),
)

# The table of an LDMBertModel's weights.
LDM_BERT_ROWS: tuple[Row, ...] = (
    Row("model.embed_tokens", "token_embed", "embed"),
    Row("model.embed_positions.weight", "position", "param"),
    *prefixed(_BLOCK, source="model.layers.{i}.", target="block_{i}/"),
    Row("model.layer_norm", "norm_out", "norm"),
    Row("to_logits", "logits", "linear"),
)


def bert_embedder_rows(num_layers: int) -> tuple[Row, ...]:
    """The table of a BERTEmbedder's weights, "transformer.token_emb.weight" and so on.

    In a file of a whole model "cond_stage_model." precedes them; `prefixed` adds it.

    Args:
      num_layers: blocks; attention and feed-forward networks are numbered through in the file.
    """
    layers = "transformer.attn_layers.layers."
    rows = [
        Row("transformer.token_emb", "token_embed", "embed"),
        Row("transformer.pos_emb.emb.weight", "position", "param"),
        Row("transformer.norm", "norm_out", "norm"),
        Row("transformer.to_logits", "logits", "linear"),
    ]
    for i in range(num_layers):
        attention, mlp, block = f"{layers}{2 * i}", f"{layers}{2 * i + 1}", f"block_{i}"
        rows += [
            Row(f"{attention}.0", f"{block}/norm_1", "norm"),
            Row(f"{attention}.1.to_q", f"{block}/attention/query", "linear"),
            Row(f"{attention}.1.to_k", f"{block}/attention/key", "linear"),
            Row(f"{attention}.1.to_v", f"{block}/attention/value", "linear"),
            Row(f"{attention}.1.to_out", f"{block}/attention/out", "linear"),
            Row(f"{mlp}.0", f"{block}/norm_2", "norm"),
            Row(f"{mlp}.1.net.0.0", f"{block}/dense_1", "linear"),
            Row(f"{mlp}.1.net.2", f"{block}/dense_2", "linear"),
        ]
    return tuple(rows)
