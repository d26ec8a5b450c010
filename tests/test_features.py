"""Features that an evaluation is configured with: pixels, and Inception's from a file."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffusion_jax.features import InceptionConfig, PixelFeatures, _OverDevices
from diffusion_jax.io.mapping import export
from diffusion_jax.io.tables.inception import inception_rows
from diffusion_jax.metrics import Feature, Pixels, inception_shapes
from diffusion_jax.training.parallel import make_mesh


def test_pixels_are_refused_where_no_covariance_could_be_estimated():
    assert PixelFeatures().build()(np.zeros((2, 8, 8, 1), np.float32)).shape == (2, 64)
    with pytest.raises(ValueError, match="at most 4096.*features inception"):
        PixelFeatures().build()(np.zeros((1, 64, 64, 3), np.float32))


def test_images_are_split_over_devices_and_few_sizes_compile():
    """Five images on two devices are six, and a smaller batch after them is filled up to six."""
    sizes = []

    class Spy(Pixels):
        def __call__(self, images):
            sizes.append((len(images), len(images.sharding.device_set)))
            return super().__call__(images)

    mesh = make_mesh()
    function = _OverDevices(Spy(), mesh)
    images = np.random.default_rng(0).standard_normal((5, 2, 2, 1)).astype(np.float32)
    np.testing.assert_array_equal(function(images), images.reshape(5, 4))
    np.testing.assert_array_equal(function(images[:1]), images[:1].reshape(1, 4))
    assert sizes == [(6, mesh.size)] * 2 and mesh.size == 2


def test_a_file_of_weights_that_is_missing_or_a_pickle_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file of Inception weights"):
        InceptionConfig(str(tmp_path / "none.safetensors")).build()
    (tmp_path / "weights.pth").write_bytes(b"PK\x03\x04 a pickle")
    with pytest.raises(ValueError, match="is no safetensors file.*converted"):
        InceptionConfig(str(tmp_path / "weights.pth")).build()
    with pytest.raises(ValueError, match="'imagenet'"):
        InceptionConfig(str(tmp_path / "weights.pth"), variant="imagenet").build()


@pytest.mark.slow
def test_inception_is_read_from_a_file_and_declares_itself(tmp_path):
    params = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), inception_shapes("tf-2015"))
    save_file(export(params, inception_rows()), tmp_path / "inception.safetensors")
    function = InceptionConfig(str(tmp_path / "inception.safetensors"), "tf-2015").build()
    assert function.feature.frechet_label == "FID"
    assert function.feature == Feature("inception-pool3", "tf-2015", function.feature.resize)
    assert function(np.zeros((1, 8, 8, 3), np.float32)).shape == (1, 2048)
