"""The command line: options reach the configuration, parts are exchanged, mistakes are named."""

from pathlib import Path

import pytest

from diffusion_jax import cli
from diffusion_jax.configuration import TABLES
from diffusion_jax.data import Folder
from diffusion_jax.experiment import find, save
from diffusion_jax.guidance import DynamicThreshold
from diffusion_jax.models import SpatialTransformer, TextAttention
from diffusion_jax.samplers import DDIM, DPMSolverMultistep

TRAIN = ["train", "classifier_free", "--tiny", "--workdir", "w"]


def test_options_change_the_experiment():
    command = cli.parse(
        [
            *TRAIN,
            "--training.num-steps",
            "7",
            "--system.guidance.scale=2.5",
            "--system.network.levels.0.channels",
            "24",
            "--training.trainable",
            "a/**",
            "b/*",
        ]
    )
    assert command.workdir == Path("w")
    config = command.config
    assert config.training.num_steps == 7 and config.system.guidance.scale == 2.5
    assert config.system.network.levels[0].channels == 24
    assert config.training.trainable == ("a/**", "b/*")
    assert config.data == find("classifier_free", tiny=True).data


def test_without_options_the_experiment_is_what_the_file_says():
    assert cli.parse(TRAIN).config == find("classifier_free", tiny=True)
    assert cli.parse(["demo"]).config == find("classifier_free", tiny=True)


def test_parts_are_exchanged_by_name_and_take_options():
    command = cli.parse(
        [
            *TRAIN,
            "--system.sampler",
            "ddim",
            "--system.sampler.eta",
            "0.5",
            "--system.threshold=dynamic",
            "--system.threshold.percentile",
            "99",
        ]
    )
    assert command.config.system.sampler == DDIM(eta=0.5)
    assert command.config.system.threshold == DynamicThreshold(99.0)
    assert find("classifier_free", tiny=True).system.sampler == DPMSolverMultistep()


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["attention"], True),
        (["no-attention"], False),
        (["attention", "False"], False),
        (["attention=True"], True),
        (["attention", "transformer"], SpatialTransformer()),
        (
            ["attention", "text", "--system.network.levels.0.attention.head-dim=2"],
            TextAttention(head_dim=2),
        ),
    ],
)
def test_attention_is_a_part_or_a_switch(arguments, expected):
    first, *rest = arguments
    command = cli.parse([*TRAIN, f"--system.network.levels.0.{first}", *rest, "--training.seed=3"])
    assert command.config.system.network.levels[0].attention == expected


def test_a_part_with_required_values_asks_for_them(capsys):
    folder = ["--data", "folder", "--data.image-size", "8", "--data.channels", "1"]
    command = cli.parse([*TRAIN, *folder, "--data.path", "pictures"])
    assert command.config.data == Folder("pictures", image_size=8, channels=1)
    with pytest.raises(SystemExit) as stop:
        cli.parse([*TRAIN, *folder])
    assert stop.value.code == 2 and "--data.path" in capsys.readouterr().err


@pytest.mark.parametrize("field", sorted(set(TABLES) - {"base"}))
def test_every_row_of_every_table_can_be_chosen(field):
    """By name; the base of a schedule is left out, since not every schedule can be one."""
    start = find("classifier_guidance", tiny=True)
    where = {
        "system": "system",
        "data": "data",
        "features": "evaluation.features",
        "weight": "system.loss.weight",
        "attention": "system.network.levels.0.attention",
        "middle_attention": "system.network.middle_attention",
    }.get(field, f"system.{field}")
    for kind, part in TABLES[field].items():
        config, left = cli.exchange_parts(start, [f"--{where}", kind, "--more"])
        for name in where.split("."):
            config = config[int(name)] if name.isdecimal() else getattr(config, name)
        assert type(config) is part and left == ["--more"]


def test_a_folder_without_a_run_is_no_working_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ddpm").mkdir()
    with pytest.raises(SystemExit):
        cli.parse(["train", "ddpm"])
    assert "--workdir" in capsys.readouterr().err


def test_a_working_directory_is_an_experiment(tmp_path):
    save(find("ddpm", tiny=True), tmp_path / "config.json")
    command = cli.parse(["sample", str(tmp_path), "--num-images", "3", "--labels", "1", "2"])
    assert command.workdir == tmp_path and command.config == find("ddpm", tiny=True)
    assert command.num_images == 3 and command.labels == (1, 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["paint"], "unknown command 'paint'"),
        (["train"], "needs an experiment"),
        (["train", "dpm", "--workdir", "w"], "no experiment 'dpm'"),
        ([*TRAIN, "--system.sampler", "dim"], "sampler must be one of"),
        ([*TRAIN, "--system.sampler"], "needs one of"),
        (["data", "polish"], "data prepare"),
    ],
)
def test_mistakes_are_one_line_and_status_2(capsys, arguments, message):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("option", ["--training.num-step", "--system.sampler.eta"])
def test_an_unknown_option_is_refused(capsys, option):
    with pytest.raises(SystemExit) as stop:
        cli.main([*TRAIN, option, "3"])
    assert stop.value.code == 2
    assert option in capsys.readouterr().err


def test_help_of_an_experiment_with_several_stages_lists_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "classifier_guidance", "--help"])
    assert stop.value.code == 0 and "--system.guidance.scale" in capsys.readouterr().out


def test_all_stages_are_trained_in_their_order():
    command = cli.parse(["train", "classifier_guidance", "--tiny", "--workdir=w"])
    assert [config.training.stage for config in command.configs] == ["base", "classifier"]
    one = cli.parse(["train", "classifier_guidance", "--stage", "classifier", "--workdir", "w"])
    assert one.config.training.stage == "classifier"


def test_help_lists_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in [*cli.COMMANDS, *cli.PLAIN_COMMANDS, "data prepare"])
    assert cli.main([]) == 2
