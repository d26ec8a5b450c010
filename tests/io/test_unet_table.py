"""diffusers' UNets: options both ways, names both ways, and what is refused."""

import functools
import json

import jax
import numpy as np
import pytest

from diffusion_jax.io.mapping import convert, export
from diffusion_jax.io.tables.options import UnsupportedOption
from diffusion_jax.models import PixelAttention, SpatialTransformer, TextAttention
from diffusion_jax.pretrained.components.unet import UNET2D, UNET2D_CONDITION

SMALL = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [4, 8],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
ADM = {
    **SMALL,
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 4,
    "num_class_embeds": 10,
}
NCSN = {
    **SMALL,
    "block_out_channels": [32, 32],
    "down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D"],
    "up_block_types": ["AttnSkipUpBlock2D", "SkipUpBlock2D"],
    "center_input_sample": True,
    "time_embedding_type": "fourier",
    "mid_block_scale_factor": 1.4142135623730951,
    "attention_head_dim": None,
    "norm_num_groups": None,
}
SD = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [4, 8],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 6,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
IF = {
    **SD,
    "block_out_channels": [8, 16],
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "act_fn": "gelu",
    "resnet_time_scale_shift": "scale_shift",
    "only_cross_attention": True,
    "cross_attention_norm": "group_norm",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1.414,
    "mid_block_scale_factor": 1.414,
    "time_embedding_act_fn": "gelu",
    "encoder_hid_dim": 12,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 3,
    "class_embed_type": "timestep",
}
FORMS = {
    "ddpm": SMALL,
    "adm": ADM,
    "ncsnpp": NCSN,
    "learned": {**SMALL, "time_embedding_type": "learned", "num_train_timesteps": 20},
    "identity": {**SMALL, "class_embed_type": "identity", "mid_block_type": None},
    "timestep": {**SMALL, "class_embed_type": "timestep", "act_fn": "gelu"},
    "widths": {**SMALL, "attention_head_dim": 3, "add_attention": True},
    "mixed": {**SMALL, "down_block_types": ["ResnetDownsampleBlock2D", "DownBlock2D"]},
    "sd": SD,
    "linear": {**SD, "use_linear_projection": True, "only_cross_attention": [True, False]},
    "sdxl": {
        **SD,
        "transformer_layers_per_block": [1, 2],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 30,
    },
    "nested": {
        **SD,
        "layers_per_block": [2, 1],
        "transformer_layers_per_block": [[1, 2], 1],
        "reverse_transformer_layers_per_block": [1, [3, 1, 2]],
    },
    "if": IF,
    "gligen": {**SD, "attention_type": "gated"},
    "gligen images": {**SD, "attention_type": "gated-text-image"},
    "kandinsky 2.1": {
        **SD,
        "encoder_hid_dim": 5,
        "encoder_hid_dim_type": "text_image_proj",
        "addition_embed_type": "text_image",
        # The inpainting network's file has it so.
        "class_embeddings_concat": None,
    },
    "kandinsky 2.2": {
        **SD,
        "encoder_hid_dim": 5,
        "encoder_hid_dim_type": "image_proj",
        "addition_embed_type": "image_hint",
        "in_channels": 8,
    },
    "concat": {
        **SD,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 5,
        "class_embeddings_concat": True,
        "mid_block_type": "UNetMidBlock2D",
        "time_cond_proj_dim": 3,
        "timestep_post_act": "mish",
        "conv_in_kernel": 5,
    },
    "simple": {
        **SD,
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 5,
        "time_embedding_type": "fourier",
        "mid_block_type": None,
    },
}


def component(options):
    return UNET2D if options["_class_name"] == "UNet2DModel" else UNET2D_CONDITION


def read(options):
    return component(options).read(options)


@functools.cache
def shaped(form):
    """(component, our configuration, shapes of the parameters) of a form."""
    kind, config = component(FORMS[form]), read(FORMS[form])
    return kind, config, kind.shapes(config)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_means_what_was_read(form):
    config = read(FORMS[form])
    written = json.loads(json.dumps(component(FORMS[form]).write(config)))
    assert read(written) == config


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_has_one_name_both_ways(form):
    kind, config, shapes = shaped(form)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype("f4"), shapes)
    tensors = export(params, kind.rows(config, ()))
    assert_equal(convert(tensors, kind.rows(config, tuple(tensors)), shapes), params)


