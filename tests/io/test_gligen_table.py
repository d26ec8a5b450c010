"""GLIGEN's options and names: the released configurations, both directions, every refusal."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from diffusion_jax.io.mapping import MappingError, convert, export
from diffusion_jax.io.tables.gligen import (
    DOWNSAMPLER_ROWS,
    POSITION_NET_ROWS,
    downsampler_config,
    downsampler_options,
    position_net_config,
    position_net_options,
    unet2d_condition_grounding,
)
from diffusion_jax.io.tables.options import UnsupportedOption
from diffusion_jax.pretrained.components.gligen import (
    GLIGEN_UNET,
    gligen_config,
    grounding_config,
    grounding_shapes,
)

PACKAGE = "ldm.modules.diffusionmodules."
# The configurations that were published with the weights.
RELEASED = {
    "text": {"in_dim": 768, "out_dim": 768},
    "text_image": {"in_dim": 768, "out_dim": 768},
    "keypoint": {"max_persons_per_image": 8, "out_dim": 768},
    "canny": {"resize_input": 256, "out_dim": 768},
    "depth": {"resize_input": 256, "out_dim": 768},
    "hed": {"resize_input": 256, "out_dim": 768},
    "normal": {"resize_input": 256, "out_dim": 768},
    "sem": {"resize_input": 256, "in_dim": 152, "out_dim": 768},
}
TINY = {"hidden": 6, "out_dim": 6}
CONVNEXT = {"convnext_depths": (1, 2, 1, 1), "convnext_dims": (4, 4, 5, 6)}
SMALL = {
    "text": {"in_dim": 5, "fourier_freqs": 2, **TINY},
    "text_image": {"in_dim": 5, "fourier_freqs": 2, **TINY},
    "keypoint": {"max_persons_per_image": 2, "fourier_freqs": 2, **TINY},
    "canny": {"resize_input": 32, **TINY, **CONVNEXT},
    "sem": {"resize_input": 64, "in_dim": 5, **TINY, **CONVNEXT},
}
DOWNSAMPLERS = {
    "canny": {"resize_input": 256, "out_dim": 8},
    "depth": {"resize_input": 256, "out_dim": 8},
    "normal": {"resize_input": 256, "out_dim": 8},
    "sem": {"resize_input": 256, "in_dim": 152, "out_dim": 8},
    "hed": {"out_dim": 1},
}


def position_net(name):
    return f"{PACKAGE}{name}_grounding_net.PositionNet"


def downsampler(name):
    return f"{PACKAGE}{name}_grounding_downsampler.GroundingDownsampler"


UNET = {
    "image_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_heads": 8,
    "transformer_depth": 2,
    "context_dim": 6,
    "fuser_type": "gatedSA",
    "grounding_tokenizer": {"target": position_net("text"), "params": SMALL["text"]},
}
SPATIAL = {
    **UNET,
    "fuser_type": "gatedSA2",
    "inpaint_mode": True,
    "grounding_downsampler": {"target": downsampler("sem"), "params": DOWNSAMPLERS["sem"]},
    "grounding_tokenizer": {"target": position_net("sem"), "params": SMALL["sem"]},
}


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def there_and_back(expected, rows):
    """The file's tensors; every parameter returns bit for bit."""
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), expected)
    tensors = export(params, rows)
    back = flatten_dict(convert(tensors, rows, expected))
    for path, leaf in flatten_dict(params).items():
        np.testing.assert_array_equal(back[path], leaf, err_msg="/".join(path))
    return params, tensors


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_configurations_are_those_of_the_defaults(name):
    form = position_net_config(position_net(name), RELEASED[name])
    config = grounding_config(form)
    assert (config.hidden, config.out_dim) == (512, 768)
    if form.kind == "map":
        # ConvNeXt-T makes 8x8 tokens of 256x256 pixels.
        assert config.num_tokens == 64 and config.encoder.widths[-1] == 768
    options = position_net_options(name, form.fields)
    assert options == {"target": position_net(name), "params": RELEASED[name]}


@pytest.mark.parametrize("name", SMALL)
def test_position_nets_have_their_names_both_ways(name):
    form = position_net_config(position_net(name), SMALL[name])
    params, tensors = there_and_back(
        grounding_shapes(grounding_config(form)), POSITION_NET_ROWS[form.kind]
    )
    mlp = "_text" if name == "text_image" else ""
    # Square, so that its shape does not tell a transpose.
    kernel = params[f"mlp{mlp}"]["hidden"]["kernel"]
    np.testing.assert_array_equal(tensors[f"linears{mlp}.2.weight"], kernel.T)
    assert position_net_options(name, form.fields)["params"] == SMALL[name]
    if form.kind == "map":
        backbone = "convnext_tiny_backbone."
        block, depthwise = backbone + "stages.1.1.", params["encoder"]["stage_1_block_1"]
        depthwise = depthwise["depthwise"]["kernel"]
        np.testing.assert_array_equal(
            tensors[block + "dwconv.weight"], depthwise.transpose(3, 2, 0, 1)
        )
        assert tensors[backbone + "downsample_layers.0.0.weight"].shape == (4, 3, 4, 4)
        assert tensors[backbone + "downsample_layers.3.1.weight"].shape == (6, 5, 2, 2)
        assert tensors[backbone + "downsample_layers.3.0.weight"].shape == (5,)
        assert ("in_conv.weight" in tensors) == (name == "sem")


