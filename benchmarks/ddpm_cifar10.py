"""Times a training step and a sampler of the CIFAR-10 DDPM at the paper's size.

python benchmarks/ddpm_cifar10.py float32
python benchmarks/ddpm_cifar10.py bfloat16

Prints five means over 20 steps each, and 64 images at several numbers of steps and values
of eta, which all use one compilation.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.arrays import as_arrays, image_keys
from diffusion_jax.core.schedules import Linear
from diffusion_jax.core.timesteps import trailing
from diffusion_jax.models import UNetConfig
from diffusion_jax.samplers import DDIM
from diffusion_jax.systems import DDPMSystem
from diffusion_jax.training.ema import EMA
from diffusion_jax.training.optimizer import Optimizer
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.step import make_train_step, step_keys

BATCH, IMAGES = 128, 64


def seconds(function, *args):
    """(result, wall time) with the device waited for."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return result, time.perf_counter() - start


def main(dtype: str) -> None:
    system = DDPMSystem(network=UNetConfig(dropout=0.1), dtype=dtype)
    stage = system.build().stages["base"]
    tx = Optimizer(learning_rate=2e-4).build()
    state = TrainState.create(jax.jit(stage.init)(jax.random.key(0)), tx)
    step = jax.jit(make_train_step(stage.loss, tx, ema=EMA()), donate_argnums=0)
    images = jax.random.uniform(jax.random.key(1), (BATCH, 32, 32, 3), minval=-1.0)
    key = jax.random.key(2)

    def train(state, count):
        for index in range(count):
            state, metrics = step(state, {"image": images}, step_keys(key, index, BATCH))
        return state, metrics

    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, {dtype}")
    (state, _), first = seconds(train, state, 1)
    print(f"first training step, compilation included: {first:.1f} s")
    times = []
    for _ in range(5):
        (state, _), spent = seconds(train, state, 20)
        times.append(f"{1e3 * spent / 20:.1f}")
    print(f"training step of {BATCH} images: {', '.join(times)} ms")

    def sample(params, keys, sampler, grid):
        return stage.sample(params, {}, keys, sampler=sampler, grid=grid)

    draw, keys = jax.jit(sample), image_keys(0, np.arange(IMAGES))
    for steps, eta in ((50, 0.0), (50, 0.0), (20, 0.5), (100, 1.0)):
        sampler, grid = as_arrays(DDIM(eta)), trailing(Linear(), steps)
        drawn, spent = seconds(draw, state.ema_params, keys, sampler, grid)
        finite = bool(jnp.isfinite(drawn).all())
        print(f"{IMAGES} images, {steps} steps, eta {eta}: {spent:.3f} s, finite: {finite}")
    print(f"compilations of the sampler: {draw._cache_size()}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "float32")
