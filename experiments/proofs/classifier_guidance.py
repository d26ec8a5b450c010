"""What classifier guidance must show on real digits, and what must fail beside it.

diffusion-jax proof classifier_guidance

An unconditional model, guided by a classifier of noisy digits, must draw the digits asked for;
with the scale diversity must fall. A classifier that never saw noise, gradients of other labels
or of the wrong sign, and a shift without its variance must do worse.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from flax import struct

from diffusion_jax.commands import figures
from diffusion_jax.commands.proof import Bench, Claim, Proof, Scores
from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.timesteps import Steps
from diffusion_jax.experiments import classifier_guidance
from diffusion_jax.experiments.proofs.common import drop, real_rows, variance_ratio
from diffusion_jax.guidance import ClassifierGuidance
from diffusion_jax.losses import NoisyCrossEntropy
from diffusion_jax.samplers import DDPM, MeanShift

BASE, CLASSIFIER = classifier_guidance.TINY["base"], classifier_guidance.TINY["classifier"]
SYSTEM = BASE.system
SCALES = (0.0, 1.0, 3.0, 10.0)
MANY = replace(SYSTEM.steps, num_steps=200)
CLEAN = replace(CLASSIFIER, system=replace(SYSTEM, classifier_loss=NoisyCrossEntropy(noisy=False)))


@struct.dataclass
class WithoutVariance(MeanShift):
    """A mistake: the mean is moved by the gradient itself, not by Σ times it."""

    def step(self, keys, denoise, state, level, next_level, info):
        x = state.x
        moved = super().step(keys, denoise, state, level, next_level, info)
        _, std = self.sampler.moments(denoise(x, level), x, level, next_level)
        return moved.replace(x=moved.x + (1.0 - std**2) * self.gradient(x, level))


def images_of(
    bench: Bench,
    labels: np.ndarray,
    guidance: ClassifierGuidance,
    *,
    classifier: str = "classifier",
    ancestral: bool = False,
    steps: Steps = SYSTEM.steps,
) -> np.ndarray:
    """Guided images."""
    params = {"base": bench.params("base"), "classifier": bench.params(classifier)}
    sampler = DDPM("small") if ancestral else SYSTEM.sampler
    grid = steps.grid(SYSTEM.schedule)
    return bench.draw(SYSTEM, params, labels, guide=guidance, sampler=sampler, grid=grid)


def guided(scale: float, classifier: str = "classifier") -> Callable[[Bench], Scores]:
    """Scores at a guidance scale."""

    def measure(bench: Bench) -> Scores:
        labels = bench.labels()
        images = images_of(bench, labels, ClassifierGuidance(scale), classifier=classifier)
        return {**bench.score(images, labels), "variance": variance_ratio(bench, images, labels)}

    return measure


def many_steps(ancestral: bool) -> Callable[[Bench], Scores]:
    """Scores at scale 3 with 200 steps, in the form that belongs to the sampler."""

    def measure(bench: Bench) -> Scores:
        labels = bench.labels(500)
        guidance = ClassifierGuidance(3.0, form="mean" if ancestral else "score")
        images = images_of(bench, labels, guidance, ancestral=ancestral, steps=MANY)
        return {
            "accuracy": bench.real.oracle.accuracy(images, labels),
            "variance": variance_ratio(bench, images, labels),
        }

    return measure


def permuted(bench: Bench) -> Scores:
    """Accuracy where the gradient is that of other images' labels, which it must follow."""
    labels = bench.labels()
    others = np.random.default_rng(bench.seed).permutation(labels)
    images = images_of(bench, others, ClassifierGuidance(3.0))
    accuracy = bench.real.oracle.accuracy
    return {"accuracy": accuracy(images, labels), "followed": accuracy(images, others)}


def flipped(bench: Bench) -> Scores:
    """Accuracy where the gradient has the wrong sign."""
    labels = bench.labels()
    images = images_of(bench, labels, ClassifierGuidance(-3.0))
    return {"accuracy": bench.real.oracle.accuracy(images, labels)}


def without_variance_images(bench: Bench, labels: np.ndarray) -> np.ndarray:
    """200 ancestral steps at scale 3 whose shift lacks Σ."""
    base, grid = SYSTEM.build().stages["base"], MANY.grid(SYSTEM.schedule)

    @jax.jit
    def draw(params, labels, keys):
        log_prob = SYSTEM.log_prob(params["classifier"], labels)
        gradient = ClassifierGuidance(3.0).gradient(log_prob)
        sampler = WithoutVariance(DDPM("small"), lambda x, level: gradient(x, level, Condition()))
        return base.sample(params["base"], {"label": labels}, keys, sampler=sampler, grid=grid)

    params = {"base": bench.params("base"), "classifier": bench.params("classifier")}
    return np.asarray(draw(params, labels, image_keys(bench.seed, range(len(labels)))))


def without_variance(bench: Bench) -> Scores:
    """How far the within-class variance is off, |log ratio|, where Σ is left out."""
    labels = bench.labels(500)
    ratio = variance_ratio(bench, without_variance_images(bench, labels), labels)
    return {"variance_error": abs(np.log(ratio))}


def derive(scores: Scores) -> Scores:
    """Ratios and differences between rows."""
    return {
        "variance_10_over_1": scores["scale 10/variance"] / scores["scale 1/variance"],
        "recall_drop_1_to_10": drop(scores, "recall", "scale 1", "scale 10"),
        "form_difference": abs(drop(scores, "accuracy", "DDIM 200", "ancestral 200")),
        "accuracy_lost_by_clean": drop(scores, "accuracy", "scale 3", "clean, scale 3"),
    }


def draw(bench: Bench, path: Path) -> None:
    """Two rows of digits for every scale, and for the controls."""
    labels = np.tile(np.arange(10, dtype=np.int32), 2)
    sheets = {
        f"scale {scale:g}": images_of(bench, labels, ClassifierGuidance(scale)) for scale in SCALES
    }
    three = ClassifierGuidance(3.0)
    sheets["clean, scale 3"] = images_of(bench, labels, three, classifier="clean")
    sheets["flipped"] = images_of(bench, labels, ClassifierGuidance(-3.0))
    sheets["Σ left out"] = np.nan_to_num(without_variance_images(bench, labels))
    figures.named_sheets(path, sheets, columns=10)


PROOF = Proof(
    arms={"base": BASE, "classifier": CLASSIFIER, "clean": CLEAN},
    rows={
        "real": real_rows,
        **{f"scale {scale:g}": guided(scale) for scale in SCALES},
        "DDIM 200": many_steps(ancestral=False),
        "ancestral 200": many_steps(ancestral=True),
        "clean, scale 3": guided(3.0, "clean"),
        "permuted": permuted,
        "flipped": flipped,
        "without variance": without_variance,
    },
    derive=derive,
    claims=(
        Claim("real/accuracy", low=0.98),
        Claim("scale 0/accuracy", high=0.2),
        Claim("scale 3/accuracy", low=0.93),
        Claim("scale 10/accuracy", low=0.97),
        Claim("variance_10_over_1", high=0.88),
        Claim("recall_drop_1_to_10", low=0.06),
        Claim("form_difference", high=0.05),
        # What the mistake below must not keep to.
        Claim("ancestral 200/variance", 1 / 1.6, 1.6),
        Claim("accuracy_lost_by_clean", low=0.10, control=True),
        Claim("permuted/followed", low=0.93),
        Claim("permuted/accuracy", high=0.2, control=True),
        Claim("flipped/accuracy", high=0.02, control=True),
        Claim("without variance/variance_error", low=float(np.log(1.6)), control=True),
    ),
    draw=draw,
)
