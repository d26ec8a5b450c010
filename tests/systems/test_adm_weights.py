"""Weights under ADM's original names fit the stages of the classifier-guidance system."""

import jax
import numpy as np
from safetensors.numpy import load_file

from diffusion_jax.io.mapping import convert, export, prefixed
from diffusion_jax.io.tables.openai import (
    LABEL_ROWS,
    adm_classifier_config,
    adm_classifier_rows,
    adm_unet_config,
    adm_unet_rows,
)
from diffusion_jax.losses import Hybrid
from diffusion_jax.models import ClassifierConfig, LevelConfig, Sinusoidal, UNetConfig
from diffusion_jax.samplers import DDPM
from diffusion_jax.systems import ClassifierGuidanceSystem
from tests.parity.test_parity import ORIGINALS

SHARED = {
    "image_size": 16,
    "in_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
UNET = {**SHARED, "out_channels": 6, "channel_mult": [1, 1], "num_classes": 10, "num_heads": 2}
CLASSIFIER = {
    **SHARED,
    "out_channels": 10,
    "channel_mult": [1, 2],
    "num_head_channels": 32,
    "pool": "attention",
}


def fields(values):
    """The plain fields of a translated configuration with the dataclasses they stand for."""
    return {
        **values,
        "levels": tuple(LevelConfig(**level) for level in values["levels"]),
        "time_features": Sinusoidal(**values["time_features"]),
    }


def stages():
    """The two stages of a system whose networks are those of the constructor arguments."""
    return (
        ClassifierGuidanceSystem(
            image_size=16,
            network=UNetConfig(**fields(adm_unet_config(UNET).unet)),
            loss=Hybrid(),
            sampler=DDPM("learned_range"),
            num_classes=10,
            classifier=ClassifierConfig(**fields(adm_classifier_config(CLASSIFIER).classifier)),
        )
        .build()
        .stages
    )


def test_original_names_of_the_diffusion_model_fill_its_stage():
    """Out and back in: one name for every tensor, labels in a table of exactly ten rows."""
    shapes = jax.eval_shape(stages()["base"].init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)
    rows = prefixed(adm_unet_rows(UNET), target="network/")
    rows += prefixed(LABEL_ROWS, target="conditioner/")
    tensors = export(params, rows)
    assert tensors["label_emb.weight"].shape == (10, 128)
    assert tensors["out.2.weight"].shape == (6, 32, 3, 3)
    assert tensors["middle_block.1.qkv.weight"].shape == (96, 32, 1)
    back = convert(tensors, rows, shapes)
    filled = {name: back.get(name, {}) for name in params}
    jax.tree.map(np.testing.assert_array_equal, filled, params)


def test_an_original_classifier_file_fills_its_stage():
    shapes = jax.eval_shape(stages()["classifier"].init, jax.random.key(0))
    file = ORIGINALS / "ckpt" / "F03_adm_classifier_attention" / "model.safetensors"
    rows = prefixed(adm_classifier_rows(CLASSIFIER), target="network/")
    params = convert(load_file(file), rows, shapes)
    jax.tree.map(lambda p, s: np.testing.assert_equal(p.shape, s.shape), params, shapes)
