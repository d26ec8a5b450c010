"""Inception against the peers: same weights, same images, their recorded outputs.

data/inception.npz was recorded with torch 2.13.0 in float64 from torchvision 0.28.0,
pytorch-fid 0.3.0 and torch-fidelity 0.4.0; data/README.md says how.
"""

import dataclasses
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.io.mapping import convert
from diffusion_jax.io.tables.inception import INCEPTION_IGNORED, inception_rows
from diffusion_jax.metrics.features import POOL, SPATIAL, Feature
from diffusion_jax.metrics.inception import VARIANTS, InceptionFeatures, inception_shapes

RECORDED = np.load(Path(__file__).parent / "data" / "inception.npz", allow_pickle=False)


def _weight(name, shape):
    """The values that the peers were filled with; RandomState never changes its stream."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        normal = np.exp(0.3 * normal)
    elif name.endswith("bn.weight"):
        normal = 1.0 + 0.2 * normal
    elif len(shape) == 1:
        normal = 0.2 * normal
    else:
        normal = normal * np.sqrt(2.0 / np.prod(shape[1:]))
    return normal.astype(np.float32)


def _params(variant):
    file = "torchvision" if variant == "torchvision" else "pytorch-fid"
    tensors = {}
    for line in RECORDED[f"names_{file}"]:
        name, shape = str(line).split(":")
        shape = tuple(int(size) for size in shape.split(",") if size)
        ignored = not shape or name.startswith("AuxLogits")
        tensors[name] = np.zeros(shape, np.float32) if ignored else _weight(name, shape)
    wanted = inception_shapes(variant)
    return convert(tensors, inception_rows(), wanted, ignore=INCEPTION_IGNORED)


def _inputs():
    """(a picture of 8 bits [1, 40, 53, 3], network inputs [2, 139, 107, 3])."""
    rng = np.random.RandomState(7)
    picture = rng.randint(0, 256, (1, 40, 53, 3)).astype(np.uint8)
    return picture, rng.uniform(-1, 1, (2, 139, 107, 3)).astype(np.float32)


def _assert_close(got, name):
    np.testing.assert_allclose(got, RECORDED[name], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_torchvisions_network():
    apply = jax.jit(VARIANTS["torchvision"].network.apply)
    got = apply({"params": _params("torchvision")}, _inputs()[1])
    _assert_close(got.pool3, "torchvision_pool3")
    _assert_close(got.spatial, "torchvision_spatial")
    _assert_close(got.logits, "torchvision_logits")


@pytest.fixture(scope="module")
def on_two_devices():
    """(parameters of the graph of 2015 on both devices, a picture and its negative, one each)."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    params = jax.device_put(_params("tf-2015"), NamedSharding(mesh, PartitionSpec()))
    picture = _inputs()[0].astype(np.float32) / 127.5 - 1
    both = np.concatenate([picture, -picture])
    return params, jax.device_put(both, NamedSharding(mesh, PartitionSpec("data")))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["tf-2015", "pytorch-fid"])
def test_the_network_of_fid_from_a_picture(on_two_devices, variant):
    params, pictures = on_two_devices
    features = InceptionFeatures(params, variant)
    outputs = features.outputs(pictures)
    assert len(outputs.pool3.sharding.device_set) == 2
    got = jax.tree.map(lambda output: output[:1], outputs)
    _assert_close(got.pool3, f"{variant}_pool3")
    _assert_close(got.spatial, f"{variant}_spatial")
    np.testing.assert_array_equal(features.select(got), got.pool3)
    spatial = dataclasses.replace(features, output="spatial").select(got)
    assert spatial.shape == (1, 2023)
    _assert_close(spatial.reshape(1, 17, 17, 7), f"{variant}_spatial")
    if variant == "tf-2015":
        _assert_close(got.logits, "tf-2015_logits")
        _assert_close(got.logits_unbiased, "tf-2015_logits_unbiased")
        scores = RECORDED["tf-2015_logits_unbiased"].astype(np.float64)
        probs = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(features.probabilities(got), probs, rtol=1e-3, atol=1e-7)
        np.testing.assert_array_equal(features(pictures)[:1], got.pool3)


def test_the_variants_differ_where_their_peers_do():
    """Guards the fixtures: a test that could not tell the variants apart would prove nothing."""
    a, b = RECORDED["tf-2015_pool3"], RECORDED["pytorch-fid_pool3"]
    assert np.abs(a - b).max() > 0.1


def test_features_declare_themselves():
    features = InceptionFeatures({}, "tf-2015")
    assert features.feature == Feature(POOL, "tf-2015", "bilinear-corner")
    spatial = InceptionFeatures({}, "pytorch-fid", output="spatial")
    assert spatial.feature == Feature(SPATIAL, "pytorch-fid", "bilinear")


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="'tf'"):
        InceptionFeatures({}, "tf")
    with pytest.raises(ValueError, match="'logits'"):
        InceptionFeatures({}, "tf-2015", output="logits")
    with pytest.raises(ValueError, match=r"\(1, 8, 8, 1\); repeat the channel"):
        InceptionFeatures({}, "tf-2015")(np.zeros((1, 8, 8, 1), np.float32))
    with pytest.raises(ValueError, match=r"75x75 pixels, got \(1, 74, 80, 3\)"):
        VARIANTS["tf-2015"].network.init(jax.random.key(0), np.zeros((1, 74, 80, 3)))
    with pytest.raises(ValueError, match="'vgg'"):
        inception_shapes("vgg")
