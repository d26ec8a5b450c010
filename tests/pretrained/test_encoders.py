"""Released encoders: what their configurations say and refuse, and where their weights lie."""

import jax
import numpy as np
import pytest

from diffusion_jax.io.mapping import MappingError, convert, export, prefixed
from diffusion_jax.io.tables import clip
from diffusion_jax.io.tables.ldm_bert import bert_embedder_config, bert_embedder_rows
from diffusion_jax.io.tables.options import UnsupportedOption
from diffusion_jax.models.clip import (
    CLIP_TEXT_TOWERS,
    CLIP_VISION_TOWERS,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
)
from diffusion_jax.models.ldm_bert import LDMBertConfig
from diffusion_jax.models.t5 import T5_ENCODERS, T5Config
from diffusion_jax.pretrained.components.encoders import ENCODERS, LDM_BERT, T5_ENCODER

# Square in every projection, so that a weight that is not transposed has the right shape.
SMALL = {"width": 4, "num_layers": 2, "num_heads": 2, "mlp_width": 4}
TEXT = CLIPTextConfig(vocab_size=4, length=4, projection=4, end_id=None, **SMALL)
VISION = CLIPVisionConfig(image_size=4, patch_size=2, channels=4, projection=4, **SMALL)
T5 = T5Config(vocab_size=4, head_dim=2, num_buckets=4, max_distance=8, **SMALL)
BERT = LDMBertConfig(vocab_size=4, length=4, head_dim=2, **SMALL)
CONFIGS = {
    "CLIPTextModelWithProjection": TEXT,
    "CLIPVisionModelWithProjection": VISION,
    "CLIPModel": CLIPConfig(TEXT, VISION),
    "T5EncoderModel": T5,
    "LDMBertModel": BERT,
}


def random_tree(component, config):
    random = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(component.shapes(config))
    values = [random.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, values)


def written(name):
    """(component, configuration, parameters, the tensors of their file)."""
    component, config = ENCODERS[name], CONFIGS[name]
    params = random_tree(component, config)
    return component, config, params, export(params, component.rows(config, ()))


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_come_back_whole_and_projections_are_transposed(name):
    component, config, params, tensors = written(name)
    back = convert(tensors, component.rows(config, tensors), component.shapes(config))
    assert jax.tree.all(jax.tree.map(np.array_equal, params, back))
    last, bias = {
        "CLIPTextModelWithProjection": ("text_model.encoder.layers.1.self_attn.q_proj", True),
        "CLIPVisionModelWithProjection": ("vision_model.encoder.layers.1.self_attn.q_proj", True),
        "CLIPModel": ("vision_model.encoder.layers.1.self_attn.q_proj", True),
        "T5EncoderModel": ("encoder.block.1.layer.0.SelfAttention.q", False),
        "LDMBertModel": ("model.layers.1.self_attn.q_proj", False),
    }[name]
    tree = params["vision"] if name == "CLIPModel" else params
    kernel = tree["block_1"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(tensors[f"{last}.weight"], kernel.T)
    assert (f"{last}.bias" in tensors) == bias


@pytest.mark.parametrize(
    "name, config",
    [
        *(("CLIPTextModelWithProjection", config) for config in CLIP_TEXT_TOWERS.values()),
        *(("CLIPVisionModelWithProjection", config) for config in CLIP_VISION_TOWERS.values()),
        *(("T5EncoderModel", config) for config in T5_ENCODERS.values()),
        *CONFIGS.items(),
        ("CLIPTextModel", CLIPTextConfig(projection=None)),
        ("CLIPVisionModel", CLIPVisionConfig(projection=None, activation="gelu")),
        ("T5EncoderModel", T5Config(gated=False, activation="relu")),
        ("T5EncoderModel", T5Config(gated=True, activation="gelu")),
        ("LDMBertModel", LDMBertConfig(activation="silu")),
    ],
)
def test_configurations_come_back(name, config):
    file = ENCODERS[name].write(config)
    assert file["architectures"] == [name]
    assert ENCODERS[name].read(file) == config


SD1 = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
T5_FILE = {
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "is_gated_act": True,
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "use_cache": True,
}


def test_released_configurations_are_the_named_sizes():
    large = CLIP_TEXT_TOWERS["vit_l_14"]
    assert ENCODERS["CLIPTextModelWithProjection"].read(SD1) == large
    assert ENCODERS["CLIPTextModel"].read(SD1).projection is None
    assert ENCODERS["T5EncoderModel"].read(T5_FILE) == T5_ENCODERS["v1_1_xxl"]
    assert ENCODERS["LDMBertModel"].read({"scale_embedding": False}) == LDMBertConfig()


def test_a_whole_clip_says_what_its_towers_are():
    """Where older files repeat a tower, the repetition counts, and what it leaves out as well."""
    file = {
        "projection_dim": 768,
        "logit_scale_init_value": 2.6592,
        "text_config": {**SD1, "projection_dim": 512},
        "vision_config": {"hidden_size": 1024, "num_attention_heads": 16, "patch_size": 14},
        "vision_config_dict": None,
    }
    both = ENCODERS["CLIPModel"].read(file)
    assert both.text == CLIP_TEXT_TOWERS["vit_l_14"]
    assert (both.vision.patch_size, both.vision.num_layers, both.vision.projection) == (14, 12, 768)
    repeated = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    again = ENCODERS["CLIPModel"].read({**file, "text_config_dict": repeated}).text
    assert (again.end_id, again.width) == (49407, 768)
    assert ENCODERS["CLIPTextModel"].read(file).end_id is None
    assert ENCODERS["CLIPVisionModel"].read(file).width == 1024


@pytest.mark.parametrize(
    "options, activation, gated",
    [
        ({}, "relu", False),
        ({"feed_forward_proj": "gated-gelu"}, "gelu_tanh", True),
        ({"feed_forward_proj": "gelu"}, "gelu", False),
        ({"feed_forward_proj": "gated-silu"}, "silu", True),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}, "gelu", True),
        ({"feed_forward_proj": "relu", "is_gated_act": True}, "relu", True),
    ],
)
def test_t5_reads_the_activation_as_transformers_does(options, activation, gated):
    config = T5_ENCODER.read(options)
    assert (config.activation, config.gated) == (activation, gated)


