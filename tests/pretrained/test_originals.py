"""guided-diffusion and latent diffusion: options and names there and back, averages, parts."""

import json

import jax
import numpy as np
import pytest

from diffusion_jax.io.mapping import MappingError, convert, export
from diffusion_jax.io.safetensors import write_safetensors
from diffusion_jax.io.tables.compvis import compvis_unet_config, compvis_unet_rows, with_averages
from diffusion_jax.io.tables.latent_diffusion import OPEN_CLIPS
from diffusion_jax.io.tables.options import UnsupportedOption
from diffusion_jax.models.clip import CLIP_TEXT_TOWERS, CLIPTextConfig
from diffusion_jax.pretrained import COMPONENTS, from_pretrained
from diffusion_jax.pretrained.components.compvis import COMPVIS_UNET, LATENT_DIFFUSION
from diffusion_jax.pretrained.components.openai import GUIDED_DIFFUSION
from diffusion_jax.pretrained.settings import read_values, with_scale_factor

BASE = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
}
TEXT = {**BASE, "use_spatial_transformer": True, "context_dim": 12}
UNETS = {
    "pixels": {**BASE, "num_head_channels": 16},
    "heads of the way up": {**BASE, "num_heads": 2, "num_heads_upsample": 4, "num_classes": 5},
    "new order": {**BASE, "num_heads": 2, "legacy": False, "use_new_attention_order": True},
    "text": {**TEXT, "num_heads": 4, "transformer_depth": 2},
    "widened heads": {**TEXT, "num_head_channels": 24, "num_res_blocks": [2, 1]},
    "linear": {
        **TEXT, "num_head_channels": 16, "legacy": False, "use_linear_in_transformer": True,
        "num_classes": "sequential", "adm_in_channels": 6, "disable_self_attentions": [False, True],
        "disable_middle_self_attn": True, "attention_resolutions": [1, 2], "resblock_updown": True,
    },
    "continuous": {**TEXT, "num_heads": 2, "num_classes": "continuous", "conv_resample": False},
}  # fmt: skip
ADM = {
    "UNetModel": {**BASE, "num_classes": 5, "num_head_channels": 16, "resblock_updown": True},
    "SuperResModel": {**BASE, "num_heads": 2, "num_heads_upsample": 4},
    "EncoderUNetModel": {**BASE, "pool": "attention", "num_head_channels": 32},
}
VAE = {
    "double_z": True, "z_channels": 6, "resolution": 8, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4], "dropout": 0.0,
}  # fmt: skip
CLIP = {
    "vocab_size": 9, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 5,
}  # fmt: skip
BERT = {"n_embed": 12, "n_layer": 1, "vocab_size": 9, "max_seq_len": 5}


def settings(unet, text, **params):
    """The settings of a latent diffusion as a file says them."""

    def part(target, params):
        return {"target": target, "params": params}

    unet = part("ldm.modules.diffusionmodules.openaimodel.UNetModel", unet)
    first = part("ldm.models.autoencoder.AutoencoderKL", {"embed_dim": 4, "ddconfig": VAE})
    whole = {"unet_config": unet, "first_stage_config": first, "cond_stage_config": text, **params}
    return {"model": part("ldm.models.diffusion.ddpm.LatentDiffusion", whole)}


def encoder(name, params):
    return {"target": f"ldm.modules.encoders.modules.{name}", "params": params}


SMALL = {**TEXT, "channel_mult": [1], "attention_resolutions": [1], "num_heads": 4}
WHOLE = {
    "clip": settings(SMALL, encoder("FrozenCLIPEmbedder", CLIP)),
    "bert": settings(SMALL, encoder("BERTEmbedder", BERT)),
    "classes": settings(
        SMALL, encoder("ClassEmbedder", {"n_classes": 3, "embed_dim": 12})
    ),
    "no text": settings({**BASE, "channel_mult": [1], "num_heads": 1}, "__is_unconditional__"),
}  # fmt: skip


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def flat(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def there_and_back(component, options):
    """The tensors of a file; options and every parameter return as they were."""
    config = component.read(options)
    assert component.read(component.write(config)) == config
    rows, shapes = component.rows(config, ()), component.shapes(config)
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), shapes)
    tensors = export(params, rows)
    back = flat(convert(tensors, component.rows(config, tuple(tensors)), shapes))
    for path, leaf in flat(params).items():
        np.testing.assert_array_equal(back[path], leaf, err_msg=path)
    return tensors


