"""Priors, their text projection and DiT as diffusers stores them: both ways, every refusal."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from diffusion_jax.conditioners.clip_projection import CLIPProjectionConfig
from diffusion_jax.io.mapping import MappingError, convert, export
from diffusion_jax.io.tables.dit import DEFAULTS
from diffusion_jax.io.tables.options import UnsupportedOption
from diffusion_jax.models.unclip import kandinsky_prior, karlo_prior, shap_e_prior
from diffusion_jax.pretrained.components import COMPONENTS

PRIOR = {
    "_class_name": "PriorTransformer",
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_layers": 2,
    "embedding_dim": 8,
    "num_embeddings": 5,
}
LATENTS = PRIOR | {
    "additional_embeddings": 0,
    "time_embed_act_fn": "GELU",
    "norm_in_type": "layer",
    "embedding_proj_norm_type": "layer",
    "encoder_hid_proj_type": None,
    "added_emb_type": None,
    "time_embed_dim": 12,
    "embedding_proj_dim": 6,
    "clip_embed_dim": 10,
    "dropout": 0.1,
}
DIT = {
    "_class_name": "DiTTransformer2DModel",
    "_diffusers_version": "0.42.1",
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_layers": 2,
    "num_embeds_ada_norm": 3,
    "sample_size": 4,
    "norm_num_groups": 4,
}
VARIED = DIT | {
    "in_channels": 8,
    "out_channels": 6,
    "patch_size": 4,
    "attention_bias": False,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-4,
    "activation_fn": "geglu-approximate",
    "dropout": 0.2,
    "upcast_attention": True,
}
# facebook/DiT-XL-2-256 and -512 still name the class that diffusers had before.
OLD = DIT | {
    "_class_name": "Transformer2DModel",
    "norm_type": "ada_norm_zero",
    "cross_attention_dim": None,
    "double_self_attention": False,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": False,
}
PROJECTION = {
    "_class_name": "UnCLIPTextProjModel",
    "clip_embeddings_dim": 6,
    "time_embed_dim": 24,
    "cross_attention_dim": 6,
}
EVERY = {
    "prior": PRIOR, "latents": LATENTS, "dit": DIT, "varied": VARIED, "old": OLD,
    "projection": PROJECTION,
}  # fmt: skip


def component(options):
    return COMPONENTS[options["_class_name"]]


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("options", EVERY.values(), ids=EVERY)
def test_configurations_and_tensors_return(options):
    """read ∘ write and convert ∘ export are the identity, bit for bit."""
    this = component(options)
    config = this.read(options)
    written = this.write(config)
    assert COMPONENTS[written["_class_name"]].read(written) == config

    shapes, rows = this.shapes(config), this.rows(config, ())
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)
    tensors = export(params, rows)
    back = convert(tensors, this.rows(config, tensors), shapes, ignore=this.ignore)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    # A square matrix of the wrong way round would have the right shape.
    for name, tensor in tensors.items():
        if name.endswith("to_q.weight"):
            block = params["network"][f"block_{name.split('.')[1]}"]
            np.testing.assert_array_equal(tensor, block["attn"]["query"]["kernel"].T)
    with pytest.raises(MappingError, match="unexpected: extra"):
        convert(tensors | {"extra": np.zeros(1)}, rows, shapes)


def test_options_are_written_as_they_were_read():
    for options in (LATENTS | {"time_embed_act_fn": "gelu"}, VARIED, PROJECTION):
        written = component(options).write(component(options).read(options))
        unread = {"_diffusers_version", "norm_num_groups", "upcast_attention"}
        assert all(written[key] == value for key, value in options.items() if key not in unread)
    assert set(component(DIT).write(component(DIT).read(DIT))) == {"_class_name", *DEFAULTS}


def test_a_patch_is_stored_as_the_kernel_of_a_convolution():
    config = component(VARIED).read(VARIED)
    tree = component(VARIED).shapes(config)
    assert tree["network"]["patch_in"]["kernel"].shape == (4, 4, 8, 8)
    assert set(tree["conditioner"]["label"]) == {"embedding_0", "embedding_1"}
    kernel = np.arange(4 * 4 * 8 * 8, dtype=np.float32).reshape(4, 4, 8, 8)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), tree)
    params["network"]["patch_in"]["kernel"] = kernel
    tensor = export(params, component(VARIED).rows(config, ()))["pos_embed.proj.weight"]
    assert tensor[3, 5, 1, 2] == kernel[1, 2, 5, 3]


def test_the_label_conditioner_makes_what_the_network_needs():
    config = component(DIT).read(DIT)
    conditioner = config.conditioner()
    params = jax.eval_shape(conditioner.init, jax.random.key(0))
    batch = {"label": jax.ShapeDtypeStruct((2,), np.int32)}
    cond = jax.eval_shape(lambda p, b: conditioner.apply(p, b, None), params, batch)
    assert cond.vector.shape == (2, config.network.embed_dim)
    x = jax.ShapeDtypeStruct((2, 4, 4, 4), np.float32)
    t = jax.ShapeDtypeStruct((2,), np.float32)
    out, _ = jax.eval_shape(config.build().init_with_output, jax.random.key(0), x, t, cond)
    assert out.shape == (2, 4, 4, 4)


@pytest.mark.parametrize(
    "config, size",
    [
        (karlo_prior(), 1_022_030_080),
        (kandinsky_prior("2.2"), 1_026_225_920),
        (shap_e_prior("text"), 315_696_128),
        (shap_e_prior("image"), 315_960_320),
    ],
)
def test_published_priors_have_the_sizes_that_diffusers_counts(config, size):
    """diffusers 0.42.1: PriorTransformer(**config) on torch's meta device."""
    this = COMPONENTS["PriorTransformer"]
    assert count(this.shapes(config)) == size
    assert this.read(this.write(config)) == config


