"""Calls of GLIGEN: its schedule, its boxes, inpainting, and what it refuses."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.types import Prediction
from diffusion_jax.guidance import GroundedUntil
from diffusion_jax.pretrained import COMPONENTS, Loaded, Pipeline, from_config, from_pretrained
from diffusion_jax.pretrained.calls import gligen
from diffusion_jax.pretrained.calls.base import control_of
from diffusion_jax.pretrained.calls.images import centered, clip_pixels
from diffusion_jax.samplers import advance
from diffusion_jax.systems.gligen import KeepOutside
from diffusion_jax.systems.phases import run_compute, run_steps
from tests.noise import drawn_by

BASE = Path(__file__).parents[2] / "parity/cases/pipelines/ckpt/E_sd1"
BOXES = [[0.1, 0.2, 0.5, 0.7], [0.4, 0.4, 0.9, 1.0]]
CALL = {
    "prompt": "a photo of a cat",
    "gligen_phrases": ["a cat", "a dog on mars"],
    "gligen_boxes": BOXES,
    "num_inference_steps": 4,
    "gligen_scheduled_sampling_beta": 0.5,
    "output_type": "np",
    "seed": 0,
}


def random_part(class_name, options):
    component = COMPONENTS[class_name]
    config = component.read(options)
    leaves, tree = jax.tree.flatten(component.shapes(config))
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32) for leaf in leaves]
    return Loaded(class_name, config, config.build(), jax.tree.unflatten(tree, params))


def pipeline_of(class_name, attention_type, in_channels=4, **parts):
    base = from_pretrained(BASE)
    options = json.loads((BASE / "unet/config.json").read_text())
    options |= {"attention_type": attention_type, "in_channels": in_channels}
    unet = random_part("UNet2DConditionModel", options)
    return Pipeline(class_name, {**base.parts, "unet": unet, **parts})


@pytest.fixture(scope="module")
def grounded():
    return pipeline_of("StableDiffusionGLIGENPipeline", "gated")


@pytest.fixture(scope="module")
def with_images():
    encoder = {
        "hidden_size": 12,
        "image_size": 16,
        "intermediate_size": 20,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "patch_size": 4,
        "projection_dim": 12,
        "hidden_act": "quick_gelu",
    }
    return pipeline_of(
        "StableDiffusionGLIGENTextImagePipeline",
        "gated-text-image",
        image_encoder=random_part("CLIPVisionModelWithProjection", encoder),
        image_project=random_part("CLIPImageProjection", {"hidden_size": 12}),
    )


@pytest.fixture(scope="module")
def inpainting():
    return pipeline_of("StableDiffusionGLIGENPipeline", "gated", in_channels=9)


def images(pipeline, **words):
    return np.asarray(pipeline(**{**CALL, **words}).images)


def test_never_grounded_is_the_model_before_it_was_grounded(grounded):
    """β = 0 is the call without boxes, bit for bit; and boxes do something otherwise."""
    plain = {name: word for name, word in CALL.items() if "gligen" not in name}
    before = np.asarray(grounded(**plain).images)
    np.testing.assert_array_equal(images(grounded, gligen_scheduled_sampling_beta=0.0), before)
    assert np.abs(images(grounded, gligen_scheduled_sampling_beta=1.0) - before).max() > 1e-3


@pytest.mark.parametrize(
    "class_name, called",
    [
        ("DDIMScheduler", "0 1 2 3 4 5"),
        ("DPMSolverMultistepScheduler", "0 1 2 3 4 5"),
        ("PNDMScheduler", "0 1 1 2 3 4 5"),
        ("HeunDiscreteScheduler", "0 1 1 2 2 3 3 4 4 5 5"),
        ("KDPM2DiscreteScheduler", "0 0.5 1 1.5 2 2.5 3 3.5 4 4.5 5"),
    ],
)
def test_gate_opens_for_a_part_of_the_calls(class_name, called):
    """diffusers shuts the gate before the call number int(β · calls) of its schedulers' times.

    Calls at one time are opened together: both or none of them, where β falls between.
    """
    config = {"_class_name": class_name, "skip_prk_steps": True}
    scheduler = from_config(
        {k: v for k, v in config.items() if "PNDM" in class_name or k[0] == "_"}
    )
    words = {**gligen.TEXT_BOXES.words, "num_inference_steps": 6}
    control = control_of(scheduler, words)
    places = [float(each) for each in called.split()]
    times = gligen._called_times(control)
    assert len(times) == len(places)
    for count in range(len(places) + 1):
        beta = {"gligen_scheduled_sampling_beta": (count + 0.5) / len(places)}
        if count == len(places):
            beta = {"gligen_scheduled_sampling_beta": 1.0}
        gate = gligen._gate(control, beta)
        opened = [time > gate.time for time in times]
        between = 0 < count < len(places) and places[count - 1] == places[count]
        assert sum(opened) == (count - 1 if between else count)
        assert opened == sorted(opened, reverse=True)


def test_knobs_do_not_recompile(grounded):
    images(grounded)
    before = run_steps._cache_size()
    images(grounded, gligen_scheduled_sampling_beta=1.0, gligen_boxes=BOXES[::-1], seed=3)
    images(grounded, gligen_boxes=BOXES[:1], gligen_phrases=["mars"], guidance_scale=3.0)
    images(grounded, num_inference_steps=7, negative_prompt="blurry", prompt="a horse")
    assert run_steps._cache_size() == before


def test_an_image_depends_on_its_seed_and_place_alone(grounded):
    both = images(grounded, num_images_per_prompt=2)
    for i, key in enumerate(image_keys(0, np.arange(2))):
        alone = images(grounded, seed=None, key=key[None])
        np.testing.assert_allclose(both[i], alone[0], atol=2e-5)


def test_a_masked_picture_is_no_picture(with_images):
    """Phrases with pictures that are masked out are phrases alone, and the other way round."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (20, 16, 3), np.uint8)) for _ in BOXES]
    both = images(with_images, gligen_images=pictures)
    phrases = images(with_images)
    pictured = images(with_images, gligen_images=pictures, gligen_phrases=None)
    for mask, value, alone in (("images", 0, phrases), ("phrases", [0, 0], pictured)):
        masked = {f"input_{mask}_mask": value}
        found = images(with_images, gligen_images=pictures, **masked)
        np.testing.assert_allclose(found, alone, atol=1e-6)
        assert np.abs(alone - both).max() > 2e-5


