"""Pipelines: parts by name, what is left out, and the way back to a folder."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from diffusion_jax.data.tokenizers import from_folder
from diffusion_jax.io.safetensors import WeightsFileError
from diffusion_jax.pretrained import (
    Pipeline,
    UnknownClassError,
    from_config,
    from_pretrained,
    save_pretrained,
)
from tests.pretrained.toys import add_toys, toy

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat")


@pytest.fixture(autouse=True)
def _toys(monkeypatch):
    add_toys(monkeypatch)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(PIECES))
    config = {"tokenizer_class": "BertTokenizer", "model_max_length": 8}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return from_folder(folder)


@pytest.fixture
def pipeline(tokenizer):
    scheduler = from_config({"_class_name": "PNDMScheduler", "skip_prk_steps": True})
    parts = {
        "unet": toy(),
        "text_encoder": toy("ToyTextModel", seed=1),
        "scheduler": scheduler,
        "tokenizer": tokenizer,
        "safety_checker": None,
    }
    return Pipeline("ToyPipeline", parts, {"requires_safety_checker": False})


def index_of(folder):
    return json.loads((folder / "model_index.json").read_text())


def change(folder, **entries):
    (folder / "model_index.json").write_text(json.dumps({**index_of(folder), **entries}))


def test_a_pipeline_comes_back_whole(pipeline, tmp_path):
    save_pretrained(pipeline, tmp_path / "a")
    assert index_of(tmp_path / "a") == {
        "_class_name": "ToyPipeline",
        "unet": ["diffusers", "ToyModel"],
        "text_encoder": ["transformers", "ToyTextModel"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "tokenizer": ["transformers", "BertTokenizer"],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
    read = from_pretrained(tmp_path / "a")
    assert set(read) == set(pipeline)
    assert (read.class_name, read.options) == (pipeline.class_name, pipeline.options)
    assert read["scheduler"] == pipeline["scheduler"]
    assert read["safety_checker"] is None
    for name in ("unet", "text_encoder"):
        assert read[name].config == pipeline[name].config
        jax.tree.map(np.testing.assert_array_equal, read[name].params, pipeline[name].params)
    assert read["tokenizer"]("a cat").ids.tolist() == [2, 5, 6, 3, 0, 0, 0, 0]
    save_pretrained(read, tmp_path / "b")
    files = {p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert len(files) == 8
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_parts_are_loaded_by_themselves_too(pipeline, tmp_path):
    save_pretrained(pipeline, tmp_path)
    assert from_pretrained(tmp_path, subfolder="unet").class_name == "ToyModel"
    assert from_pretrained(tmp_path, subfolder="scheduler") == pipeline["scheduler"]
    tokenizer = from_pretrained(tmp_path, subfolder="tokenizer", token_length=4)
    assert tokenizer("a").ids.tolist() == [2, 5, 3, 0]
    for part in ("scheduler", "tokenizer"):
        save_pretrained(from_pretrained(tmp_path, subfolder=part), tmp_path / f"new_{part}")
        for path in (tmp_path / part).iterdir():
            assert (tmp_path / f"new_{part}" / path.name).read_bytes() == path.read_bytes()


def test_a_tokenizer_is_known_by_any_of_its_files(tmp_path):
    (tmp_path / "bpe_simple_vocab_16e6.txt").write_text('"#version: 0.2\na t</w>\nc at</w>\n')
    assert from_pretrained(tmp_path, token_length=6).kind == "clip"


def test_the_class_of_the_index_is_the_one_that_is_built(pipeline, tmp_path):
    """As in diffusers: a folder's own config.json may be of a larger class."""
    save_pretrained(pipeline, tmp_path)
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace("ToyTextModel", "ToyWholeModel"))
    assert from_pretrained(tmp_path)["text_encoder"].class_name == "ToyTextModel"
    change(tmp_path, unet=["evil_module", "ToyModel"])
    assert from_pretrained(tmp_path)["unet"].class_name == "ToyModel"