@pytest.mark.parametrize(
    "name, config, words",
    [
        (
            "CLIPTextModel",
            {"hidden_sise": 4},
            "no option 'hidden_sise' .did you mean 'hidden_size'",
        ),
        ("CLIPTextModel", {"hidden_act": "gelu_10"}, "hidden_act .* got 'gelu_10'"),
        ("CLIPTextModel", {"eos_token_id": [1, 2]}, "eos_token_id .* one integer, got"),
        ("CLIPTextModel", {"hidden_size": 10}, "multiple of num_attention_heads = 8, got 10"),
        ("CLIPTextModel", {"num_hidden_layers": "12"}, "num_hidden_layers .* got '12'"),
        ("CLIPTextModel", {"layer_norm_eps": None}, "layer_norm_eps .* got None"),
        ("CLIPVisionModel", {"image_size": [224, 224]}, r"image_size .* got \[224, 224\]"),
        ("CLIPVisionModel", {"vocab_size": 3}, "no option 'vocab_size'"),
        ("CLIPModel", {"text_config": {"magic": 1}}, "no option 'magic'"),
        ("CLIPModel", {"hidden_size": 1}, "no option 'hidden_size'"),
        ("T5EncoderModel", {"is_decoder": True}, "is_decoder .* must be false"),
        ("T5EncoderModel", {"feed_forward_proj": "twice-gelu"}, "got 'twice-gelu'"),
        ("T5EncoderModel", {"feed_forward_proj": "gated-elu"}, "got 'elu'"),
        (
            "T5EncoderModel",
            {"d_model": 3, "hidden_size": 4},
            "d_model .* given twice, as hidden_size",
        ),
        ("T5EncoderModel", {"quantization_config": {}}, "'quantization_config'"),
        ("LDMBertModel", {"activation_function": "elu"}, "got 'elu'"),
    ],
)
def test_what_our_encoders_do_not_have_is_named(name, config, words):
    with pytest.raises(UnsupportedOption, match=words):
        ENCODERS[name].read(config)


def test_what_the_other_library_would_misread_is_not_written():
    with pytest.raises(UnsupportedOption, match="end_id must not be 2"):
        ENCODERS["CLIPTextModel"].write(CLIPTextConfig(end_id=2))
    with pytest.raises(UnsupportedOption, match="logits must be True"):
        LDM_BERT.write(LDMBertConfig(logits=False))


@pytest.mark.parametrize(
    "name, prefix, more",
    [
        ("CLIPTextModelWithProjection", "text_model.", "embeddings.position_ids"),
        ("CLIPVisionModelWithProjection", "vision_model.", "embeddings.position_ids"),
    ],
)
def test_towers_are_read_with_and_without_their_prefix(name, prefix, more):
    component, config, params, tensors = written(name)
    bare = {key.removeprefix(prefix): value for key, value in tensors.items()}
    assert any(key.startswith(prefix) for key in tensors) and len(bare) == len(tensors)
    for file, start in ((tensors, prefix), (bare, "")):
        file = {**file, start + more: np.arange(4)[None]}
        rows = component.rows(config, file)
        back = convert(file, rows, component.shapes(config), ignore=component.ignore)
        assert jax.tree.all(jax.tree.map(np.array_equal, params, back))


