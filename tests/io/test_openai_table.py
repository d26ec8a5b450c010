"""guided-diffusion's arguments and names: both directions, both orders, every refusal."""

import dataclasses

import jax
import numpy as np
import pytest

from diffusion_jax.io.mapping import MappingError, convert, export
from diffusion_jax.io.tables.openai import (
    adm_classifier_config,
    adm_classifier_rows,
    adm_unet_config,
    adm_unet_rows,
    qkv_rows,
)
from diffusion_jax.io.tables.unet import UnsupportedOption
from diffusion_jax.models import adm_classifier, adm_unet, adm_upsampler
from diffusion_jax.models.attention import Attention
from diffusion_jax.pretrained.components.openai import GUIDED_DIFFUSION, MODULE

BASE = {
    "image_size": 4,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
}
ADM = {
    **BASE,
    "num_classes": 5,
    "num_head_channels": 16,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
PLAIN = {**BASE, "num_heads": 2, "num_heads_upsample": 4, "num_res_blocks": 2}
POOLED = {**BASE, "conv_resample": False, "attention_resolutions": [1, 2]}


UNET = GUIDED_DIFFUSION[MODULE + "UNetModel"]
UPSAMPLER = GUIDED_DIFFUSION[MODULE + "SuperResModel"]
CLASSIFIER = GUIDED_DIFFUSION[MODULE + "EncoderUNetModel"]


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def flat(params):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def there_and_back(component, options):
    """Names of the file; every parameter returns bit for bit."""
    config = component.read(options)
    expected, rows = component.shapes(config), component.rows(config, ())
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), expected)
    tensors = export(params, rows)
    back = flat(convert(tensors, rows, expected))
    for path, leaf in flat(params).items():
        np.testing.assert_array_equal(back[path], leaf, err_msg=path)
    again = export(convert(tensors, rows, expected), rows)
    assert all(np.array_equal(again[name], tensors[name]) for name in tensors)
    return {name: tensor.shape for name, tensor in tensors.items()}


# What becomes of the two changes of resolution. Blocks are numbered through: on the way down a
# change has a number of its own, on the way up it is the last module of a block.
CHANGES = {
    "adm": (ADM, "input_blocks.2.0.in_layers.2.weight", "output_blocks.1.2.in_layers.2.weight"),
    "plain": (PLAIN, "input_blocks.3.0.op.weight", "output_blocks.2.2.conv.weight"),
    "pooled": (POOLED, None, None),
}


@pytest.mark.parametrize("new_order", [False, True], ids=["legacy", "new"])
@pytest.mark.parametrize("config, down, up", CHANGES.values(), ids=CHANGES)
def test_the_unet_table_covers_the_network_both_ways(config, down, up, new_order):
    config = {**config, "use_new_attention_order": new_order}
    shapes = there_and_back(UNET, config)
    assert ("label_emb.weight" in shapes) == ("num_classes" in config)
    assert shapes["middle_block.1.qkv.weight"] == (192, 64, 1)
    assert shapes["out.2.weight"] == (6, 32, 3, 3)
    if down is None:
        prefixes = {".".join(name.split(".")[:3]) for name in shapes}
        assert "input_blocks.2.0" not in prefixes and "output_blocks.1.2" not in prefixes
    else:
        assert shapes[down] == (32, 32, 3, 3) and shapes[up] == (64, 64, 3, 3)


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
def test_the_classifier_table_covers_every_pool_both_ways(pool):
    config = {**BASE, "pool": pool, "num_head_channels": 32, "resblock_updown": True}
    shapes = there_and_back(CLASSIFIER, config)
    out = {name: shape for name, shape in shapes.items() if name.startswith("out.")}
    # Means of conv_in, a block, its change of resolution, a wider block and the bottom.
    features = 32 + 32 + 32 + 64 + 64
    weights = {
        "adaptive": {"out.0.weight": (64,), "out.3.weight": (6, 64, 1, 1)},
        "attention": {
            "out.0.weight": (64,),
            "out.2.positional_embedding": (64, 2 * 2 + 1),
            "out.2.qkv_proj.weight": (192, 64, 1),
            "out.2.c_proj.weight": (6, 64, 1),
        },
        "spatial": {"out.0.weight": (2048, features), "out.2.weight": (6, 2048)},
        "spatial_v2": {
            "out.0.weight": (2048, features),
            "out.1.weight": (2048,),
            "out.3.weight": (6, 2048),
        },
    }[pool]
    assert {name: shape for name, shape in out.items() if "bias" not in name} == weights
    assert not any(name.startswith("output_blocks") for name in shapes)


