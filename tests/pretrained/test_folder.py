"""from_pretrained and save_pretrained: one network, its errors, its dtype and its devices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from diffusion_jax.io.mapping import MappingError
from diffusion_jax.io.safetensors import WeightsFile, WeightsFileError
from diffusion_jax.io.tables.options import UnsupportedOption
from diffusion_jax.pretrained import UnknownClassError, from_pretrained, networks, save_pretrained
from diffusion_jax.training.parallel import make_mesh
from tests.pretrained.toys import add_toys, toy


@pytest.fixture(autouse=True)
def _toys(monkeypatch):
    add_toys(monkeypatch)


@pytest.fixture
def folder(tmp_path):
    """A folder with a toy, and the toy."""
    save_pretrained(toy(), tmp_path / "toy")
    return tmp_path / "toy"


def assert_same(read, written):
    assert (read.class_name, read.config) == (written.class_name, written.config)
    assert jax.tree.structure(read.params) == jax.tree.structure(written.params)
    for ours, theirs in zip(*map(jax.tree.leaves, (read.params, written.params)), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def edit(path, **values):
    """Changes keys of a JSON file; None deletes one."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.mark.parametrize("class_name", ["ToyModel", "ToyTextModel"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": 100}, {"variant": "fp16"}])
def test_what_was_saved_is_loaded_bit_for_bit(class_name, options, tmp_path):
    written = toy(class_name)
    save_pretrained(written, tmp_path / "a", **options)
    read = from_pretrained(tmp_path / "a", variant=options.get("variant"))
    assert_same(read, written)
    x = jnp.ones((3, 4))
    ours, theirs = (each.module.apply({"params": each.params}, x) for each in (read, written))
    np.testing.assert_array_equal(ours, theirs)
    save_pretrained(read, tmp_path / "b", **options)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_files_have_the_names_and_layout_of_the_library(tmp_path):
    """Read by the format's own library: linear kernels are transposed, and marked as torch's."""
    for class_name, stem in (("ToyModel", "diffusion_pytorch_model"), ("ToyTextModel", "model")):
        written = toy(class_name)
        save_pretrained(written, tmp_path / class_name)
        path = tmp_path / class_name / f"{stem}.safetensors"
        tensors = safetensors.numpy.load_file(path)
        np.testing.assert_array_equal(
            tensors["first.weight"], np.asarray(written.params["first"]["kernel"]).T
        )
        assert WeightsFile(path).metadata == {"format": "pt"}


@pytest.mark.parametrize("stored", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("wanted", [None, "float16", "bfloat16"])
def test_dtype_is_that_of_parameters_and_module(stored, wanted, tmp_path):
    written = toy()
    halves = jax.tree.map(lambda leaf: leaf.astype(stored), written.params)
    save_pretrained(written._replace(params=halves), tmp_path)
    read = from_pretrained(tmp_path, dtype=wanted)
    dtype = jnp.dtype(wanted or "float32")
    assert read.module.dtype == read.module.param_dtype == dtype
    for ours, theirs in zip(*map(jax.tree.leaves, (read.params, halves)), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(ours, theirs.astype(dtype))


def test_no_leaf_is_a_view_of_the_file(folder):
    """A file that changes after loading does not change the parameters."""
    read = from_pretrained(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 100)
        file.write(b"\xff" * 100)
    assert_same(read, toy())


def mesh_spec(*names):
    return NamedSharding(make_mesh(), PartitionSpec(*names))


def by_columns(path, shape):
    return mesh_spec(None, "data") if path.endswith("kernel") else mesh_spec()


def test_parameters_are_spread_over_devices(folder, monkeypatch):
    """A device is given its own part, and no more than that is ever copied out of the file."""
    copied = []

    class Recording:
        def __getattr__(self, name):
            return getattr(np, name)

        @staticmethod
        def array(value, *args, **kwargs):
            copied.append(np.shape(value))
            return np.array(value, *args, **kwargs)

    monkeypatch.setattr(networks, "np", Recording())
    read = from_pretrained(folder, shardings=by_columns)
    assert_same(read, toy())
    kernel = read.params["first"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "data")
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(4, 3)}
    assert (4, 3) in copied
    assert (4, 6) not in copied
    assert read.params["first"]["bias"].sharding.is_fully_replicated


def test_shardings_are_a_tree_or_one_for_all(folder):
    second = SingleDeviceSharding(jax.devices()[1])
    for shardings in (second, jax.tree.map(lambda _: second, dict(toy().params))):
        read = from_pretrained(folder, shardings=shardings)
        assert all(leaf.devices() == {jax.devices()[1]} for leaf in jax.tree.leaves(read.params))
    with pytest.raises(ValueError, match="differ in first/bias, first/kernel, last/bias"):
        from_pretrained(folder, shardings={"norm": {"scale": second, "bias": second}})
    with pytest.raises(ValueError, match=r"sharding of first/bias must be a .*, got 'data'"):
        from_pretrained(folder, shardings=lambda path, shape: "data")


@pytest.mark.parametrize("width", [None, [6], "6", 1.5])
def test_values_of_the_wrong_kind_name_the_file(folder, width):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "width": width}))
    with pytest.raises(
        ValueError, match=r"config\.json: .*(of the wrong kind|default 6|no network)"
    ):
        from_pretrained(folder)


