"""The documentation: its code runs, and what its tables name exists."""

import json
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_jax.cli import main
from diffusion_jax.data.tokenizers import from_folder
from diffusion_jax.pretrained import (
    COMPONENTS,
    ORIGINALS,
    PUBLISHED,
    Loaded,
    Pipeline,
    from_config,
    save_original,
    save_pretrained,
)
from diffusion_jax.pretrained.calls import TASKS
from diffusion_jax.pretrained.hub import is_repository

DOCS = Path(__file__).resolve().parents[1] / "docs"
MARKED = re.compile(r"^<!-- run -->\n```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHELL = re.compile(r"^<!-- run -->\n```\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = [page for page in sorted(DOCS.glob("*.md")) if "<!-- run -->" in page.read_text("utf-8")]
ROW = re.compile(r"^\| `([\w.]+)` \|", re.MULTILINE)
FROM_ORIGINAL = re.compile(r"""from_original\(\s*"([^"]+)",\s*"([^"]+)\"""")
FROM_PRETRAINED = re.compile(r"""from_pretrained\("([^"]+)\"""")

ADM = "guided_diffusion.unet.UNetModel"
ARGUMENTS = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": [],
    "channel_mult": [1],
}
UNET = {
    "sample_size": 8,
    "block_out_channels": [32],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 4,
    "mid_block_type": None,
}
VAE = {
    "block_out_channels": [32],
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "layers_per_block": 1,
    "latent_channels": 4,
    "mid_block_add_attention": False,
}
TEXT = {
    "architectures": ["CLIPTextModel"],
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 8,
    "eos_token_id": 3,
}


def random(class_name, options):
    """A network with random weights."""
    component, rng = COMPONENTS[class_name], np.random.default_rng(0)
    config = component.read(options)
    shapes = component.shapes(config)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype("f4"), shapes)
    return Loaded(class_name, config, config.build(), params)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the code of the documentation finds: `folder`, `file` and its `arguments`."""
    place = tmp_path_factory.mktemp("docs")
    pieces = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"
    (place / "bert").mkdir()
    (place / "bert" / "vocab.txt").write_text("\n".join(pieces))
    about = {"tokenizer_class": "BertTokenizer", "model_max_length": 8}
    (place / "bert" / "tokenizer_config.json").write_text(json.dumps(about))
    parts = {
        "unet": random("UNet2DConditionModel", UNET),
        "vae": random("AutoencoderKL", VAE),
        "text_encoder": random("CLIPTextModel", TEXT),
        "tokenizer": from_folder(place / "bert"),
        "scheduler": from_config({"_class_name": "PNDMScheduler", "skip_prk_steps": True}),
        "safety_checker": None,
    }
    save_pretrained(Pipeline("StableDiffusionPipeline", parts), place / "model")
    save_original(random(ADM, ARGUMENTS), place / "original.safetensors")
    return {
        "folder": place / "model",
        "file": place / "original.safetensors",
        "arguments": ARGUMENTS,
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_marked_code_runs(page, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, scope = page.read_text(encoding="utf-8"), dict(names)
    for match in MARKED.finditer(text):
        # Empty lines before it, so that errors show the line of the page.
        line = text.count("\n", 0, match.start(1))
        exec(compile("\n" * line + match[1], str(page), "exec"), scope)  # noqa: S102
    assert len(MARKED.findall(text)) == text.count("<!-- run -->")


@pytest.mark.slow
def test_the_first_hour_makes_the_pictures_that_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (DOCS.parent / "README.md").read_text("utf-8")
    lines = [line for block in SHELL.findall(text) for line in block.splitlines()]
    assert len(lines) > 5
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "diffusion-jax"
        assert main(arguments) == 0, line
    shown = re.findall(r"^\| `(runs/\S+\.png)`.*\"(docs/pictures/\S+)\"", text, re.MULTILINE)
    assert len(shown) > 3
    for made, kept in shown:
        assert (tmp_path / made).is_file()
        assert (DOCS.parent / kept).is_file()


def test_the_table_of_checkpoints_names_what_there_is():
    text = (DOCS / "checkpoints.md").read_text(encoding="utf-8")
    assert sorted(ROW.findall(text.partition("\n## Classes\n")[2])) == sorted(COMPONENTS)
    kinds = [kind for _, kind in FROM_ORIGINAL.findall(text)]
    assert sorted(kind for kind in kinds if kind not in ORIGINALS) == sorted(PUBLISHED)
    files = {kind: file for file, kind in FROM_ORIGINAL.findall(text)}
    for name, published in PUBLISHED.items():
        on_hub = published.file.endswith(".safetensors")
        assert not on_hub or files[name] == published.file
    for name in FROM_PRETRAINED.findall(text):
        assert is_repository(name) or name == "ID"


def test_the_page_on_drawing_lists_every_class_that_can_be_called():
    page = (DOCS / "drawing.md").read_text("utf-8")
    assert set(re.findall(r"`(\w+Pipeline)`", page)) == set(TASKS)
