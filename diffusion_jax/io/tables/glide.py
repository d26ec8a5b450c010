"""OpenAI's glide-text2im: its constructors' arguments and its names as those of our networks."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusion_jax.io.mapping import Row, Share, prefixed
from diffusion_jax.io.tables.openai import (
    DEFAULTS,
    REQUIRED,
    AttentionRows,
    complete,
    decoder_rows,
    dtype_of,
    encoder_fields,
    encoder_options,
    encoder_rows,
    head_count,
    level_fields,
    resample_of,
    self_attention_rows,
)
from diffusion_jax.io.tables.options import UnsupportedOption, require_integers


class Glide(NamedTuple):
    """What the arguments of a Text2ImUNet or one of its subclasses mean here.

    Attributes:
      unet: fields of our UNetConfig as plain values, as in `ADMUNet.unet`. Where there is a text
        every attention of it is a `TextAttention`, that at the bottom included.
      text: fields of our TextTransformerConfig, None for a network that reads no text.
      in_channels: channels of x.
      inpaint: cond.image begins with known · image and known, see `known_pixels`.
      low_res: cond.image ends with the image of low resolution, see `low_res`.
      dtype: name of the dtype of the activations.
    """

    unet: dict[str, Any]
    text: dict[str, Any] | None
    in_channels: int
    inpaint: bool
    low_res: bool
    dtype: str

    @property
    def image_channels(self) -> int:
        """Channels of cond.image, 0 without one."""
        return (self.in_channels + 1) * self.inpaint + self.in_channels * self.low_res


# class -> (inpaint, low_res)
CLASSES: Mapping[str, tuple[bool, bool]] = {
    "Text2ImUNet": (False, False),
    "SuperResText2ImUNet": (False, True),
    "InpaintText2ImUNet": (True, False),
    "SuperResInpaintText2ImUnet": (True, True),
}

_TEXT = ("text_ctx", "xf_width", "xf_layers", "xf_heads", "xf_final_ln")
_REQUIRED = (*_TEXT, *(option for option in REQUIRED if option != "image_size"))
_DEFAULTS: Mapping[str, Any] = {
    **{option: v for option, v in DEFAULTS.items() if option != "use_new_attention_order"},
    "n_vocab": 50257,
    "xf_padding": False,
    "xf_ar": 0.0,
    "share_unemb": False,
    "cache_text_emb": False,
    "num_classes": None,
}
# Options of which our networks have one value; a cache of the text changes no number.
_SUPPORTED: Mapping[str, tuple] = {
    "xf_ar": (0, 0.0),
    "share_unemb": (False,),
    "num_classes": (None,),
    "cache_text_emb": (False, True),
}


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    full = complete(config, _DEFAULTS, _REQUIRED)
    for option, values in _SUPPORTED.items():
        if full[option] not in values:
            raise UnsupportedOption(f"{option} must be {values[0]}, got {full[option]!r}")
    if full["xf_width"]:
        text = ("text_ctx", "xf_width", "xf_layers", "xf_heads", "n_vocab")
        require_integers(full, text, "the network")
    return full


def glide_config(config: Mapping[str, Any], class_name: str = "Text2ImUNet") -> Glide:
    """Translates the arguments of a constructor.

    Args:
      config: the arguments by name, with the tokenizer's `n_vocab` in its place; missing ones
        have the constructor's defaults.
      class_name: a key of `CLASSES`.

    Returns:
      The same network in our terms.

    Raises:
      UnsupportedOption: naming what is unknown, missing or not for images.
    """
    if class_name not in CLASSES:
        raise UnsupportedOption(f"the class must be one of {list(CLASSES)}, got {class_name!r}")
    full = _complete(config)
    inpaint, low_res = CLASSES[class_name]
    up = head_count({**full, "num_head_channels": -1}, 0, "up")
    by_number = full["num_head_channels"] == -1
    unet = {
        **encoder_fields(full),
        "out_channels": full["out_channels"],
        "num_heads_up": up if by_number and up != full["num_heads"] else None,
        "needs_vector": bool(full["xf_width"]),
    }
    return Glide(unet, _text_fields(full), full["in_channels"], inpaint, low_res, dtype_of(full))


def _text_fields(full: Mapping[str, Any]) -> dict[str, Any] | None:
    if not full["xf_width"]:
        return None
    return {
        "vector_dim": 4 * full["model_channels"],
        "vocab_size": full["n_vocab"],
        "length": full["text_ctx"],
        "width": full["xf_width"],
        "num_layers": full["xf_layers"],
        "num_heads": full["xf_heads"],
        "final_norm": full["xf_final_ln"],
        "padding": full["xf_padding"],
    }


def glide_options(
    unet: Mapping[str, Any], text: Mapping[str, Any] | None, in_channels: int
) -> dict[str, Any]:
    """The arguments of a constructor: `glide_config` backwards.

    Args:
      unet, text, in_channels: as in `Glide`.

    Raises:
      UnsupportedOption: if the levels differ in their number of blocks.
    """
    up = unet["num_heads_up"]
    text = text or {"length": 1, "width": 0, "num_layers": 1, "num_heads": 1, "padding": False}
    return {
        **encoder_options(unet),
        "in_channels": in_channels,
        "out_channels": unet["out_channels"],
        "num_heads_upsample": -1 if up is None else up,
        "text_ctx": text["length"],
        "xf_width": text["width"],
        "xf_layers": text["num_layers"],
        "xf_heads": text["num_heads"],
        "xf_final_ln": text.get("final_norm", False),
        "xf_padding": text["padding"],
        "n_vocab": text.get("vocab_size", _DEFAULTS["n_vocab"]),
    }


def _attention_rows(full: Mapping[str, Any]) -> AttentionRows:
    """One convolution makes queries, keys and values of the pixels, another those of the text."""

    def rows(channels: int, part: str) -> tuple[Row, ...]:
        heads = head_count(full, channels, part)
        pixels = self_attention_rows(heads)
        if not full["xf_width"]:
            return pixels
        text = tuple(
            Row("encoder_kv", f"attention/{name}", "conv1d_as_linear", Share(i, 2, heads))
            for i, name in enumerate(("text_key", "text_value"))
        )
        return pixels + text

    return rows


def glide_unet_rows(config: Mapping[str, Any]) -> tuple[Row, ...]:
    """The table of the weights of a UNet; its text encoder's is `glide_text_rows`.

    Args:
      config: arguments as of `glide_config`.

    Raises:
      UnsupportedOption: as `glide_config`.
    """
    full = _complete(config)
    table = (level_fields(full), resample_of(full), _attention_rows(full))
    return (*encoder_rows(*table), *decoder_rows(*table))


def glide_text_rows(config: Mapping[str, Any]) -> tuple[Row, ...]:
    """The table of the weights of a text encoder, none for a network that reads no text.

    Args:
      config: arguments as of `glide_config`.

    Raises:
      UnsupportedOption: as `glide_config`.
    """
    full = _complete(config)
    if not full["xf_width"]:
        return ()
    block = (
        Row("ln_1", "norm_1", "norm"),
        *(
            Row("attn.c_qkv", f"attention/{name}", "linear", Share(i, 3, full["xf_heads"]))
            for i, name in enumerate(("query", "key", "value"))
        ),
        Row("attn.c_proj", "attention/out", "linear"),
        Row("ln_2", "norm_2", "norm"),
        Row("mlp.c_fc", "dense_1", "linear"),
        Row("mlp.c_proj", "dense_2", "linear"),
    )
    return (
        Row("token_embedding", "token_embed", "embed"),
        Row("positional_embedding", "position", "param"),
        Row("padding_embedding", "padding", "param"),
        *prefixed(block, source="transformer.resblocks.{i}.", target="block_{i}/"),
        Row("final_ln", "norm_out", "norm"),
        Row("transformer_proj", "vector", "linear"),
    )