def test_an_unknown_class_is_no_import(folder):
    """The name of a class is looked up in the table, whatever it looks like."""
    config = folder / "config.json"
    edit(config, _class_name="ToyModl")
    with pytest.raises(UnknownClassError, match=r"did you mean 'ToyModel'\? Known classes: Auto"):
        from_pretrained(folder)
    for name in ("os.system", "diffusion_jax.pretrained.networks.Loaded", ["ToyModel"], 3):
        edit(config, _class_name=name)
        with pytest.raises(UnknownClassError):
            from_pretrained(folder)
    edit(config, _class_name=None, architectures=["ToyTextModel", "ToyModel"])
    with pytest.raises(UnknownClassError, match="one entry of architectures"):
        from_pretrained(folder)


def test_an_unknown_option_names_the_file_and_is_ignored_on_request(folder, capsys):
    path = folder / "config.json"
    edit(path, depth=3)
    with pytest.raises(UnsupportedOption, match=r"config\.json: ToyModel has no option 'depth'"):
        from_pretrained(folder)
    assert_same(from_pretrained(folder, ignore_unknown=True), toy())
    assert capsys.readouterr().err == f"{path}: ignored depth\n"
    edit(path, width=0)
    with pytest.raises(UnsupportedOption, match=r"config\.json: .*width must be 1 or more"):
        from_pretrained(folder, ignore_unknown=True)


def test_weights_without_a_configuration_are_told_it(folder, tmp_path):
    """A file by itself, or a folder with nothing else, as original code releases them."""
    (folder / "config.json").unlink()
    path = folder / "diffusion_pytorch_model.safetensors"
    config = {"_class_name": "ToyModel", "width": 6}
    for place in (path, folder):
        assert_same(from_pretrained(place, config=config), toy())
    with pytest.raises(WeightsFileError, match="does not say what network it holds"):
        from_pretrained(path)
    with pytest.raises(UnknownClassError, match="config must name its class"):
        from_pretrained(path, config={"width": 6})
    with pytest.raises(ValueError, match="variant has no meaning .* holds a file"):
        from_pretrained(path, config=config, variant="fp16")
    save_pretrained(toy(), tmp_path / "b")
    with pytest.raises(ValueError, match="config has no meaning"):
        from_pretrained(tmp_path / "b", config=config)


