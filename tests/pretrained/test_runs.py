"""Training directories: the averaged or the raw weights of every stage, as they were saved."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffusion_jax.commands.run import checkpoints, stage_dir
from diffusion_jax.core.timesteps import Steps
from diffusion_jax.experiment import Experiment, find, find_stages, save
from diffusion_jax.io.checkpoint import CheckpointMismatchError
from diffusion_jax.models import MLPClassifierConfig, MLPConfig
from diffusion_jax.pretrained import from_pretrained
from diffusion_jax.training.parallel import make_mesh
from diffusion_jax.training.state import TrainState


def shrunk(experiment: Experiment) -> Experiment:
    parts = {"network": MLPConfig(width=8, depth=1), "steps": Steps(num_steps=2, max_steps=2)}
    if hasattr(experiment.system, "classifier"):
        parts["classifier"] = MLPClassifierConfig(width=8, depth=1)
    return replace(experiment, system=replace(experiment.system, **parts))


def write_run(folder, experiments):
    """What training would leave, with averages that are not the raw weights; the raw params."""
    system, raw = experiments[0].system.build(), {}
    for step, experiment in enumerate(experiments, 1):
        name = experiment.training.stage
        tx = experiment.optimizer.build()
        shapes = jax.eval_shape(system.stages[name].init, jax.random.key(0))
        rng = np.random.default_rng(step)
        params = jax.tree.map(lambda s, r=rng: jnp.asarray(r.normal(size=s.shape), s.dtype), shapes)
        state = TrainState.create(params, tx)
        state = state.replace(ema=jax.tree.map(lambda leaf: leaf + 1.0, state.ema))
        place = stage_dir(folder, system, name)
        place.mkdir(parents=True, exist_ok=True)
        save(experiment, place / "config.json")
        with checkpoints(place) as checkpointer:
            checkpointer.save(step, state, {})
        raw[name] = params
    return raw


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, experiment, raw params) of a system of one stage."""
    folder = tmp_path_factory.mktemp("run")
    experiment = shrunk(find("ddpm", tiny=True))
    return folder, experiment, write_run(folder, [experiment])["base"]


def same(read, expected):
    assert jax.tree.structure(read) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, read, expected)


@pytest.mark.parametrize("weights, shift", [(None, 1.0), ("ema", 1.0), ("raw", 0.0)])
def test_a_run_gives_its_averaged_weights_unless_asked_for_raw_ones(weights, shift, run):
    folder, experiment, raw = run
    read = from_pretrained(folder, weights=weights)
    same(read.params["base"], jax.tree.map(lambda leaf: leaf + shift, raw))
    assert read.experiment == experiment
    assert read.steps == {"base": 1}
    batch, keys = {"label": jnp.zeros(2, jnp.int32)}, jax.random.split(jax.random.key(0), 2)
    size = experiment.system.image_size
    images = jax.eval_shape(read.system.sample, read.params, batch, keys)
    assert images.shape == (2, size, size, experiment.system.channels)


def test_a_run_is_cast_and_spread_over_devices(run):
    folder, _, raw = run
    mesh = make_mesh()
    calls = {}

    def sharding(path, shape):
        calls[path] = shape
        spread = len(shape) == 2 and shape[1] % 2 == 0
        return NamedSharding(mesh, PartitionSpec(None, "data") if spread else PartitionSpec())

    read = from_pretrained(folder, dtype="bfloat16", weights="raw", shardings=sharding)
    same(read.params["base"], jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), raw))
    spread = [
        leaf
        for leaf in jax.tree.leaves(read.params["base"])
        if leaf.ndim == 2 and leaf.shape[1] % 2 == 0
    ]
    assert spread
    for leaf in spread:
        assert {s.data.shape[1] for s in leaf.addressable_shards} == {leaf.shape[1] // 2}
    assert any(path.startswith("network/") for path in calls)


def test_every_stage_of_a_run_is_read(tmp_path):
    stages = find_stages("classifier_guidance", tiny=True)
    raw = write_run(tmp_path, [shrunk(each) for each in stages.values()])
    read = from_pretrained(tmp_path, weights="raw")
    assert set(read.params) == {"base", "classifier"} == set(read.steps)
    for name, params in raw.items():
        same(read.params[name], params)


def test_a_configuration_that_does_not_fit_its_checkpoint_is_refused(run, tmp_path):
    folder, experiment, _ = run
    other = replace(
        experiment, system=replace(experiment.system, network=MLPConfig(width=12, depth=1))
    )
    save(other, tmp_path / "config.json")
    (tmp_path / "checkpoints").symlink_to(folder / "checkpoints")
    with pytest.raises(CheckpointMismatchError, match="leaves differ"):
        from_pretrained(tmp_path)


def test_options_without_meaning_are_refused(run, tmp_path):
    folder, experiment, _ = run
    with pytest.raises(ValueError, match=r"weights must be one of \['ema', 'raw'\], got 'last'"):
        from_pretrained(folder, weights="last")
    with pytest.raises(ValueError, match="variant has no meaning .* training directory"):
        from_pretrained(folder, variant="fp16")
    save(experiment, tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        from_pretrained(tmp_path)
