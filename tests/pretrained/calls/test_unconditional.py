"""Calls of models that are told the time alone, and of models that are told labels."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import image_keys
from diffusion_jax.pretrained import from_config, from_pretrained
from diffusion_jax.pretrained.schedulers import to_config
from diffusion_jax.samplers import DDIM
from diffusion_jax.systems.phases import run_steps

CHECKPOINTS = Path(__file__).parents[2] / "parity" / "cases" / "pipelines" / "ckpt"
SHORT = {"num_inference_steps": 2, "output_type": "np"}


@pytest.fixture(scope="module")
def ddpm():
    return from_pretrained(CHECKPOINTS / "E09_ddpm_ddim_pipelines")


@pytest.fixture(scope="module")
def dit():
    loaded = from_pretrained(CHECKPOINTS / "E10_dit")
    names = {"2": "great white shark, white shark", "207": "golden retriever"}
    return dataclasses.replace(loaded, options={"id2label": names})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 1.0}, "batch_size"),
        ({"eta": 1.0}, "DDPMScheduler takes no eta"),
        ({"num_inference_steps": 1001}, "1000"),
        ({"latents": np.zeros((1, 3, 16, 16))}, "(1, 16, 16, 3)"),
        ({"guidance_scale": 2.0}, "has no guidance_scale"),
    ],
)
def test_bad_words_of_ddpm_are_refused_by_name(ddpm, words, message):
    with pytest.raises(ValueError) as error:
        ddpm(**{**SHORT, **words})
    assert message in str(error.value)


def test_a_network_that_does_not_say_its_size_cannot_be_called(ddpm):
    unet = ddpm["unet"]
    unsized = unet._replace(config=dataclasses.replace(unet.config, kept={}))
    with pytest.raises(ValueError, match="no sample_size"):
        ddpm.replace(unet=unsized)(**SHORT)


def test_ddim_with_noise_is_ddpm_where_every_step_is_taken(ddpm):
    """Song et al. 2021 (arXiv:2010.02502), section 4.1: η = 1 is DDPM with its small variance."""
    config = {"num_train_timesteps": 6, "clip_sample": False}
    ancestral = from_config(
        {"_class_name": "DDPMScheduler", "variance_type": "fixed_small", **config}
    )
    implicit = from_config({"_class_name": "DDIMScheduler", "set_alpha_to_one": True, **config})
    words = {**SHORT, "num_inference_steps": 6, "batch_size": 2, "seed": 3}
    expected = ddpm.replace(scheduler=ancestral)(**words).images
    as_ddim = dataclasses.replace(ddpm.replace(scheduler=implicit), class_name="DDIMPipeline")
    np.testing.assert_allclose(as_ddim(**words, eta=1.0).images, expected, atol=1e-5)
    assert np.abs(as_ddim(**words, eta=0.0).images - expected).max() > 1e-2


def test_an_unconditional_image_depends_on_its_own_key_alone(ddpm):
    both = ddpm(2, **SHORT, seed=5).images
    second = ddpm(1, **SHORT, key=image_keys(5, [1])).images
    np.testing.assert_allclose(second[0], both[1], atol=1e-5)
    latents = ddpm(2, **{**SHORT, "output_type": "latent"}, seed=5).images
    np.testing.assert_allclose(np.clip(latents / 2 + 0.5, 0, 1), both, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "needs class_labels"),
        ({"class_labels": []}, "[0, 1000)"),
        ({"class_labels": [1000]}, "[0, 1000)"),
        ({"class_labels": [-1]}, "[0, 1000)"),
        ({"class_labels": [1.0]}, "[0, 1000)"),
        ({"class_labels": [True]}, "[0, 1000)"),
        ({"class_labels": [[1, 2]]}, "[0, 1000)"),
        ({"class_labels": "white sharkk"}, "did you mean 'white shark'"),
        ({"class_labels": ["golden retriever", 2]}, "names of classes, got ['2']"),
        ({"class_labels": [1], "guidance_scale": "4"}, "guidance_scale"),
        ({"class_labels": [1], "negative_prompt": "x"}, "has no negative_prompt"),
    ],
)
def test_bad_labels_are_refused_by_name(dit, words, message):
    with pytest.raises(ValueError) as error:
        dit(**{**SHORT, **words})
    assert message in str(error.value)


def test_names_of_classes_stand_for_their_numbers_and_nothing_compiles_again(dit):
    words = {**SHORT, "seed": 1, "sampler": DDIM()}
    both = dit([2, 207], **words).images
    before = run_steps._cache_size()
    np.testing.assert_array_equal(dit(["white shark", "golden retriever"], **words).images, both)
    scaled = dit([2, 207], guidance_scale=7, **{**words, "num_inference_steps": 3, "seed": 2})
    assert np.abs(scaled.images - both).max() > 1e-3
    assert run_steps._cache_size() == before
    second = dit(207, **{**words, "seed": None}, key=image_keys(1, [1])).images
    np.testing.assert_allclose(second[0], both[1], atol=1e-5)


@pytest.mark.parametrize(("fraction", "fixed"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_a_scheduler_that_reads_the_learned_variance_is_given_it(dit, fraction, fixed):
    """v = -1 and 1 are the ends of its range (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15)."""
    transformer = dit["transformer"]
    out = transformer.config.network.out_channels

    def says(path, leaf):
        # Channels of the last layer are [patch, patch, out] in a row; the later half is v.
        if "patch_out" not in jax.tree_util.keystr(path):
            return leaf
        value = fraction if leaf.ndim == 1 else 0.0
        later = (jnp.arange(leaf.shape[-1]) % out) >= out // 2
        return jnp.where(later, value, leaf)

    params = jax.tree_util.tree_map_with_path(says, transformer.params)
    changed = dit.replace(transformer=transformer._replace(params=params))

    def drawn(variance):
        config = {**to_config(dit["scheduler"]), "_class_name": "DDPMScheduler"}
        for name in ("set_alpha_to_one", "steps_offset", "timestep_spacing"):
            config.pop(name, None)
        scheduler = from_config({**config, "variance_type": variance})
        words = {**SHORT, "num_inference_steps": 3, "seed": 0, "output_type": "latent"}
        return changed.replace(scheduler=scheduler)([1], **words).images

    np.testing.assert_allclose(drawn("learned_range"), drawn(fixed), atol=1e-4)