@pytest.mark.parametrize("options", UNETS.values(), ids=UNETS)
def test_every_unet_of_latent_diffusion_goes_there_and_back(options):
    tensors = there_and_back(COMPVIS_UNET, options)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if options.get("use_linear_in_transformer"):
        assert shapes["middle_block.1.proj_in.weight"] == (64, 64)
        # At the bottom the first attention is to the text as well.
        name = "middle_block.1.transformer_blocks.0.attn1.to_k.weight"
        assert shapes[name] == (64, 12) and shapes["label_emb.0.0.weight"] == (128, 6)
    elif options.get("use_spatial_transformer"):
        assert shapes["middle_block.1.proj_in.weight"][2:] == (1, 1)
    else:
        assert shapes["middle_block.1.qkv.weight"] == (192, 64, 1)
    # A file of everything has the same names behind a prefix.
    config = COMPVIS_UNET.read(options)
    whole = {"model.diffusion_model." + name: tensor for name, tensor in tensors.items()}
    whole |= {"betas": normal(3), "first_stage_model.encoder.conv_in.bias": normal(2)}
    rows = COMPVIS_UNET.rows(config, tuple(whole))
    convert(whole, rows, COMPVIS_UNET.shapes(config), ignore=COMPVIS_UNET.ignore)


@pytest.mark.parametrize("name, options", ADM.items(), ids=ADM)
def test_every_network_of_guided_diffusion_goes_there_and_back(name, options):
    tensors = there_and_back(GUIDED_DIFFUSION[f"guided_diffusion.unet.{name}"], options)
    width = 8 if name == "SuperResModel" else 4
    assert tensors["input_blocks.0.0.weight"].shape == (32, width, 3, 3)


def test_heads_of_latent_diffusion_are_those_of_its_constructor():
    """By hand: 64 // 24 = 2 heads are widened to 32; without legacy they stay at 24."""

    def heads(**options):
        form = compvis_unet_config({**TEXT, **options})
        return form.unet["middle_attention"]["num_heads"], form.unet["middle_attention"]["head_dim"]

    assert heads(num_head_channels=24) == (2, None)
    assert heads(num_head_channels=24, legacy=False) == (None, 24)
    assert heads(num_head_channels=16) == (None, 16)
    assert heads(num_heads=3) == (3, None)

    def up(**options):
        return compvis_unet_config({**BASE, **options}).unet["num_heads_up"]

    # Without legacy the way up is given heads of a width, and their number goes unread.
    assert up(num_heads=2, num_heads_upsample=4) == 4
    assert up(num_heads=2, num_heads_upsample=4, legacy=False) is None
    for legacy, heads_up in ((True, 4), (False, 2)):
        options = {**BASE, "num_heads": 2, "num_heads_upsample": 4, "legacy": legacy}
        rows = {row.target: row for row in compvis_unet_rows(options)}
        assert rows["up_0/attn_0/attention/query"].share.groups == heads_up


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_latent_diffusion_goes_there_and_back(name):
    tensors = there_and_back(LATENT_DIFFUSION, WHOLE[name])
    parts = {key.partition(".")[0] for key in tensors}
    text = {"cond_stage_model"} if name != "no text" else set()
    assert parts == {"model", "first_stage_model"} | text
    assert tensors["first_stage_model.quant_conv.weight"].shape == (8, 12, 1, 1)
    found = {
        "clip": "transformer.text_model.embeddings.token_embedding.weight",
        "bert": "transformer.token_emb.weight",
        "classes": "embedding.weight",
    }
    if text:
        rows = 3 if name == "classes" else 9
        assert tensors[f"cond_stage_model.{found[name]}"].shape == (rows, 12)


@pytest.mark.parametrize("name, options", [
    ("AutoencoderKL", {"embed_dim": 4, "ddconfig": VAE}),
    ("VQModel", {"embed_dim": 6, "n_embed": 5, "ddconfig": {**VAE, "double_z": False}}),
])  # fmt: skip
def test_an_autoencoder_alone_goes_there_and_back(name, options):
    target = f"ldm.models.autoencoder.{name}"
    component = COMPONENTS[target]
    tensors = there_and_back(component, {"model": {"target": target, "params": options}})
    assert tensors["decoder.up.1.block.0.conv1.weight"].shape == (64, 64, 3, 3)
    assert ("quantize.embedding.weight" in tensors) == (name == "VQModel")


