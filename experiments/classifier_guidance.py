"""Classifier guidance, ADM on ImageNet (arXiv:2105.05233).

python -m experiments.classifier_guidance train --workdir runs/adm
python -m experiments.classifier_guidance sample --workdir runs/adm --scale 0.5

Two stages, trained one after the other or alone with --stage base and --stage classifier: the
class-conditional diffusion model with learned variance, and the classifier of noisy images.
CONFIG has the networks, schedules and optimizers of the released commands for 128 pixels; it
needs imagenet2012 prepared by tensorflow-datasets as array_record. The numbers of steps are a
choice of this file, and images are cut out of the middle where the release cuts at random for
the classifier. Evaluating it needs Inception's weights (`--evaluation.features inception`, see
README). The paper's FID of 2.97 at scale 0.5 has not been repeated here.

TINY is a small relative on real 8x8 digits: an unconditional diffusion model with fixed variance,
and an MLP as classifier; `make proof-classifier_guidance` says what it must show.
"""

import sys
from dataclasses import replace

from diffusion_jax.core.schedules import Linear
from diffusion_jax.core.timesteps import Steps
from diffusion_jax.data import TFDS
from diffusion_jax.experiment import Evaluation, Experiment, Training
from diffusion_jax.experiments import ddpm
from diffusion_jax.guidance import ClassifierGuidance
from diffusion_jax.losses import Hybrid
from diffusion_jax.models import MLPClassifierConfig, adm_classifier, adm_unet
from diffusion_jax.samplers import DDIM, DDPM
from diffusion_jax.systems import ClassifierGuidanceSystem
from diffusion_jax.training.ema import EMA
from diffusion_jax.training.optimizer import Optimizer

_BASE = Experiment(
    system=ClassifierGuidanceSystem(
        image_size=128,
        channels=3,
        network=adm_unet(128),
        schedule=Linear(),
        loss=Hybrid(rescaling="none", cdf="tanh"),
        sampler=DDPM(variance="learned_range"),
        # The released "250": rounded, both ends included.
        steps=Steps(spacing="linspace", num_steps=250, round_t=True),
        num_classes=1000,
        class_conditional=True,
        classifier=adm_classifier(128),
        guidance=ClassifierGuidance(scale=0.5, form="mean"),
    ),
    data=TFDS("imagenet2012", image_size=128),
    optimizer=Optimizer(name="adamw", learning_rate=1e-4, weight_decay=0.0, clip_norm=None),
    training=Training(
        num_steps=4_000_000,
        batch_size=256,
        ema=EMA(0.9999, warmup=False),
        flip=True,
        eval_every=10_000,
        checkpoint_every=5000,
    ),
    evaluation=Evaluation(num_samples=50_000, scales=(0.0, 0.5, 1.0)),
)
CONFIG = {
    "base": _BASE,
    "classifier": replace(
        _BASE,
        optimizer=Optimizer(
            name="adamw",
            learning_rate=3e-4,
            schedule="linear",
            total_steps=300_000,
            weight_decay=0.05,
            clip_norm=None,
        ),
        training=Training(
            stage="classifier",
            num_steps=300_000,
            batch_size=256,
            ema=EMA(0.0),
            flip=True,
            checkpoint_every=5000,
        ),
    ),
}

_TINY_BASE = replace(
    ddpm.TINY,
    system=ClassifierGuidanceSystem(
        image_size=8,
        channels=1,
        network=ddpm.TINY.system.network,
        schedule=ddpm.TINY.system.schedule,
        parameterization=ddpm.TINY.system.parameterization,
        sampler=DDIM(),
        # Not trailing: the cosine schedule ends at alpha = 5e-5, and guidance divides by it.
        steps=Steps(spacing="leading", num_steps=30),
        num_classes=10,
        class_conditional=False,
        classifier=MLPClassifierConfig(width=256, depth=2, dropout=0.2),
        guidance=ClassifierGuidance(scale=3.0),
    ),
    evaluation=Evaluation(scales=(0.0, 1.0, 3.0, 10.0), batch_size=479),
    expected={
        "scale 0/accuracy": (0.0, 0.2),
        "scale 3/accuracy": (0.93, 1.0),
        "scale 10/accuracy": (0.97, 1.0),
    },
)
TINY = {
    "base": _TINY_BASE,
    "classifier": replace(
        _TINY_BASE,
        optimizer=Optimizer(
            name="adamw",
            learning_rate=1e-3,
            schedule="cosine",
            warmup_steps=100,
            total_steps=2000,
            weight_decay=0.05,
        ),
        training=Training(
            stage="classifier",
            num_steps=2000,
            batch_size=128,
            ema=EMA(0.99),
            checkpoint_every=1000,
        ),
    ),
}

if __name__ == "__main__":
    from diffusion_jax.cli import experiment_main

    sys.exit(experiment_main("classifier_guidance"))