def fused_attention(x, weight, bias, *, heads, legacy):
    """Self-attention in float64 of one convolution's queries, keys and values, by their order."""
    made = x.astype(np.float64) @ weight[:, :, 0].T + bias
    width = x.shape[-1] // heads
    if legacy:
        made = made.reshape(*x.shape[:2], heads, 3, width).transpose(3, 0, 2, 1, 4)
    else:
        made = made.reshape(*x.shape[:2], 3, heads, width).transpose(2, 0, 3, 1, 4)
    q, k, v = made
    weights = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(width))
    out = weights / weights.sum(-1, keepdims=True) @ v
    return out.swapaxes(1, 2).reshape(x.shape)


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "new"])
def test_queries_keys_and_values_come_out_of_either_order(legacy):
    """With the order of the file our attention is its formula; with the other one it is not."""
    heads, x = 2, normal(1, 3, 8)
    tensors = {"qkv.weight": normal(24, 8, 1) * 0.5, "qkv.bias": normal(24)}
    expected = fused_attention(
        x, tensors["qkv.weight"], tensors["qkv.bias"], heads=heads, legacy=legacy
    )
    shape = {"kernel": np.zeros((8, 8), np.float32), "bias": np.zeros(8, np.float32)}
    identity = {"kernel": np.eye(8, dtype=np.float32), "bias": np.zeros(8, np.float32)}
    attend = jax.jit(Attention(heads).apply)

    def ours(order):
        rows = qkv_rows("qkv", "attention", heads=order)
        wanted = {"attention": dict.fromkeys(("query", "key", "value"), shape)}
        params = convert(tensors, rows, wanted)["attention"]
        return np.asarray(attend({"params": {**params, "out": identity}}, x))

    right, wrong = (heads, None) if legacy else (None, heads)
    np.testing.assert_allclose(ours(right), expected, atol=1e-5)
    assert np.abs(ours(wrong) - expected).max() > 0.1


def test_a_way_up_with_its_own_heads_is_cut_by_them():
    rows = {row.target: row for row in adm_unet_rows(PLAIN)}
    assert rows["down_1/attn_0/attention/query"].share.groups == 2
    assert rows["mid/attn/attention/query"].share.groups == 2
    assert rows["up_0/attn_0/attention/query"].share.groups == 4
    rows = {row.target: row for row in adm_unet_rows({**PLAIN, "num_head_channels": 8})}
    assert rows["up_0/attn_0/attention/query"].share.groups == 64 // 8


def test_a_file_of_another_configuration_is_refused():
    config = UNET.read(ADM)
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), UNET.shapes(config))
    tensors = export(params, UNET.rows(config, ()))
    other = UNET.read({**ADM, "resblock_updown": False})
    with pytest.raises(MappingError, match=r"missing: input_blocks.2.0.op.weight"):
        convert(tensors, UNET.rows(other, ()), UNET.shapes(other))


def released(image_size, factors, **options):
    return {
        "image_size": image_size,
        "in_channels": 3,
        "out_channels": 6,
        "attention_resolutions": factors,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        **options,
    }