def test_the_text_encoder_of_stable_diffusion_2_keeps_its_original_names(monkeypatch):
    options = settings(SMALL, encoder("FrozenOpenCLIPEmbedder", {"layer": "penultimate"}))
    config = LATENT_DIFFUSION.read(options)
    assert config.text == CLIP_TEXT_TOWERS["openclip_vit_h_14"] and config.text_skip == 1
    tiny = {"vocab_size": 9, "length": 5, "width": 12, "num_layers": 2, "num_heads": 2,
            "mlp_width": 20, "activation": "gelu", "end_id": None, "projection": 4}  # fmt: skip
    monkeypatch.setitem(OPEN_CLIPS, "ViT-H-14", tiny)
    tensors = there_and_back(LATENT_DIFFUSION, options)
    block = "cond_stage_model.model.transformer.resblocks.1."
    assert tensors[block + "attn.in_proj_weight"].shape == (36, 12)
    assert tensors["cond_stage_model.model.text_projection"].shape == (12, 4)


def test_settings_say_the_schedule_the_factor_and_the_prediction():
    config = LATENT_DIFFUSION.read(
        settings(
            UNETS["text"], encoder("FrozenCLIPEmbedder", {}), scale_factor=0.5,
            linear_start=0.00085, linear_end=0.012, timesteps=4, parameterization="v",
        )
    )  # fmt: skip
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 4) ** 2
    np.testing.assert_allclose(config.schedule.alphas_cumprod(), np.cumprod(1 - betas))
    assert (config.first_stage.scaling_factor, config.prediction) == (0.5, "v")
    # The encoder that is loaded by its name: Radford et al. 2021, table 20, ViT-L/14.
    assert config.text == CLIPTextConfig(width=768, num_heads=12, mlp_width=3072, projection=None)
    assert set(config.build()) == {"unet", "first_stage", "text"}


def test_averages_are_found_by_names_without_dots():
    weights = {f"model.a.{i}.weight": normal(i, 2) for i in (1, 2)}
    averages = {f"model_ema.a{i}weight": normal(2, i).T for i in (1, 2)}
    counters = {"model_ema.decay": normal(), "model_ema.num_updates": normal()}
    beside = {"first_stage_model.a.weight": normal(3)}
    found = with_averages({**weights, **averages, **counters, **beside})
    assert set(found) == {*weights, *beside}
    for i in (1, 2):
        np.testing.assert_array_equal(
            found[f"model.a.{i}.weight"], averages[f"model_ema.a{i}weight"]
        )
    with pytest.raises(MappingError, match="(?s)missing: model_ema.a2weight.*unexpected: .*b"):
        with_averages({**weights, "model_ema.a1weight": normal(1, 2), "model_ema.b": normal(1)})
    with pytest.raises(MappingError, match=r"shape \(2, 1\), expected that of model.a.1.weight"):
        with_averages({"model.a.1.weight": normal(1, 2), "model_ema.a1weight": normal(2, 1)})
    with pytest.raises(MappingError, match="no averages"):
        with_averages(weights)
    with pytest.raises(MappingError, match="average of model.a.1 and of model.a1"):
        with_averages({"model.a.1": normal(1), "model.a1": normal(1), "model_ema.a1": normal(1)})


@pytest.mark.parametrize("change, words", [
    ({"num_heads": -1}, "needs num_heads or num_head_channels"),
    ({"n_embed": 8}, "n_embed of .* must be None here, got 8"),
    ({"channel_mult": [2, 2]}, r"begin with 1.*got \[2, 2\]"),
    ({"use_spatial_transformer": True}, "belong together, got True and None"),
    ({"num_classes": "many"}, "'sequential', got 'many'"),
    ({"num_classes": "sequential"}, "adm_in_channels must be an integer"),
    ({"num_res_blocks": [1, 1, 1]}, "one for each of the 2 levels"),
    ({"modelchannels": 3}, "did you mean 'model_channels'"),
    ({"num_head_channels": 0}, "num_head_channels .* at least 1, got 0"),
    ({"channel_mult": 2}, "channel_mult .* like its default .*, got 2"),
])  # fmt: skip
def test_a_unet_that_is_not_computed_here_is_named(change, words):
    with pytest.raises(UnsupportedOption, match=words):
        compvis_unet_config({**BASE, "num_heads": 2, **change})


