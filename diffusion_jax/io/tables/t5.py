"""transformers' T5EncoderModel: its configuration and its names as those of our encoder."""

from collections.abc import Mapping
from typing import Any

from diffusion_jax.io.mapping import Row, prefixed
from diffusion_jax.io.tables.options import require_integers
from diffusion_jax.io.tables.pretrained_config import (
    our_activation,
    read_options,
    refuse,
    their_activation,
)

_OWNER = "T5EncoderModel"

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "dense_act_fn": None,
    "is_gated_act": None,
    "is_decoder": False,
}
_ALIASES: Mapping[str, str] = {
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
}
# Dropout acts in training only, and the rest says something about the decoder, or about a
# bound on lengths that relative positions do not have.
_UNREAD = (
    "dropout_rate",
    "classifier_dropout",
    "num_decoder_layers",
    "scale_decoder_outputs",
    "n_positions",
)
_FIELDS: Mapping[str, str] = {  # ours -> theirs
    "vocab_size": "vocab_size",
    "width": "d_model",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "mlp_width": "d_ff",
    "num_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "norm_eps": "layer_norm_epsilon",
}


def _feed_forward(full: Mapping[str, Any]) -> tuple[str, bool]:
    """(our name of the activation, whether it is gated).

    dense_act_fn and is_gated_act, where a file gives them, overrule feed_forward_proj.
    """
    option, value = "feed_forward_proj", full["feed_forward_proj"]
    gate, _, name = str(value).rpartition("-")
    if gate not in ("", "gated"):
        raise refuse(option, value, "an activation or gated-ACTIVATION", _OWNER)
    # In files, "gated-gelu" means the approximation by tanh.
    name = "gelu_new" if value == "gated-gelu" else name
    if full["dense_act_fn"] is not None:
        option, name = "dense_act_fn", full["dense_act_fn"]
    gated = gate == "gated" if full["is_gated_act"] is None else full["is_gated_act"]
    if not isinstance(gated, bool):
        raise refuse("is_gated_act", gated, "true or false", _OWNER)
    return our_activation(option, name, _OWNER), gated


def t5_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the config.json of a T5EncoderModel, or that of a whole T5 for its encoder.

    Args:
      config: the parsed file; missing options have transformers' defaults.

    Returns:
      Fields of our T5Config as plain values.

    Raises:
      UnsupportedOption: naming the option and the value that our encoder does not have.
    """
    full = read_options(config, DEFAULTS, _OWNER, unread=_UNREAD, aliases=_ALIASES)
    numbers = [name for name in _FIELDS.values() if name != "layer_norm_epsilon"]
    require_integers(full, numbers, _OWNER)
    if full["is_decoder"] is not False:
        raise refuse("is_decoder", full["is_decoder"], "false", _OWNER)
    activation, gated = _feed_forward(full)
    return {
        **{ours: full[theirs] for ours, theirs in _FIELDS.items()},
        "activation": activation,
        "gated": gated,
    }


def write_t5_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`t5_config` backwards: the config.json of an encoder."""
    activation, gated = their_activation(fields["activation"]), fields["gated"]
    # "gated-gelu" is the only name that older readers know for T5 1.1.
    known = {("gelu_new", True): "gated-gelu"}
    return {
        "architectures": [_OWNER],
        "model_type": "t5",
        **{theirs: fields[ours] for ours, theirs in _FIELDS.items()},
        "feed_forward_proj": known.get(
            (activation, gated), ("gated-" if gated else "") + activation
        ),
        "dense_act_fn": activation,
        "is_gated_act": gated,
        "is_encoder_decoder": False,
        "use_cache": False,
    }


_BLOCK = (
    Row("layer.0.layer_norm", "norm_1", "norm"),
    Row("layer.0.SelfAttention.q", "attention/query", "linear"),
    Row("layer.0.SelfAttention.k", "attention/key", "linear"),
    Row("layer.0.SelfAttention.v", "attention/value", "linear"),
    Row("layer.0.SelfAttention.o", "attention/out", "linear"),
    Row("layer.1.layer_norm", "norm_2", "norm"),
    Row("layer.1.DenseReluDense.wo", "dense_2", "linear"),
)
_PLAIN = (Row("layer.1.DenseReluDense.wi", "dense_1", "linear"),)
_GATED = (
    Row("layer.1.DenseReluDense.wi_0", "gate", "linear"),
    Row("layer.1.DenseReluDense.wi_1", "dense_1", "linear"),
)

# The decoder of a whole T5 and its head; the encoder is read without them.
IGNORED = ("decoder.*", "lm_head.*")


def t5_rows(*, gated: bool) -> tuple[Row, ...]:
    """The table of an encoder's weights.

    Files may hold the embedding of the tokens as the encoder's, as that of encoder and decoder,
    or as both.

    Args:
      gated: the feed-forward networks have a gate.
    """
    block = _BLOCK + (_GATED if gated else _PLAIN)
    first = "encoder.block.0.layer.0.SelfAttention."
    return (
        Row("shared", "token_embed", "embed", copies=("encoder.embed_tokens",)),
        Row(f"{first}relative_attention_bias.weight", "distance_bias", "param"),
        *prefixed(block, source="encoder.block.{i}.", target="block_{i}/"),
        Row("encoder.final_layer_norm", "norm_out", "norm"),
    )
