"""Autoencoders' options and names: diffusers', older ones and CompVis', both ways, refusals."""

import dataclasses

import jax
import numpy as np
import pytest

from diffusion_jax.io.mapping import MappingError, convert, export, prefixed
from diffusion_jax.io.tables.autoencoder import (
    COMPVIS_IGNORE,
    autoencoder_rows,
    compvis_autoencoder_rows,
    compvis_kl_config,
    compvis_vq_config,
)
from diffusion_jax.io.tables.unet import UnsupportedOption
from diffusion_jax.models.autoencoder import AutoencoderKLConfig, AutoencoderLevel
from diffusion_jax.models.first_stages import FIRST_STAGES
from diffusion_jax.models.vq import VQModelConfig
from diffusion_jax.pretrained.components import COMPONENTS
from diffusion_jax.pretrained.components.autoencoder import autoencoder_shapes, with_levels

DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
SD = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": [DOWN] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": [UP] * 4,
}
MOVQ = {
    "_class_name": "VQModel",
    "block_out_channels": [128, 256, 256, 512],
    "down_block_types": [DOWN] * 3 + ["AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D"] + [UP] * 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_type": "spatial",
    "num_vq_embeddings": 16384,
    "vq_embed_dim": 4,
}
# Everything that differs from the defaults at once.
KL = {
    "_class_name": "AutoencoderKL",
    "act_fn": "gelu",
    "block_out_channels": [4, 8],
    "down_block_types": ["AttnDownEncoderBlock2D", DOWN],
    "up_block_types": [UP, UP],
    "in_channels": 4,
    "out_channels": 1,
    "latent_channels": 2,
    "layers_per_block": 3,
    "norm_num_groups": 2,
    "sample_size": [16, 24],
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
    "latents_mean": [0.5, 1.5],
    "latents_std": [2.5, 3.5],
    "force_upcast": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
}
VQ = {
    "_class_name": "VQModel",
    "act_fn": "mish",
    "block_out_channels": [8, 16],
    "down_block_types": [DOWN, DOWN],
    "up_block_types": ["AttnUpDecoderBlock2D", UP],
    "in_channels": 4,
    "out_channels": 1,
    "latent_channels": 5,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
    "scaling_factor": 0.5,
    "force_upcast": True,
    "mid_block_add_attention": False,
    "num_vq_embeddings": 7,
    "vq_embed_dim": 2,
    "norm_type": "group",
    "lookup_from_codebook": True,
}
TINY = {
    "_class_name": "AutoencoderTiny",
    "in_channels": 4,
    "out_channels": 1,
    "encoder_block_out_channels": [4, 4],
    "decoder_block_out_channels": [6, 6, 6],
    "act_fn": "silu",
    "upsample_fn": "bicubic",
    "latent_channels": 3,
    "upsampling_scaling_factor": 3,
    "num_encoder_blocks": [0, 2],
    "num_decoder_blocks": [2, 1, 0],
    "latent_magnitude": 2,
    "latent_shift": 0.25,
    "force_upcast": False,
    "scaling_factor": 0.5,
    "shift_factor": 0.125,
}
# 64 channels, which the rows of attention leave square.
COMPVIS = {
    "embed_dim": 3,
    "lossconfig": {"target": "torch.nn.Identity"},
    "ddconfig": {
        "double_z": True,
        "z_channels": 5,
        "resolution": 16,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [8],
        "dropout": 0.0,
    },
}


def read(config):
    return COMPONENTS[config["_class_name"]].read(config)


def there_and_back(config, rows):
    """Parameters and the file's tensors; every parameter returns bit for bit."""
    random = np.random.default_rng(0)
    expected = autoencoder_shapes(config)
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype("f4"), expected)
    tensors = export(params, rows)
    jax.tree.map(np.testing.assert_array_equal, convert(tensors, rows, expected), params)
    return params, tensors


@pytest.mark.parametrize(
    "config, name", [(SD, "sd"), (MOVQ, "movq"), ({"_class_name": "AutoencoderTiny"}, "taesd")]
)
def test_published_configurations_are_the_published_autoencoders(config, name):
    assert read(config) == FIRST_STAGES[name]
    assert read(COMPONENTS[config["_class_name"]].write(FIRST_STAGES[name])) == FIRST_STAGES[name]


@pytest.mark.parametrize("config", [KL, VQ, TINY], ids=["kl", "vq", "tiny"])
def test_options_return_as_they_came(config):
    """None of them has its default, so that none can be lost."""
    component = COMPONENTS[config["_class_name"]]
    ours = component.read(config)
    assert component.write(ours) == config
    # The peer has one epsilon and one pair of weights; the norm and z_channels are tested below.
    # No file says how attention is computed.
    fixed = ("norm", "norm_eps", "commitment_weight", "codebook_weight", "z_channels")
    fixed += ("attention_implementation",)
    for field in dataclasses.fields(ours):
        assert field.name in fixed or getattr(ours, field.name) != field.default, field.name


