"""Position networks: features of positions, null vectors, the order of tokens; ConvNeXt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.resize import bicubic_resize, nearest_resize
from diffusion_jax.models.convnext import ConvNeXtBlock, ConvNeXtConfig
from diffusion_jax.models.grounding import (
    KeypointGroundingConfig,
    MapDownsamplerConfig,
    MapGroundingConfig,
    TextGroundingConfig,
    TextImageGroundingConfig,
    position_features,
)
from tests.models.trees import random_params

B, M = 2, 3
TINY = ConvNeXtConfig(depths=(1, 1), widths=(4, 6))
MASK = np.asarray([[True, False, True], [False, False, True]])
CONFIGS = {
    "text": TextGroundingConfig(5, 6, hidden=7, num_frequencies=2),
    "text_image": TextImageGroundingConfig(5, 6, hidden=7, num_frequencies=2),
    "keypoint": KeypointGroundingConfig(2, 3, out_dim=6, hidden=7, num_frequencies=2),
    "map": MapGroundingConfig(16, out_dim=6, hidden=7, encoder=TINY),
    "classes": MapGroundingConfig(16, num_classes=5, out_dim=6, hidden=7, encoder=TINY),
    "downsampler": MapDownsamplerConfig(16, hidden=3, out_channels=2),
}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def uniform(seed, *shape):
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


BOXES, TEXT, IMAGE = uniform(0, B, M, 4), normal(1, B, M, 5), normal(2, B, M, 5)
POINTS, POINT_MASK = uniform(3, B, 6, 2), np.random.default_rng(4).random((B, 6)) < 0.6
MAP, CLASSES = normal(5, B, 20, 24, 3), normal(6, B, 20, 24, 5)
ARGUMENTS = {
    "text": {"boxes": BOXES, "mask": MASK, "text": TEXT},
    "text_image": {
        "boxes": BOXES,
        "mask": MASK,
        "text": TEXT,
        "text_mask": MASK & [[False, True, True]],
        "image": IMAGE,
        "image_mask": MASK & [[True, True, False]],
    },
    "keypoint": {"points": POINTS, "mask": POINT_MASK},
    "map": {"map": MAP, "mask": np.asarray([True, False])},
    "classes": {"map": CLASSES, "mask": np.asarray([True, False])},
    "downsampler": {"map": MAP},
}


def run(name, **changed):
    """(output, parameters in float64)."""
    module = CONFIGS[name].build()
    arguments = {**ARGUMENTS[name], **changed}
    params = random_params(module, **arguments)
    out = jax.jit(module.apply)({"params": params}, **arguments)
    return np.asarray(out), jax.tree.map(lambda leaf: leaf.astype(np.float64), params)


def silu(x):
    return x / (1 + np.exp(-x))


def mlp(x, params):
    for name in ("in", "hidden"):
        x = silu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["out"]["kernel"] + params["out"]["bias"]


def waves(x):
    """Frequencies 1 and 10: for each the sines of all coordinates, then their cosines."""
    x = x.astype(np.float64)
    return np.concatenate([np.sin(x), np.cos(x), np.sin(10 * x), np.cos(10 * x)], axis=-1)


def masked(x, null, mask):
    return np.where(mask[..., None], x, null).astype(x.dtype)


def test_position_features_are_frequency_by_frequency():
    np.testing.assert_allclose(position_features(BOXES, 2), waves(BOXES), atol=1e-6)
    last = np.sin(100 ** (7 / 8) * BOXES.astype(np.float64))
    np.testing.assert_allclose(position_features(BOXES)[..., 56:60], last, atol=1e-5)


def test_a_box_is_its_text_and_its_position_or_null():
    """Whatever an unused slot holds."""
    unused = {name: masked(ARGUMENTS["text"][name], np.nan, MASK) for name in ("boxes", "text")}
    out, params = run("text", **unused)
    position = masked(waves(BOXES), params["null_position"], MASK)
    text = masked(TEXT, params["null_text"], MASK)
    expected = mlp(np.concatenate([text, position], axis=-1), params["mlp"])
    np.testing.assert_allclose(out, expected, atol=2e-4)


def test_texts_come_before_images_and_either_may_be_null():
    arguments = ARGUMENTS["text_image"]
    out, params = run("text_image")
    position = masked(waves(BOXES), params["null_position"], MASK)
    tokens = []
    for name in ("text", "image"):
        feature = masked(arguments[name], params[f"null_{name}"], arguments[f"{name}_mask"])
        tokens.append(mlp(np.concatenate([feature, position], axis=-1), params[f"mlp_{name}"]))
    np.testing.assert_allclose(out, np.concatenate(tokens, axis=1), atol=2e-4)


def test_keypoints_are_told_apart_person_by_person():
    out, params = run("keypoint")
    who = np.stack([params["person"][i // 3] + params["keypoint"][i % 3] for i in range(6)])
    who = masked(np.stack([who, who]), params["null_person"], POINT_MASK)
    position = masked(waves(POINTS), params["null_position"], POINT_MASK)
    expected = mlp(np.concatenate([who, position], axis=-1), params["mlp"])
    np.testing.assert_allclose(out, expected, atol=2e-4)


@pytest.mark.parametrize("name", ["map", "classes"])
def test_a_map_is_the_features_of_its_pixels_or_null(name):
    """ConvNeXt sees the map of 16x16 pixels; without a map every token is null, at its position."""
    out, params = run(name)
    image = nearest_resize(ARGUMENTS[name]["map"], 16, 16)
    if name == "classes":
        kernel = np.asarray(params["conv_in"]["kernel"], np.float32)
        dims = ("NHWC", "HWIO", "NHWC")
        image = jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=dims)
        image = image + np.asarray(params["conv_in"]["bias"], np.float32).reshape(1, 1, 1, 3)
    encoder = jax.tree.map(lambda leaf: leaf.astype(np.float32), params["encoder"])
    features = jax.jit(TINY.build().apply)({"params": encoder}, image)
    features = np.array(features).reshape(B, 4, 6)
    features[1] = params["null_feature"]
    expected = mlp(features + params["position"], params["mlp"])
    np.testing.assert_allclose(out, expected, atol=1e-3)


def test_a_downsampled_map_is_resized_and_convolved_twice():
    out, params = run("downsampler")
    h = np.asarray(bicubic_resize(MAP[..., :1], 16, 16), np.float64)
    for name in ("conv_1", "conv_2"):
        padded = np.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)))
        side = h.shape[1] // 2
        kernel = params[name]["kernel"]
        h = np.zeros((B, side, side, kernel.shape[-1]))
        for i, j in np.ndindex(side, side):
            window = padded[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4]
            h[:, i, j] = np.einsum("bhwc,hwco->bo", window, kernel) + params[name]["bias"]
        h = silu(h) if name == "conv_1" else h
    np.testing.assert_allclose(out, h, atol=1e-4)
    plain = MapDownsamplerConfig(8, hidden=None, out_channels=1, resize="nearest").build()
    np.testing.assert_array_equal(plain.apply({}, MAP), nearest_resize(MAP[..., :1], 8, 8))


def test_a_convnext_block_is_its_formula():
    module, x = ConvNeXtBlock(), normal(7, 1, 3, 3, 2)
    params = random_params(module, x)
    ours = jax.jit(module.apply)({"params": params}, x)
    padded = np.pad(x.astype(np.float64), ((0, 0), (3, 3), (3, 3), (0, 0)))
    h = np.zeros(x.shape)
    for i, j in np.ndindex(3, 3):
        window = padded[:, i : i + 7, j : j + 7]
        h[:, i, j] = (window * params["depthwise"]["kernel"][:, :, 0]).sum((1, 2))
    h = h + params["depthwise"]["bias"]
    h = h - h.mean(-1, keepdims=True)
    h = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6)
    h = h * params["norm"]["scale"] + params["norm"]["bias"]
    h = h @ params["mlp_1"]["kernel"] + params["mlp_1"]["bias"]
    h = h * 0.5 * (1 + np.asarray(jax.scipy.special.erf(h / np.sqrt(2.0))))
    h = h @ params["mlp_2"]["kernel"] + params["mlp_2"]["bias"]
    np.testing.assert_allclose(ours, x + params["layer_scale"] * h, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_has_no_nan(name):
    module, arguments = CONFIGS[name].build(dtype="bfloat16"), ARGUMENTS[name]
    params = random_params(module, **arguments, scale=0.3)
    out = jax.jit(module.apply)({"params": params}, **arguments)
    assert out.dtype == jnp.bfloat16
    assert np.isfinite(out.astype(np.float32)).all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TextGroundingConfig(hidden=0), "hidden must be at least 1, got 0"),
        (lambda: MapGroundingConfig(size=40), "multiple of the encoder's stride 32, got 40"),
        (lambda: MapDownsamplerConfig(resize="cubic"), "bicubic', 'nearest'], got 'cubic'"),
        (lambda: MapDownsamplerConfig(hidden=None), "out_channels = 8 and in_channels = 1"),
        (lambda: ConvNeXtConfig(depths=(1, 2)), r"depths = \(1, 2\)"),
        (lambda: run("text", boxes=BOXES[..., :2]), r"boxes must have shape \(2, 3, 4\)"),
        (lambda: run("text", text=TEXT[..., :4]), r"text must have shape \(2, 3, 5\)"),
        (lambda: run("keypoint", points=POINTS[:, :5]), r"points must have shape \(2, 6, 2\)"),
        (lambda: run("map", map=CLASSES), r"map must have shape \(2, 20, 24, 3\)"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
