"""The promises about devices, batches and resuming, compiled as users compile."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from diffusion_jax.commands.sample import make_sampler
from diffusion_jax.core.timesteps import Steps
from diffusion_jax.experiment import find
from diffusion_jax.models import LevelConfig, UNetConfig
from diffusion_jax.training.ema import EMA
from diffusion_jax.training.optimizer import Optimizer
from diffusion_jax.training.parallel import make_mesh, mesh_train
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.step import make_train_step, step_keys

pytestmark = pytest.mark.slow

NETWORK = UNetConfig(levels=(LevelConfig(8, 1),), out_channels=1, norm_groups=4, dropout=0.1)
LABELS = np.asarray([3, 1, 4, 1], np.int32)


@pytest.fixture(autouse=True, scope="module")
def optimized():
    """All of XLA's optimizations, unlike in the other tests."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture(scope="module")
def stage():
    system = find("classifier_free", tiny=True).system
    return (
        replace(system, network=NETWORK, steps=Steps(num_steps=4, max_steps=4))
        .build()
        .stages["base"]
    )


def fresh(stage):
    tx = Optimizer(learning_rate=1e-3).build()
    step = make_train_step(stage.loss, tx, ema=EMA(0.9))
    return TrainState.create(jax.jit(stage.init)(jax.random.key(0)), tx), step


def trained(step, state, first, last):
    key = jax.random.key(1)
    images = np.random.default_rng(0).uniform(-1, 1, (10, 4, 8, 8, 1)).astype(np.float32)
    for number in range(first, last):
        batch = {"image": images[number], "label": LABELS}
        state, _ = step(state, batch, step_keys(key, number, 4))
    return state


def test_a_unet_trained_in_two_parts_or_on_other_devices(stage):
    """Bit-equal in two parts on the same devices, 1e-5 on another number of them."""
    state, step = fresh(stage)
    on_two = mesh_train(step, make_mesh())
    whole = jax.device_get(trained(on_two, state, 0, 4))
    half = jax.device_get(trained(on_two, fresh(stage)[0], 0, 2))
    again = mesh_train(step, make_mesh())
    jax.tree.map(np.testing.assert_array_equal, whole, jax.device_get(trained(again, half, 2, 4)))
    one = mesh_train(step, make_mesh(devices=jax.devices()[:1]))
    alone = jax.device_get(trained(one, fresh(stage)[0], 0, 4))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        whole.trainable,
        alone.trainable,
    )


def test_images_of_a_unet_do_not_depend_on_the_batch(stage):
    state, step = fresh(stage)
    params = trained(mesh_train(step, make_mesh()), state, 0, 4).params
    draw = make_sampler(stage)
    four = draw(params, {"label": LABELS}, seed=0, batch_size=4)
    np.testing.assert_allclose(
        draw(params, {"label": LABELS}, seed=0, batch_size=2), four, atol=1e-5
    )
