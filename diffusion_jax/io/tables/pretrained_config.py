"""What the configurations of transformers' models have in common, and how they are completed."""

from collections.abc import Collection, Mapping
from typing import Any

from diffusion_jax.io.tables.options import UnsupportedOption, complete

# Keys that any configuration may hold and that say nothing about what an encoder computes:
# about the file, about calls and their outputs, about heads and generation, about training.
METADATA: frozenset[str] = frozenset(
    """
    architectures model_type transformers_version torch_dtype dtype use_bfloat16 torchscript
    tokenizer_class prefix finetuning_task problem_type task_specific_params id2label label2id
    num_labels return_dict output_attentions output_hidden_states output_scores output_past
    return_dict_in_generate chunk_size_feed_forward use_cache pruned_heads tie_encoder_decoder
    tie_word_embeddings is_encoder_decoder add_cross_attention cross_attention_hidden_size
    tf_legacy_loss initializer_range initializer_factor gradient_checkpointing
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    bad_words_ids begin_suppress_tokens suppress_tokens forced_bos_token_id forced_eos_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty length_penalty max_length min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences remove_invalid_values repetition_penalty
    temperature top_k top_p typical_p
    """.split()
)


def read_options(
    config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    owner: str,
    *,
    unread: Collection[str] = (),
    aliases: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The options of a config.json that an encoder reads, defaults filled in.

    Args:
      config: the parsed file.
      defaults: every option that is read, and its default.
      owner: name of the class, for messages.
      unread: keys beside `METADATA` that have no effect on the encoder.
      aliases: other names of options -> their names.

    Raises:
      UnknownOptions: naming the keys that nobody knows.
      UnsupportedOption: if an option is given twice with two values.
    """
    given: dict[str, Any] = {}
    for key, value in config.items():
        name = (aliases or {}).get(key, key)
        if name not in defaults and (name in METADATA or name in unread):
            continue
        if given.setdefault(name, value) != value:
            raise UnsupportedOption(f"{name} of {owner} is given twice, as {key} as well")
    return complete(given, defaults, owner)


# Names of activations in configurations -> ours; the first of several is the one that is written.
ACTIVATIONS: Mapping[str, str] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "mish": "mish",
}


def our_activation(option: str, value: Any, owner: str) -> str:
    """Our name of an activation.

    Raises:
      UnsupportedOption: if it is none of `ACTIVATIONS`.
    """
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise refuse(option, value, "one of " + ", ".join(ACTIVATIONS), owner)
    return ACTIVATIONS[value]


def their_activation(activation: str) -> str:
    """The name that a configuration has for one of our activations."""
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == activation)


def refuse(option: str, value: Any, expected: str, owner: str) -> UnsupportedOption:
    """The error for a value that we do not compute."""
    return UnsupportedOption(f"{option} of {owner} must be {expected}, got {value!r}")