def test_released_arguments_are_our_released_configurations():
    """The arguments follow from the published commands; attention factors are 64 / 32 …"""
    unet = released(
        64, (2, 4, 8), model_channels=192, num_res_blocks=3, channel_mult=(1, 2, 3, 4),
        num_head_channels=64, num_heads=4, dropout=0.1, num_classes=1000,
        use_new_attention_order=True, use_fp16=True,
    )  # fmt: skip
    form = adm_unet_config(unet)
    assert UNET.read(unet).network == adm_unet(64)
    assert (form.in_channels, form.image_channels, form.num_classes) == (3, 0, 1000)
    assert form.dtype == "float16"

    half = released(
        512, (16, 32, 64), model_channels=256, num_res_blocks=2, num_head_channels=64,
        channel_mult=(0.5, 1, 1, 2, 2, 4, 4),
    )  # fmt: skip
    assert UNET.read(half).network == adm_unet(512, class_conditional=False)

    upsampler = released(
        256, (8, 16, 32), model_channels=192, num_res_blocks=2, num_heads=4, num_classes=1000,
        channel_mult=(1, 1, 2, 2, 4, 4),
    )  # fmt: skip
    form = adm_unet_config(upsampler, super_resolution=True)
    assert (form.in_channels, form.image_channels, form.dtype) == (6, 3, "float32")
    ours = UPSAMPLER.read(upsampler).network
    assert dataclasses.replace(ours, time_embed_dim=None, time_channels=None) == adm_upsampler(256)

    classifier = released(
        512, (16, 32, 64), model_channels=128, num_res_blocks=2, num_head_channels=64,
        channel_mult=(0.5, 1, 1, 2, 2, 4, 4), pool="attention",
    ) | {"out_channels": 1000}  # fmt: skip
    form = adm_classifier_config(classifier)
    assert CLASSIFIER.read(classifier).classifier == adm_classifier(512)
    assert (form.in_channels, form.image_size) == (3, 512)


def test_missing_arguments_have_the_constructors_defaults():
    config = {name: value for name, value in BASE.items() if name != "channel_mult"}
    unet = adm_unet_config(config).unet
    assert [level["channels"] for level in unet["levels"]] == [32, 64, 128, 256]
    assert [level["attention"] for level in unet["levels"]] == [False, True, False, False]
    assert (unet["resample"], unet["scale_shift"], unet["num_heads"]) == ("conv", False, 1)
    assert (unet["num_heads_up"], unet["needs_vector"], unet["remat"]) == (None, False, False)
    assert adm_classifier_config(config).classifier["pool"] == "adaptive"


@pytest.mark.parametrize("change, words", [
    ({"dims": 3}, "dims must be 2.*got 3"),
    ({"dims": 1}, "dims must be 2.*got 1"),
    ({"chanel_mult": [1]}, "no option 'chanel_mult' .did you mean 'channel_mult'"),
    ({"num_res_blocks": [1, 2]}, "one number for all levels, got .1, 2."),
    ({"image_size": "64"}, "image_size .* integer of at least 1, got '64'"),
    ({"model_channels": None}, "model_channels .* integer of at least 1, got None"),
    ({"attention_resolutions": "32,16"}, "attention_resolutions .* list of numbers, got '32,16'"),
    ({"resblock_updown": "False"}, "resblock_updown .* like its default False, got 'False'"),
])  # fmt: skip
def test_what_our_networks_do_not_have_is_named(change, words):
    for translate in (adm_unet_config, adm_unet_rows, adm_classifier_config, adm_classifier_rows):
        with pytest.raises(UnsupportedOption, match=words):
            translate({**BASE, **change})


def test_options_of_one_network_are_unknown_to_the_other():
    with pytest.raises(UnsupportedOption, match="'pool'"):
        adm_unet_config({**BASE, "pool": "adaptive"})
    with pytest.raises(UnsupportedOption, match="'num_classes'"):
        adm_classifier_config({**BASE, "num_classes": 3})
    with pytest.raises(UnsupportedOption, match="got 'max'"):
        adm_classifier_rows({**BASE, "pool": "max"})
    with pytest.raises(UnsupportedOption, match="needs num_head_channels"):
        adm_classifier_config({**BASE, "pool": "attention"})
    with pytest.raises(UnsupportedOption, match="must have the option image_size"):
        adm_unet_config({name: value for name, value in BASE.items() if name != "image_size"})
