"""Calls of unCLIP: three stages and what each is told, and what is refused."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import image_keys
from diffusion_jax.data.tokenizers import from_folder
from diffusion_jax.pretrained import COMPONENTS, Loaded, Pipeline, from_config
from diffusion_jax.pretrained.calls import unclip
from diffusion_jax.pretrained.calls.base import completed
from diffusion_jax.systems import phases
from diffusion_jax.systems.dalle2 import DenoiseEmbedding, ResizeLowRes, RestoreEmbedding

BASE = Path(__file__).parents[2] / "parity/cases/pipelines/ckpt/E_sd1"
WIDTH, LENGTH = 12, 20
CALL = {
    "prompt": "a photo of a cat",
    "prior_num_inference_steps": 3,
    "decoder_num_inference_steps": 3,
    "super_res_num_inference_steps": 3,
    "output_type": "np",
    "seed": 0,
}
UNET = {
    "down_block_types": ["ResnetDownsampleBlock2D"],
    "up_block_types": ["ResnetUpsampleBlock2D"],
    "block_out_channels": [4],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "resnet_time_scale_shift": "scale_shift",
}
SUPER_RES = {
    **UNET,
    "in_channels": 6,
    "out_channels": 3,
    "sample_size": 8,
    "add_attention": False,
}
DECODER = {
    **UNET,
    "in_channels": 3,
    "out_channels": 6,
    "sample_size": 4,
    "attention_head_dim": 4,
    "class_embed_type": "identity",
    "cross_attention_dim": WIDTH,
    "down_block_types": ["SimpleCrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ["SimpleCrossAttnUpBlock2D"],
}
PRIOR = {
    "num_attention_heads": 2,
    "attention_head_dim": 6,
    "num_layers": 1,
    "embedding_dim": WIDTH,
    "num_embeddings": LENGTH,
}
PROJECTION = {
    "clip_embeddings_dim": WIDTH,
    "clip_extra_context_tokens": 2,
    "cross_attention_dim": WIDTH,
    "time_embed_dim": 16,
}


def random_part(class_name, options, seed):
    component = COMPONENTS[class_name]
    config = component.read(options)
    leaves, tree = jax.tree.flatten(component.shapes(config))
    rng = np.random.default_rng(seed)
    params = [jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32) for leaf in leaves]
    return Loaded(class_name, config, config.build(), jax.tree.unflatten(tree, params))


def scheduler(**options):
    return from_config({"_class_name": "UnCLIPScheduler", **options})


@pytest.fixture(scope="module")
def pipeline():
    text = json.loads((BASE / "text_encoder/config.json").read_text())
    text["architectures"] = ["CLIPTextModelWithProjection"]
    parts = {
        "prior": random_part("PriorTransformer", PRIOR, 0),
        "decoder": random_part("UNet2DConditionModel", DECODER, 1),
        "text_encoder": random_part("CLIPTextModelWithProjection", text, 2),
        "text_proj": random_part("UnCLIPTextProjModel", PROJECTION, 3),
        "super_res_first": random_part("UNet2DModel", SUPER_RES, 4),
        "super_res_last": random_part("UNet2DModel", SUPER_RES, 5),
        "tokenizer": from_folder(BASE, subfolder="tokenizer"),
        "prior_scheduler": scheduler(prediction_type="sample", clip_sample_range=5.0),
        "decoder_scheduler": scheduler(variance_type="learned_range"),
        "super_res_scheduler": scheduler(),
    }
    return Pipeline("UnCLIPPipeline", parts)


def images(pipeline, **words):
    return np.asarray(pipeline(**{**CALL, **words}).images)


def prepared(pipeline, **words):
    words = completed(unclip.TEXT_TO_IMAGE, "UnCLIPPipeline", {**CALL, **words})
    return unclip.TEXT_TO_IMAGE.prepare(pipeline, words)


def test_knobs_do_not_recompile(pipeline):
    images(pipeline)
    before = phases.run_steps._cache_size()
    images(pipeline, prior_guidance_scale=0.5, decoder_guidance_scale=2.0, seed=3, prompt="a horse")
    steps = {f"{stage}_num_inference_steps": 4 for stage in ("prior", "decoder", "super_res")}
    images(pipeline, **steps)
    assert phases.run_steps._cache_size() == before


def test_an_image_depends_on_its_seed_and_place_alone(pipeline):
    both = images(pipeline, num_images_per_prompt=2)
    assert both.shape == (2, 8, 8, 3)
    for i, key in enumerate(image_keys(0, np.arange(2))):
        alone = images(pipeline, seed=None, key=key[None])
        np.testing.assert_allclose(both[i], alone[0], atol=1e-4)


def test_stages_draw_from_keys_of_their_own(pipeline):
    """Noise of one shape would be one noise otherwise."""
    job = prepared(pipeline)
    keys = image_keys(0, np.arange(1))
    drawing = [phase for phase in job.phases if isinstance(phase, phases.Draw)]
    assert [phase.name for phase in drawing] == ["prior", "decoder", "super_res"]
    noises = [phases.initial_noise(phase.own_keys(keys), (5,)) for phase in drawing]
    for i in range(3):
        for other in noises[:i]:
            assert np.abs(noises[i] - other).min() > 1e-4


@pytest.mark.parametrize(
    "scales, guided", [((4.0, 8.0), True), ((1.0, 2.0), True), ((2.0, 0.0), True), ((1, 1), False)]
)
def test_one_scale_above_one_guides_both_stages(pipeline, scales, guided):
    """As in diffusers; the super-resolution is never guided."""
    job = prepared(pipeline, prior_guidance_scale=scales[0], decoder_guidance_scale=scales[1])
    found = {name: control.guided for name, control in job.controls.items()}
    assert found == {"prior": guided, "decoder": guided, "super_res": False}
    assert ("null_ids" in job.batch) == guided
    if guided:
        assert [job.controls[name].guide.scale for name in ("prior", "decoder")] == list(scales)


def test_last_step_has_a_network_of_its_own(pipeline):
    """Change one network: the last one alone is seen in a run's last step, the other before."""
    job = prepared(pipeline, prior_guidance_scale=1.0, decoder_guidance_scale=1.0)
    [draw] = [phase for phase in job.phases if getattr(phase, "name", "") == "super_res"]
    keys = image_keys(0, np.arange(1))
    batch = {"channels": jnp.zeros((1, 8, 8, 3))}
    control = job.controls["super_res"]
    whole = {name: pipeline[name].params for name in draw.components}

    def states(**changed):
        params = {**whole, **changed}
        state = phases.start(draw, params, batch, keys, control)
        found = []
        for step in range(3):
            state = phases.run_steps(draw, params, batch, keys, control, state, step, step + 1)
            found.append(np.asarray(state.x))
        return found

    plain = states()
    other = jax.tree.map(lambda a: a + 0.1, whole["super_res_last"])
    last, first = states(super_res_last=other), states(super_res_first=other)
    np.testing.assert_array_equal(plain[:2], last[:2])
    assert np.abs(plain[2] - last[2]).max() > 1e-3
    assert np.abs(plain[0] - first[0]).max() > 1e-3
    # The last step ends at what the last network says of where the others led.
    assert np.abs(first[2] - plain[2]).max() > 1e-3


