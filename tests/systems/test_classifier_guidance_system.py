"""The classifier-guidance system: two stages, guidance in both forms, thresholds before it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import as_arrays, image_keys
from diffusion_jax.core.parameterization import V
from diffusion_jax.core.schedules import Linear, ZeroTerminalSNR
from diffusion_jax.core.timesteps import Steps, trailing
from diffusion_jax.guidance import ClassifierFree, ClassifierGuidance, Unguided
from diffusion_jax.models import MLPClassifierConfig, MLPConfig
from diffusion_jax.samplers import DDIM, DDPM
from diffusion_jax.systems import ClassifierGuidanceSystem

SYSTEM = ClassifierGuidanceSystem(
    image_size=2,
    channels=1,
    network=MLPConfig(width=16, depth=1),
    schedule=Linear(),
    parameterization=V(),
    sampler=DDPM("small"),
    steps=Steps(num_steps=4, max_steps=8),
    num_classes=3,
    class_conditional=False,
    classifier=MLPClassifierConfig(width=16, depth=1, num_classes=3),
    guidance=ClassifierGuidance(scale=2.0),
)
LABELS = {"label": jnp.asarray([0, 1, 2, 0], jnp.int32)}
KEYS = image_keys(0, np.arange(4))


def params_of(system):
    """Parameters with every leaf random: output layers start at zero otherwise."""
    rng = np.random.default_rng(0)
    # A weak denoiser, whose images stay inside of the threshold, and a classifier with slopes.
    scales = {"base": 0.1, "classifier": 0.5}

    def random(shape, scale):
        return jnp.asarray(scale * rng.standard_normal(shape.shape), jnp.float32)

    stages = system.build().stages
    shapes = {name: jax.eval_shape(s.init, jax.random.key(0)) for name, s in stages.items()}
    return {
        name: jax.tree.map(lambda shape, name=name: random(shape, scales[name]), tree)
        for name, tree in shapes.items()
    }


PARAMS = params_of(SYSTEM)
BUILT = SYSTEM.build()
TRACES = []


@jax.jit
def draw(params, batch, keys, guide, sampler, grid):
    TRACES.append(1)
    return BUILT.sample(params, batch, keys, guide=guide, sampler=sampler, grid=grid)


def drawn(scale=2.0, *, labels=LABELS, steps=4, form="score", params=PARAMS):
    grid = trailing(SYSTEM.schedule, steps, max_steps=8)
    guide = as_arrays(ClassifierGuidance(scale, form=form))
    return draw(params, labels, KEYS, guide, as_arrays(SYSTEM.sampler), grid)


@pytest.mark.slow
def test_one_compilation_for_scale_labels_steps_and_parameters():
    reference, before = drawn(), len(TRACES)
    classifier = jax.tree.map(lambda x: 0.5 * x, PARAMS["classifier"])
    for other in (
        drawn(3),
        drawn(labels={"label": LABELS["label"][::-1]}),
        drawn(steps=6),
        drawn(params={**PARAMS, "classifier": classifier}),
    ):
        assert np.abs(other - reference).max() > 1e-4 and np.isfinite(other).all()
    assert len(TRACES) == before


@pytest.mark.slow
@pytest.mark.parametrize("form", ["score", "mean"])
def test_scale_0_is_the_base_model_and_ignores_the_label(form):
    base = BUILT.stages["base"].sample(PARAMS["base"], LABELS, KEYS)
    np.testing.assert_allclose(drawn(0, form=form), base, atol=1e-5)
    unguided = BUILT.sample(PARAMS, LABELS, KEYS, guide=Unguided())
    np.testing.assert_allclose(unguided, base, atol=1e-5)


@pytest.mark.slow
def test_guidance_raises_the_classifiers_probability_of_the_label():
    """At the last step, where the classifier sees almost the image itself."""
    classifier = SYSTEM.classifier.build()

    def log_prob(images):
        logits = classifier.apply({"params": PARAMS["classifier"]["network"]}, images, jnp.zeros(4))
        return jax.nn.log_softmax(logits)[jnp.arange(4), LABELS["label"]].mean()

    for form in ("score", "mean"):
        values = [float(log_prob(drawn(scale, form=form))) for scale in (-3, 0, 3)]
        assert values[0] < values[1] < values[2], form


def test_the_threshold_stands_before_guidance():
    """So guided images may leave [-1, 1], as in the released code.

    Away from the label, where the classifier's gradient does not vanish.
    """
    assert np.abs(drawn(0)).max() <= 1.0 + 1e-6
    assert np.abs(drawn(-100)).max() > 1.1


@pytest.mark.slow
def test_the_classifier_stage_trains_on_noisy_images_and_draws_nothing():
    stage = BUILT.stages["classifier"]
    params = stage.init(jax.random.key(0))
    batch = {"image": jnp.zeros((4, 2, 2, 1)), **LABELS}
    loss, metrics = stage.loss(params, batch, KEYS)
    # A new classifier is uniform over the three classes.
    np.testing.assert_allclose(loss, np.log(3), rtol=1e-6)
    assert set(metrics) == {"accuracy", *(f"loss_q{k}" for k in range(4))}
    assert stage.sample is None
    with pytest.raises(ValueError, match="expected images of shape"):
        stage.loss(params, {"image": jnp.zeros((4, 3, 3, 1)), **LABELS}, KEYS)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"guidance": ClassifierFree(2.0)}, "guided by its classifier"),
        ({"num_classes": 4}, "the classifier has 3 classes, the system 4"),
        (
            {"guidance": ClassifierGuidance(form="mean"), "sampler": DDIM()},
            "ancestral sampling only",
        ),
        ({"guidance": ClassifierGuidance(float("nan"))}, "finite"),
        ({"schedule": ZeroTerminalSNR()}, "divides by alpha, which is 0"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SYSTEM, **changes).build()


def test_a_scale_needs_guidance():
    assert SYSTEM.guide(3).scale == 3.0 and SYSTEM.guide() == SYSTEM.guidance
    with pytest.raises(ValueError, match="no scale"):
        replace(SYSTEM, guidance=Unguided()).guide(2.0)


@pytest.mark.slow
def test_a_class_conditional_base_is_told_the_label():
    system = replace(SYSTEM, class_conditional=True, guidance=Unguided())
    params = params_of(system)
    one = system.build().sample(params, LABELS, KEYS)
    other = system.build().sample(params, {"label": (LABELS["label"] + 1) % 3}, KEYS)
    assert np.abs(one - other).max() > 1e-4


def test_guides_of_other_systems_are_refused_where_they_are_given():
    with pytest.raises(ValueError, match="guided by its classifier, got ClassifierFree"):
        BUILT.sample(PARAMS, LABELS, KEYS, guide=ClassifierFree(3.0))
    with pytest.raises(ValueError, match="ancestral sampling only"):
        guide = ClassifierGuidance(1.0, form="mean")
        BUILT.sample(PARAMS, LABELS, KEYS, guide=guide, sampler=DDIM())
