"""Stable Diffusion XL: two networks that share a way, and words that are refused."""

from pathlib import Path

import numpy as np
import pytest

from diffusion_jax.pretrained import from_config, from_pretrained
from diffusion_jax.samplers import DDIM
from diffusion_jax.systems.phases import run_steps

CHECKPOINTS = Path(__file__).parents[2] / "parity" / "cases" / "pipelines" / "ckpt"
INPAINTING = Path(__file__).parents[1] / "data_sdxl_inpainting" / "case.npz"
WORDS = {"prompt": "a cat", "num_inference_steps": 8, "output_type": "np", "seed": 3}
SIZE = {"height": 16, "width": 16}


@pytest.fixture(scope="module")
def pipeline():
    return from_pretrained(CHECKPOINTS / "E12_sdxl")


@pytest.mark.parametrize("sampler", [None, DDIM()])
def test_halves_of_the_way_are_the_way(pipeline, sampler):
    """A network that goes on where it stopped itself; Euler and DDIM remember no earlier step."""
    words = {**WORDS, "sampler": sampler}
    whole = pipeline(**words, **SIZE).images
    first = pipeline(**{**words, **SIZE, "output_type": "latent"}, denoising_end=0.5).images
    second = pipeline(**words, image=first, denoising_start=0.5).images
    np.testing.assert_allclose(second, whole, atol=1e-5)
    third = pipeline(**words, image=first, denoising_start=0.75).images
    assert np.abs(third - whole).max() > 1e-2


# β and spacing of the folder's own scheduler.
DDIM_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


@pytest.mark.parametrize("scheduler", ["euler", "ddim"])
def test_inpainting_in_two_parts_is_that_of_diffusers(pipeline, scheduler):
    """Strength 0.9999 leaves out a step; Euler's samples are x / α, what is known is not."""
    if scheduler == "ddim":
        pipeline = pipeline.replace(scheduler=from_config(DDIM_SCHEDULER))
    case = dict(np.load(INPAINTING))
    nhwc = {name: np.moveaxis(a, 1, -1) for name, a in case.items() if a.ndim == 4}
    words = {**WORDS, **SIZE, "mask_image": case["mask"], "output_type": "latent"}
    start = {"image": nhwc["image"], "latents": nhwc["noise"]}
    first = nhwc[f"{scheduler}_first"]
    going_on = {"image": first, "latents": nhwc["second_noise"], "denoising_start": 0.5}
    for name, call in (
        ("first", {**start, "denoising_end": 0.5}),
        ("second", going_on),
        ("whole", start),
    ):
        images = np.asarray(pipeline(**words, **call).images)
        np.testing.assert_allclose(images, nhwc[f"{scheduler}_{name}"], atol=5e-4, err_msg=name)


def test_shares_and_strength_do_not_compile_again(pipeline):
    latents = np.zeros((1, 8, 8, 4), np.float32)
    image = np.full((16, 16, 3), 0.5, np.float32)

    def calls(share, strength):
        pipeline(**WORDS, **SIZE, denoising_end=share)
        pipeline(**WORDS, image=latents, denoising_start=share)
        pipeline(**WORDS, image=image, strength=strength)

    calls(0.5, 0.4)
    before = run_steps._cache_size()
    calls(0.7, 0.9)
    assert run_steps._cache_size() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"denoising_end": 1.0}, "denoising_end must lie between 0 and 1"),
        ({"denoising_end": "half"}, "denoising_end"),
        ({"denoising_end": 1e-4}, "leaves none of 8 steps"),
        ({"image": np.zeros((16, 16, 3)), "denoising_start": 0.5}, "must be latents"),
        (
            {
                "image": np.zeros((1, 8, 8, 4), np.float32),
                "denoising_start": 0.5,
                "denoising_end": 0.5,
            },
            "must be smaller than denoising_end",
        ),
        (
            {
                "image": np.zeros((16, 16, 3)),
                "mask_image": np.zeros((16, 16)),
                "denoising_start": 0.5,
            },
            "must be latents",
        ),
        (
            {"image": np.zeros((1, 4, 4, 4), np.float32), "mask_image": np.zeros((16, 16))},
            r"image must have latents of \(8, 8\), as height and width say, got \(4, 4\)",
        ),
        ({"image": np.zeros((16, 16, 3)), "aesthetic_score": float("nan")}, "aesthetic_score"),
        ({"image": np.zeros((16, 16, 3)), "negative_target_size": 3}, "two numbers of pixels"),
        ({"image": np.zeros((16, 16, 3)), "mask_image": np.zeros((16, 16)), "strength": 2.0}, "st"),
    ],
)
def test_bad_words_are_refused_by_name(pipeline, words, message):
    sized = {} if "image" in words and "mask_image" not in words else SIZE
    with pytest.raises(ValueError, match=message):
        pipeline(**WORDS, **sized, **words)


def test_a_network_told_what_is_known_cannot_go_on_from_latents():
    told = from_pretrained(CHECKPOINTS / "E12c_sdxl_inp9")
    image = {"image": np.full((16, 16, 3), 0.5, np.float32), "mask_image": np.ones((16, 16))}
    with pytest.raises(ValueError, match="leave denoising_start out, or take a network of 4"):
        told(**WORDS, **SIZE, **image, denoising_start=0.5)


def test_what_the_network_is_not_told_is_refused(pipeline):
    refiner = from_pretrained(CHECKPOINTS / "E12b_sdxl_refiner")
    image = np.full((16, 16, 3), 0.5, np.float32)
    with pytest.raises(ValueError, match="no aesthetic scores; leave aesthetic_score out"):
        pipeline(**WORDS, image=image, aesthetic_score=6.0)
    with pytest.raises(ValueError, match="not target sizes; leave target_size out"):
        refiner(**WORDS, image=image, target_size=(16, 16))
    with pytest.raises(ValueError, match="aesthetic_score"):
        refiner(**WORDS, image=image, aesthetic_score=float("nan"))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [("PNDMScheduler", "PNDM has no halves"), ("EDMEulerScheduler", "share of numbered times")],
)
def test_schedulers_without_halves_are_refused(pipeline, scheduler, message):
    other = pipeline.replace(scheduler=from_config({"_class_name": scheduler}))
    with pytest.raises(ValueError, match=message):
        other(**WORDS, **SIZE, denoising_end=0.5)


def test_every_size_and_score_reaches_its_branch(pipeline):
    """Of both networks, with and without an image; what is left out has diffusers' default."""
    refiner = from_pretrained(CHECKPOINTS / "E12b_sdxl_refiner")
    image = {"image": np.full((16, 16, 3), 0.5, np.float32), "strength": 0.9}
    both = {"negative_original_size": (9, 7), "negative_target_size": (5, 3)}
    with_image = [
        {"original_size": (9, 7)},
        {"negative_original_size": (9, 7)},
        {"crops_coords_top_left": (9, 7)},
        {"negative_crops_coords_top_left": (9, 7)},
    ]
    scores = [{"aesthetic_score": 1.0}, {"negative_aesthetic_score": 9.0}]
    targets = [{"target_size": (9, 7)}, {"negative_target_size": (9, 7)}]
    for one, base, changes in (
        (pipeline, SIZE, [*with_image[::2], *targets[:1], both]),
        (pipeline, image, [*with_image, *targets]),
        (refiner, image, [*with_image, *scores]),
    ):
        plain = one(**WORDS, **base).images
        for change in changes:
            assert np.abs(one(**WORDS, **base, **change).images - plain).max() > 1e-4, change
