"""What classifier-free guidance must show on real digits, and what must fail beside it.

diffusion-jax proof classifier_free

Guidance trades diversity for fidelity: with the scale accuracy and precision rise and recall
falls, while the Fréchet distance has its minimum at a small scale. It must agree with guidance
by a classifier, and a network that never saw the null label must not serve as unconditional.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from flax import struct

from diffusion_jax.commands import figures
from diffusion_jax.commands.proof import Bench, Claim, Proof, Scores
from diffusion_jax.core.arrays import halves, twice
from diffusion_jax.core.condition import together
from diffusion_jax.experiments import classifier_free, classifier_guidance
from diffusion_jax.experiments.proofs.common import drop, real_rows
from diffusion_jax.guidance import Chain, ClassifierGuidance
from diffusion_jax.systems import ClassifierGuidanceSystem

TINY = classifier_free.TINY
SYSTEM = TINY.system
SCALES = (0.0, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
NEVER_NULL = replace(TINY, system=replace(SYSTEM, label_dropout=0.0))

# Classifier guidance divides by alpha, so both kinds of guidance are compared on a sampler and a
# grid that suit it.
GUIDED = classifier_guidance.TINY["base"].system
# The same diffusion model, guided by a classifier instead of by itself.
BY_CLASSIFIER = ClassifierGuidanceSystem(
    image_size=SYSTEM.image_size,
    channels=SYSTEM.channels,
    network=SYSTEM.network,
    schedule=SYSTEM.schedule,
    parameterization=SYSTEM.parameterization,
    sampler=GUIDED.sampler,
    steps=GUIDED.steps,
    num_classes=SYSTEM.num_classes,
    class_conditional=True,
    classifier=GUIDED.classifier,
    guidance=ClassifierGuidance(scale=2.0),
)
CLASSIFIER = replace(classifier_guidance.TINY["classifier"], system=BY_CLASSIFIER)


def guided(scale: float, arm: str = "model") -> Callable[[Bench], Scores]:
    """Scores at a guidance scale."""

    def measure(bench: Bench) -> Scores:
        labels = bench.labels()
        params = {"base": bench.params(arm)}
        return bench.score(bench.draw(SYSTEM, params, labels, guide=SYSTEM.guide(scale)), labels)

    return measure


def by_classifier(bench: Bench) -> Scores:
    """Scores of the conditional model with classifier guidance of scale 2, which is CFG's 3."""
    labels = bench.labels()
    params = {"base": bench.params("model"), "classifier": bench.params("classifier")}
    return bench.score(bench.draw(BY_CLASSIFIER, params, labels), labels)


def on_its_grid(bench: Bench) -> Scores:
    """Scores of classifier-free guidance of scale 3 with the same sampler and grid."""
    labels, params = bench.labels(), {"base": bench.params("model")}
    grid = GUIDED.steps.grid(SYSTEM.schedule)
    images = bench.draw(
        SYSTEM, params, labels, guide=SYSTEM.guide(3.0), sampler=GUIDED.sampler, grid=grid
    )
    return bench.score(images, labels)


@struct.dataclass
class ConditionalHalf:
    """The conditional prediction out of the pair of calls that guidance makes."""

    def __call__(self, denoise, uncond):
        def conditional(x, level, cond):
            pair = denoise(twice(x), twice(level), together(cond, uncond))
            return jax.tree.map(lambda field: halves(field)[0], pair)

        return conditional


def at_scale_1(bench: Bench) -> Scores:
    """Largest difference to the purely conditional images, of scale 1 and of 1 + 1 by mistake."""
    labels, params = bench.labels(64), {"base": bench.params("model")}
    pure = Chain((ConditionalHalf(), SYSTEM.threshold))
    conditional = bench.draw(SYSTEM, params, labels, guide=pure)

    def difference(scale):
        images = bench.draw(SYSTEM, params, labels, guide=SYSTEM.guide(scale))
        return np.abs(images - conditional).max()

    return {"difference": difference(1.0), "one_plus_scale_difference": difference(2.0)}


def derive(scores: Scores) -> Scores:
    """Minimum over scales, and differences between rows."""
    distances = {scale: scores[f"scale {scale:g}/frechet_train"] for scale in SCALES}
    best = min(distances, key=distances.get)
    return {
        "best_scale": best,
        "frechet_8_over_best": distances[8.0] / distances[best],
        "recall_drop_1_to_3": drop(scores, "recall", "scale 1", "scale 3"),
        "precision_gain_1_to_3": -drop(scores, "precision", "scale 1", "scale 3"),
        "accuracy_from_classifier": abs(drop(scores, "accuracy", "scale 3", "classifier scale 2")),
        "frechet_over_classifier": scores["scale 3/frechet_train"]
        / scores["classifier scale 2/frechet_train"],
        "frechet_2_never_null": scores["never null, scale 2/frechet_train"] / distances[2.0],
    }


def draw(bench: Bench, path: Path) -> None:
    """Two rows of digits for every scale."""
    labels = np.tile(np.arange(10, dtype=np.int32), 2)
    params = {"base": bench.params("model")}
    sheets = {
        f"scale {scale:g}": bench.draw(SYSTEM, params, labels, guide=SYSTEM.guide(scale))
        for scale in SCALES
    }
    never = {"base": bench.params("never null")}
    sheets["never null, scale 2"] = bench.draw(SYSTEM, never, labels, guide=SYSTEM.guide(2.0))
    figures.named_sheets(path, sheets, columns=10)


PROOF = Proof(
    arms={"model": TINY, "never null": NEVER_NULL, "classifier": CLASSIFIER},
    rows={
        "real": real_rows,
        **{f"scale {scale:g}": guided(scale) for scale in SCALES},
        "classifier scale 2": by_classifier,
        "DDIM, scale 3": on_its_grid,
        "at scale 1": at_scale_1,
        "never null, scale 2": guided(2.0, "never null"),
    },
    derive=derive,
    claims=(
        Claim("real/accuracy", low=0.98),
        Claim("scale 1/accuracy", low=0.93),
        Claim("scale 2/accuracy", low=0.98),
        Claim("best_scale", 1.0, 2.0),
        Claim("frechet_8_over_best", low=2.5),
        Claim("recall_drop_1_to_3", low=0.10),
        Claim("precision_gain_1_to_3", low=0.01),
        Claim("accuracy_from_classifier", high=0.02),
        Claim("frechet_over_classifier", 0.33, 3.0),
        Claim("scale 1/nearest_ratio", low=0.7),
        # Two programs round differently; in one, scale 1 is equal bit for bit (tests/guidance).
        Claim("at scale 1/difference", high=1e-4),
        Claim("at scale 1/one_plus_scale_difference", low=0.1, control=True),
        Claim("scale 0/accuracy", high=0.2, control=True),
        Claim("real/shuffled_accuracy", high=0.2, control=True),
        Claim("frechet_2_never_null", low=1.5, control=True),
    ),
    draw=draw,
)
