"""Original files: every class there and back as users do it, and the files that were published."""

import dataclasses
import json
import math

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.io.mapping import MappingError
from diffusion_jax.io.safetensors import WeightsFile, WeightsFileError, write_safetensors
from diffusion_jax.io.tables.options import UnsupportedOption
from diffusion_jax.models import FIRST_STAGES, adm_classifier, adm_unet, adm_upsampler
from diffusion_jax.pretrained import (
    COMPONENTS,
    ORIGINALS,
    PUBLISHED,
    HubError,
    Loaded,
    UnknownClassError,
    from_original,
    save_original,
)
from tests.pretrained.test_round_trips import CONFIGS, loaded

UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
LATENT = "ldm.models.diffusion.ddpm.LatentDiffusion"
GLIGEN = "gligen.ldm.modules.diffusionmodules.openaimodel.UNetModel"
ADM = "guided_diffusion.unet.UNetModel"


def same(read, written):
    assert (read.class_name, read.config) == (written.class_name, written.config)
    assert jax.tree.structure(read.params) == jax.tree.structure(written.params)
    for ours, theirs in zip(*map(jax.tree.leaves, (read.params, written.params)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def original(monkeypatch):
    """A network of a class, whose shapes are worked out once, as that takes longest."""

    def make(class_name):
        network = loaded(class_name)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), network.params)
        quick = ORIGINALS[class_name]._replace(shapes=lambda config: shapes)
        monkeypatch.setitem(ORIGINALS, class_name, quick)
        monkeypatch.setitem(COMPONENTS, class_name, quick)
        return network

    return make


@pytest.fixture(scope="module")
def adm_file(tmp_path_factory):
    """A file of guided-diffusion's UNetModel."""
    path = tmp_path_factory.mktemp("adm") / "unet.safetensors"
    save_original(loaded(ADM), path)
    return path


@pytest.mark.parametrize("class_name", ORIGINALS)
def test_every_original_class_goes_to_a_file_and_back(class_name, tmp_path, original):
    written = original(class_name)
    path = tmp_path / "weights.safetensors"
    save_original(written, path)
    config = {k: v for k, v in CONFIGS[class_name].items() if k != "_class_name"}
    same(from_original(path, class_name, config), written)
    # What the component writes is a configuration as well, its class included.
    (tmp_path / "config.json").write_text(json.dumps(ORIGINALS[class_name].write(written.config)))
    half = from_original(path, class_name, tmp_path / "config.json", dtype="float16")
    assert half.config == written.config
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("float16")}


SETTINGS = CONFIGS[LATENT]


def test_what_is_written_has_the_names_of_the_paper_s_code_and_nothing_else(tmp_path, original):
    written = original(LATENT)
    path = tmp_path / "v1.safetensors"
    save_original(written, path)
    file = WeightsFile(path)
    kernel = written.params["unet"]["network"]["conv_in"]["kernel"]
    name = "model.diffusion_model.input_blocks.0.0.weight"
    np.testing.assert_array_equal(file[name], np.transpose(kernel, (3, 2, 0, 1)))
    assert {name.partition(".")[0] for name in file} == {
        "model", "first_stage_model", "cond_stage_model"
    }  # fmt: skip
    with pytest.raises(ValueError, match="is there already; choose another file"):
        save_original(written, path)
    with pytest.raises(ValueError, match="must end with .safetensors"):
        save_original(written, tmp_path / "v1.ckpt")
    narrow = jax.tree.map(lambda leaf: leaf[..., :1], written.params)
    with pytest.raises(MappingError, match="not those of the configuration"):
        save_original(written._replace(params=narrow), tmp_path / "narrow.safetensors")
    with pytest.raises(UnknownClassError, match="'UNet2DModel' is no original class"):
        save_original(written._replace(class_name="UNet2DModel"), tmp_path / "u.safetensors")
    assert [each.name for each in tmp_path.iterdir()] == ["v1.safetensors"]


def test_settings_of_everything_are_settings_of_their_unet(tmp_path, original):
    """A UNet reads its part of a whole file, and of the settings beside it."""
    whole = original(LATENT)
    path = tmp_path / "v1.safetensors"
    save_original(whole, path)
    unet = from_original(path, UNET, {**SETTINGS, "data": {"target": "os.system"}})
    same(unet, Loaded(UNET, whole.config.unet, None, whole.params["unet"]))
    # GLIGEN's settings have a part for each network, and say nothing of the repository.
    gligen = original(GLIGEN)
    path = tmp_path / "gligen.safetensors"
    save_original(gligen, path)
    model = {"target": UNET, "params": CONFIGS[GLIGEN]}
    same(from_original(path, GLIGEN, {"model": model, "diffusion": {"target": "x"}}), gligen)


