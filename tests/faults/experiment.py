"""The run that faults happen to: a small network on rendered shapes, twenty-four updates."""

from dataclasses import replace

from diffusion_jax.data import ShapesData
from diffusion_jax.experiments import ddpm
from diffusion_jax.models import LevelConfig, UNetConfig

CONFIG = replace(
    ddpm.TINY,
    system=replace(
        ddpm.TINY.system,
        channels=3,
        network=UNetConfig(
            levels=(LevelConfig(16, 1),), middle_blocks=0, middle_attention=False, norm_groups=8
        ),
    ),
    data=ShapesData(image_size=8, num_examples=300),
    training=replace(
        ddpm.TINY.training,
        num_steps=24,
        batch_size=16,
        log_every=1,
        eval_every=0,
        checkpoint_every=8,
        max_to_keep=3,
    ),
)
