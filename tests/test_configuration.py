"""Configurations survive JSON and refuse everything that they do not know."""

import json
from dataclasses import replace

import pytest

from diffusion_jax.configuration import TABLES, from_dict, to_dict
from diffusion_jax.core.schedules import Betas, Cosine, ShiftedLogSNR, ZeroTerminalSNR
from diffusion_jax.experiment import EXPERIMENTS, Experiment, find, load, save
from diffusion_jax.guidance import DynamicThreshold
from diffusion_jax.models import (
    DiTConfig,
    LevelConfig,
    PixelAttention,
    SpatialTransformer,
    TextAttention,
    UNetConfig,
)
from diffusion_jax.samplers import DDIM

TINY = find("classifier_free", tiny=True)
# Every kind of attention that a level may have.
LEVELS = tuple(
    LevelConfig(32, 1, attention=attention)
    for attention in (
        True,
        PixelAttention(2, head_dim=4),
        TextAttention(text_norm="layer"),
        SpatialTransformer(2, depth=(1,), fuser="self"),
    )
)


def through_json(experiment):
    return from_dict(Experiment, json.loads(json.dumps(to_dict(experiment))))


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("tiny", [False, True])
def test_every_experiment_survives_json(name, tiny):
    experiment = find(name, tiny=tiny)
    assert through_json(experiment) == experiment


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": ZeroTerminalSNR(500, Cosine(500))},
        {"schedule": ShiftedLogSNR(Cosine(), shift=-1.5)},
        {"schedule": Betas(3, (0.1, 0.2, 0.3))},
        {"sampler": DDIM(eta=0.25), "threshold": DynamicThreshold(99.0)},
        {"network": DiTConfig(width=32, depth=2, num_heads=2, out_channels=1)},
        {
            "network": UNetConfig(
                levels=LEVELS, up_levels=LEVELS[:1] * 4, middle_blocks=1, middle_attention=False
            )
        },
    ],
)
def test_exchanged_parts_survive_json(changes):
    experiment = replace(TINY, system=replace(TINY.system, **changes))
    assert through_json(experiment) == experiment


def test_every_row_of_every_table_has_a_name_of_its_own():
    for table in TABLES.values():
        assert len(set(table.values())) == len(table)


def changed(path, value):
    values = json.loads(json.dumps(to_dict(TINY)))
    node = values
    *parents, last = path.split(".")
    for name in parents:
        node = node[name]
    node[last] = value
    return values


@pytest.mark.parametrize(
    "path, value, message",
    [
        (
            "training.num_step",
            3,
            r"config\.training: unknown key 'num_step'; did you mean 'num_steps'",
        ),
        ("system.sampler.kind", "dim", r"config\.system\.sampler: 'kind' must be one of .*'ddim'"),
        ("training.num_steps", "many", r"config\.training\.num_steps: expected .*int.*'many'"),
        ("training.num_steps", 2.5, r"config\.training\.num_steps"),
        ("training.num_steps", True, r"config\.training\.num_steps"),
        ("training.num_steps", 0, r"config\.training: num_steps must be at least 1, got 0"),
        ("system.steps.num_steps", 2000, r"config\.system\.steps: num_steps = 2000 exceeds"),
        ("optimizer", 3, r"config\.optimizer: expected an object"),
        ("expected", {"a": [1.0]}, r"config\.expected\.a: expected 2 values, got 1"),
    ],
)
def test_what_no_experiment_means_is_refused(path, value, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Experiment, changed(path, value))


def test_an_object_without_a_place_is_not_written():
    with pytest.raises(TypeError, match="function"):
        to_dict(replace(TINY, expected={"f": find}))


def test_find_takes_names_files_and_directories(tmp_path):
    save(TINY, tmp_path / "config.json")
    assert find(str(tmp_path)) == find(str(tmp_path / "config.json")) == TINY
    script = tmp_path / "mine.py"
    script.write_text("from diffusion_jax.experiment import find\nCONFIG = find('ddpm')\n")
    assert find(str(script)) == find("ddpm")
    with pytest.raises(ValueError, match="no TINY"):
        find(str(script), tiny=True)
    with pytest.raises(ValueError, match="'nothing'.*ddpm"):
        find("nothing")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load(tmp_path / "broken.json")