@pytest.mark.parametrize("wrong, words", [
    ({"model": {"target": "os.system"}}, "must be LatentDiffusion .* got os.system"),
    (settings(BASE, "__is_unconditional__", magic=1), "no option 'magic'"),
    (settings(UNETS["text"], encoder("FrozenT5Embedder", {})), "BERTEmbedder.*FrozenT5Embedder"),
    (settings(UNETS["text"], encoder("FrozenCLIPEmbedder", {"version": "x"})), "got 'x'"),
    (settings(UNETS["text"], None, scale_by_std=True), "give it as scale_factor"),
    (settings(UNETS["text"], None, parameterization="mu"), "parameterization .* got 'mu'"),
    ({**WHOLE["clip"], "extra": 1}, "data and lightning, got .'extra'. as well"),
])  # fmt: skip
def test_settings_that_are_not_computed_here_are_named(wrong, words):
    with pytest.raises(UnsupportedOption, match=words):
        LATENT_DIFFUSION.read(wrong)


YAML = """
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 85e-5
    linear_end: 1.2e-2
    monitor: 1.0.0
    scale_by_std: true
    unet_config: {target: x, params: {dropout: .5, image_size: 8, factors: [1, 2]}}
data: null
"""


def test_settings_are_plain_values_of_yaml_or_json(tmp_path):
    path, weights = tmp_path / "settings.yaml", tmp_path / "weights.safetensors"
    path.write_text(YAML)
    write_safetensors({"scale_factor": np.float32([0.25]).reshape(())}, weights)
    params = with_scale_factor(read_values(path), weights)["model"]["params"]
    assert (params["linear_start"], params["linear_end"]) == (0.00085, 0.012)
    assert params["monitor"] == "1.0.0"
    assert params["unet_config"]["params"] == {"dropout": 0.5, "image_size": 8, "factors": [1, 2]}
    assert (params["scale_factor"], params["scale_by_std"]) == (0.25, False)
    assert read_values(path)["model"]["params"]["scale_by_std"] is True
    path.write_text(json.dumps({"model": {"eps": 1e-05}}))
    assert read_values(path) == {"model": {"eps": 1e-05}}


@pytest.mark.parametrize("text, words", [
    ("model: !!python/object/apply:os.getcwd []", "neither JSON nor plain YAML"),
    ("model: [", "neither JSON nor plain YAML"),
    ("model: 2022-13-01", "neither JSON nor plain YAML: month must be in"),
    ("model: !!bool maybe", "neither JSON nor plain YAML"),
    ("[" * 2000, "neither JSON nor plain YAML: maximum recursion"),
    ("model: &a {params: *a}", "by aliases"),
    ("model", "must be a mapping of options, got 'model'"),
    ("{}" + " " * 2**20, "longer than 1048576 bytes"),
])  # fmt: skip
def test_settings_that_are_no_settings_are_refused(tmp_path, text, words):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(UnsupportedOption, match=words):
        read_values(path)


def test_original_files_are_read_by_their_settings_with_either_weights(tmp_path):
    """A file of weights and halved averages, read as users do."""
    options = settings({**BASE, "channel_mult": [1], "num_heads": 1}, "__is_unconditional__")
    config = LATENT_DIFFUSION.read(options)
    shapes = LATENT_DIFFUSION.shapes(config)
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), shapes)
    tensors = export(params, LATENT_DIFFUSION.rows(config, ()))
    network = {n: t for n, t in tensors.items() if n.startswith("model.")}
    averages = {"model_ema." + n[6:].replace(".", ""): t / 2 for n, t in network.items()}
    path = tmp_path / "weights.safetensors"
    write_safetensors({**tensors, **averages, "model_ema.decay": normal()}, path)
    given = {"_class_name": "ldm.models.diffusion.ddpm.LatentDiffusion", **options}
    for which, factor in (("raw", 1.0), ("ema", 0.5), (None, 1.0)):
        loaded = from_pretrained(path, config=given, weights=which)
        for part, scale in (("unet", factor), ("first_stage", 1.0)):
            kernel = loaded.params[part]
            kernel = kernel["network"] if part == "unet" else kernel["encoder"]
            expected = params[part]["network" if part == "unet" else "encoder"]
            np.testing.assert_array_equal(
                kernel["conv_in"]["kernel"], scale * expected["conv_in"]["kernel"]
            )
    unet = {"_class_name": "guided_diffusion.unet.UNetModel", **BASE}
    with pytest.raises(ValueError, match="must be 'raw', got 'ema'"):
        from_pretrained(path, config=unet, weights="ema")