def test_embedding_is_restored_by_the_statistics_of_the_prior():
    mean, std = np.arange(4.0)[None], np.arange(1.0, 5.0)[None]
    params = {"prior": {"codec": {"mean": jnp.asarray(mean), "std": jnp.asarray(std)}}}
    sample = np.asarray([[1.0, -1.0, 0.5, 0.0], [0.0, 2.0, 1.0, -3.0]])
    found = RestoreEmbedding()(params, {"prior_sample": jnp.asarray(sample)}, None)
    np.testing.assert_allclose(found["image_embedding"], sample * std + mean)


def test_the_empty_text_is_told_in_the_other_branch():
    text = {
        "text_embedding": jnp.ones((1, 3)),
        "text_tokens": jnp.ones((1, 2, 3)),
        "text_mask": jnp.ones((1, 2), bool),
    }
    batch = {**text, **{f"null_{name}": jnp.zeros_like(value) for name, value in text.items()}}
    draw = DenoiseEmbedding("prior", "prior_sample", (3,))
    for null in (False, True):
        condition = draw.condition({}, batch, null=null)
        for value in (condition.vector, condition.tokens, condition.token_mask):
            assert value.mean() == (0.0 if null else 1.0)


def test_small_image_is_clipped_and_resized_as_pillow_does():
    """Pillow's bicubic filter is the cubic convolution with a = -1/2 that torch antialiases by."""
    from PIL import Image

    small = np.random.default_rng(0).normal(0, 1, (5, 6)).astype(np.float32)
    image = Image.fromarray(np.clip(small, -1, 1)).resize((12, 15), Image.Resampling.BICUBIC)
    batch = {"low_res": jnp.asarray(small)[None, :, :, None]}
    found = ResizeLowRes((15, 12))({}, batch, None)["channels"]
    np.testing.assert_allclose(found[0, :, :, 0], np.asarray(image), atol=2e-6)