def test_either_tower_of_a_whole_clip_is_read_alone():
    _, _, params, tensors = written("CLIPModel")
    for name, side in (("CLIPTextModelWithProjection", "text"), ("CLIPVisionModel", "vision")):
        component = ENCODERS[name]
        config = component.read(ENCODERS["CLIPModel"].write(CONFIGS["CLIPModel"]))
        rows = component.rows(config, tensors)
        back = convert(tensors, rows, component.shapes(config), ignore=component.ignore)
        wanted = {key: value for key, value in params[side].items() if key in back}
        assert jax.tree.all(jax.tree.map(np.array_equal, wanted, back))
        assert ("project" in back) == (name == "CLIPTextModelWithProjection")


def test_t5_is_read_with_either_name_of_its_embedding_and_without_its_decoder():
    component, config, params, tensors = written("T5EncoderModel")
    gate = tensors["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"]
    np.testing.assert_array_equal(gate, params["block_0"]["gate"]["kernel"].T)
    shared = tensors.pop("shared.weight")
    decoder = {"decoder.block.0.layer.0.SelfAttention.q.weight": shared, "lm_head.weight": shared}
    encoder = {"encoder.embed_tokens.weight": shared}
    rows, shapes = component.rows(config, ()), component.shapes(config)
    for names in ({"shared.weight": shared}, encoder, {"shared.weight": shared, **encoder}):
        file = {**tensors, **names, **decoder}
        back = convert(file, rows, shapes, ignore=component.ignore)
        assert jax.tree.all(jax.tree.map(np.array_equal, params, back))
    file = {**tensors, "shared.weight": shared, "encoder.embed_tokens.weight": shared + 1}
    with pytest.raises(MappingError, match="encoder.embed_tokens.weight: must equal shared.weight"):
        convert(file, rows, shapes, ignore=component.ignore)


@pytest.mark.parametrize("prefix", ["", "cond_stage_model.model."])
def test_the_original_names_of_clip(prefix):
    """Queries, keys and values lie in one matrix, and projections are not transposed."""
    component, config = ENCODERS["CLIPModel"], CONFIGS["CLIPModel"]
    params = random_tree(component, config)
    rows = prefixed(clip.OPEN_CLIP_ROWS, source=prefix)
    tensors = export(params, rows)
    attention = params["text"]["block_1"]["attention"]
    joined = np.concatenate([attention[name]["kernel"].T for name in ("query", "key", "value")])
    stem = f"{prefix}transformer.resblocks.1.attn."
    np.testing.assert_array_equal(tensors[f"{stem}in_proj_weight"], joined)
    assert tensors[f"{stem}in_proj_bias"].shape == (12,)
    for name, side in (("text_projection", "text"), ("visual.proj", "vision")):
        np.testing.assert_array_equal(tensors[prefix + name], params[side]["project"]["kernel"])
    back = convert(tensors, rows, component.shapes(config))
    assert jax.tree.all(jax.tree.map(np.array_equal, params, back))
    assert {name for name in tensors if "visual" not in name and "resblocks" not in name} == {
        prefix + name
        for name in (
            "token_embedding.weight",
            "positional_embedding",
            "ln_final.weight",
            "ln_final.bias",
            "text_projection",
            "logit_scale",
        )
    }


def test_the_original_text_encoder_of_latent_diffusion():
    arguments = {"n_embed": 4, "n_layer": 2, "vocab_size": 4, "max_seq_len": 4, "device": "cpu"}
    config = LDMBertConfig(**bert_embedder_config(arguments))
    assert (config.num_heads, config.head_dim, config.mlp_width) == (8, 64, 16)
    params = random_tree(LDM_BERT, config)
    rows = prefixed(bert_embedder_rows(2), source="cond_stage_model.")
    tensors = export(params, rows)
    second = "cond_stage_model.transformer.attn_layers.layers.3.1.net.2.weight"
    np.testing.assert_array_equal(tensors[second], params["block_1"]["dense_2"]["kernel"].T)
    back = convert(tensors, rows, LDM_BERT.shapes(config))
    assert jax.tree.all(jax.tree.map(np.array_equal, params, back))
    with pytest.raises(UnsupportedOption, match="n_layer .* got None"):
        bert_embedder_config({"n_embed": 4})