# Names and shapes of tensors in files that diffusers writes.
NAMES = {
    "ncsnpp": {
        "time_proj.weight": (32,),
        "down_blocks.0.resnet_down.conv_shortcut.weight": (32, 32, 1, 1),
        "down_blocks.0.skip_conv.weight": (32, 3, 1, 1),
        "up_blocks.0.resnet_up.norm1.weight": (32,),
        "up_blocks.0.skip_norm.weight": (32,),
        "up_blocks.0.skip_conv.weight": (3, 32, 3, 3),
        "up_blocks.0.attentions.0.group_norm.weight": (32,),
    },
    "learned": {"time_proj.weight": (20, 4)},
    "sd": {
        "down_blocks.0.attentions.0.proj_in.weight": (4, 4, 1, 1),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (4, 6),
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight": (64, 8),
        "up_blocks.1.attentions.1.transformer_blocks.0.norm3.bias": (4,),
        "down_blocks.0.downsamplers.0.conv.weight": (4, 4, 3, 3),
        "up_blocks.0.upsamplers.0.conv.weight": (8, 8, 3, 3),
    },
    "linear": {"mid_block.attentions.0.proj_out.weight": (8, 8)},
    "if": {
        "mid_block.attentions.0.norm_cross.weight": (32,),
        "mid_block.attentions.0.add_k_proj.weight": (16, 32),
        "mid_block.attentions.0.add_v_proj.bias": (16,),
        "down_blocks.0.downsamplers.0.time_emb_proj.weight": (16, 32),
        "encoder_hid_proj.weight": (32, 12),
        "class_embedding.linear_1.weight": (32, 8),
        "add_embedding.norm1.weight": (12,),
        "add_embedding.pool.positional_embedding": (1, 12),
        "add_embedding.pool.q_proj.weight": (12, 12),
        "add_embedding.proj.weight": (32, 12),
        "add_embedding.norm2.weight": (32,),
    },
    "sdxl": {"add_embedding.linear_1.weight": (16, 30)},
    "gligen": {
        "mid_block.attentions.0.transformer_blocks.0.fuser.linear.weight": (8, 6),
        "position_net.null_positive_feature": (6,),
    },
    "kandinsky 2.1": {
        "encoder_hid_proj.image_embeds.weight": (60, 6),
        "encoder_hid_proj.text_proj.weight": (6, 5),
        "add_embedding.text_norm.weight": (16,),
        "add_embedding.text_proj.weight": (16, 6),
        "add_embedding.image_proj.weight": (16, 6),
    },
    "kandinsky 2.2": {
        "encoder_hid_proj.image_embeds.weight": (192, 5),
        "encoder_hid_proj.norm.weight": (6,),
        "add_embedding.image_norm.weight": (16,),
        "add_embedding.input_hint_block.0.weight": (16, 3, 3, 3),
        "add_embedding.input_hint_block.14.weight": (4, 256, 3, 3),
    },
    "concat": {
        "time_embedding.cond_proj.weight": (4, 3),
        "class_embedding.linear_2.weight": (16, 16),
        "down_blocks.0.resnets.0.time_emb_proj.weight": (4, 32),
        "conv_in.weight": (4, 4, 5, 5),
    },
    "simple": {"class_embedding.weight": (8, 5), "time_proj.weight": (4,)},
}


@pytest.mark.parametrize("form", NAMES)
def test_names_and_layouts_are_those_of_the_files(form):
    kind, config, shapes = shaped(form)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, "f4"), shapes)
    tensors = export(zeros, kind.rows(config, ()))
    assert {name: tensors[name].shape for name in NAMES[form]} == NAMES[form]


def test_files_with_old_names_of_attention_are_told_by_their_names():
    config = read(ADM)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, "f4"), UNET2D.shapes(config))
    old = export(params, UNET2D.rows(config, ["x.proj_attn.weight"]))
    assert "mid_block.attentions.0.query.weight" in old
    assert "class_embedding.weight" in old
    assert old["down_blocks.0.downsamplers.0.conv1.weight"].shape == (4, 4, 3, 3)
    assert_equal(convert(old, UNET2D.rows(config, tuple(old)), UNET2D.shapes(config)), params)