def test_text_may_be_given_as_embeddings(pipeline):
    """What the encoder says of a prompt, with its mask, draws what the prompt does."""
    job = prepared(pipeline)
    encoder = pipeline["text_encoder"]
    encoded = encoder.module.apply({"params": encoder.params}, job.batch["ids"])
    given = {
        "prompt": None,
        "text_model_output": (encoded.projected, encoded.last),
        "text_attention_mask": job.batch["text_mask"],
    }
    np.testing.assert_allclose(images(pipeline, **given), images(pipeline), atol=1e-4)
    batch = prepared(pipeline, **given, num_images_per_prompt=2).batch
    assert {len(value) for value in batch.values()} == {2}


def test_noise_may_be_given(pipeline):
    """Each stage starts from what is given, and nothing else is drawn at the start."""
    rng = np.random.default_rng(0)
    shapes = {"prior": (1, WIDTH), "decoder": (1, 4, 4, 3), "super_res": (1, 8, 8, 3)}
    noises = {stage: rng.normal(size=shape) for stage, shape in shapes.items()}
    job = prepared(pipeline, **{f"{stage}_latents": noise for stage, noise in noises.items()})
    keys = image_keys(0, np.arange(1))
    for phase in job.phases:
        if isinstance(phase, phases.Draw):
            found = phase.unit_noise(job.batch, keys)
            np.testing.assert_allclose(found, noises[phase.name], rtol=1e-6)


OUTPUT = (np.zeros((1, WIDTH)), np.zeros((1, LENGTH, WIDTH)))


@pytest.mark.parametrize(
    "words, message",
    [
        ({"prompt": None}, "either a prompt, or a text_model_output and its text_attention_mask"),
        ({"text_model_output": OUTPUT}, "either a prompt"),
        ({"text_attention_mask": np.ones((1, LENGTH))}, "either a prompt"),
        ({"prompt": None, "text_model_output": OUTPUT}, "either a prompt"),
        (
            {
                "prompt": None,
                "text_model_output": OUTPUT,
                "text_attention_mask": np.ones((1, LENGTH + 1)),
            },
            f"and \\[P, {LENGTH}\\], got",
        ),
        (
            {"prompt": None, "text_model_output": 3, "text_attention_mask": np.ones((1, LENGTH))},
            "must be the embeddings",
        ),
        ({"prompt": 3}, "3"),
        ({"prompt": ["a", None]}, "1"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"prior_num_inference_steps": 1}, "prior_num_inference_steps must be .* at least 2"),
        ({"decoder_num_inference_steps": 2.5}, "decoder_num_inference_steps"),
        ({"super_res_num_inference_steps": 1001}, "1001"),
        ({"prior_guidance_scale": "much"}, "prior_guidance_scale must be a number"),
        ({"decoder_guidance_scale": np.nan}, "decoder_guidance_scale must be a number"),
        ({"prior_latents": np.zeros((1, WIDTH + 1))}, f"prior_latents .* \\(1, {WIDTH}\\)"),
        ({"decoder_latents": np.zeros((1, 3, 4, 4))}, r"decoder_latents .* \(1, 4, 4, 3\)"),
        ({"super_res_latents": np.zeros((2, 8, 8, 3))}, r"super_res_latents .* \(1, 8, 8, 3\)"),
        ({"negative_prompt": "blurry"}, "has no negative_prompt"),
        ({"num_inference_steps": 5}, "did you mean 'prior_num_inference_steps'"),
    ],
)
def test_bad_words_are_refused(pipeline, words, message):
    with pytest.raises(ValueError, match=message):
        images(pipeline, **words)
