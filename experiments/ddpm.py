"""DDPM on CIFAR-10: unconditional diffusion in pixel space (arXiv:2006.11239).

diffusion-jax data prepare cifar10
python -m experiments.ddpm train --workdir runs/ddpm
python -m experiments.ddpm sample --workdir runs/ddpm

CONFIG has the paper's network, schedule and optimizer (sections 4 and B). The paper reports FID
3.17 after 800,000 steps; that run has not been repeated here.
"""

import sys
from dataclasses import replace

from diffusion_jax.core.parameterization import V
from diffusion_jax.core.schedules import Cosine, Linear
from diffusion_jax.core.timesteps import Steps
from diffusion_jax.data import TFDS, Digits
from diffusion_jax.experiment import Evaluation, Experiment, Training
from diffusion_jax.models import LevelConfig, Sinusoidal, UNetConfig
from diffusion_jax.samplers import DDPM, DPMSolverMultistep
from diffusion_jax.systems import DDPMSystem
from diffusion_jax.training.ema import EMA
from diffusion_jax.training.optimizer import Optimizer

CONFIG = Experiment(
    system=DDPMSystem(
        image_size=32,
        channels=3,
        network=UNetConfig(
            levels=(
                LevelConfig(128, 2),
                LevelConfig(256, 2, attention=True),
                LevelConfig(256, 2),
                LevelConfig(256, 2),
            ),
            # DDPM's conventions; the defaults of UNetConfig are ADM's.
            time_features=Sinusoidal(cos_first=False, freq_shift=1),
            norm_eps=1e-6,
            downsample_padding="asymmetric",
            dropout=0.1,
        ),
        schedule=Linear(),
        sampler=DDPM(variance="large"),
        steps=Steps(num_steps=1000),
    ),
    data=TFDS("cifar10", image_size=32, in_memory=True),
    optimizer=Optimizer(learning_rate=2e-4, warmup_steps=5000, clip_norm=1.0),
    training=Training(
        num_steps=800_000,
        batch_size=128,
        ema=EMA(0.9999, warmup=False),
        flip=True,
        eval_every=10_000,
        checkpoint_every=5000,
    ),
)

TINY = replace(
    CONFIG,
    system=DDPMSystem(
        image_size=8,
        channels=1,
        network=UNetConfig(
            levels=(LevelConfig(16, 1), LevelConfig(48, 1, attention=True)),
            out_channels=1,
            norm_groups=8,
        ),
        schedule=Cosine(),
        parameterization=V(),
        sampler=DPMSolverMultistep(),
        steps=Steps(num_steps=20),
    ),
    data=Digits(),
    optimizer=Optimizer(learning_rate=4e-3, schedule="cosine", warmup_steps=100, total_steps=1200),
    training=Training(
        num_steps=1200, batch_size=64, ema=EMA(0.998), eval_every=400, checkpoint_every=400
    ),
    evaluation=Evaluation(batch_size=479),
    expected={"best_frechet_train_ratio": (0.0, 1.6), "min_nearest_ratio": (0.7, 2.0)},
)

if __name__ == "__main__":
    from diffusion_jax.cli import experiment_main

    sys.exit(experiment_main("ddpm"))
