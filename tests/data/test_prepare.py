"""Original files to array_record and back: MNIST, CIFAR-10 and the digits, without TensorFlow."""

import gzip
import hashlib
import io
import json
import shutil
import sys
import tarfile

import numpy as np
import pytest

from diffusion_jax.data import TFDS, Digits, digits, originals
from diffusion_jax.data.prepare import prepare
from diffusion_jax.data.sources import take

RNG = np.random.default_rng(0)
CIFAR = {
    split: (
        RNG.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
        RNG.integers(0, 10, count, dtype=np.uint8),
    )
    for split, count in (("train", 10), ("test", 3))
}
MNIST = {
    split: (
        RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8),
        RNG.integers(0, 10, count, dtype=np.uint8),
    )
    for split, count in (("train", 6), ("t10k", 4))
}


def _records(images, labels):
    pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([labels[:, None], pixels], axis=1).tobytes()


def _write_cifar(folder, *, change=None):
    members = {"test_batch.bin": _records(*CIFAR["test"]), "readme.html": b"hello"}
    images, labels = CIFAR["train"]
    for i in range(5):
        part = slice(2 * i, 2 * i + 2)
        members[f"data_batch_{i + 1}.bin"] = _records(images[part], labels[part])
    members = change(members) if change else members
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _idx(array):
    sizes = b"".join(int(size).to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def _write_mnist(folder):
    for split, (images, labels) in MNIST.items():
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            (folder / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(_idx(array)))


def _rows(arrays):
    pairs = zip(arrays["image"], arrays["label"], strict=True)
    return sorted((image.tobytes(), int(label)) for image, label in pairs)


def _same_examples(arrays, images, labels):
    """TFDS shuffles while it writes, so the order does not count."""
    as_bytes = np.rint((arrays["image"].astype(np.float64) + 1) * 127.5).astype(np.uint8)
    np.testing.assert_allclose(as_bytes / 127.5 - 1, arrays["image"], atol=1e-6)
    assert _rows({**arrays, "image": as_bytes}) == _rows({"image": images, "label": labels})


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder with CIFAR-10 and MNIST prepared; the undeclared dependency of TFDS is hidden."""
    folder, source = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("originals")
    _write_cifar(source)
    _write_mnist(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "importlib_resources", None)
        for name in ("cifar10", "mnist"):
            prepare(name, str(source), str(folder))
    return str(folder)


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar10_survives_bit_by_bit(data_dir, split):
    config = TFDS("cifar10", 32, split=split, data_dir=data_dir, in_memory=split == "train")
    arrays = take(config.source(), len(config.source()))
    _same_examples(arrays, *CIFAR[split])
    assert config.num_classes == 10 and config.channels == 3


def test_mnist_survives_and_can_be_resized(data_dir):
    config = TFDS("mnist", 28, split="test", channels=1, data_dir=data_dir)
    arrays = take(config.source(), 4)
    images, labels = MNIST["t10k"]
    _same_examples(arrays, images[..., None], labels)
    wide = TFDS("mnist", 14, split="train[:50%]", data_dir=data_dir).source()
    assert len(wide) == 3 and wide[0]["image"].shape == (14, 14, 3)


def test_tensorflow_was_never_imported(data_dir):
    assert "tensorflow" not in sys.modules and "torch" not in sys.modules


def test_a_prepared_set_is_left_alone(data_dir):
    path = prepare("cifar10", data_dir=data_dir)
    assert (path / "dataset_info.json").is_file()


def test_the_digits_are_prepared_on_first_use(tmp_path):
    for split in digits.SPLITS:
        config = Digits(split, data_dir=str(tmp_path))
        arrays, direct = config.source().arrays, digits.load_arrays(split)
        assert arrays["image"].dtype == np.float32
        assert _rows(arrays) == _rows(direct)
    with pytest.raises(ValueError, match="'validation'"):
        Digits("validation", data_dir=str(tmp_path)).source()


def test_missing_sets_and_splits_say_what_to_do(data_dir, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}.*diffusion-jax data prepare cifar10"):
        TFDS("cifar10", 32, data_dir=str(tmp_path)).source()
    with pytest.raises(ValueError, match="'flowers' is not in .*its TFDS builder"):
        TFDS("flowers", 32, data_dir=data_dir).source()
    with pytest.raises(ValueError, match="'val'"):
        TFDS("cifar10", 32, split="val", data_dir=data_dir).source()
    with pytest.raises(ValueError, match="gs://bucket"):
        TFDS("cifar10", 32, data_dir="gs://bucket").source()


def test_another_file_format_is_refused(data_dir, tmp_path):
    shutil.copytree(f"{data_dir}/mnist", tmp_path / "mnist")
    info = tmp_path / "mnist/1.0.0/dataset_info.json"
    table = json.loads(info.read_text())
    info.write_text(json.dumps({**table, "fileFormat": "parquet"}))
    with pytest.raises(ValueError, match="stored as parquet.*array_record"):
        TFDS("mnist", 28, data_dir=str(tmp_path)).source()


def test_prepare_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(ValueError, match=r"'imagenet'.*cifar10"):
        prepare("imagenet", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="leave source_dir out"):
        prepare("digits", str(tmp_path), str(tmp_path))
    with pytest.raises(ValueError, match="cifar-10-binary.tar.gz"):
        prepare("cifar10", str(tmp_path), str(tmp_path / "out"))
    assert not (tmp_path / "out/cifar10/1.0.0").exists()


def _drop(members):
    return {name: data for name, data in members.items() if name != "data_batch_3.bin"}


@pytest.mark.parametrize(
    "change, message",
    [
        (_drop, "no regular file data_batch_3.bin"),
        (lambda m: {**m, "data_batch_2.bin": m["data_batch_2.bin"][:-1]}, "6145 bytes"),
        (lambda m: {**m, "data_batch_1.bin": b"\x0a" + bytes(3072)}, "label 10, above 9"),
        (lambda m: {**m, "sub/data_batch_1.bin": b"x"}, "there twice"),
    ],
)
def test_a_wrong_cifar10_archive_is_refused(tmp_path, change, message):
    _write_cifar(tmp_path, change=change)
    with pytest.raises(ValueError, match=message):
        list(originals.read_cifar10(tmp_path, "train"))


def test_links_in_an_archive_are_no_files(tmp_path):
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as tar:
        link = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ValueError, match="no regular file test_batch.bin"):
        list(originals.read_cifar10(tmp_path, "test"))


def test_a_truncated_archive_is_refused(tmp_path):
    _write_cifar(tmp_path)
    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be read|no regular file"):
        list(originals.read_cifar10(tmp_path, "train"))


@pytest.mark.parametrize(
    "data, message",
    [
        (_idx(MNIST["train"][1])[:-1], "announces 6 values"),
        (_idx(MNIST["train"][1]) + b"\0", "announces 6 values"),
        (_idx(MNIST["train"][1][:-1]), "6 images but 5 labels"),
        (_idx(MNIST["train"][0]), "not an idx file"),
        (b"\0\0", "not an idx file"),
        (b"\0\0\x08\x01" + b"\xff" * 4, "is not MNIST"),
    ],
)
def test_a_wrong_idx_file_is_refused(tmp_path, data, message):
    _write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(data))
    with pytest.raises(ValueError, match=message):
        list(originals.read_mnist(tmp_path, "train"))


def test_what_is_not_gzip_is_refused(tmp_path):
    _write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte.gz cannot be read"):
        list(originals.read_mnist(tmp_path, "train"))


def test_a_download_is_kept_only_with_the_right_hash(tmp_path):
    remote, local = tmp_path / "remote.bin", tmp_path / "local"
    remote.write_bytes(b"data")
    good = originals.Original(remote.as_uri(), hashlib.sha256(b"data").hexdigest())
    bad = good._replace(sha256="0" * 64)
    with pytest.raises(ValueError, match="expected 0000"):
        originals.download(bad, local)
    assert list(local.iterdir()) == []
    assert originals.download(good, local).read_bytes() == b"data"
    remote.unlink()
    assert originals.download(good, local).name == "remote.bin"  # not fetched again
    (local / "remote.bin").write_bytes(b"rot")
    with pytest.raises(ValueError, match="SHA-256"):
        originals.download(good, local)


def test_a_download_that_fails_says_what_to_do(tmp_path):
    missing = originals.Original((tmp_path / "missing.bin").as_uri(), "0" * 64)
    with pytest.raises(OSError, match=r"cannot fetch file://.*missing\.bin.*--source-dir"):
        originals.download(missing, tmp_path / "local")
    assert list((tmp_path / "local").iterdir()) == []


def test_captions_of_a_set_are_kept(tmp_path):
    import tensorflow_datasets as tfds
    from etils import epath

    from diffusion_jax.data.builders import encode_png

    texts = ["a red circle", "zwei Häuser"]

    class Captioned(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "captioned"
        VERSION = tfds.core.Version("1.0.0")
        code_path = epath.Path(__file__)
        pkg_dir_path = epath.Path(__file__).parent

        def _info(self):
            image = tfds.features.Image(shape=(8, 8, 3), encoding_format="png")
            features = {"image": image, "caption": tfds.features.Text()}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(texts),
                "broken": self._generate_examples([b"\xff"]),
            }

        def _generate_examples(self, texts):
            for i, text in enumerate(texts):
                png = encode_png(np.full((8, 8, 3), 50 * i, np.uint8))
                yield i, {"image": io.BytesIO(png), "caption": text}

    Captioned(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    source = TFDS("captioned", 8, data_dir=str(tmp_path)).source()
    found = {source[i]["caption"]: float(source[i]["image"].max()) for i in range(2)}
    assert found == {texts[0]: -1.0, texts[1]: pytest.approx(100 / 255 - 1)}
    broken = TFDS("captioned", 8, split="broken", data_dir=str(tmp_path)).source()
    with pytest.raises(ValueError, match="caption of record 0 of captioned/1.0.0, .* UTF-8"):
        broken[0]
    with pytest.raises(ValueError, match="captions, which in_memory"):
        TFDS("captioned", 8, data_dir=str(tmp_path), in_memory=True).source()
