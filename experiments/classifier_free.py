"""Classifier-free guidance on classes (arXiv:2207.12598).

python -m experiments.classifier_free train --workdir runs/classifier_free
python -m experiments.classifier_free sample --workdir runs/classifier_free --scale 1.3

CONFIG is the paper's 64x64 ImageNet model: ADM's 64-pixel network, the continuous cosine
schedule cut at log-SNR -20 and 20, a tenth of the labels dropped, reverse variance interpolated
at v = 0.3. It needs imagenet_resized/64x64 prepared by tensorflow-datasets as array_record. The
batch size, learning rate and number of steps are a choice of this file. The paper's best FID,
1.55 at scale 1.1, has not been repeated here.

TINY is the demo: real 8x8 digits in minutes on two CPU cores. `expected` holds what it must
score; an SVM fitted on real digits judges, never the guiding network.
"""

import sys
from dataclasses import replace

from diffusion_jax.core.schedules import CosineLogSNR
from diffusion_jax.core.timesteps import Steps
from diffusion_jax.data import TFDS
from diffusion_jax.experiment import Evaluation, Experiment, Training
from diffusion_jax.experiments import ddpm
from diffusion_jax.guidance import ClassifierFree
from diffusion_jax.models import LevelConfig, UNetConfig
from diffusion_jax.samplers import DDPM
from diffusion_jax.systems import ClassifierFreeSystem
from diffusion_jax.training.ema import EMA
from diffusion_jax.training.optimizer import Optimizer

CONFIG = Experiment(
    system=ClassifierFreeSystem(
        image_size=64,
        channels=3,
        network=UNetConfig(
            levels=(
                LevelConfig(192, 3),
                LevelConfig(384, 3, attention=True),
                LevelConfig(576, 3, attention=True),
                LevelConfig(768, 3, attention=True),
            ),
            scale_shift=True,
            resample="block",
            head_dim=64,
            dropout=0.1,
        ),
        schedule=CosineLogSNR(-20.0, 20.0),
        time_input="scaled_t",
        sampler=DDPM("interpolated", fraction=0.3),
        steps=Steps(num_steps=256),
        num_classes=1000,
        label_dropout=0.1,
        guidance=ClassifierFree(scale=1.1),
    ),
    data=TFDS("imagenet_resized/64x64", image_size=64),
    optimizer=Optimizer(learning_rate=1e-4),
    training=Training(
        num_steps=540_000,
        batch_size=2048,
        ema=EMA(0.9999, warmup=False),
        eval_every=10_000,
        checkpoint_every=5000,
    ),
    evaluation=Evaluation(num_samples=50_000, scales=(1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0, 5.0)),
)

TINY = replace(
    ddpm.TINY,
    system=ClassifierFreeSystem(
        image_size=8,
        channels=1,
        network=ddpm.TINY.system.network,
        schedule=ddpm.TINY.system.schedule,
        parameterization=ddpm.TINY.system.parameterization,
        sampler=ddpm.TINY.system.sampler,
        steps=ddpm.TINY.system.steps,
        num_classes=10,
        label_dropout=0.1,
        guidance=ClassifierFree(scale=1.5),
    ),
    evaluation=Evaluation(scales=(1.0, 2.0, 3.0, 4.0), batch_size=479),
    expected={
        "scale 1/accuracy": (0.93, 1.0),
        "scale 2/accuracy": (0.98, 1.0),
        "shuffled labels/accuracy": (0.0, 0.2),
        "best_scale_train": (1.0, 2.0),
        "best_scale_test": (1.0, 2.0),
        "best_frechet_train_ratio": (0.0, 1.5),
        "best_frechet_test_ratio": (0.0, 1.5),
        "recall_drop": (0.10, 1.0),
        "min_nearest_ratio": (0.7, 2.0),
    },
)

if __name__ == "__main__":
    from diffusion_jax.cli import experiment_main

    sys.exit(experiment_main("classifier_free"))
