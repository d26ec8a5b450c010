"""Words of a call: what is refused before anything is computed, and what must not recompile."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import image_keys
from diffusion_jax.models import attention
from diffusion_jax.pretrained import from_config, from_pretrained
from diffusion_jax.pretrained.calls import task_of
from diffusion_jax.pretrained.calls.base import completed, control_of
from diffusion_jax.pretrained.calls.image_to_image import INPAINTING
from diffusion_jax.samplers import DDIM
from diffusion_jax.systems.phases import draw_all, run_steps
from diffusion_jax.training.parallel import make_mesh

CHECKPOINTS = Path(__file__).parents[2] / "parity" / "cases" / "pipelines" / "ckpt"
SMALL = {"height": 16, "width": 16, "num_inference_steps": 3, "output_type": "np"}


@pytest.fixture(scope="module")
def pipeline():
    return from_pretrained(CHECKPOINTS / "E_sd1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "prompt or prompt_embeds"),
        ({"prompt": None}, "prompt or prompt_embeds"),
        ({"prompt": 3}, "int"),
        ({"prompt": []}, "empty list"),
        ({"prompt": ["a", 3]}, "prompt 1 is no string but int"),
        ({"prompt": "half \ud83d"}, "surrogate"),
        ({"prompt": "a", "prompt_embeds": np.zeros((1, 20, 12))}, "either"),
        ({"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y"]}, "got 2 for 3"),
        ({"prompt": "a", "height": 15}, "height = 15"),
        ({"prompt": "a", "width": 17}, "width = 17"),
        ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps"),
        ({"prompt": "a", "num_inference_steps": -3}, "num_inference_steps"),
        ({"prompt": "a", "num_inference_steps": 2.5}, "num_inference_steps"),
        ({"prompt": "a", "num_inference_steps": 1001}, "1000"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale"),
        ({"prompt": "a", "guidance_rescale": 1.5}, "guidance_rescale"),
        ({"prompt": "a", "eta": -1.0}, "eta"),
        ({"prompt": "a", "eta": 0.5}, "PNDMScheduler takes no eta"),
        ({"prompt": "a", "latents": np.zeros((1, 4, 8, 8))}, "(1, 8, 8, 4)"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"prompt": "a", "seed": 1, "key": jax.random.key(1)}, "not both"),
        ({"prompt": "a", "key": jax.random.split(jax.random.key(1), 3)}, "for each of 1 images"),
        ({"prompt": "a", "key": jnp.zeros(2)}, "jax.random.key"),
        ({"prompt": "a", "sampler": "dimm"}, "sampler must be one of"),
        ({"prompt": "a", "sampler": "ddim", "timesteps": [3, 2]}, "belongs to the scheduler"),
        ({"prompt": "a", "spacing": "karras"}, "give one as sampler"),
        ({"prompt": "a", "output_type": "pt"}, "output_type"),
        ({"prompt": "a", "guidance": 3.0}, "did you mean 'guidance_scale'"),
        ({"prompt": "a", "image": np.zeros((16, 16, 3)), "strength": 0.0}, "strength of 0.0"),
        ({"prompt": "a", "image": np.zeros((16, 16, 3)), "strength": 2.0}, "strength"),
        ({"prompt": "a", "image": np.full((16, 16, 3), 200.0)}, "must lie in"),
        ({"prompt": "a", "image": np.zeros((16, 16, 3), np.uint16)}, "scale it"),
        (
            {"prompt": "a", "image": np.zeros((16, 16, 3)), "mask_image": np.zeros((16, 16, 3))},
            "one channel",
        ),
    ],
)
def test_bad_words_are_refused_by_name(pipeline, words, message):
    before = run_steps._cache_size()
    # Image-to-image has the image's size.
    sized = {} if "image" in words and "mask_image" not in words else SMALL
    with pytest.raises(ValueError) as error:
        pipeline(**{**sized, **words})
    assert message in str(error.value)
    assert run_steps._cache_size() == before


def test_a_callback_may_change_the_latents_and_its_errors_are_the_users_own(pipeline):
    seen = []

    def callback(pipe, step, t, tensors):
        seen.append((step, t))
        return {"latents": jnp.zeros_like(tensors["latents"])} if step == 2 else None

    words = {**SMALL, "seed": 0, "output_type": "latent"}
    drawn = pipeline("a", callback_on_step_end=callback, **words)
    assert [step for step, _ in seen] == [0, 1, 2]
    assert all(a > b for (_, a), (_, b) in zip(seen, seen[1:], strict=False))
    np.testing.assert_array_equal(drawn.images, np.zeros((1, 8, 8, 4)))

    def broken(pipe, step, t, tensors):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pipeline("a", callback_on_step_end=broken, **words)


def test_steps_one_by_one_are_the_steps_at_once(pipeline):
    told = []
    words = {**SMALL, "seed": 0}
    at_once = pipeline("a", **words).images
    by_step = pipeline("a", **words, progress=lambda *each: told.append(each)).images
    np.testing.assert_allclose(by_step, at_once, atol=1e-5)
    assert told == [("denoise", None, 3), *(("denoise", done, 3) for done in range(4))]


def test_scale_seed_prompt_steps_and_strength_do_not_compile_again(pipeline):
    image = np.full((16, 16, 3), 0.5, np.float32)
    sampler = DDIM()
    pipeline("a", **SMALL, seed=0, sampler=sampler)
    pipeline("a", image, sampler=sampler, num_inference_steps=3, output_type="np", seed=0)
    before = run_steps._cache_size()
    for scale, steps in ((3, 4), (2.0, 7), (np.float32(9.0), 2)):
        words = {"guidance_scale": scale, "num_inference_steps": steps, "seed": steps}
        pipeline(f"{scale}", negative_prompt="b", **{**SMALL, **words}, sampler=sampler)
        pipeline(f"{scale}", image, strength=0.9, output_type="np", **words, sampler=sampler)
    pipeline("a", **SMALL, seed=0, sampler=DDIM(eta=0.7))
    assert run_steps._cache_size() == before


def test_an_image_depends_on_the_seed_and_its_number_alone(pipeline):
    words = {**SMALL, "sampler": DDIM(eta=1.0)}
    both = pipeline(["a", "b"], **words, seed=4).images
    second = pipeline("b", **words, key=image_keys(4, [1])).images
    np.testing.assert_allclose(second[0], both[1], atol=1e-5)
    again = pipeline(["a", "b"], **words, key=jax.random.key(4)).images
    np.testing.assert_array_equal(again, both)
    other = pipeline(["a", "b"], **words, seed=5).images
    assert np.abs(other - both).max() > 1e-2
    spread = pipeline(["a", "b", "a"], **words, seed=4, mesh=make_mesh()).images
    np.testing.assert_allclose(spread[:2], both, atol=1e-5)


def test_an_undrawn_seed_is_reported_and_draws_the_same_again(pipeline):
    drawn = pipeline("a", **SMALL)
    again = pipeline("a", **SMALL, seed=drawn.seed)
    np.testing.assert_array_equal(again.images, drawn.images)


def test_parameters_may_stay_on_the_host(pipeline):
    host = pipeline.on_host()
    assert isinstance(jax.tree.leaves(host["unet"].params)[0], np.ndarray)
    np.testing.assert_array_equal(
        host("a", **SMALL, seed=0).images, pipeline("a", **SMALL, seed=0).images
    )


def test_embeddings_stand_for_prompts(pipeline):
    encoder = pipeline["text_encoder"]

    def embeds(text):
        ids = pipeline["tokenizer"]([text]).ids
        return encoder.module.apply({"params": encoder.params}, ids).last

    given = {"prompt_embeds": embeds("a cat"), "negative_prompt_embeds": embeds("blurry")}
    words = {**SMALL, "seed": 0, "num_images_per_prompt": 2}
    np.testing.assert_allclose(
        pipeline(**given, **words).images,
        pipeline("a cat", negative_prompt="blurry", **words).images,
        atol=1e-5,
    )


def test_every_output_type_is_the_same_image(pipeline):
    words = {**SMALL, "seed": 0}
    image = pipeline("a", **words).images
    [picture] = pipeline("a", **{**words, "output_type": "pil"}).images
    np.testing.assert_array_equal(np.asarray(picture), (image[0] * 255).round().astype(np.uint8))
    assert isinstance(pipeline("a", **{**words, "output_type": "jax"}).images, jax.Array)
    latents = pipeline("a", **{**words, "output_type": "latent"}).images
    vae = pipeline["vae"]
    decoded = vae.module.apply(
        {"params": vae.params}, latents / vae.config.scaling_factor, method="decode"
    )
    np.testing.assert_allclose(np.clip(decoded / 2 + 0.5, 0, 1), image, atol=1e-5)


def test_a_warning_tells_of_images_that_are_not_finite(pipeline):
    vae = pipeline["vae"]
    broken = vae._replace(params=jax.tree.map(lambda a: a * jnp.nan, vae.params))
    with pytest.warns(UserWarning, match="not finite"):
        pipeline.replace(vae=broken)("a", **{**SMALL, "output_type": "jax"}, seed=0)


def test_a_whole_pipeline_is_one_pure_function(pipeline):
    words = {**SMALL, "prompt": ["a", "b"], "seed": 3}
    task = task_of(pipeline.class_name, words)
    job = task.prepare(pipeline, completed(task, pipeline.class_name, words))
    params = {name: pipeline[name].params for name in ("text_encoder", "unet", "vae")}
    draw = jax.jit(
        lambda params, batch, keys, controls: draw_all(job.phases, params, batch, keys, controls)
    )
    images = draw(params, job.batch, image_keys(3, [0, 1]), job.controls)["images"]
    np.testing.assert_allclose(images, pipeline(**words).images, atol=1e-5)


def test_pipelines_that_cannot_be_called_say_so(pipeline):
    with pytest.raises(ValueError, match="KandinskyPipeline cannot be called"):
        dataclasses.replace(pipeline, class_name="KandinskyPipeline")("a")
    with pytest.raises(ValueError, match="no parts"):
        pipeline.replace(sheduler=None)


def test_sliced_attention_is_attention(pipeline, monkeypatch):
    words = {**SMALL, "seed": 0}
    tiled, traced = attention._tiled, []
    monkeypatch.setattr(attention, "_tiled", lambda *args: traced.append(1) or tiled(*args))
    whole = pipeline("a", **words).images
    assert not traced
    sliced = pipeline("a", **words, attention_slicing=True).images
    assert traced
    np.testing.assert_allclose(sliced, whole, atol=1e-5)


def test_autoencoders_work_image_by_image_and_in_tiles(pipeline):
    words = {**SMALL, "seed": 0}
    whole = pipeline(["a", "b"], **words).images
    np.testing.assert_allclose(
        pipeline(["a", "b"], **words, vae_slicing=True).images, whole, atol=1e-5
    )
    # An image of one tile is decoded as it is, a larger one in several.
    size = pipeline["vae"].config.sample_size
    words |= {"height": size, "width": size}
    one = pipeline("a", **words).images
    np.testing.assert_array_equal(pipeline("a", **words, vae_tiling=True).images, one)
    words |= {"height": 2 * size}
    tall = pipeline("a", **words).images
    tiles = pipeline("a", **words, vae_tiling=True).images
    assert tiles.shape == tall.shape
    assert np.abs(tiles - tall).max() > 1e-4
    start = {"image": tall, "num_inference_steps": 2, "seed": 0, "output_type": "np"}
    np.testing.assert_allclose(
        pipeline("a", **start, vae_slicing=True).images, pipeline("a", **start).images, atol=1e-5
    )
    assert pipeline("a", **start, vae_slicing=True, vae_tiling=True).images.shape == tall.shape
    unconditional = from_pretrained(CHECKPOINTS / "E09_ddpm_ddim_pipelines")
    with pytest.raises(ValueError, match="with an autoencoder"):
        unconditional(num_inference_steps=2, vae_tiling=True)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_own_samplers_start_with_the_noise_of_the_first_level_that_is_run(strength):
    """Pure noise is N(0, σ²) in this schedule, where inpainting with latents begins later too."""
    scheduler = from_config({"_class_name": "EDMEulerScheduler"})
    words = {**INPAINTING.words, "num_inference_steps": 6, "sampler": "ddim", "strength": strength}
    control = control_of(scheduler, words)
    sigma = np.asarray(control.grid.levels.sigma)
    assert control.start_std == sigma[0 if strength == 1.0 else 3]
    assert sigma[3] < sigma[0]
