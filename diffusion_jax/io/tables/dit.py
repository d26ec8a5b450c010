"""diffusers' DiTTransformer2DModel: its configuration and its names as those of our DiT."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusion_jax.io.mapping import Row, prefixed
from diffusion_jax.io.tables.options import (
    UnsupportedOption,
    complete,
    require,
    require_integers,
)
from diffusion_jax.io.tables.transformer import SELF_ATTENTION_BLOCK_ROWS

CLASS = "DiTTransformer2DModel"
# The class that the first released DiTs name; diffusers reads such files as its DiT class.
OLD_CLASS = "Transformer2DModel"


class DiTForm(NamedTuple):
    """What a DiTTransformer2DModel configuration means here.

    Attributes:
      dit: fields of our DiTConfig as plain values; `time_features` holds those of a Sinusoidal.
      in_channels: channels of x.
      num_classes: labels without the null label, which is the last row of every table.
    """

    dit: dict[str, Any]
    in_channels: int
    num_classes: int


DEFAULTS: Mapping[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}
# Options of the older class alone, which its own DiTs leave as they are.
_OLD_DEFAULTS: Mapping[str, Any] = {
    "cross_attention_dim": None,
    "num_vector_embeds": None,
    "use_linear_projection": False,
    "only_cross_attention": False,
    "double_self_attention": False,
    "attention_type": "default",
    "caption_channels": None,
    "interpolation_scale": None,
    "use_additional_conditions": None,
}
# norm_num_groups is of no consequence in diffusers either, whatever its value, and
# upcast_attention is always on here, where logits and softmax are float32.
_SUPPORTED: Mapping[str, tuple] = {
    "norm_type": ("ada_norm_zero",),
    "attention_bias": (True, False),
    "norm_elementwise_affine": (True, False),
    "upcast_attention": (True, False),
    "cross_attention_dim": (None,),
    "num_vector_embeds": (None,),
    "use_linear_projection": (False,),
    "only_cross_attention": (False,),
    "double_self_attention": (False,),
    "attention_type": ("default",),
    "caption_channels": (None,),
    "interpolation_scale": (None, 1, 1.0),
    "use_additional_conditions": (None, False),
}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu-approximate": "gelu_tanh",
    "geglu": "geglu",
    "geglu-approximate": "quick_gelu",
    "swiglu": "swiglu",
    "linear-silu": "silu",
}
_TIME_CHANNELS = 256


def dit_config(config: Mapping[str, Any]) -> DiTForm:
    """Translates the config.json of a DiTTransformer2DModel.

    Args:
      config: the parsed file; keys that start with "_" are metadata, missing ones have
        diffusers' defaults. Files of the older Transformer2DModel are read in the same way.

    Returns:
      The same network in our terms.

    Raises:
      UnsupportedOption: naming the option and the value that our DiT does not have.
    """
    defaults = {**DEFAULTS, **_OLD_DEFAULTS}
    if config.get("_class_name") == OLD_CLASS and "norm_type" not in config:
        # diffusers takes such a file for another network, with cross-attention.
        raise UnsupportedOption(f"a {OLD_CLASS} is a DiT if norm_type says 'ada_norm_zero'")
    full = complete(config, defaults, CLASS)
    require(full, _SUPPORTED, CLASS)
    sizes = ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers")
    require_integers(full, (*sizes, "sample_size", "patch_size", "num_embeds_ada_norm"), CLASS)
    if full["activation_fn"] not in _ACTIVATIONS:
        raise UnsupportedOption(
            f"activation_fn of {CLASS} must be one of {sorted(_ACTIVATIONS)}, "
            f"got {full['activation_fn']!r}"
        )
    out_channels = full["out_channels"]
    dit = {
        "patch_size": full["patch_size"],
        "width": full["num_attention_heads"] * full["attention_head_dim"],
        "depth": full["num_layers"],
        "num_heads": full["num_attention_heads"],
        "mlp_ratio": 4.0,
        "out_channels": full["in_channels"] if out_channels is None else out_channels,
        "base_size": full["sample_size"] // full["patch_size"],
        "activation": _ACTIVATIONS[full["activation_fn"]],
        "qkv_bias": full["attention_bias"],
        "mlp_norm_eps": full["norm_eps"],
        "mlp_norm_affine": full["norm_elementwise_affine"],
        "time_features": {"cos_first": True, "freq_shift": 1},
        "time_channels": _TIME_CHANNELS,
        "shared_embedding": False,
        "dropout": full["dropout"],
        "attention_dropout": full["dropout"],
        "needs_vector": True,
    }
    return DiTForm(dit, full["in_channels"], full["num_embeds_ada_norm"])


# Fields of our DiT that the other class has no option for, with the values it assumes.
_ASSUMED: Mapping[str, Any] = {
    "mlp_ratio": 4.0,
    "position": "sincos",
    "time_channels": _TIME_CHANNELS,
    "shared_embedding": False,
    "needs_vector": True,
}


def dit_options(form: DiTForm) -> dict[str, Any]:
    """The config.json of a DiTTransformer2DModel, back from our terms.

    Args:
      form: all fields of our DiTConfig in `dit`.

    Raises:
      UnsupportedOption: naming the field whose value the other class cannot express.
    """
    dit = form.dit
    for name, value in _ASSUMED.items():
        if dit[name] != value:
            raise UnsupportedOption(f"{name} of a {CLASS} is {value!r}, got {dit[name]!r}")
    if dit["base_size"] is None:
        raise UnsupportedOption(f"base_size of a {CLASS} must be a number, got None")
    features = {"cos_first": True, "freq_shift": 1, "max_period": 10000.0, "scale": 1.0}
    if dit["time_features"] != features:
        raise UnsupportedOption(
            f"time_features of a {CLASS} are {features}, got {dit['time_features']}"
        )
    if dit["dropout"] != dit["attention_dropout"]:
        raise UnsupportedOption(
            f"a {CLASS} has one dropout, got dropout = {dit['dropout']} and attention_dropout = "
            f"{dit['attention_dropout']}"
        )
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    if dit["activation"] not in names:
        raise UnsupportedOption(
            f"activation of a {CLASS} must be one of {sorted(names)}, got {dit['activation']!r}"
        )
    return {
        **DEFAULTS,
        "_class_name": CLASS,
        "num_attention_heads": dit["num_heads"],
        "attention_head_dim": dit["width"] // dit["num_heads"],
        "in_channels": form.in_channels,
        "out_channels": dit["out_channels"],
        "num_layers": dit["depth"],
        "dropout": dit["dropout"],
        "attention_bias": dit["qkv_bias"],
        "sample_size": dit["base_size"] * dit["patch_size"],
        "patch_size": dit["patch_size"],
        "activation_fn": names[dit["activation"]],
        "num_embeds_ada_norm": form.num_classes,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": dit["mlp_norm_affine"],
        "norm_eps": dit["mlp_norm_eps"],
    }


_BLOCK = (
    Row("norm1.linear", "modulation", "linear"),
    *SELF_ATTENTION_BLOCK_ROWS,
)
_TIME = (
    Row("linear_1", "dense_1", "linear"),
    Row("linear_2", "dense_2", "linear"),
)
_NETWORK = (
    Row("pos_embed.proj", "patch_in", "conv"),
    *prefixed(_BLOCK, source="transformer_blocks.{i}.", target="block_{i}/"),
    *prefixed(
        _TIME,
        source="transformer_blocks.{i}.norm1.emb.timestep_embedder.",
        target="time_embed_{i}/",
    ),
    Row("proj_out_1", "modulation_out", "linear"),
    Row("proj_out_2", "patch_out", "linear"),
)
# The table of a DiTTransformer2DModel, whatever its configuration: the network, and the tables
# of a label conditioner.
DIT_ROWS = (
    *prefixed(_NETWORK, target="network/"),
    Row(
        "transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight",
        "conditioner/label/embedding_{i}",
        "param",
    ),
)