def test_up_levels_are_those_of_the_encoder_unless_they_differ():
    assert read(MOVQ).up_levels is None
    levels = read(VQ).levels, read(VQ).up_levels
    assert [[level.attention for level in half] for half in levels] == [[False] * 2, [False, True]]


# Tensors of the state dict, and some of their shapes, as diffusers 0.42 and CompVis have them.
PUBLISHED = {
    "sd": (
        248,
        {
            "encoder.mid_block.attentions.0.to_out.0.weight": (512, 512),
            "encoder.down_blocks.2.downsamplers.0.conv.weight": (512, 512, 3, 3),
            "decoder.up_blocks.2.resnets.0.conv_shortcut.weight": (256, 512, 1, 1),
            "decoder.up_blocks.3.resnets.2.conv2.weight": (128, 128, 3, 3),
            "quant_conv.weight": (8, 8, 1, 1),
        },
    ),
    "vq-f4": (205, {"quantize.embedding.weight": (8192, 3), "quant_conv.weight": (3, 3, 1, 1)}),
    "movq": (
        431,
        {
            "decoder.up_blocks.1.resnets.0.norm1.conv_y.weight": (512, 4, 1, 1),
            "decoder.up_blocks.0.attentions.2.spatial_norm.norm_layer.bias": (512,),
            "encoder.down_blocks.3.attentions.1.group_norm.weight": (512,),
            "decoder.conv_norm_out.conv_b.weight": (128, 4, 1, 1),
        },
    ),
    "taesd": (
        134,
        {
            "encoder.layers.6.weight": (64, 64, 3, 3),
            "encoder.layers.13.conv.4.bias": (64,),
            "encoder.layers.14.weight": (4, 64, 3, 3),
            "decoder.layers.4.conv.2.weight": (64, 64, 3, 3),
            "decoder.layers.16.weight": (64, 64, 3, 3),
            "decoder.layers.18.bias": (3,),
        },
    ),
}


