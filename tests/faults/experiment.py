"""The run that faults happen to: a small network on rendered shapes, forty updates."""

from dataclasses import replace

from diffusion_jax.data import ShapesData
from diffusion_jax.experiments import ddpm
from diffusion_jax.models import LevelConfig, UNetConfig

CONFIG = replace(
    ddpm.TINY,
    system=replace(
        ddpm.TINY.system,
        channels=3,
        network=UNetConfig(levels=(LevelConfig(16, 1),), norm_groups=8),
    ),
    data=ShapesData(image_size=8, num_examples=300),
    training=replace(
        ddpm.TINY.training,
        num_steps=40,
        batch_size=16,
        log_every=1,
        eval_every=0,
        checkpoint_every=10,
        max_to_keep=3,
    ),
)