def test_the_factor_of_latents_may_be_in_the_file(tmp_path, original):
    """0.25, a tensor beside the weights, where the settings say scale_by_std."""
    whole = original(LATENT)
    path = tmp_path / "v1.safetensors"
    save_original(whole, path)
    params = {**SETTINGS["model"]["params"], "scale_by_std": True}
    settings = {"model": {**SETTINGS["model"], "params": params}}
    with pytest.raises(UnsupportedOption, match="must hold scale_factor, and does not"):
        from_original(path, LATENT, settings)
    write_safetensors({"scale_factor": np.ones(2, np.float32)}, tmp_path / "two.safetensors")
    with pytest.raises(UnsupportedOption, match=r"must be one number, got \(2,\)"):
        from_original(tmp_path / "two.safetensors", LATENT, settings)
    scaled = tmp_path / "scaled.safetensors"
    write_safetensors({**WeightsFile(path), "scale_factor": np.float32([0.25])[0]}, scaled)
    for config in (settings, settings["model"], params):
        assert from_original(scaled, LATENT, config).config.first_stage.scaling_factor == 0.25


def test_one_file_of_a_repository_is_fetched(tmp_path, monkeypatch, capsys, original):
    written = original("ldm.models.autoencoder.AutoencoderKL")
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "snapshots" / commit
    snapshot.mkdir(parents=True)
    save_original(written, snapshot / "vae.safetensors")
    asked = []

    def snapshot_download(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, revision, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    config = CONFIGS[written.class_name]
    read = from_original("owner/vae:vae.safetensors", written.class_name, config, revision="v2")
    same(read, written)
    assert asked == [("owner/vae", "v2", ["vae.safetensors"])]
    assert capsys.readouterr().err == f"owner/vae: revision {commit}\n"
    with pytest.raises(HubError, match="owner/vae has no file old.safetensors"):
        from_original("owner/vae:old.safetensors", written.class_name, config)
    for name in ("vae.ckpt", "*.safetensors", "../vae.safetensors", ""):
        with pytest.raises(WeightsFileError, match="diffusion-jax convert"):
            from_original(f"owner/vae:{name}", written.class_name, config)
    assert len(asked) == 2


@pytest.mark.parametrize("kind, config, error, words", [
    ("guided_diffusion.unet.UNetModl", None, UnknownClassError, f"did you mean {ADM!r}"),
    ("glide/base-inpant", None, UnknownClassError, "did you mean 'glide/base-inpaint'"),
    ("UNet2DModel", {}, UnknownClassError, "is no original class and no published file"),
    ("glide/base", {}, ValueError, "name its class: glide_text2im.text2im_model.Text2ImUNet"),
    (ADM, None, ValueError, "known without for guided-diffusion/64x64_diffusion, guided"),
    (ADM, {"_class_name": UNET}, ValueError, f"config is of {UNET}, expected one of {ADM}"),
    (ADM, SETTINGS, ValueError, f"settings of a {LATENT}, expected a {ADM}"),
    (GLIGEN, SETTINGS, ValueError, f"settings of a {LATENT}, expected a {GLIGEN}"),
    (ADM, {"image_sise": 8}, UnsupportedOption, "image_sise"),
    (ADM, {"model": {"target": ADM, "params": [8]}}, ValueError, "model in config must have"),
    (UNET, {"model": {"target": LATENT, "params": {}}}, ValueError, "unet_config in config must"),
    (LATENT, {"unet_config": {"target": "os.system"}}, UnsupportedOption, "got os.system"),
    (ADM, {**CONFIGS[ADM], "num_classes": None}, MappingError, "label_emb.weight"),
])  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path, adm_file, kind, config, error, words):
    with pytest.raises(error, match=words):
        from_original(adm_file, kind, config)


def test_files_that_cannot_be_read_are_named(tmp_path):
    for name in ("a.pt", "b.ckpt", "c.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04")
        with pytest.raises(WeightsFileError, match="convert"):
            from_original(tmp_path / name, "latent-diffusion/lsun_churches256")
    with pytest.raises(FileNotFoundError, match="on the hub it is OWNER/NAME:FILE"):
        from_original(tmp_path / "d.safetensors", "glide/base")
    with pytest.raises(ValueError, match="revision is for OWNER/NAME:FILE"):
        from_original(tmp_path / "c.safetensors", "glide/base", revision="v2")
    for text, words in (("[1]", "must be a mapping of options"), ("a: [", "neither JSON nor")):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UnsupportedOption, match=words):
            from_original(tmp_path / "c.safetensors", ADM, tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UnsupportedOption, match="neither JSON nor plain YAML"):
        from_original(tmp_path / "c.safetensors", ADM, tmp_path / "config.yaml")