def test_three_and_four_pictures_share_a_compilation(with_images):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (20, 16, 3), np.uint8)) for _ in range(4)]
    places = {"gligen_phrases": None, "gligen_boxes": [*BOXES, *BOXES]}
    four = images(with_images, gligen_images=pictures, **places)
    before = run_compute._cache_size(), run_steps._cache_size()
    places["gligen_boxes"] = places["gligen_boxes"][:3]
    three = images(with_images, gligen_images=pictures[:3], **places)
    assert (run_compute._cache_size(), run_steps._cache_size()) == before
    assert np.abs(three - four).max() > 2e-5


def test_the_gate_of_text_and_images_stays_open_unless_asked(with_images):
    """As in diffusers, whatever β is; "paper" heeds it."""
    always = [images(with_images, gligen_scheduled_sampling_beta=beta) for beta in (0.0, 1.0)]
    np.testing.assert_array_equal(*always)
    heeded = images(with_images, gligen_scheduled_sampling_beta=0.0, gligen_gate="paper")
    assert np.abs(heeded - always[0]).max() > 1e-3


@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler", "PNDMScheduler"])
def test_every_call_sees_what_is_known_at_its_level(name):
    """Outside of the boxes α z + σ n at the level of the call, with n = 1 throughout."""
    scheduler = from_config({"_class_name": name})
    known = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 2)), jnp.float32)
    mask = jnp.zeros((1, 4, 4, 1), bool).at[:, :2].set(True)
    seen = []

    def denoise(x, level):
        jax.debug.callback(lambda *values: seen.append(values), x, level.alpha, level.sigma)
        return Prediction(jnp.tanh(x))

    sampler, grid = KeepOutside(scheduler.sampler, known, mask), scheduler.grid(4)
    state = sampler.init(jnp.zeros_like(known))
    with drawn_by(lambda keys, x: jnp.ones_like(x)):
        state = advance(sampler, denoise, grid, state, image_keys(0, np.arange(1)), 0, 3)
    jax.block_until_ready(state)
    jax.effects_barrier()
    assert len(seen) == {"DDIMScheduler": 3, "HeunDiscreteScheduler": 6}.get(name, len(seen)) >= 3
    for x, alpha, sigma in seen:
        np.testing.assert_allclose(x[:, :2], alpha * known[:, :2] + sigma, rtol=1e-4, atol=1e-5)
        assert np.abs(x[:, 2:] - (alpha * known[:, 2:] + sigma)).min() > 1e-3


