"""Encoders of texts and images: who sees whom, where they pool, their formulas and sizes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.clip import (
    CLIP_TEXT_TOWERS,
    CLIP_VISION_TOWERS,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
)
from diffusion_jax.models.ldm_bert import LDMBertConfig
from diffusion_jax.models.t5 import T5_ENCODERS, T5Config, distance_buckets
from tests.models.trees import random_params

SMALL = {"width": 8, "num_layers": 1, "num_heads": 2, "mlp_width": 12}
TEXT = CLIPTextConfig(vocab_size=20, length=7, projection=6, end_id=19, **SMALL)
TEXT = dataclasses.replace(TEXT, num_layers=2)
VISION = CLIPVisionConfig(image_size=6, patch_size=2, projection=6, **SMALL)
BERT = LDMBertConfig(vocab_size=20, length=7, head_dim=3, **SMALL)
T5 = T5Config(vocab_size=20, head_dim=3, num_buckets=6, max_distance=5, **SMALL)
ENCODERS = {"clip": TEXT, "bert": BERT, "t5": T5}

IDS = np.array([[3, 7, 19, 4, 9, 19, 0], [1, 5, 8, 12, 2, 11, 6]], np.int32)
IMAGES = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)


@functools.cache
def compiled(config, dtype="float32", skip=0):
    """The encoder, (params, *inputs) -> Encoded, compiled once for all tests."""
    module, options = config.build(dtype=dtype, param_dtype=dtype), {"skip": skip} if skip else {}
    return jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs, **options))


@functools.cache
def params_of(config, dtype="float32", scale=0.4):
    inputs = [IDS] if config is not VISION else [IMAGES]
    inputs += [IMAGES] if isinstance(config, CLIPConfig) else []
    params = random_params(config.build(), *inputs, scale=scale)
    return jax.tree.map(lambda p: p.astype(dtype), params)


def encode(config, *inputs, dtype="float32", scale=0.4, skip=0):
    """What an encoder with random parameters says, and these."""
    params = params_of(config, dtype, scale)
    return compiled(config, dtype, skip)(params, *inputs), params


def normed(x, params, eps=1e-5):
    x = np.asarray(x, np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x * params["scale"] + params["bias"]


def count(config, inputs):
    """Parameters, of which every block has as many."""

    def shallow(num_layers):
        module = dataclasses.replace(config, num_layers=num_layers).build()
        tree = jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    one, two = shallow(1), shallow(2)
    return one + (config.num_layers - 1) * (two - one)


@pytest.mark.parametrize("name", ENCODERS)
def test_only_clip_is_causal(name):
    changed = IDS.copy()
    changed[:, 4] = 13
    (one, _), (other, _) = (encode(ENCODERS[name], ids) for ids in (IDS, changed))
    moved = np.abs(one.last - other.last).max((0, 2)) > 1e-4
    assert moved[4:].all()
    assert not moved[:4].any() if name == "clip" else moved[:4].all()


@pytest.mark.parametrize("name", ENCODERS)
def test_masked_tokens_are_not_seen(name):
    config, length = ENCODERS[name], np.array([[5], [3]])
    mask, everything = np.arange(7)[None] < length, np.ones((2, 7), np.bool_)
    # CLIP never looks at later tokens, so that the masked ones must be earlier.
    mask = mask if name != "clip" else (np.arange(7)[None] > 3) | (np.arange(7)[None] == 0)
    mask = np.broadcast_to(mask, (2, 7))
    other = np.where(mask, IDS, 13).astype(np.int32)
    (one, _), (two, _), (seen, _) = (
        encode(config, ids, m) for ids, m in ((IDS, mask), (other, mask), (other, everything))
    )
    np.testing.assert_allclose(one.last[mask], two.last[mask], atol=1e-6)
    assert np.abs(one.last[mask] - seen.last[mask]).max() > 1e-2
    (with_all, _), (without, _) = encode(config, IDS, everything), encode(config, IDS)
    np.testing.assert_allclose(with_all.last, without.last, atol=1e-6)


def test_texts_are_pooled_where_they_first_end_or_at_their_largest_number():
    ends = IDS.copy()
    ends[1, 3] = 19
    encoded, params = encode(TEXT, ends)
    np.testing.assert_array_equal(encoded.pooled, encoded.last[[0, 1], [2, 3]])
    project = params["project"]["kernel"]
    np.testing.assert_allclose(encoded.projected, encoded.pooled @ project, atol=1e-5)
    # A text without an end is pooled at its first token.
    encoded, _ = encode(TEXT, IDS)
    np.testing.assert_array_equal(encoded.pooled[1], encoded.last[1, 0])
    encoded, _ = encode(dataclasses.replace(TEXT, end_id=None, num_layers=1), IDS)
    np.testing.assert_array_equal(encoded.pooled, encoded.last[[0, 1], [2, 3]])


def test_the_penultimate_layer_comes_with_and_without_the_final_norm():
    full, params = encode(TEXT, IDS)
    assert len(full.hidden) == 3
    skipped, _ = encode(TEXT, IDS, skip=1)
    np.testing.assert_allclose(full.last, normed(full.hidden[-1], params["norm_out"]), atol=1e-5)
    np.testing.assert_allclose(skipped.last, normed(full.hidden[-2], params["norm_out"]), atol=1e-5)
    np.testing.assert_array_equal(skipped.pooled, full.pooled)
    with pytest.raises(ValueError, match="skip must lie in 0 … 2, got 3"):
        encode(TEXT, IDS, skip=3)


def test_images_are_pooled_at_the_class_token():
    encoded, params = encode(VISION, IMAGES)
    assert encoded.last.shape == (2, 10, 8)
    np.testing.assert_array_equal(encoded.last, encoded.hidden[-1])
    first = normed(encoded.last[:, 0], params["norm_out"])
    np.testing.assert_allclose(encoded.pooled, first, atol=1e-5)
    # The third patch lies right in the first row: only its token is another at first.
    changed = IMAGES.copy()
    changed[:, :2, 4:] += 1.0
    other, _ = encode(VISION, changed)
    moved = np.abs(other.hidden[0] - encoded.hidden[0]).max((0, 2)) > 1e-4
    np.testing.assert_array_equal(np.flatnonzero(moved), [3])
    with pytest.raises(ValueError, match=r"\[B, 6, 6, 3\], got \(2, 6, 4, 3\)"):
        encode(VISION, IMAGES[:, :, :4])


def test_clip_compares_directions():
    """Radford et al. 2021, figure 3."""
    match, params = encode(CLIPConfig(dataclasses.replace(TEXT, num_layers=1), VISION), IDS, IMAGES)
    u, v = (np.asarray(side.projected, np.float64) for side in (match.text, match.image))
    cosine = (v @ u.T) / np.outer(np.linalg.norm(v, axis=1), np.linalg.norm(u, axis=1))
    np.testing.assert_allclose(match.logits, np.exp(params["logit_scale"]) * cosine, rtol=1e-4)


def test_t5_knows_distances_only():
    """Padding on the left shifts a text and changes nothing else."""
    shifted = np.concatenate([np.zeros((2, 3), np.int32), IDS], axis=1)
    mask = np.broadcast_to(np.arange(10) >= 3, (2, 10))
    (padded, _), (alone, _) = encode(T5, shifted, mask), encode(T5, IDS)
    np.testing.assert_allclose(padded.last[:, 3:], alone.last, atol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_a_block_of_t5_is_its_formula(gated):
    """Raffel et al. 2020, section 2.1: no means, no biases, no scale of the logits."""
    config = dataclasses.replace(T5, gated=gated, activation="relu")
    encoded, params = encode(config, IDS)
    block = params["block_0"]

    def rms(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale

    x = params["token_embed"]["embedding"].astype(np.float64)[IDS]
    h = rms(x, block["norm_1"]["scale"])
    q, k, v = (
        (h @ block["attention"][name]["kernel"]).reshape(2, 7, 2, 3)
        for name in ("query", "key", "value")
    )
    buckets = distance_buckets(7, num_buckets=6, max_distance=5)
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) + params["distance_bias"][buckets].transpose(
        2, 0, 1
    )
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    h = np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(2, 7, 6)
    x = x + h @ block["attention"]["out"]["kernel"]
    h = rms(x, block["norm_2"]["scale"])
    up = h @ block["dense_1"]["kernel"]
    up = np.maximum(h @ block["gate"]["kernel"], 0) * up if gated else np.maximum(up, 0)
    x = x + up @ block["dense_2"]["kernel"]
    np.testing.assert_allclose(encoded.hidden[-1], x, atol=1e-4)
    np.testing.assert_allclose(encoded.last, rms(x, params["norm_out"]["scale"]), atol=1e-4)


def test_near_distances_have_sets_of_their_own_and_far_ones_share():
    """32 sets up to 128: 8 exact ones, then 8 per factor of 16, and the same for later places."""
    buckets = distance_buckets(300, num_buckets=32, max_distance=128)
    earlier, later = buckets[-1, ::-1], buckets[0]
    np.testing.assert_array_equal(earlier[:8], np.arange(8))
    # Bounds are at 8 · 16^(j/8): 11.3, 16, 22.6, 32, 45.3, 64, 90.5.
    bounds = [8, 12, 16, 23, 32, 46, 64, 91]
    np.testing.assert_array_equal(earlier[bounds], np.arange(8, 16))
    np.testing.assert_array_equal(earlier[np.array(bounds[1:]) - 1], np.arange(8, 15))
    assert (earlier[91:] == 15).all()
    np.testing.assert_array_equal(later[1:], earlier[1:] + 16)


@pytest.mark.parametrize("config", [TEXT, BERT, T5, VISION], ids=["clip", "bert", "t5", "vision"])
def test_half_precision_is_close(config):
    inputs = IMAGES if config is VISION else IDS
    half, _ = encode(config, inputs, dtype="bfloat16")
    full, _ = encode(config, inputs)
    assert half.last.dtype == jnp.bfloat16
    error = np.abs(np.asarray(half.last, np.float32) - full.last).max()
    assert error < 0.1 * np.abs(full.last).max()


def test_t5_keeps_small_terms_of_a_large_stream_in_half_precision():
    """Activations of the large encoders are in the thousands: in bfloat16 steps are of 16."""
    params = dict(params_of(T5, "bfloat16"))
    params["token_embed"] = {"embedding": params["token_embed"]["embedding"] * jnp.bfloat16(8000)}
    hidden = compiled(T5, "bfloat16")(params, IDS).hidden
    added = np.asarray(hidden[-1]) - np.asarray(hidden[0])
    assert np.abs(hidden[0]).max() > 4096 and 0 < np.abs(added).max() < 16
    assert len(np.unique(added)) > 50


def test_t5_multiplies_beyond_float16_in_float32():
    """The hidden units of the large encoders exceed 65504."""
    params = jax.tree.map(np.copy, params_of(T5))
    block = params["block_0"]
    for name, factor in (("gate", 500.0), ("dense_1", 500.0), ("dense_2", 1e-3)):
        block[name]["kernel"] *= factor
    half = compiled(T5, "float16")(jax.tree.map(lambda p: p.astype(np.float16), params), IDS).last
    full = compiled(T5)(params, IDS).last
    assert half.dtype == jnp.float16
    assert np.abs(half.astype(np.float32) - full).max() < 0.01 * np.abs(full).max()


# Parameters as transformers and diffusers count them, where they build these sizes.
@pytest.mark.parametrize(
    "config, parameters",
    [
        (CLIP_TEXT_TOWERS["vit_l_14"], 123650304),
        (dataclasses.replace(CLIP_TEXT_TOWERS["vit_l_14"], projection=None), 123060480),
        (CLIP_TEXT_TOWERS["openclip_vit_h_14"], 354032640),
        (CLIP_TEXT_TOWERS["openclip_vit_bigg_14"], 694659840),
        (T5_ENCODERS["v1_1_small"], 35332800),
        (T5_ENCODERS["v1_1_base"], 109628544),
        (T5_ENCODERS["v1_1_large"], 341231104),
        (T5_ENCODERS["v1_1_xl"], 1223527424),
        (T5_ENCODERS["v1_1_xxl"], 4762310656),
        (LDMBertConfig(), 581994042),
    ],
)
def test_text_encoders_have_their_released_sizes(config, parameters):
    assert count(config, jax.ShapeDtypeStruct((1, 2), jnp.int32)) == parameters


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("vit_l_14", 303966208),
        ("openclip_vit_h_14", 632076800),
        ("openclip_vit_bigg_14", 1844907264),
    ],
)
def test_image_towers_have_their_released_sizes(name, parameters):
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    assert count(CLIP_VISION_TOWERS[name], images) == parameters


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: CLIPTextConfig(width=10, num_heads=3), "multiple of num_heads = 3, got 10"),
        (lambda: CLIPTextConfig(activation="gelo"), "activation must be one of .* got 'gelo'"),
        (lambda: CLIPTextConfig(projection=0), "projection must be at least 1 or None, got 0"),
        (lambda: CLIPVisionConfig(patch_size=300), "patch_size must be at most image_size = 224"),
        (lambda: CLIPConfig(CLIPTextConfig(projection=None)), "got None for texts and 512"),
        (lambda: T5Config(num_buckets=2), "num_buckets must be at least 4, got 2"),
        (lambda: T5Config(max_distance=8), "max_distance must exceed .* = 8, .* got 8"),
        (lambda: LDMBertConfig(head_dim=0), "head_dim must be at least 1, got 0"),
        (lambda: encode(TEXT, IDS.astype(np.float32)), "ids must be integers"),
        (lambda: encode(BERT, np.ones((1, 8), np.int32)), "7 positions, got texts of 8 tokens"),
        (lambda: encode(T5, IDS, np.ones((2, 7), np.int32)), "mask must be bool of shape"),
        (lambda: encode(T5, IDS, np.ones((7,), np.bool_)), "mask must be bool of shape"),
    ],
)
def test_wrong_configurations_and_inputs_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_numbers_outside_of_the_vocabulary_give_nan():
    for number in (-1, 20):
        ids = IDS.copy()
        ids[0, -1] = number
        encoded, _ = encode(TEXT, ids)
        assert np.isnan(encoded.last[0, -1]).all() and np.isfinite(encoded.last[1]).all()