def published(name):
    """Our configuration of a published file."""
    class_name, config, _ = PUBLISHED[name]
    if name == "latent-diffusion/lsun_churches256":
        params = {**config["model"]["params"], "scale_by_std": False}
        config = {"model": {**config["model"], "params": params}}
    return ORIGINALS[class_name].read(config)


def test_published_files_are_told_apart_and_their_configurations_go_there_and_back():
    """Every file is a repository's, or its own address; every option is known."""
    files = [each.file for each in PUBLISHED.values()]
    assert len(set(files)) == len(files)
    for name, each in PUBLISHED.items():
        assert each.file.startswith("https://") or each.file.count(":") == 1
        component, config = ORIGINALS[each.class_name], published(name)
        assert component.read(component.write(config)) == config


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_published_networks_of_adm_are_our_configurations(size):
    family = "guided-diffusion/"
    unet = published(f"{family}{size}x{size}_diffusion")
    assert unet.network == adm_unet(size)
    assert unet.conditioners["label"][1]["num_classes"] == 1000
    assert published(f"{family}{size}x{size}_classifier").classifier == adm_classifier(size)
    if size < 256:
        return
    upsampler = published(f"{family}{size // 4}_{size}_upsampler").network
    assert dataclasses.replace(upsampler, time_embed_dim=None, time_channels=None) == (
        adm_upsampler(size)
    )
    alone = adm_unet(256, class_conditional=False)
    for name in ("256x256_diffusion_uncond", "lsun_horse_nodropout"):
        assert published(family + name).network == alone
    for name in ("lsun_bedroom", "lsun_cat", "lsun_horse"):
        assert published(family + name).network == dataclasses.replace(alone, dropout=0.1)


def test_published_first_stages_are_our_configurations():
    """Whose numbers of parameters are held to the published ones where they are."""
    within = {
        "celeba256": "vq-f4", "ffhq256": "vq-f4", "lsun_beds256": "vq-f4", "cin256": "vq-f8",
        "cin256-v2": "vq-f4", "text2img256": "vq-f4", "bsr_sr": "vq-f4",
        "inpainting_big": "vq-f4-noattn",
    }  # fmt: skip
    for name in PUBLISHED:
        family, _, short = name.partition("/")
        if family not in ("latent-diffusion", "stable-diffusion"):
            continue
        config = published(name)
        if hasattr(config, "network"):
            expected, factor = FIRST_STAGES.get(short, FIRST_STAGES["kl-f8"]), 1.0
            assert config.network == dataclasses.replace(expected, scaling_factor=factor)
            continue
        scaled = family == "stable-diffusion" or short == "text2img-large"
        expected = FIRST_STAGES[within.get(short, "kl-f8")]
        factor = 0.18215 if scaled else 1.0
        assert config.first_stage == dataclasses.replace(expected, scaling_factor=factor), name


# Parameters, counted in the original constructors: glide-text2im at 69b5307, latent-diffusion at
# a506df5, stablediffusion at cf1d67a, GLIGEN at f9dccb9. Rombach et al. 2022 print 274 million for
# faces and bedrooms, 294 for churches, 400 for ImageNet, 1.45 billion for text with its encoder.
COUNTS = {
    "glide/base": 385_030_726,
    "glide/upsample-inpaint": 398_368_198,
    "latent-diffusion/celeba256": 274_056_163,
    "latent-diffusion/lsun_churches256": 294_966_916,
    "latent-diffusion/cin256-v2": 400_920_579,
    "latent-diffusion/text2img-large": 872_300_484,
    "latent-diffusion/bsr_sr": 113_622_563,
    "latent-diffusion/inpainting_big": 387_245_827,
    "stable-diffusion/v1": 859_520_964,
    "stable-diffusion/v2": 865_910_724,
    "gligen/generation-text-box": 1_068_623_204,
    "gligen/generation-hed": 1_096_460_996,
    "gligen/generation-sem": 1_096_526_247,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_published_networks_have_their_sizes(name):
    config, component = published(name), ORIGINALS[PUBLISHED[name].class_name]
    if hasattr(config, "unet"):
        config, component = config.unet, ORIGINALS[UNET]
    leaves = jax.tree.leaves(component.shapes(config))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == COUNTS[name]