def test_an_empty_configuration_means_the_defaults_of_the_format():
    config = UNET2D.read({})
    assert [level.channels for level in config.network.levels] == [224, 448, 672, 896]
    assert [level.attention for level in config.network.levels] == [False, True, True, True]
    assert (config.network.head_dim, config.in_channels, config.conditioners) == (8, 3, {})
    condition = UNET2D_CONDITION.read({})
    assert condition.network.levels[0].attention == SpatialTransformer(num_heads=8)
    assert condition.conditioners == {"tokens": ("given_tokens", {"dim": 1280})}


def test_options_of_the_configuration_arrive():
    config = read({**ADM, "freq_shift": 1, "flip_sin_to_cos": False, "in_channels": 6})
    network = config.network
    assert config.in_channels == 6 and config.conditioners["label"][1]["num_classes"] == 10
    assert not network.time_features.cos_first and network.time_features.freq_shift == 1
    assert (network.resample, network.scale_shift) == ("block", True)
    assert network.middle_attention_groups == 4
    padded = read({**SMALL, "downsample_padding": 0}).network
    assert (padded.resample, padded.downsample_padding) == ("conv", "asymmetric")


def test_heads_are_numbers_in_one_block_and_widths_in_another():
    """In the second kind the way up takes the list as it is, in the first backwards."""
    numbers = read(SD).network
    assert numbers.levels[0].attention == SpatialTransformer(num_heads=2)
    assert numbers.middle_attention == SpatialTransformer(num_heads=4)
    types = ["SimpleCrossAttnDownBlock2D", "AttnDownBlock2D"]
    ups = ["AttnUpBlock2D", "SimpleCrossAttnUpBlock2D"]
    widths = read({**SD, "down_block_types": types, "up_block_types": ups}).network
    assert widths.levels[0].attention == TextAttention(head_dim=2)
    assert widths.levels[1].attention == PixelAttention(2)
    assert widths.way_up[0].attention == TextAttention(head_dim=4)
    assert widths.way_up[1].attention == PixelAttention(4)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"down_block_types": ["KDownBlock2D", "AttnDownBlock2D"]}, "'KDownBlock2D'"),
        ({"time_embedding_type": "sines"}, "time_embedding_type of UNet2DModel must be"),
        ({"class_embed_type": "projection"}, "class_embed_type of UNet2DModel must be None"),
        ({"norm_num_groups": None}, "norm_num_groups must be an integer"),
        ({"norm_num_groups": 3}, "norm_groups = 3"),
        ({"up_block_types": ["UpBlock2D"]}, "equally long"),
        ({"act_fn": "tanh"}, "act_fn must be one of silu"),
        ({"attention_head_dim": 9}, "attention_head_dim must be at most 8"),
        ({"down_block_types": ["SkipDownBlock2D"] * 2, "in_channels": 4}, "in_channels and out"),
        ({"down_block_types": None}, r"down_block_types of .* like its default \(.*got None"),
        ({"layers_per_blok": 1}, r"'layers_per_blok' \(did you mean 'layers_per_block'"),
    ],
)
def test_what_our_unet_does_not_have_is_named(change, words):
    with pytest.raises(UnsupportedOption, match=words):
        read({**SMALL, **change})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dual_cross_attention": True}, "dual_cross_attention"),
        ({"num_attention_heads": 4}, "num_attention_heads"),
        ({"cross_attention_dim": [6, 7]}, "cross_attention_dim must be the same"),
        ({"attention_head_dim": [1, 2, 3]}, "a list of 2, one for each block"),
        ({"transformer_layers_per_block": [[1], [1]]}, "reverse_transformer_layers_per_block"),
        ({"class_embed_type": "projection"}, "projection_class_embeddings_input_dim must be"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type"),
        ({"attention_type": "gated-map"}, "attention_type"),
        ({"class_embeddings_concat": True, "addition_embed_type": "text"}, "must be False with"),
    ],
)
def test_what_our_conditional_unet_does_not_have_is_named(change, words):
    with pytest.raises(UnsupportedOption, match=words):
        read({**SD, **change})
