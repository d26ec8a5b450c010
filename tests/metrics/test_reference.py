"""Reference statistics: what is stored, what is refused, and what a distance is called."""

import pickle

import numpy as np
import pytest

from diffusion_jax.metrics.arrays import read_arrays, write_arrays
from diffusion_jax.metrics.features import POOL, SPATIAL, Feature, Pixels
from diffusion_jax.metrics.frechet import GaussianStats, frechet_distance
from diffusion_jax.metrics.reference import (
    Reference,
    frechet_score,
    load_foreign_images,
    load_foreign_reference,
    load_reference,
    save_reference,
)

RNG = np.random.default_rng(0)
TF = Feature(POOL, "tf-2015", "bilinear-corner")
STATS = GaussianStats.of(RNG.normal(size=(20, 4)))
DECLARED = {"feature": TF, "image_size": (32, 32), "source": "rüben, train, 20 images"}


@pytest.fixture
def saved(tmp_path):
    save_reference(tmp_path / "ref.npz", STATS, **DECLARED)
    return tmp_path / "ref.npz"


def test_a_reference_comes_back_bit_by_bit(saved):
    got = load_reference(saved)
    np.testing.assert_array_equal(got.mean, STATS.mean)
    np.testing.assert_array_equal(got.covariance, STATS.covariance)
    assert (got.count, got.feature, got.image_size) == (20, TF, (32, 32))
    assert got.source == "rüben, train, 20 images"
    with np.load(saved, allow_pickle=False) as file:
        assert all(not file[name].dtype.hasobject for name in file.files)


def test_a_score_carries_what_makes_it_comparable(saved):
    samples = GaussianStats.of(RNG.normal(size=(9, 4)) + 1)
    score = frechet_score(
        samples, load_reference(saved), num_samples=9, feature=TF, image_size=(32, 32)
    )
    assert score.label == "FID" and score.num_samples == 9 and score.num_reference == 20
    assert score.value == frechet_distance(samples, STATS)
    assert score.feature == TF and score.source == "rüben, train, 20 images"


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"feature": TF._replace(variant="pytorch-fid")},
            "variant 'pytorch-fid' against 'tf-2015'",
        ),
        (
            {"feature": TF._replace(resize="bilinear")},
            "resize 'bilinear' against 'bilinear-corner'",
        ),
        ({"feature": Feature("pixels")}, "name 'pixels' against 'inception-pool3'"),
        ({"image_size": (64, 64)}, r"image_size \(64, 64\) against \(32, 32\)"),
    ],
)
def test_what_does_not_compare_is_refused(saved, change, words):
    declared = {"feature": TF, "image_size": (32, 32), **change}
    with pytest.raises(ValueError, match=words):
        frechet_score(STATS, load_reference(saved), num_samples=20, **declared)


@pytest.mark.parametrize(
    "feature, label",
    [
        (TF, "FID"),
        (Feature(POOL, "pytorch-fid", "bilinear"), "FID"),
        (Feature(SPATIAL, "tf-2015", "bilinear-corner"), "sFID"),
        (Feature(POOL, "torchvision"), "Fréchet distance over inception-pool3 (torchvision)"),
        (Feature(SPATIAL, "mine"), "Fréchet distance over inception-mixed6-spatial (mine)"),
        (Feature(POOL), "Fréchet distance over inception-pool3"),
        (Feature("pixels"), "Fréchet distance over pixels"),
        (Feature("shapes-net", "v2"), "Fréchet distance over shapes-net (v2)"),
    ],
)  # fmt: skip
def test_only_the_inception_of_2015_makes_an_fid(feature, label):
    assert feature.frechet_label == label


def test_pixels_are_features():
    images = RNG.uniform(-1, 1, (3, 2, 4, 1)).astype(np.float32)
    pixels = Pixels()
    np.testing.assert_array_equal(pixels(images), images.reshape(3, 8))
    assert pixels.feature == Feature("pixels")
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        pixels(np.zeros((2, 4)))


