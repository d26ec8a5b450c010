"""LoRA files: diffusers' own outputs with them, and files that diffusers wrote or could have."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion_jax.core.condition import Condition
from diffusion_jax.core.lora import merge_lora
from diffusion_jax.io.mapping import MappingError
from diffusion_jax.io.safetensors import WeightsFileError
from diffusion_jax.pretrained import from_pretrained, load_lora, save_lora, with_lora

HERE = Path(__file__).parent
DATA = HERE / "data_lora"
FOLDER = HERE.parent / "parity" / "cases" / "pipelines" / "ckpt" / "E_sd1"


@pytest.fixture(scope="module")
def unet():
    return from_pretrained(FOLDER, subfolder="unet")


@pytest.fixture(scope="module")
def case():
    return dict(np.load(DATA / "case.npz"))


def output(unet, params, case):
    x = np.moveaxis(case["x"], 1, -1)
    cond = Condition(tokens=case["c"])
    y = unet.module.apply({"params": params["network"]}, x, case["t"].astype(np.float32), cond)
    return np.moveaxis(np.asarray(y), -1, 1)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_outputs_are_those_of_diffusers(unet, case):
    [lora] = load_lora(DATA, {"unet": unet}).values()
    np.testing.assert_allclose(
        output(unet, merge_lora(unet.params, lora), case), case["with_lora"], atol=5e-5
    )
    np.testing.assert_allclose(
        output(unet, merge_lora(unet.params, lora, 0.0), case), case["without"], atol=5e-5
    )


def test_what_is_written_is_read_again(unet, tmp_path):
    loras = load_lora(DATA, {"unet": unet})
    file = save_lora(tmp_path, loras, {"unet": unet})
    same(load_lora(file, {"unet": unet}), loras)
    # The names and shapes of PEFT, convolutions as convolutions.
    shapes = {name: tensor.shape for name, tensor in load_file(file).items()}
    assert shapes["unet.down_blocks.0.resnets.0.conv1.lora_A.weight"] == (3, 4, 3, 3)
    assert shapes["unet.down_blocks.0.attentions.0.proj_in.lora_B.weight"] == (4, 3, 1, 1)


def test_pefts_own_folder_is_the_same(unet, tmp_path):
    tensors = load_file(DATA / "pytorch_lora_weights.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")
        renamed[f"base_model.model.{name.removeprefix('unet.')}"] = tensor
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    config = {"r": 3, "lora_alpha": 6, "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    same(load_lora(tmp_path, {"unet": unet}), load_lora(DATA, {"unet": unet}))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(WeightsFileError, match="use_dora"):
        load_lora(tmp_path, {"unet": unet})


def test_an_alpha_of_one_module_counts_alone(unet, tmp_path):
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    rng = np.random.default_rng(0)
    tensors = {
        f"{module}.lora_A.weight": rng.normal(size=(2, 8)).astype(np.float32),
        f"{module}.lora_B.weight": rng.normal(size=(8, 2)).astype(np.float32),
        f"{module}.alpha": np.array(6.0, np.float32),
    }
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    lora = load_lora(tmp_path, {"unet": unet})["unet"]
    found = lora["network"]["mid"]["attn"]["block_0"]["attn_1"]["query"]
    change = 3.0 * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
    np.testing.assert_allclose(found["down"] @ found["up"], change.T, rtol=1e-5)


def test_everything_that_does_not_fit_is_listed(unet, tmp_path):
    ones = np.ones((2, 8), np.float32)
    mid = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    tensors = {
        f"{mid}.to_q.lora_A.weight": ones,
        f"{mid}.to_k.lora_A.weight": ones,
        f"{mid}.to_k.lora_B.weight": ones,
        f"{mid}.nothing.lora_A.weight": ones,
        "unet.conv_in.weight": ones,
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(MappingError) as error:
        load_lora(tmp_path / "lora.safetensors", {"unet": unet})
    for part in ("to_q: only ['down']", "to_k: (2, 8)", "nothing", "conv_in.weight", "4 problem"):
        assert part in str(error.value)
    with pytest.raises(WeightsFileError, match="must hold"):
        load_lora(tmp_path, {"unet": unet})


def test_a_pipeline_draws_with_a_lora():
    pipeline = from_pretrained(FOLDER)
    words = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np", "seed": 0}
    plain = pipeline("a", **words).images
    np.testing.assert_array_equal(with_lora(pipeline, DATA, 0.0)("a", **words).images, plain)
    assert np.abs(with_lora(pipeline, DATA)("a", **words).images - plain).max() > 1e-3
