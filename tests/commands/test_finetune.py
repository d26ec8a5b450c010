"""finetune: what is trained and what is not, going on, and results that load."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.cli import main
from diffusion_jax.commands.finetune import fine_tuning
from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.lora import init_lora
from diffusion_jax.pretrained import from_pretrained, load_lora

MODEL = Path(__file__).parents[1] / "parity" / "cases" / "pipelines" / "ckpt" / "E_sd1"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i, (name, color) in enumerate((("red", (255, 0, 0)), ("blue", (0, 0, 255))) * 2):
        image = np.zeros((16, 16, 3), np.uint8)
        image[4:12, 4:12] = color
        Image.fromarray(image).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {name} square")
    return folder


def finetune(pictures, workdir, *arguments):
    options = ("--image-size", 16, "--batch-size", 2, "--checkpoint-every", 3, "--log-every", 1)
    paths = ("--model", MODEL, "--data", pictures, "--workdir", workdir)
    return main(["finetune", *map(str, (*paths, *options, *arguments))])


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_an_interrupted_run_of_a_lora_ends_as_an_undisturbed_one(pictures, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    rate = ("--learning-rate", 1e-2)
    assert finetune(pictures, whole, "--num-steps", 6, *rate) == 0
    assert finetune(pictures, parts, "--num-steps", 3, *rate) == 0
    assert finetune(pictures, parts, "--num-steps", 6, *rate) == 0
    unet = from_pretrained(MODEL, subfolder="unet")
    found = [load_lora(folder / "lora", {"unet": unet}) for folder in (whole, parts)]
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert losses(whole) == losses(parts)
    assert any(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(found[0]))
    assert finetune(pictures, parts, "--num-steps", 6, "--learning-rate", 0.5) == 2


def test_a_whole_unet_is_written_as_a_pipeline_with_nothing_else_changed(pictures, tmp_path):
    arguments = ("--rank", 0, "--num-steps", 3, "--learning-rate", 1e-3, "--ema", 0.5)
    assert finetune(pictures, tmp_path, *arguments) == 0
    before, after = from_pretrained(MODEL), from_pretrained(tmp_path / "pipeline")
    for name in ("vae", "text_encoder"):
        jax.tree.map(np.testing.assert_array_equal, before[name].params, after[name].params)
    changed = jax.tree.map(lambda a, b: (a != b).any(), before["unet"].params, after["unet"].params)
    assert all(jax.tree.leaves(changed["network"]["conv_in"]))
    words = {"num_inference_steps": 2, "output_type": "np", "height": 16, "width": 16, "seed": 0}
    assert np.isfinite(after("a red square", **words).images).all()


def test_training_on_few_pictures_lowers_their_loss(pictures, tmp_path):
    arguments = ("--rank", 0, "--num-steps", 30, "--learning-rate", 3e-3, "--caption-dropout", 0)
    assert finetune(pictures, tmp_path, *arguments) == 0
    images = np.stack([np.asarray(Image.open(pictures / f"{i}.png")) for i in range(4)])
    batch = {"image": images.astype(np.float32) / 127.5 - 1.0}
    pipelines = from_pretrained(MODEL), from_pretrained(tmp_path / "pipeline")
    captions = [(pictures / f"{i}.txt").read_text() for i in range(4)]
    batch["ids"] = pipelines[0]["tokenizer"](captions).ids
    loss = jax.jit(fine_tuning(pipelines[0], caption_dropout=0.0).build())
    before, after = (
        np.mean(
            [
                loss(
                    {name: p[name].params for name in ("unet", "vae", "text_encoder")},
                    batch,
                    image_keys(seed, range(4)),
                )[0]
                for seed in range(8)
            ]
        )
        for p in pipelines
    )
    assert after < 0.9 * before


def test_a_lora_begins_where_the_base_is_and_cached_latents_stand_for_images():
    pipeline = from_pretrained(MODEL)
    tuning = fine_tuning(pipeline, caption_dropout=0.0)
    params = {name: pipeline[name].params for name in ("unet", "vae", "text_encoder")}
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    ids = pipeline["tokenizer"](["a", "b"]).ids
    keys = image_keys(0, range(2))
    loss = jax.jit(tuning.build())
    plain, _ = loss(params, {"image": image, "ids": ids}, keys)
    lora = init_lora(jax.random.key(0), params["unet"], rank=2)
    np.testing.assert_allclose(
        loss({**params, "lora": lora}, {"image": image, "ids": ids}, keys)[0], plain, rtol=1e-6
    )
    vae, text = pipeline["vae"], pipeline["text_encoder"]
    posterior = vae.module.apply({"params": vae.params}, image, method="encode")
    cached = {
        "image_mean": posterior.mean,
        "image_std": posterior.std,
        "tokens": text.module.apply({"params": text.params}, ids).last,
    }
    np.testing.assert_allclose(loss(params, cached, keys)[0], plain, rtol=1e-5)


def test_a_cache_stands_for_autoencoder_and_text_encoder(pictures, tmp_path, capsys):
    cache, arguments = tmp_path / "cache", ("--num-steps", 4, "--learning-rate", 1e-2)
    assert finetune(pictures, tmp_path / "plain", *arguments) == 0
    assert finetune(pictures, tmp_path / "first", *arguments, "--cache", cache) == 0
    np.testing.assert_allclose(losses(tmp_path / "first"), losses(tmp_path / "plain"), rtol=1e-4)
    (shard,) = cache.glob("*.safetensors")
    written = shard.stat().st_mtime_ns
    assert finetune(pictures, tmp_path / "second", *arguments, "--cache", cache) == 0
    assert losses(tmp_path / "second") == losses(tmp_path / "first")
    assert shard.stat().st_mtime_ns == written
    # Other pictures under the same names.
    others = shutil.copytree(pictures, tmp_path / "others")
    assert finetune(others, tmp_path / "third", *arguments, "--cache", cache) == 2
    assert "made by something else" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rank", -1), "rank"),
        (("--data-dir", "sets"), "data_dir"),
        (("--eval-every", 2), "--prompt"),
        (("--batch-size", 3), "batch_size 3"),
        (("--caption-dropout", 1.0), "caption_dropout"),
        (("--image-size", 15), "image_size"),
        (("--targets", "**/nothing/kernel"), "matches no parameter"),
    ],
)
def test_bad_options_end_with_an_error(pictures, tmp_path, arguments, message, capsys):
    assert finetune(pictures, tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err