def shapes_of(expected, rows):
    """Name -> shape of the file's tensors."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.int8), expected)
    return {name: tensor.shape for name, tensor in export(zeros, rows).items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names(name):
    config = FIRST_STAGES[name]
    component = {"sd": "AutoencoderKL", "taesd": "AutoencoderTiny"}.get(name, "VQModel")
    found = shapes_of(autoencoder_shapes(config), COMPONENTS[component].rows(config, ()))
    count, some = PUBLISHED[name]
    assert len(found) == count
    assert {key: found.get(key) for key in some} == some


SPATIAL = {
    **VQ,
    **{"block_out_channels": [32, 32], "norm_type": "spatial", "vq_embed_dim": None},
    "mid_block_add_attention": True,
}


@pytest.mark.parametrize("config", [KL, VQ, TINY, SPATIAL], ids=["kl", "vq", "tiny", "spatial"])
def test_tables_cover_the_networks_both_ways(config):
    component = COMPONENTS[config["_class_name"]]
    ours = component.read(config)
    assert component.read(component.write(ours)) == ours
    there_and_back(ours, component.rows(ours, ()))


def test_old_names_of_attention():
    config = read({**KL, "mid_block_add_attention": True})
    rows = autoencoder_rows(["encoder.mid_block.attentions.0.proj_attn.weight"])
    params, tensors = there_and_back(config, rows)
    place = "decoder.mid_block.attentions.0."
    ours = params["decoder"]["mid"]["attn"]["attention"]
    for theirs, name in (("query", "query"), ("key", "key"), ("proj_attn", "out")):
        np.testing.assert_array_equal(tensors[f"{place}{theirs}.weight"], ours[name]["kernel"].T)
    assert not any(".to_" in name for name in tensors)


def test_compvis_names():
    """Numbered from fine to coarse in both halves; attention is made of 1x1 convolutions."""
    config = AutoencoderKLConfig(**with_levels(compvis_kl_config(COMPVIS, scaling_factor=0.5)))
    assert (config.latent_channels, config.z_channels, config.scaling_factor) == (3, 5, 0.5)
    assert config.levels == tuple(
        AutoencoderLevel(channels, 1, attention)
        for channels, attention in ((32, False), (64, True), (64, False))
    )
    params, tensors = there_and_back(config, compvis_autoencoder_rows(3))
    ups = params["decoder"]
    np.testing.assert_array_equal(
        tensors["decoder.up.0.block.0.conv1.weight"],
        ups["up_2"]["res_0"]["conv_1"]["kernel"].transpose(3, 2, 0, 1),
    )
    np.testing.assert_array_equal(
        tensors["decoder.up.1.attn.1.q.weight"][:, :, 0, 0],
        ups["up_1"]["attn_1"]["attention"]["query"]["kernel"].T,
    )
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert shapes["encoder.down.1.block.0.nin_shortcut.weight"] == (64, 32, 1, 1)
    assert shapes["decoder.up.2.upsample.conv.weight"] == (64, 64, 3, 3)
    assert shapes["encoder.mid.attn_1.proj_out.weight"] == (64, 64, 1, 1)
    assert shapes["quant_conv.weight"] == (6, 10, 1, 1)
    assert shapes["post_quant_conv.weight"] == (5, 3, 1, 1)
    whole = {f"first_stage_model.{name}": tensor for name, tensor in tensors.items()}
    rows = prefixed(compvis_autoencoder_rows(3), source="first_stage_model.")
    extra = {"first_stage_model.loss.logvar": np.zeros(())}
    ignore = [f"first_stage_model.{glob}" for glob in COMPVIS_IGNORE]
    expected = autoencoder_shapes(config)
    convert({**whole, **extra}, rows, expected, ignore=ignore)
    with pytest.raises(MappingError, match="unexpected: first_stage_model.loss.logvar"):
        convert({**whole, **extra}, rows, expected)


def test_compvis_codebooks():
    """VQ-f4 of LDM-4, and its variant without attention."""
    ddconfig = {
        **COMPVIS["ddconfig"],
        **{"double_z": False, "z_channels": 3, "resolution": 256, "ch": 128},
        **{"ch_mult": [1, 2, 4], "num_res_blocks": 2, "attn_resolutions": []},
    }
    params = {"embed_dim": 3, "n_embed": 8192, "ddconfig": ddconfig, "monitor": "val/rec_loss"}
    assert VQModelConfig(**with_levels(compvis_vq_config(params))) == FIRST_STAGES["vq-f4"]
    params = {**params, "ddconfig": {**ddconfig, "attn_type": "none"}}
    assert VQModelConfig(**with_levels(compvis_vq_config(params))) == FIRST_STAGES["vq-f4-noattn"]


@pytest.mark.parametrize(
    "config, message",
    [
        ({**KL, "latent_channel": 4}, "'latent_channel' .did you mean 'latent_channels'"),
        ({**KL, "act_fn": "tanh"}, "act_fn of an AutoencoderKL .* got 'tanh'"),
        (
            {**KL, "down_block_types": [DOWN, "DownBlock2D"]},
            "down_block_types .* got 'DownBlock2D'",
        ),
        ({**KL, "up_block_types": [UP]}, "equally long, got 1 and 2"),
        ({**KL, "layers_per_block": [1, 2]}, r"layers_per_block .* got \[1, 2\]"),
        ({**VQ, "norm_type": "batch"}, "norm_type .* got 'batch'"),
        ({**VQ, "norm_type": "spatial"}, "latent_channels = 5, .* got 2"),
        ({**TINY, "encoder_block_out_channels": [4, 8]}, r"the same width.* got \[4, 8\]"),
        ({**TINY, "num_decoder_blocks": [1]}, "1 times the same width"),
        ({**TINY, "upsample_fn": "area"}, "upsample_fn .* got 'area'"),
        ({**TINY, "block_out_channels": [6, 6]}, r"block_out_channels .* got \[6, 6\]"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(config, message):
    with pytest.raises(UnsupportedOption, match=message):
        read(config)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"embed_dimension": 4}, r"unknown: \['embed_dimension'\]"),
        ({"ddconfig": {**COMPVIS["ddconfig"], "double_z": False}}, "double_z"),
        ({"ddconfig": {**COMPVIS["ddconfig"], "attn_type": "linear"}}, "attn_type .* 'linear'"),
        ({"ddconfig": {**COMPVIS["ddconfig"], "dropout": 0.1}}, "dropout .* got 0.1"),
        ({"ddconfig": {**COMPVIS["ddconfig"], "chs": 3}}, "'chs'"),
        ({"ddconfig": {"ch": 3}}, "must have the option out_ch, num_res_blocks"),
        ({"ddconfig": {**COMPVIS["ddconfig"], "resolution": None}}, "resolution .* got None"),
        ({"ddconfig": None}, "options by their names, got None"),
        ({"embed_dim": "4"}, "embed_dim .* got '4'"),
    ],
)
def test_what_we_do_not_compute_of_compvis_is_refused(change, message):
    with pytest.raises(UnsupportedOption, match=message):
        compvis_kl_config({**COMPVIS, **change})


@pytest.mark.parametrize(
    "config, change, message",
    [
        (KL, {"z_channels": 7, "quant_conv": True, "post_quant_conv": True}, "z_channels, got 7"),
        (KL, {"norm_eps": 1e-5}, "norm_eps other than 1e-06"),
        (KL, {"up_levels": (AutoencoderLevel(8, 3),) * 2}, "different width"),
        (KL, {"up_levels": (AutoencoderLevel(4, 1), AutoencoderLevel(8, 3))}, "different depth"),
        (VQ, {"commitment_weight": 0.25}, "weights of the loss"),
    ],
)
def test_what_diffusers_does_not_have_is_not_written(config, change, message):
    ours = dataclasses.replace(read(config), **change)
    with pytest.raises(UnsupportedOption, match=message):
        COMPONENTS[config["_class_name"]].write(ours)