def test_parts_of_other_kinds_are_left_out_or_refused(pipeline, tmp_path):
    save_pretrained(pipeline, tmp_path)
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    change(
        tmp_path, safety_checker=checker, feature_extractor=["transformers", "CLIPImageProcessor"]
    )
    read = from_pretrained(tmp_path)
    assert read["safety_checker"] is None and read["feature_extractor"] is None
    change(tmp_path, unet=["diffusers", "ToyModl"])
    with pytest.raises(UnknownClassError, match=r"model_index\.json.* did you mean 'ToyModel'"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"../unet": ["diffusers", "ToyModel"]}, "no plain name"),
        ({"/etc": ["diffusers", "ToyModel"]}, "no plain name"),
        ({"..": [None, None]}, "no plain name"),
        ({"unet": ["diffusers"]}, r"\[library, class\] or \[null, null\]"),
        ({"unet": ["diffusers", {"code": 1}]}, r"\[library, class\]"),
        ({"_class_name": ["A"]}, "must have a _class_name"),
    ],
)
def test_an_index_that_is_none_is_refused(entries, message, pipeline, tmp_path):
    save_pretrained(pipeline, tmp_path)
    change(tmp_path, **entries)
    with pytest.raises(WeightsFileError, match=message):
        from_pretrained(tmp_path)


def test_a_variant_is_taken_where_there_is_one(pipeline, tmp_path):
    save_pretrained(pipeline, tmp_path)
    save_pretrained(toy(seed=5), tmp_path / "unet", variant="fp16")
    read = from_pretrained(tmp_path, variant="fp16")
    for name, expected in (("unet", toy(seed=5)), ("text_encoder", pipeline["text_encoder"])):
        jax.tree.map(np.testing.assert_array_equal, read[name].params, expected.params)
    with pytest.raises(WeightsFileError, match="variant 'bf16'"):
        from_pretrained(tmp_path, variant="bf16")
    # A variant that is there and broken is no reason to take the plain file.
    save_pretrained(toy("ToyTextModel"), tmp_path / "text_encoder", variant="fp16")
    (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(bytes(9))
    with pytest.raises(WeightsFileError, match=r"model\.fp16\.safetensors: "):
        from_pretrained(tmp_path, variant="fp16")


def test_dtype_and_shardings_reach_every_network(pipeline, tmp_path):
    save_pretrained(pipeline, tmp_path)
    first, second = map(SingleDeviceSharding, jax.devices()[:2])
    seen = {}

    def sharding(path, shape):
        seen[path] = shape
        return second if path.startswith("unet/") else first

    read = from_pretrained(tmp_path, dtype="bfloat16", shardings=sharding)
    assert seen["text_encoder/first/kernel"] == (4, 6)
    assert read["unet"].params["norm"]["bias"].devices() == {jax.devices()[1]}
    assert read["text_encoder"].params["norm"]["bias"].devices() == {jax.devices()[0]}
    assert read["unet"].params["norm"]["bias"].dtype == read["unet"].module.dtype == "bfloat16"
    tree = jax.tree.map(lambda _: second, dict(toy().params))
    read = from_pretrained(tmp_path, shardings={"unet": tree})
    assert read["unet"].params["last"]["kernel"].devices() == {jax.devices()[1]}
    with pytest.raises(ValueError, match=r"shardings of \['net'\], but the networks are"):
        from_pretrained(tmp_path, shardings={"net": tree})


def test_a_part_of_another_class_is_written_as_what_it_is(pipeline, tokenizer, tmp_path):
    save_pretrained(pipeline, tmp_path / "a")
    change(tmp_path / "a", unet=["library", "ToyModel"], tokenizer=["other", "BertTokenizerFast"])
    read = from_pretrained(tmp_path / "a")
    parts = {**read, "text_encoder": toy()}
    save_pretrained(replace(read, parts=parts), tmp_path / "b")
    index = index_of(tmp_path / "b")
    assert index["text_encoder"] == ["diffusers", "ToyModel"]
    assert index["unet"] == ["library", "ToyModel"]
    assert index["tokenizer"] == ["other", "BertTokenizerFast"]
    assert from_pretrained(tmp_path / "b")["text_encoder"].class_name == "ToyModel"
    glide = replace(tokenizer, kind="glide")
    with pytest.raises(ValueError, match="no class for the glide tokenizer 'tokenizer'"):
        save_pretrained(replace(read, parts={"tokenizer": glide}), tmp_path / "c")


def test_what_is_no_part_is_not_written(pipeline, tmp_path):
    save_pretrained(pipeline, tmp_path / "a")
    with pytest.raises(ValueError, match="already holds a pipeline"):
        save_pretrained(pipeline, tmp_path / "a")
    with pytest.raises(ValueError, match="'unet' must be a Loaded, .* got Toy"):
        save_pretrained(Pipeline("P", {"unet": toy().module}), tmp_path / "b")