def test_files_of_adm_are_read_as_declared(tmp_path):
    """Keys of guided-diffusion's evaluator; the covariance is numpy's unbiased one."""
    pool, spatial = RNG.normal(size=(30, 5)), RNG.normal(size=(30, 3))
    images = RNG.integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    np.savez(
        tmp_path / "adm.npz",
        arr_0=images,
        mu=pool.mean(axis=0),
        sigma=np.cov(pool, rowvar=False),
        mu_s=spatial.mean(axis=0),
        sigma_s=np.cov(spatial, rowvar=False),
    )
    options = {"image_size": (8, 8), "source": "ADM's reference"}
    for feature, data in ((TF, pool), (TF._replace(name=SPATIAL), spatial)):
        got = load_foreign_reference(tmp_path / "adm.npz", feature=feature, **options)
        assert frechet_distance(GaussianStats.of(data), got) == pytest.approx(0, abs=1e-6)
        assert got.feature == feature and got.count is None
    np.testing.assert_array_equal(load_foreign_images(tmp_path / "adm.npz"), images)
    with pytest.raises(ValueError, match="got 'pixels'"):
        load_foreign_reference(tmp_path / "adm.npz", feature=Feature("pixels"), **options)
    with pytest.raises(ValueError, match=r"no array \['count'"):
        load_reference(tmp_path / "adm.npz")


def test_a_file_of_pytorch_fid_has_no_spatial_statistics(tmp_path):
    np.savez(tmp_path / "fid.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(
        ValueError, match=r"no array \['mu_s', 'sigma_s'\]; it has \['mu', 'sigma'\]"
    ):
        load_foreign_reference(
            tmp_path / "fid.npz", feature=TF._replace(name=SPATIAL), image_size=(8, 8), source="x"
        )
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match="arr_0 must be uint8.*float64"):
        load_foreign_images(tmp_path / "floats.npz")


class _Payload:
    def __reduce__(self):
        return print, ("a pickle was executed",)


def test_no_pickle_is_opened(tmp_path, capsys):
    objects = np.array([_Payload()], dtype=object)
    np.savez(tmp_path / "bad.npz", mu=objects, sigma=np.eye(1))
    (tmp_path / "raw.npz").write_bytes(pickle.dumps(_Payload()))
    for name in ("bad.npz", "raw.npz"):
        with pytest.raises(ValueError, match=name):
            read_arrays(tmp_path / name)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="mu holds Python objects"):
        write_arrays(tmp_path / "worse.npz", {"mu": objects})
    assert not (tmp_path / "worse.npz").exists()


def test_damaged_and_misnamed_files_are_refused(saved, tmp_path):
    whole = saved.read_bytes()
    for content in (b"", whole[:200]):
        (tmp_path / "cut.npz").write_bytes(content)
        with pytest.raises(ValueError, match="cut.npz"):
            load_reference(tmp_path / "cut.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ValueError, match="a single array"):
        read_arrays(tmp_path / "one.npy")
    with pytest.raises(ValueError, match=r"must end in .npz, got .*ref"):
        save_reference(tmp_path / "ref", STATS, **DECLARED)
    write_arrays(saved, {**read_arrays(saved), "format": np.asarray(9)})
    with pytest.raises(ValueError, match="format 9 is unknown"):
        load_reference(saved)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"covariance": np.eye(3)}, r"\(2,\) and \(3, 3\)"),
        ({"mean": np.array([0.0, np.nan])}, "NaN"),
        ({"covariance": np.array([[1.0, 0.5], [0.0, 1.0]])}, "symmetric"),
        ({"source": " "}, "source must say"),
    ],
)
def test_a_reference_that_cannot_be_is_refused(change, message):
    good = {"mean": np.zeros(2), "covariance": np.eye(2), "count": 5, "feature": TF}
    good |= {"image_size": (8, 8), "source": "x"}
    with pytest.raises(ValueError, match=message):
        Reference(**{**good, **change})
