"""Classifier-free guidance on classes (arXiv:2207.12598).

diffusion-jax data prepare cifar10
python -m experiments.classifier_free train --workdir runs/classifier_free
python -m experiments.classifier_free sample --workdir runs/classifier_free --scale 2

CONFIG is the CIFAR-10 DDPM with ten classes, trained as in the paper: a tenth of the labels is
dropped. The paper's own data set is ImageNet at 64 and 128 pixels, with the continuous cosine
schedule; its scores have not been repeated here.

TINY is the demo: real 8x8 digits in minutes on two CPU cores. `expected` holds what it must
score; an SVM fitted on real digits judges, never the guiding network.
"""

import sys
from dataclasses import replace

from diffusion_jax.core.schedules import CosineLogSNR
from diffusion_jax.core.timesteps import Steps
from diffusion_jax.experiment import Evaluation
from diffusion_jax.guidance import ClassifierFree
from diffusion_jax.samplers import DDPM
from diffusion_jax.systems import ClassifierFreeSystem

from . import ddpm

CONFIG = replace(
    ddpm.CONFIG,
    system=ClassifierFreeSystem(
        image_size=32,
        channels=3,
        network=ddpm.CONFIG.system.network,
        schedule=CosineLogSNR(),
        time_input="scaled_t",
        sampler=DDPM(variance="small"),
        steps=Steps(num_steps=256),
        num_classes=10,
        label_dropout=0.1,
        guidance=ClassifierFree(scale=1.3),
    ),
    evaluation=Evaluation(scales=(1.0, 1.1, 1.3, 1.5, 2.0, 3.0)),
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