def test_the_other_published_sizes():
    """diffusers 0.42.1, counted on torch's meta device."""
    projection = COMPONENTS["UnCLIPTextProjModel"].shapes(CLIPProjectionConfig())
    assert count(projection) == 7_878_400
    dit = COMPONENTS["DiTTransformer2DModel"]
    config = dit.read({"out_channels": 8})
    assert count(dit.shapes(config)) == 749_826_464
    assert (config.network.depth, config.network.width, config.num_classes) == (28, 1152, 1000)
    assert COMPONENTS["PriorTransformer"].read({}) == karlo_prior()


@pytest.mark.parametrize(
    "options, change, message",
    [
        (PRIOR, {"num_layer": 3}, "'num_layer' .did you mean 'num_layers'"),
        (PRIOR, {"norm_in_type": "group"}, "norm_in_type of PriorTransformer must be None or"),
        (PRIOR, {"added_emb_type": "x"}, "added_emb_type"),
        (PRIOR, {"encoder_hid_proj_type": "conv"}, "encoder_hid_proj_type"),
        (PRIOR, {"embedding_proj_norm_type": "group"}, "embedding_proj_norm_type"),
        (PRIOR, {"time_embed_act_fn": "tanh"}, "got 'tanh'"),
        (PRIOR, {"num_layers": 2.0}, "num_layers .* integer of at least 1, got 2.0"),
        (PROJECTION, {"time_embed_dim": None}, "time_embed_dim"),
        (PROJECTION, {"dim": 3}, "'dim'"),
        (DIT, {"norm_type": "ada_norm_single"}, "'ada_norm_zero' here, got 'ada_norm_single'"),
        (DIT, {"num_embeds_ada_norm": None}, "num_embeds_ada_norm"),
        (DIT, {"activation_fn": "relu"}, "activation_fn"),
        (DIT, {"attention_bias": 1}, "attention_bias"),
        (OLD, {"cross_attention_dim": 8}, "cross_attention_dim"),
        (OLD, {"interpolation_scale": 2}, "interpolation_scale"),
        (OLD, {"attention_type": "gated"}, "attention_type"),
    ],
)
def test_what_we_do_not_compute_is_refused(options, change, message):
    with pytest.raises(UnsupportedOption, match=message):
        component(options).read(options | change)


def test_a_transformer_without_a_norm_type_is_no_dit():
    options = {key: value for key, value in OLD.items() if key != "norm_type"}
    with pytest.raises(UnsupportedOption, match="norm_type says 'ada_norm_zero'"):
        component(OLD).read(options)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shared_embedding": True}, "shared_embedding"),
        ({"mlp_ratio": 2.0}, "mlp_ratio"),
        ({"base_size": None}, "base_size"),
        ({"attention_dropout": 0.5}, "one dropout"),
        ({"time_channels": 64}, "time_channels"),
        ({"activation": "relu"}, "activation of a .*'relu'"),
    ],
)
def test_a_dit_that_diffusers_does_not_have_is_not_written(change, message):
    config = component(DIT).read(DIT)
    network = dataclasses.replace(config.network, **change)
    with pytest.raises(UnsupportedOption, match=message):
        component(DIT).write(dataclasses.replace(config, network=network))
