"""Every class that is read here: saved and loaded again it is the same, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.io.mapping import MappingError
from diffusion_jax.io.shards import open_weights
from diffusion_jax.pretrained import COMPONENTS, Loaded, from_pretrained, save_pretrained

UNET = {
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
}
AUTOENCODER = {
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "out_channels": 8,
    "num_layers": 1,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
}
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "projection_dim": 12,
}
CLIP_TEXT = {**CLIP, "vocab_size": 60, "max_position_embeddings": 12}
CLIP_VISION = {**CLIP, "image_size": 16, "patch_size": 4}
T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2}
ADM = {
    "image_size": 16,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
}
TEXT = {"text_ctx": 8, "xf_width": 32, "xf_layers": 1, "xf_heads": 2, "xf_final_ln": True}
GLIDE = {**ADM, **TEXT, "xf_padding": True, "n_vocab": 80, "num_heads": 2}
del GLIDE["image_size"]
COMPVIS_UNET = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [1],
    "num_res_blocks": 1,
    "channel_mult": [1, 1],
    "num_heads": 4,
    "use_spatial_transformer": True,
    "context_dim": 12,
    "legacy": False,
}
GLIGEN = {
    **{
        name: value
        for name, value in COMPVIS_UNET.items()
        if name not in ("use_spatial_transformer", "legacy")
    },
    "fuser_type": "gatedSA",
    "grounding_tokenizer": {
        "target": "ldm.modules.diffusionmodules.text_grounding_net.PositionNet",
        "params": {"in_dim": 6, "out_dim": 12, "hidden": 8},
    },
    "grounding_downsampler": {
        "target": "ldm.modules.diffusionmodules.hed_grounding_downsampler.GroundingDownsampler",
        "params": {"out_dim": 1},
    },
    "inpaint_mode": True,
}
FIRST_STAGE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
}
LATENT_DIFFUSION = {
    "model": {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "linear_start": 0.00085,
            "linear_end": 0.012,
            "timesteps": 1000,
            "conditioning_key": "crossattn",
            "unet_config": {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": COMPVIS_UNET,
            },
            "first_stage_config": {
                "target": "ldm.models.autoencoder.AutoencoderKL",
                "params": {"embed_dim": 4, "ddconfig": FIRST_STAGE},
            },
            "cond_stage_config": {
                "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
                "params": {**CLIP_TEXT, "hidden_size": 12},
            },
        },
    }
}


def first_stage(name, **codes):
    ddconfig = {**FIRST_STAGE, "double_z": not codes}
    params = {"embed_dim": 4, "ddconfig": ddconfig, **codes}
    return {"model": {"target": f"ldm.models.autoencoder.{name}", "params": params}}


# Class -> what its config.json may say, as small as it gets.
CONFIGS = {
    "UNet2DModel": {
        **UNET,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "num_class_embeds": 5,
    },
    "UNet2DConditionModel": {
        **UNET,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
    },
    "AutoencoderKL": AUTOENCODER,
    "VQModel": {**AUTOENCODER, "num_vq_embeddings": 16},
    "AutoencoderTiny": {
        "encoder_block_out_channels": [8, 8],
        "decoder_block_out_channels": [8, 8],
        "num_encoder_blocks": [1, 1],
        "num_decoder_blocks": [1, 1],
    },
    "PriorTransformer": {
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "num_layers": 1,
        "embedding_dim": 12,
        "num_embeddings": 5,
    },
    "UnCLIPTextProjModel": {
        "clip_embeddings_dim": 12,
        "time_embed_dim": 16,
        "cross_attention_dim": 8,
    },
    "CLIPImageProjection": {"hidden_size": 6},
    "DiTTransformer2DModel": DIT,
    "Transformer2DModel": {
        **DIT,
        "in_channels": 4,
        "patch_size": 2,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    },
    "CLIPTextModel": CLIP_TEXT,
    "CLIPTextModelWithProjection": CLIP_TEXT,
    "CLIPVisionModel": CLIP_VISION,
    "CLIPVisionModelWithProjection": CLIP_VISION,
    "CLIPModel": {
        "projection_dim": 12,
        "text_config": CLIP_TEXT,
        "vision_config": CLIP_VISION,
    },
    "T5EncoderModel": {**T5, "feed_forward_proj": "gated-gelu"},
    "T5ForConditionalGeneration": T5,
    "LDMBertModel": {
        "vocab_size": 60,
        "max_position_embeddings": 12,
        "d_model": 16,
        "encoder_ffn_dim": 24,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "head_dim": 6,
    },
    "guided_diffusion.unet.UNetModel": {**ADM, "num_classes": 10},
    "guided_diffusion.unet.SuperResModel": ADM,
    "guided_diffusion.unet.EncoderUNetModel": {**ADM, "num_head_channels": 16},
    "glide_text2im.text2im_model.Text2ImUNet": GLIDE,
    "glide_text2im.text2im_model.SuperResText2ImUNet": GLIDE,
    "glide_text2im.text2im_model.InpaintText2ImUNet": GLIDE,
    "glide_text2im.text2im_model.SuperResInpaintText2ImUnet": GLIDE,
    "ldm.modules.diffusionmodules.openaimodel.UNetModel": COMPVIS_UNET,
    "ldm.models.diffusion.ddpm.LatentDiffusion": LATENT_DIFFUSION,
    "ldm.models.autoencoder.AutoencoderKL": first_stage("AutoencoderKL"),
    "ldm.models.autoencoder.VQModel": first_stage("VQModel", n_embed=5),
    "ldm.models.autoencoder.VQModelInterface": first_stage("VQModelInterface", n_embed=5),
    "gligen.ldm.modules.diffusionmodules.openaimodel.UNetModel": GLIGEN,
}
# Classes that hold more than is read, or are older names, and what they are written as.
WRITTEN_AS = {
    "Transformer2DModel": "DiTTransformer2DModel",
    "T5ForConditionalGeneration": "T5EncoderModel",
}


def loaded(class_name):
    """A network of that class with random parameters, exact in float16."""
    component = COMPONENTS[class_name]
    config = component.read(CONFIGS[class_name])
    rng = np.random.default_rng(0)

    def random(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape).astype(np.float16), leaf.dtype)

    return Loaded(
        class_name, config, config.build(), jax.tree.map(random, component.shapes(config))
    )


def test_every_class_has_a_row_here():
    assert set(CONFIGS) == set(COMPONENTS)


@pytest.mark.parametrize("class_name", CONFIGS)
def test_a_network_is_the_same_after_a_round_trip(class_name, tmp_path, monkeypatch):
    written = loaded(class_name)
    shapes = jax.eval_shape(lambda: written.params)
    for name in {class_name, WRITTEN_AS.get(class_name, class_name)}:
        # Tracing the network again for equal configurations is what takes the time.
        monkeypatch.setitem(
            COMPONENTS, name, COMPONENTS[name]._replace(shapes=lambda config: shapes)
        )
    save_pretrained(written, tmp_path / "a", max_shard_size=20_000)
    read = from_pretrained(tmp_path / "a", dtype="float16")
    assert (read.class_name, read.config) == (
        WRITTEN_AS.get(class_name, class_name),
        written.config,
    )
    assert jax.tree.structure(read.params) == jax.tree.structure(written.params)
    for ours, theirs in zip(*map(jax.tree.leaves, (read.params, written.params)), strict=True):
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs))


def test_the_projection_of_images_is_a_matrix_on_the_left(tmp_path):
    """diffusers' is torch's linear layer: x Wᵀ with the W of the file, which is square."""
    written = loaded("CLIPImageProjection")
    save_pretrained(written, tmp_path)
    weight = open_weights(tmp_path)["project.weight"]
    x = np.random.default_rng(1).normal(size=(2, 6)).astype(np.float32)
    out = written.module.apply({"params": written.params}, x)
    np.testing.assert_allclose(out, x @ weight.T, rtol=1e-5, atol=1e-5)


def test_parameters_of_another_configuration_are_not_written(tmp_path):
    wider = {**CONFIGS["CLIPImageProjection"], "hidden_size": 7}
    config = COMPONENTS["CLIPImageProjection"].read(wider)
    with pytest.raises(MappingError, match=r"kernel: has \(6, 6\), expected \(7, 7\)"):
        save_pretrained(loaded("CLIPImageProjection")._replace(config=config), tmp_path)
