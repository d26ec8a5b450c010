"""The hub, without one: what is asked of it, and what its errors become."""

import shutil

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import errors

from diffusion_jax.io.safetensors import WeightsFileError
from diffusion_jax.pretrained import (
    HubError,
    Pipeline,
    from_config,
    from_pretrained,
    save_pretrained,
)
from tests.pretrained.toys import add_toys, toy

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one repository, into whose folder tests write; lists what was asked for."""
    add_toys(monkeypatch)
    remote = tmp_path / "remote"
    cache = tmp_path / "cache" / "snapshots" / COMMIT
    asked = []

    def snapshot_download(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, revision, allow_patterns))
        for path in remote.rglob("*"):
            name = path.relative_to(remote)
            if path.is_file() and any(name.match(pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return remote, asked, cache


def same(read, written):
    jax.tree.map(np.testing.assert_array_equal, read.params, written.params)


def test_configurations_come_first_and_then_their_weights_at_that_commit(hub, capsys):
    remote, asked, cache = hub
    save_pretrained(toy(), remote)
    save_pretrained(toy(seed=1), remote, variant="fp16")
    for name in ("model.bin", "run.py", "other.safetensors", "weights.ckpt"):
        (remote / name).write_bytes(b"x")
    same(from_pretrained("owner/toy", revision="v2"), toy())
    assert asked == [
        ("owner/toy", "v2", ["*.json", "*.txt", "*.model"]),
        ("owner/toy", COMMIT, ["diffusion_pytorch_model.safetensors", "model.safetensors"]),
    ]
    assert capsys.readouterr().err == f"owner/toy: revision {COMMIT}\n"
    names = {path.name for path in cache.iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}
    same(from_pretrained("owner/toy", variant="fp16"), toy(seed=1))


def test_a_pipeline_asks_for_the_weights_of_its_parts_only(hub):
    remote, asked, cache = hub
    parts = {"unet": toy(), "text_encoder": toy("ToyTextModel", seed=1), "safety_checker": None}
    save_pretrained(Pipeline("ToyPipeline", parts), remote, max_shard_size=100)
    (remote / "whole.safetensors").write_bytes(b"x")
    shutil.copytree(remote / "unet", remote / "ema_unet")
    read = from_pretrained("owner/toy")
    same(read["unet"], toy())
    same(read["text_encoder"], parts["text_encoder"])
    assert all(name.endswith(".safetensors") and "-of-" in name for name in asked[1][2])
    assert {path.parent.name for path in cache.rglob("*.safetensors")} == {"unet", "text_encoder"}
    same(from_pretrained("owner/toy", subfolder="unet"), toy())
    # A part without the variant gives its plain file, which is fetched after that is known.
    save_pretrained(toy(seed=2), remote / "unet", variant="fp16")
    shutil.rmtree(cache)
    read = from_pretrained("owner/toy", variant="fp16")
    same(read["unet"], toy(seed=2))
    same(read["text_encoder"], parts["text_encoder"])
    fetched = [path.name for path in (cache / "unet").glob("*.safetensors")]
    assert fetched == ["diffusion_pytorch_model.fp16.safetensors"]


def test_an_old_pipeline_lies_in_one_folder(hub):
    """As the first pipelines on the hub: config.json beside model_index.json."""
    remote, asked, _ = hub
    scheduler = from_config({"_class_name": "DDPMScheduler"})
    save_pretrained(Pipeline("ToyPipeline", {"unet": toy(), "scheduler": scheduler}), remote)
    for path in [*(remote / "unet").iterdir(), *(remote / "scheduler").iterdir()]:
        path.rename(remote / path.name)
    for name in ("unet", "scheduler"):
        (remote / name).rmdir()
    for folder in ("owner/toy", remote):
        read = from_pretrained(folder)
        same(read["unet"], toy())
        assert read["scheduler"] == scheduler
    assert asked[1][2] == ["diffusion_pytorch_model.safetensors", "model.safetensors"]


def test_an_index_of_the_hub_names_files_beside_it_only(hub):
    remote, asked, _ = hub
    save_pretrained(toy(), remote, max_shard_size=100)
    (remote / "diffusion_pytorch_model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../../x.safetensors"}}'
    )
    with pytest.raises(WeightsFileError, match="plain name"):
        from_pretrained("owner/toy")
    assert len(asked) == 1


def test_a_repository_without_safetensors_is_refused(hub):
    remote, _, _ = hub
    save_pretrained(toy(), remote)
    (remote / "diffusion_pytorch_model.safetensors").rename(remote / "pytorch_model.bin")
    with pytest.raises(WeightsFileError, match=r"no safetensors in its root; .*hf download owner"):
        from_pretrained("owner/toy")


def test_a_repository_of_weights_alone_says_how_they_are_read(hub):
    remote, _, cache = hub
    save_pretrained(toy(), remote)
    (remote / "config.json").unlink()
    assert not cache.exists()
    with pytest.raises(WeightsFileError, match="it has nothing. Weights alone .* from_original"):
        from_pretrained("owner/toy")
    with pytest.raises(FileNotFoundError, match="no folder 'unet'"):
        from_pretrained("owner/toy", subfolder="unet")
    same(from_pretrained("owner/toy", config={"_class_name": "ToyModel", "width": 6}), toy())


def test_a_folder_comes_before_the_hub(hub, tmp_path):
    _, asked, _ = hub
    save_pretrained(toy(), tmp_path / "owner" / "toy")
    same(from_pretrained("owner/toy"), toy())
    for name in ("../x/y", "a/b/c", "/owner/toy", "owner/..", "toy", "C:\\toy", ""):
        with pytest.raises((FileNotFoundError, WeightsFileError)):
            from_pretrained(name)
    assert asked == []


def _http(cls):
    # Without the response that its constructor wants, whose class is the hub library's business.
    error = cls.__new__(cls)
    error.args = ("no",)
    return error


@pytest.mark.parametrize(
    "error, advice",
    [
        (_http(errors.GatedRepoError), "accept its licence at https://huggingface.co/owner/toy"),
        (_http(errors.RepositoryNotFoundError), "no such repository at .* correct the name"),
        (_http(errors.DisabledRepoError), "no such repository"),
        (_http(errors.RevisionNotFoundError), "no revision 'v9'; .*/commits/main"),
        (_http(errors.HfHubHTTPError), "cannot be fetched"),
        (errors.LocalEntryNotFoundError("no"), "cannot be reached; connect, unset HF_HUB_OFFLINE"),
        (errors.OfflineModeIsEnabled("no"), "give the path of a folder"),
        (errors.HFValidationError("no"), "neither a folder nor the id"),
    ],
)
def test_errors_say_what_to_do(error, advice, monkeypatch, tmp_path):
    def snapshot_download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError, match=advice) as caught:
        from_pretrained("owner/toy", revision="v9")
    assert "owner/toy" in str(caught.value)
    assert isinstance(caught.value, OSError)
