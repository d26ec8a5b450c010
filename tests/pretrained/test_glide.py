"""GLIDE: names and options both ways, the published networks, and what a network is shown."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.io.mapping import convert, export
from diffusion_jax.io.tables.glide import glide_config
from diffusion_jax.io.tables.unet import UnsupportedOption
from diffusion_jax.models.glide import glide_text_encoder, glide_unet
from diffusion_jax.pretrained.components.glide import GLIDE, MODULE

BASE = {
    "text_ctx": 4,
    "xf_width": 32,
    "xf_layers": 1,
    "xf_heads": 2,
    "xf_final_ln": True,
    "xf_padding": True,
    "n_vocab": 10,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_head_channels": 16,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
PLAIN = {
    **BASE,
    "num_head_channels": -1,
    "num_heads": 2,
    "num_heads_upsample": 4,
    "xf_final_ln": False,
    "xf_padding": False,
    "resblock_updown": False,
    "channel_mult": [1, 1],
    "in_channels": 4,
}
NO_TEXT = {**BASE, "xf_width": 0}
CASES = {
    "base": ("Text2ImUNet", BASE),
    "plain inpainting": ("InpaintText2ImUNet", PLAIN),
    "upsampling": ("SuperResText2ImUNet", BASE),
    "both": ("SuperResInpaintText2ImUnet", BASE),
    "no text": ("Text2ImUNet", NO_TEXT),
}


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def flat(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("name, options", CASES.values(), ids=CASES)
def test_options_and_names_go_there_and_back(name, options):
    component = GLIDE[MODULE + name]
    config = component.read(options)
    written = component.write(config)
    assert component.read(written) == config
    assert written["_class_name"] == MODULE + name
    if options["xf_width"]:
        assert {key: written[key] for key in options} == options

    rows = component.rows(config, ())
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), component.shapes(config))
    tensors = export(params, rows)
    back = flat(convert(tensors, rows, component.shapes(config)))
    for path, leaf in flat(params).items():
        np.testing.assert_array_equal(back[path], leaf, err_msg=path)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    channels = options["in_channels"]
    channels += (channels + 1) * ("Inpaint" in name) + channels * ("SuperRes" in name)
    assert shapes["input_blocks.0.0.weight"][1] == channels
    if options["xf_width"]:
        assert shapes["middle_block.1.encoder_kv.weight"][1:] == (32, 1)
        assert shapes["transformer.resblocks.0.attn.c_qkv.weight"] == (96, 32)
        assert ("padding_embedding" in shapes) == ("final_ln.weight" in shapes) == (
            options["xf_padding"]
        )  # fmt: skip
    else:
        assert not any(key.startswith("transformer") or "encoder_kv" in key for key in shapes)


def test_queries_of_the_way_up_are_cut_by_its_own_heads():
    component = GLIDE[MODULE + "Text2ImUNet"]
    rows = {row.target: row for row in component.rows(component.read(PLAIN), ())}
    for part, heads in (("mid/attn", 2), ("up_0/attn_0", 4)):
        for name, count in (("query", 3), ("text_key", 2)):
            share = rows[f"network/{part}/attention/{name}"].share
            assert (share.groups, share.count) == (heads, count)
    # In the text encoder, too, each head's queries, keys and values lie together.
    shares = [rows[f"conditioner/text/block_{{i}}/attention/{name}"].share
              for name in ("query", "key", "value")]  # fmt: skip
    assert shares == [(i, 3, BASE["xf_heads"]) for i in range(3)]


def test_released_arguments_are_our_released_configurations():
    """The arguments are the defaults of the release: attention at 32, 16 and 8 pixels."""
    released = {
        **BASE, "text_ctx": 128, "xf_width": 512, "xf_layers": 16, "xf_heads": 8,
        "n_vocab": 50257, "model_channels": 192, "num_heads": 1, "num_head_channels": 64,
        "num_heads_upsample": -1, "dropout": 0.1, "use_fp16": True, "cache_text_emb": False,
    }  # fmt: skip
    base = {
        **released, "num_res_blocks": 3, "attention_resolutions": (2, 4, 8),
        "channel_mult": (1, 2, 3, 4),
    }  # fmt: skip
    config = GLIDE[MODULE + "InpaintText2ImUNet"].read(base)
    assert config.network == glide_unet(64) and config.text == glide_text_encoder()
    upsampler = {
        **released, "num_res_blocks": 2, "attention_resolutions": (8, 16, 32),
        "channel_mult": (1, 1, 2, 2, 4, 4),
    }  # fmt: skip
    config = GLIDE[MODULE + "SuperResText2ImUNet"].read(upsampler)
    assert config.network == glide_unet(256) and config.text == glide_text_encoder()
    with pytest.raises(ValueError, match="64 and 256 pixels, got 128"):
        glide_unet(128)


def test_a_network_is_shown_known_pixels_their_mask_and_the_low_resolution():
    config = GLIDE[MODULE + "SuperResInpaintText2ImUnet"].read(NO_TEXT)
    conditioner = config.conditioner((4, 4))
    assert not jax.tree.leaves(conditioner.init(jax.random.key(0)))
    image, low = normal(2, 4, 4, 3), normal(2, 2, 2, 3)
    known = (normal(2, 4, 4, 1) > 0).astype(np.float32)
    batch = {"known_image": image, "known_mask": known, "low_res": low}
    shown = np.asarray(conditioner.apply({}, batch, None).image)
    np.testing.assert_array_equal(shown[..., :3], image * known)
    np.testing.assert_array_equal(shown[..., 3:4], known)
    # Pixel centres lie at 1/4 and 3/4 between two of low resolution; corners repeat.
    weights = np.asarray([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    expected = np.einsum("ik,jl,bklc->bijc", weights, weights, low)
    np.testing.assert_allclose(shown[..., 4:], expected, atol=1e-6)
    np.testing.assert_array_equal(conditioner.null({}, batch).image, shown)
    for wrong in ({"known_image": image}, {**batch, "known_mask": known[..., 0]}):
        with pytest.raises(ValueError, match="known_mask"):
            conditioner.apply({}, wrong, None)


def test_the_null_text_is_all_padding():
    config = GLIDE[MODULE + "Text2ImUNet"].read(BASE)
    conditioner = config.conditioner((2, 2), dtype="bfloat16")
    params = jax.tree.map(
        lambda leaf: normal(*leaf.shape), jax.eval_shape(conditioner.init, jax.random.key(0))
    )
    nothing = {"tokens": jnp.full((2, 4), 3), "token_mask": jnp.zeros((2, 4), bool)}
    text = {"tokens": jnp.arange(8).reshape(2, 4), "token_mask": jnp.ones((2, 4), bool)}

    @jax.jit
    def both(params):
        return conditioner.apply(params, nothing, None), conditioner.null(params, text)

    expected, null = both(params)
    for slot in ("tokens", "vector"):
        ours, theirs = (np.asarray(getattr(c, slot), np.float32) for c in (null, expected))
        np.testing.assert_allclose(ours, theirs, rtol=0.05, atol=0.05)
    assert null.slots() == ("vector", "tokens") and null.tokens.dtype == jnp.bfloat16
    assert bool(jnp.isfinite(null.tokens).all())
    with pytest.raises(ValueError, match="no 'token_mask'"):
        conditioner.apply(params, {"tokens": nothing["tokens"]}, None)


@pytest.mark.parametrize("change, words", [
    ({"xf_ar": 0.5}, "xf_ar must be 0, got 0.5"),
    ({"num_classes": 3}, "num_classes must be None, got 3"),
    ({"use_new_attention_order": True}, "no option .use_new_attention_order"),
    ({"dims": 1}, "dims must be 2"),
    ({"xf_layers": None}, "xf_layers .* got None"),
])  # fmt: skip
def test_what_our_networks_do_not_have_is_named(change, words):
    with pytest.raises(UnsupportedOption, match=words):
        glide_config({**BASE, **change})
    with pytest.raises(UnsupportedOption, match="'Text2ImUNet'.*got 'UNet'"):
        glide_config(BASE, "UNet")
    with pytest.raises(UnsupportedOption, match="must have the option text_ctx"):
        glide_config({name: value for name, value in BASE.items() if name != "text_ctx"})
