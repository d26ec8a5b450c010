"""sample --model: pictures with their settings, and pictures that are drawn again from them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.cli import main

CHECKPOINTS = Path(__file__).parents[1] / "parity" / "cases" / "pipelines" / "ckpt"
pytestmark = pytest.mark.slow


def sample(*arguments):
    return main(["sample", *map(str, arguments)])


def pixels(path):
    return np.asarray(Image.open(path))


def settings(path):
    return json.loads(Image.open(path).text["diffusion_jax"])


def test_pictures_hold_their_settings_and_are_drawn_again_from_them(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    options = ("--num-images", 2, "--num-steps", 3, "--height", 16, "--width", 24, "--scale", 3)
    texts = ("--prompt", "a cat", "a dog", "--negative-prompt", "blurry")
    assert sample("--model", CHECKPOINTS / "E_sd1", *texts, *options, "--out", first) == 0
    assert "s an image" in capsys.readouterr().out
    files = [first / f"0000{i}.png" for i in range(4)]
    assert pixels(files[0]).shape == (16, 24, 3)
    assert pixels(first / "grid.png").shape == (16, 4 * 24, 3)
    assert len({pixels(file).tobytes() for file in files}) == 4
    kept = settings(files[2])
    assert kept["words"]["prompt"] == ["a cat", "a dog"]
    assert kept["index"] == 2
    assert kept["words"]["guidance_scale"] == 3
    assert sample("--from-image", files[2], "--out", second) == 0
    np.testing.assert_array_equal(pixels(second / "00002.png"), pixels(files[2]))


def test_a_picture_to_start_from_must_be_the_one_it_was(tmp_path, capsys):
    rng = np.random.default_rng(0)
    start, mask = tmp_path / "start.png", tmp_path / "mask.png"
    Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(start)
    Image.fromarray(np.triu(np.full((16, 16), 255, np.uint8))).save(mask)
    options = ("--prompt", "a cat", "--num-steps", 4, "--strength", 0.5, "--seed", 0)
    model = ("--model", CHECKPOINTS / "E_sd1")
    out = tmp_path / "out"
    assert sample(*model, *options, "--image", start, "--out", out) == 0
    assert settings(out / "00000.png")["task"] == "image_to_image"
    size = ("--height", 16, "--width", 16)
    assert sample(*model, *options, *size, "--image", start, "--mask", mask, "--out", out) == 0
    assert settings(out / "00000.png")["task"] == "inpainting"
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(start)
    assert sample("--from-image", out / "00000.png", "--out", tmp_path / "again") == 2
    assert "was changed" in capsys.readouterr().err


def test_a_lora_is_part_of_the_settings(tmp_path):
    data = Path(__file__).parents[1] / "pretrained" / "data_lora"
    options = ("--prompt", "a", "--num-steps", 2, "--height", 16, "--width", 16, "--seed", 0)
    model = ("--model", CHECKPOINTS / "E_sd1")
    assert sample(*model, *options, "--out", tmp_path / "plain") == 0
    assert sample(*model, *options, "--lora", data, "--out", tmp_path / "lora") == 0
    plain, adapted = (pixels(tmp_path / name / "00000.png") for name in ("plain", "lora"))
    assert (plain != adapted).any()
    file = tmp_path / "lora" / "00000.png"
    assert sample("--from-image", file, "--out", tmp_path / "again") == 0
    np.testing.assert_array_equal(pixels(tmp_path / "again" / "00000.png"), adapted)


def test_labels_and_unconditional_models(tmp_path):
    options = ("--num-steps", 2, "--num-images", 2, "--seed", 0)
    out = tmp_path / "dit"
    assert sample("--model", CHECKPOINTS / "E10_dit", *options, "--labels", 3, 5, "--out", out) == 0
    assert len(list(out.glob("0*.png"))) == 4
    out = tmp_path / "ddpm"
    folder = CHECKPOINTS / "E09_ddpm_ddim_pipelines"
    assert sample("--model", folder, *options, "--out", out) == 0
    assert len(list(out.glob("0*.png"))) == 2


def test_boxes_are_drawn_in_the_grid(tmp_path):
    Image.fromarray(np.full((16, 16, 3), 128, np.uint8)).save(tmp_path / "known.png")
    layout = tmp_path / "layout.json"
    boxes = [[0.0, 0.0, 0.5, 0.5]]
    content = {"boxes": boxes, "phrases": ["a cat"], "inpaint": "known.png"}
    layout.write_text(json.dumps(content))
    options = ("--prompt", "a room", "--num-steps", 2, "--height", 16, "--width", 16)
    folder, out = CHECKPOINTS / "E06c_sd_gligen_inpaint", tmp_path / "out"
    assert sample("--model", folder, *options, "--layout", layout, "--out", out) == 0
    grid, image = pixels(out / "grid.png"), pixels(out / "00000.png")
    assert (grid[0, :8] == (255, 0, 0)).all()
    assert not (image[0, :8] == (255, 0, 0)).all()
    np.testing.assert_array_equal(grid[9:], image[9:])
    assert settings(out / "00000.png")["words"]["gligen_boxes"] == boxes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--from-image", "missing.png"), "missing.png"),
        (("--model", "no/such/place/at/all"), "no/such/place"),
        (("--model", CHECKPOINTS / "E_sd1"), "prompt"),
        (("--model", CHECKPOINTS / "E_sd1" / "unet", "--prompt", "a"), "wants a pipeline"),
        (("--model", CHECKPOINTS / "E_sd1", "--prompt", "a", "--word", "x"), "NAME=JSON"),
        (("--model", CHECKPOINTS / "E_sd1", "--prompt", "a", "--word", "eta2=1"), "has no eta2"),
        (("--model", CHECKPOINTS / "E_sd1", "--prompt", "a", "--num-images", 0), "num_images"),
    ],
)
def test_bad_options_end_with_an_error(arguments, message, capsys):
    assert sample(*arguments) == 2
    assert message in capsys.readouterr().err