def test_every_tensor_that_does_not_fit_is_listed(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = dict(safetensors.numpy.load_file(path))
    tensors["a.position_ids"] = np.arange(3)
    safetensors.numpy.save_file(tensors, path)
    assert_same(from_pretrained(folder), toy())
    tensors["extra"] = tensors.pop("norm.bias")
    tensors["last.weight"] = np.ascontiguousarray(tensors["last.weight"].T)
    tensors["last.bias"] = tensors["last.bias"].astype(np.int32)
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(MappingError, match=r"as a ToyModel: .* 4 problem\(s\)") as caught:
        from_pretrained(folder)
    for part in ("missing: norm.bias", "unexpected: extra", "last.weight", "last.bias"):
        assert part in str(caught.value)
    assert str(path) in str(caught.value)


def test_other_names_of_a_class_are_read(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    old = {name.replace("first", "to_first"): tensor for name, tensor in tensors.items()}
    safetensors.numpy.save_file(old, path)
    assert_same(from_pretrained(folder), toy())


def test_finiteness_is_checked_where_it_is_asked_for(tmp_path):
    written = toy()
    bad = {**written.params, "norm": {**written.params["norm"], "bias": jnp.full(6, jnp.nan)}}
    save_pretrained(written._replace(params=bad), tmp_path)
    from_pretrained(tmp_path)
    with pytest.raises(WeightsFileError, match=r"not finite: norm\.bias"):
        from_pretrained(tmp_path, check_finite=True)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 1}', "[" * 100_000, '{"a": NaN}'])
def test_a_configuration_that_is_none_is_refused(text, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(WeightsFileError, match=r"config\.json is not valid JSON"):
        from_pretrained(folder)


def test_pickled_weights_are_refused_with_the_command_that_converts_them(folder):
    old = folder / "diffusion_pytorch_model.safetensors"
    pickled = old.rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(WeightsFileError, match=rf"diffusion-jax convert {pickled} {folder}"):
        from_pretrained(folder)
    with pytest.raises(WeightsFileError, match=rf"convert {pickled} {old}"):
        from_pretrained(pickled)
    (folder / "config.json").unlink()
    with pytest.raises(WeightsFileError, match="Pickled weights are never read"):
        from_pretrained(folder)


def test_a_place_that_is_none_says_what_is_expected(folder, tmp_path):
    for name in (tmp_path / "nowhere", "./toy", "../a/b/c", "toy"):
        with pytest.raises(FileNotFoundError, match="no folder .* OWNER/NAME"):
            from_pretrained(name)
    with pytest.raises(FileNotFoundError, match=r"no folder 'unet'; it has \['toy'\]"):
        from_pretrained(tmp_path, subfolder="unet")
    assert_same(from_pretrained(tmp_path, subfolder="toy"), toy())
    for subfolder in ("../toy", "/toy", ""):
        with pytest.raises(ValueError, match="must lie in the folder"):
            from_pretrained(folder, subfolder=subfolder)
    with pytest.raises(WeightsFileError, match="it has toy"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="subfolder is for folders"):
        from_pretrained(folder / "config.json", subfolder="unet")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"revision": "main"}, "revision is for repositories"),
        ({"weights": "raw"}, "weights has no meaning .* holds a network"),
        ({"token_length": 77}, "token_length has no meaning"),
        ({"variant": "fp16"}, "variant 'fp16'.* there is variant=None"),
        ({"dtype": "int8"}, "dtype must be of floating point"),
        ({"dtype": "fp16"}, "dtype must be of floating point.* got 'fp16'"),
    ],
)
def test_options_without_meaning_are_refused(options, message, folder):
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder, **options)


def test_nothing_is_overwritten(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="already holds"):
        save_pretrained(toy(seed=1), folder)
    with pytest.raises(ValueError, match="of another network"):
        save_pretrained(toy(width=7), folder, variant="fp16")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_pretrained(toy(), folder, variant="fp16")
    assert_same(from_pretrained(folder, variant="fp16"), toy())


def test_what_cannot_be_written_is_refused(tmp_path):
    written = toy()
    lost = {("lost" if name == "last" else name): leaf for name, leaf in written.params.items()}
    with pytest.raises(
        MappingError, match=r"(?s)4 differ.*lost/bias: has \(2,\), expected nothing"
    ):
        save_pretrained(written._replace(params=lost), tmp_path)
    with pytest.raises(ValueError, match="got Toy; a training directory"):
        save_pretrained(written.module, tmp_path)
    with pytest.raises(UnknownClassError, match="'Toy' is not read here"):
        save_pretrained(written._replace(class_name="Toy"), tmp_path)
    assert not list(tmp_path.iterdir())
