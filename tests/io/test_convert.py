"""Conversion of pickled weights: what is asked of torch, what is chosen and what is refused.

torch itself is replaced by a module that hands out what a file would hold.
"""

import contextlib
import json
import pickle
import sys
import types

import ml_dtypes
import numpy as np
import pytest

from diffusion_jax import cli
from diffusion_jax.io import convert
from diffusion_jax.io.convert import MissingTorchError, convert_files
from diffusion_jax.io.safetensors import WeightsFile, WeightsFileError
from diffusion_jax.io.shards import open_weights


class Tensor:
    """As much of a torch.Tensor as the conversion uses."""

    def __init__(self, array, dtype=None):
        self.array, self.dtype = np.asarray(array), dtype or np.asarray(array).dtype

    def detach(self):
        return self

    cpu = contiguous = detach

    def view(self, dtype):
        assert (self.dtype, dtype) == ("bfloat16", "int16")
        return Tensor(self.array.view(np.int16))

    def numpy(self):
        if self.dtype in ("bfloat16", "float8"):
            raise TypeError("Got unsupported ScalarType")
        return self.array


W = Tensor(np.arange(6, dtype=np.float32).reshape(2, 3))
V = Tensor(np.ones(2, np.float16))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A torch that reads these contents, and a function that makes their files."""
    contents = {}

    def load(path, *, map_location, weights_only):
        assert map_location == "cpu"
        assert weights_only is True
        content = contents[path]
        if isinstance(content, Exception):
            raise content
        return content

    @contextlib.contextmanager
    def safe_globals(allowed):
        for stand_in, name in allowed:
            assert stand_in.__module__ == "diffusion_jax.io.convert", name
        yield

    torch = types.ModuleType("torch")
    torch.Tensor, torch.bfloat16, torch.int16, torch.load = Tensor, "bfloat16", "int16", load
    torch.serialization = types.SimpleNamespace(safe_globals=safe_globals)
    # Not into sys.modules, where the command line would take it for a whole torch.
    monkeypatch.setattr(convert, "_torch", lambda: torch)

    def make(name, content):
        path = tmp_path / name
        path.write_bytes(bytes(40))
        contents[str(path)] = content
        return path

    return make


def test_without_torch_the_command_says_what_is_missing(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.bin"
    path.write_bytes(b"PK\x03\x04")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "torch", None)
        with pytest.raises(MissingTorchError, match="pip install torch") as caught:
            convert_files([path], tmp_path / "out")
        without.setitem(sys.modules, "torch", types.SimpleNamespace(__version__="2.5.1+cpu"))
        with pytest.raises(MissingTorchError, match=r"torch 2\.5\.1\+cpu .* 'torch>=2\.6'"):
            convert_files([path], tmp_path / "out")

    def missing():
        raise caught.value

    monkeypatch.setattr(convert, "_torch", missing)
    assert cli.main(["convert", str(path), str(tmp_path / "out")]) == 2
    assert "needs torch" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tensors_keep_names_values_and_dtypes(files, tmp_path):
    """Shared memory becomes separate tensors; bfloat16 travels bit for bit."""
    brain = np.linspace(-2, 2, 4).astype(ml_dtypes.bfloat16)
    content = {"a": W, "tied": W, "t": Tensor(W.array.T), "h": V, "b": Tensor(brain, "bfloat16")}
    done = convert_files([files("x.pt", {**content, "epoch": 3})], tmp_path / "out.safetensors")
    assert (done.tensors, done.left_out) == (5, ["epoch"])
    read = WeightsFile(tmp_path / "out.safetensors")
    assert set(read) == set(content)
    for name in ("a", "tied", "t", "h"):
        np.testing.assert_array_equal(read[name], content[name].array)
        assert read[name].dtype == content[name].array.dtype
    assert read["b"].dtype == brain.dtype
    np.testing.assert_array_equal(read["b"].view(np.int16), brain.view(np.int16))


@pytest.mark.parametrize(
    "content",
    [
        {"w": W},
        {"state_dict": {"w": W}, "optimizer_states": [{"state": {0: W}}], "epoch": 1},
        {"model": {"w": W}, "optimizer": {"state": {"w": V}}, "callbacks": {"best": V}},
        {"module": {"model": {"w": W}}},
    ],
)
def test_weights_are_found_beside_other_state(content, files, tmp_path):
    convert_files([files("x.ckpt", content)], tmp_path / "out.safetensors")
    np.testing.assert_array_equal(WeightsFile(tmp_path / "out.safetensors")["w"], W.array)


def test_several_dictionaries_need_a_choice(files, tmp_path):
    path, out = files("x.ckpt", {"model": {"w": V}, "ema": {"w": W}}), tmp_path / "o.safetensors"
    with pytest.raises(WeightsFileError, match=r"choose one as key \(--key\): model, ema"):
        convert_files([path], out)
    with pytest.raises(WeightsFileError, match="'emma'; there is model, ema"):
        convert_files([path], out, key="emma")
    mixed = files("y.ckpt", {"epoch": V, "ema": {"w": W}})
    with pytest.raises(WeightsFileError, match=r"choose one .*: '' \(the top level\), ema"):
        convert_files([mixed], out)
    convert_files([mixed], tmp_path / "mixed.safetensors", key="ema")
    np.testing.assert_array_equal(WeightsFile(tmp_path / "mixed.safetensors")["w"], W.array)
    assert cli.main(["convert", str(path), str(out), "--key", "ema"]) == 0
    np.testing.assert_array_equal(WeightsFile(out)["w"], W.array)


@pytest.mark.parametrize(
    "name, written",
    [
        ("pytorch_model.bin", "model.safetensors"),
        ("pytorch_model.fp16.bin", "model.fp16.safetensors"),
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
        ("diffusion_pytorch_model.fp16.bin", "diffusion_pytorch_model.fp16.safetensors"),
        ("sd-v1-4.ckpt", "sd-v1-4.safetensors"),
        ("64x64_diffusion.pt", "64x64_diffusion.safetensors"),
    ],
)
def test_files_in_a_folder_get_the_names_that_are_looked_for(name, written, files, tmp_path):
    done = convert_files([files(name, {"w": W})], tmp_path / "out")
    assert [path.name for path in done.files] == [written]


def test_the_parts_of_an_index_are_converted_together(files, tmp_path):
    parts = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    files(parts[0], {"a": W}), files(parts[1], {"b": Tensor(W.array + 1)})
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": parts[0], "b": parts[1]}}))
    done = convert_files([index], tmp_path / "out")
    assert [path.name for path in done.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    np.testing.assert_array_equal(open_weights(tmp_path / "out")["b"], W.array + 1)
    for weight_map in ({"a": "../x.bin"}, {"a": "x.safetensors"}, ["x.bin"]):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(WeightsFileError, match="a bin file in the same folder|a weight_map"):
            convert_files([index], tmp_path / "out")


UNSAFE = pickle.UnpicklingError(
    "Weights only load failed. Re-run with weights_only=False. WeightsUnpickler error: "
    "Unsupported global: GLOBAL posix.system was not an allowed global"
)


@pytest.mark.parametrize(
    "content, message",
    [
        (UNSAFE, r"it asks for posix\.system; it is not read in any other way"),
        (RuntimeError("torchscript"), "torch says RuntimeError"),
        (IndexError("pop from empty list"), "torch says IndexError"),
        (W, "no dictionary of tensors$"),
        ({"a": 1, "optimizer": {"w": W}}, "no dictionary of tensors$"),
        ({"w": Tensor(np.ones(2, np.uint8), "float8")}, "'w' of dtype float8: Got unsupported"),
        ({"w": Tensor(np.ones(2, np.complex64))}, "'w' of dtype complex64: safetensors"),
    ],
)
def test_what_is_no_weights_is_refused(content, message, files, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        convert_files([files("x.bin", content)], tmp_path / "out.safetensors")
    assert "weights_only=False" not in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_arguments_are_checked(files, tmp_path, capsys):
    path = files("x.bin", {"w": W})
    with pytest.raises(WeightsFileError, match=r"earlier file has too: \['w'\]"):
        convert_files([path, files("y.bin", {"w": W})], tmp_path / "out")
    with pytest.raises(ValueError, match=r"must end with one of \.bin"):
        convert_files([files("x.msgpack", {"w": W})], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        convert_files([tmp_path / "nowhere.bin"], tmp_path / "out")
    convert_files([path], tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="exists"):
        convert_files([path], tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="a folder, got .*y.bin"):
        convert_files([path], tmp_path / "y.bin")
    with pytest.raises(ValueError, match="max_shard_size is for folders"):
        convert_files([path], tmp_path / "other.safetensors", max_shard_size=1)
    assert cli.main(["convert", str(path)]) == 2
    assert "FILE … OUT" in capsys.readouterr().err