@pytest.mark.parametrize("name", DOWNSAMPLERS)
def test_downsamplers_have_their_options_and_names(name):
    form = downsampler_config(downsampler(name), DOWNSAMPLERS[name])
    config = grounding_config(form)
    _, tensors = there_and_back(grounding_shapes(config), DOWNSAMPLER_ROWS)
    channels = {"canny": 1, "depth": 1, "normal": 3, "sem": 152, "hed": 1}[name]
    shapes = {key: tensor.shape for key, tensor in tensors.items() if "weight" in key}
    hidden = 16 if name == "sem" else 4
    expected = {"layers.0.weight": (hidden, channels, 4, 4), "layers.2.weight": (8, hidden, 4, 4)}
    assert shapes == ({} if name == "hed" else expected)
    assert config.resize == ("nearest" if name == "sem" else "bicubic")
    options = {"target": downsampler(name), "params": DOWNSAMPLERS[name]}
    assert downsampler_options(form.fields, name=name) == options
    with pytest.raises(UnsupportedOption, match="no original downsampler"):
        downsampler_options({**form.fields, "hidden": 5}, name=name)


@pytest.mark.parametrize("options", [UNET, SPATIAL], ids=["boxes", "map and inpainting"])
def test_the_unet_has_its_names_and_its_options_both_ways(options):
    config = gligen_config(options)
    rows = GLIGEN_UNET.rows(config, ())
    params, tensors = there_and_back(GLIGEN_UNET.shapes(config), rows)
    fuser = "middle_block.1.transformer_blocks.1.fuser."
    query = params["network"]["mid"]["attn"]["block_1"]["fuser"]["attn"]["query"]["kernel"]
    np.testing.assert_array_equal(tensors[fuser + "attn.to_q.weight"], query.T)
    assert tensors[fuser + "alpha_attn"].shape == ()
    assert tensors[fuser + "linear.weight"].shape == (64, 6)
    # The text's feature, or the map's 8 channels, 4 of the known latent and its mask.
    spatial = options is SPATIAL
    assert tensors["input_blocks.0.0.weight"].shape == (32, 17 if spatial else 4, 3, 3)
    assert ("downsample_net.layers.0.weight" in tensors) == spatial
    assert "position_net.linears.4.bias" in tensors
    written = GLIGEN_UNET.write(config)
    assert gligen_config(written) == config
    assert {key: written[key] for key in options} == options


def test_missing_and_unexpected_tensors_are_one_error():
    form = position_net_config(position_net("text"), SMALL["text"])
    shapes, rows = grounding_shapes(grounding_config(form)), POSITION_NET_ROWS["text"]
    _, tensors = there_and_back(shapes, rows)
    del tensors["null_positive_feature"]
    tensors["linears.6.weight"] = normal(2, 2)
    with pytest.raises(MappingError, match="2 problem") as error:
        convert(tensors, rows, shapes)
    assert "null_positive_feature" in str(error.value) and "linears.6" in str(error.value)


@pytest.mark.parametrize(
    "kind, name, text, objects",
    [("gated", "text", "text_dim", 512), ("gated-text-image", "text_image", "feature_dim", 512)],
)
def test_diffusers_takes_all_widths_from_the_text(kind, name, text, objects):
    options = {"attention_type": kind, "cross_attention_dim": [512, 512]}
    form = unet2d_condition_grounding(options)
    assert form.kind == name and form.fields["hidden"] == 512
    assert (form.fields[text], form.fields["out_dim"]) == (objects, objects)
    assert unet2d_condition_grounding({**options, "attention_type": "default"}) is None
    with pytest.raises(UnsupportedOption, match="attention_type"):
        unet2d_condition_grounding({**options, "attention_type": "gates"})
    with pytest.raises(UnsupportedOption, match="cross_attention_dim"):
        unet2d_condition_grounding({**options, "cross_attention_dim": [512, 768]})


def changed(**options):
    return gligen_config({**UNET, **options})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: position_net_config("x.box_grounding_net.PositionNet", {}), "got 'x.box_"),
        (lambda: position_net_config(position_net("text"), {"in_dim": 5}), "needs .*out_dim"),
        (lambda: position_net_config(position_net("hed"), {"out_din": 5}), "mean 'out_dim'"),
        (lambda: position_net_config(position_net("hed"), {"out_dim": 0}), "out_dim.*got 0"),
        (
            lambda: position_net_config(position_net("hed"), {"convnext_feature_dim": 5}),
            "convnext_feature_dim.*768, got 5",
        ),
        (lambda: downsampler_config(downsampler("hed"), {"out_dim": 8}), "must be 1, got 8"),
        (lambda: downsampler_config(downsampler("text"), {}), "got '.*text_grounding_down"),
        (lambda: changed(fuser_type="gated"), "gatedSA, gatedSA2, gatedCA, got 'gated'"),
        (lambda: changed(grounding_tokenizer="text"), "grounding_tokenizer must have a target"),
        (lambda: changed(dims=3), "dims must be 2"),
        (lambda: changed(num_head_channels=8), "num_head_channels"),
    ],
)
def test_what_is_unknown_or_missing_is_named(make, message):
    with pytest.raises(UnsupportedOption, match=message):
        make()
