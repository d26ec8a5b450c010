"""Grounding conditioners: what they read, what is null, and several of them at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.conditioners import (
    combine,
    keypoints,
    map_channels,
    map_tokens,
    text_boxes,
    text_image_boxes,
)
from diffusion_jax.models.convnext import ConvNeXtConfig

B, M, D = 2, 3, 6


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


BATCH = {
    "boxes": np.random.default_rng(0).uniform(size=(B, M, 4)).astype(np.float32),
    "box_mask": np.asarray([[True, False, True], [False, False, True]]),
    "box_text": normal(1, B, M, 5),
    "box_text_mask": np.asarray([[True, False, False], [False, False, True]]),
    "box_image": normal(2, B, M, 5),
    "box_image_mask": np.asarray([[False, False, True], [False, False, True]]),
    "keypoints": np.random.default_rng(3).uniform(size=(B, 4, 2)).astype(np.float32),
    "keypoint_mask": np.ones((B, 4), bool),
    "depth": normal(4, B, 10, 12, 3),
    "depth_mask": np.ones(B, bool),
}
SMALL = {"out_dim": D, "hidden": 7, "num_frequencies": 2}
PARTS = {
    "boxes": text_boxes(text_dim=5, **SMALL),
    "examples": text_image_boxes(feature_dim=5, **SMALL),
    "persons": keypoints(max_persons=2, num_keypoints=2, **SMALL),
    "depth": map_tokens(
        size=8,
        out_dim=D,
        hidden=7,
        encoder=ConvNeXtConfig(depths=(1,), widths=(4,)),
        name="depth",
    ),
}
NUM_OBJECTS = {"boxes": M, "examples": 2 * M, "persons": 4, "depth": 4}


def params_of(conditioner):
    shapes = jax.eval_shape(conditioner.init, jax.random.key(0))
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [normal(i, *leaf.shape) for i, leaf in enumerate(leaves)])


def test_groundings_of_several_kinds_are_one_list_of_objects():
    both = combine(**PARTS)
    params = params_of(both)
    assert set(params) == set(PARTS)

    @jax.jit
    def run(params):
        alone = {name: part.apply(params[name], BATCH, None) for name, part in PARTS.items()}
        return both.apply(params, BATCH, None).grounding, alone

    grounding, alone = run(params)
    assert grounding.objects.shape == (B, sum(NUM_OBJECTS.values()), D)
    np.testing.assert_array_equal(grounding.gate, np.ones(B))
    start = 0
    for name in PARTS:
        own = alone[name].grounding.objects
        end = start + NUM_OBJECTS[name]
        np.testing.assert_allclose(grounding.objects[:, start:end], own, atol=1e-4)
        start = end


@pytest.mark.parametrize("name", PARTS)
def test_null_has_nothing_in_any_slot(name):
    """It is the condition of a batch whose masks are False, whatever else the batch holds."""
    part, params = PARTS[name], params_of(PARTS[name])
    nothing = {k: np.zeros_like(v) if k.endswith("mask") else v for k, v in BATCH.items()}
    null = part.null(params, BATCH)
    assert null.slots() == ("grounding",)
    masked = part.apply(params, nothing, None)
    np.testing.assert_allclose(null.grounding.objects, masked.grounding.objects, atol=1e-6)
    # No example says anything of its own.
    np.testing.assert_array_equal(null.grounding.objects[0], null.grounding.objects[1])
    objects = part.apply(params, BATCH, None).grounding.objects
    assert np.abs(objects - null.grounding.objects).max() > 0.1


def test_channels_of_a_map_stay_in_the_null_condition():
    part = map_channels(size=16, hidden=3, out_channels=2, name="depth")
    params = params_of(part)
    cond, null = part.apply(params, BATCH, None), part.null(params, BATCH)
    assert cond.slots() == null.slots() == ("image",)
    assert cond.image.shape == (B, 4, 4, 2)
    np.testing.assert_array_equal(cond.image, null.image)
    assert np.any(cond.image)
    plain = map_channels(size=8, hidden=None, out_channels=1, name="depth")
    assert plain.init(jax.random.key(0)) == {}
    assert plain.apply({}, BATCH, None).image.shape == (B, 8, 8, 1)


def test_init_starts_with_null_vectors_of_zero():
    params = PARTS["boxes"].init(jax.random.key(0))
    assert not np.any(params["null_text"]) and not np.any(params["null_position"])
    assert np.any(params["mlp"]["out"]["kernel"])


def test_tokens_have_the_dtype_asked_for():
    part = text_boxes(text_dim=5, **SMALL, dtype="bfloat16")
    assert part.apply(params_of(part), BATCH, None).grounding.objects.dtype == jnp.bfloat16


def test_missing_inputs_are_named():
    batch = {"boxes": BATCH["boxes"]}
    with pytest.raises(ValueError, match=r"no box_mask, box_text, only \['boxes'\]"):
        PARTS["boxes"].apply({}, batch, None)
    with pytest.raises(ValueError, match="no map, only"):
        map_channels().apply({}, batch, None)