def test_what_lies_outside_of_the_boxes_is_kept(inpainting):
    """That is where no box is; boxes are cut to whole latents, as int does."""
    picture = Image.fromarray(np.full((16, 16, 3), 200, np.uint8))
    words = {**gligen.TEXT_BOXES.words, **CALL, "gligen_inpaint_image": picture}
    words = {name: word for name, word in words.items() if name not in ("output_type", "seed")}
    job = gligen.TEXT_BOXES.prepare(inpainting, words)
    outside = np.ones((8, 8))
    outside[1:5, 0:4] = outside[3:8, 3:7] = 0.0
    np.testing.assert_array_equal(job.batch["outside"][0, ..., 0], outside)


def test_pictures_of_another_shape_are_cut_in_the_middle():
    """Stripes of one colour each: what is left is the middle one."""
    stripes = np.zeros((8, 24, 3), np.uint8)
    stripes[:, 8:16] = 90
    for array in (stripes, stripes.swapaxes(0, 1)):
        assert np.asarray(centered(Image.fromarray(array), (4, 4)))[2, 2, 0] == 90
        pixels = clip_pixels(array, "gligen_images", 8)
        mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
        expected = np.broadcast_to((90 / 255 - np.asarray(mean)) / std, (8, 8, 3))
        np.testing.assert_allclose(pixels, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="three channels"):
        clip_pixels(np.zeros((8, 8, 4)), "gligen_images", 8)


@pytest.mark.parametrize(
    "words, message",
    [
        ({"gligen_phrases": None}, "gligen_phrases must be a list with one entry for each of 2"),
        ({"gligen_phrases": ["a cat"]}, "one entry for each of 2"),
        ({"gligen_phrases": ["a cat", 3]}, "1"),
        ({"gligen_boxes": BOXES * 16, "gligen_phrases": ["a"] * 32}, "1 to 30 boxes"),
        ({"gligen_boxes": []}, "1 to 30 boxes"),
        ({"gligen_boxes": [[0, 0, 1]]}, r"\[left, top, right, bottom\]"),
        ({"gligen_boxes": [[0, 0, 512, 512]] * 2}, r"in \[0, 1\]"),
        ({"gligen_boxes": [[0.5, 0, 0.2, 1]] * 2}, "left <= right"),
        ({"gligen_boxes": [[0, 0, np.nan, 1]] * 2}, "left <= right"),
        ({"gligen_scheduled_sampling_beta": 1.5}, "gligen_scheduled_sampling_beta"),
        ({"gligen_inpaint_image": np.zeros((16, 16, 3))}, "must read 9 channels, this one reads 4"),
        ({"gligen_images": []}, "gligen_images"),
        ({"height": 15}, "multiples of 2"),
        ({"prompt": None}, "prompt"),
        ({"negative_prompt": ["a", "b"]}, "negative"),
        ({"latents": np.zeros((1, 4, 8, 8))}, r"\(1, 8, 8, 4\)"),
    ],
)
def test_bad_words_are_refused(grounded, words, message):
    with pytest.raises(ValueError, match=message):
        images(grounded, **words)


@pytest.mark.parametrize(
    "words, message",
    [
        ({"gligen_phrases": None}, "gligen_phrases, gligen_images or both"),
        ({"gligen_images": [None]}, "gligen_images must be a list with one entry for each of 2"),
        ({"input_images_mask": [1]}, "input_images_mask must be a list"),
        ({"input_phrases_mask": [1, 0.5]}, "zeros and ones"),
        ({"input_phrases_mask": 2}, "zeros and ones"),
        ({"gligen_gate": "never"}, "gligen_gate must be one of"),
        ({"gligen_images": [3, 4]}, "gligen_images"),
        (
            {"gligen_normalize_constant": "x", "gligen_images": [np.zeros((16, 16, 3))] * 2},
            "number",
        ),
    ],
)
def test_bad_words_for_images_are_refused(with_images, words, message):
    with pytest.raises(ValueError, match=message):
        images(with_images, **words)


def test_a_network_for_inpainting_needs_an_image(inpainting):
    with pytest.raises(ValueError, match="must read 4 channels, this one reads 9"):
        images(inpainting)
    with pytest.raises(ValueError, match="16 x 16"):
        images(inpainting, gligen_inpaint_image=np.zeros((8, 8, 3)))


def test_gate_is_no_guidance(grounded):
    """Without guidance the unconditional branch is not computed, gated or not."""
    words = {**gligen.TEXT_BOXES.words, **CALL, "guidance_scale": 1.0}
    words = {name: word for name, word in words.items() if name not in ("output_type", "seed")}
    job = gligen.TEXT_BOXES.prepare(grounded, words)
    control = job.controls["denoise"]
    assert isinstance(control.guide.guides[0], GroundedUntil) and not control.guided
    assert "null_ids" not in job.batch
