"""Classifier guidance is Bayes' rule on a mixture: exact scores, and nothing else is touched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import as_arrays
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.schedules import EDM, Linear
from diffusion_jax.core.types import NoiseLevel, Prediction
from diffusion_jax.guidance import ClassifierFree, ClassifierGuidance, StaticThreshold
from tests.analytic import MIXTURE

COUNT = 64
LABELS = np.arange(COUNT) % 3
SCHEDULES = pytest.mark.parametrize("schedule", [Linear(), EDM()], ids=["linear", "edm"])


def log_label(x, level, cond):
    del cond
    return MIXTURE.log_class(x, level, LABELS)


def points(schedule):
    """Noised data at levels from the cleanest to the noisiest, one for each example."""
    rng = np.random.default_rng(0)
    level = schedule(np.linspace(schedule.t_min, schedule.t_max, COUNT))
    noise = rng.standard_normal((COUNT, 2))
    x = level.alpha[:, None] * MIXTURE.draw(rng, COUNT) + level.sigma[:, None] * noise
    return x, level


@functools.partial(jax.jit, static_argnames="log_prob")
def guided_x0(guidance, x, level, cond, *, log_prob=log_label):
    return guidance(MIXTURE.denoise, log_prob)(x, level, cond).x0


def as_jax(x, level, dtype):
    return jnp.asarray(x, dtype), NoiseLevel(*(jnp.asarray(field, dtype) for field in level))


@SCHEDULES
def test_score_form_at_scale_one_is_the_exact_conditional_denoiser(schedule, x64):
    x, level = points(schedule)
    exact = MIXTURE.x0(x, level, np.eye(3)[LABELS])
    unguided = MIXTURE.x0(x, level)
    guided = guided_x0(
        ClassifierGuidance(1.0), *as_jax(x, level, jnp.float64), MIXTURE.any_class(COUNT)
    )
    np.testing.assert_allclose(guided, exact, rtol=0, atol=1e-8)
    assert np.mean(np.abs(unguided - exact).max(axis=1) > 0.05) > 0.3


@SCHEDULES
def test_score_form_holds_in_float32(schedule):
    """To 1e-5 of x_t / α, the size from which x̂0 is what remains."""
    x, level = points(schedule)
    exact = MIXTURE.x0(x, level, np.eye(3)[LABELS])
    guided = guided_x0(
        ClassifierGuidance(1.0), *as_jax(x, level, jnp.float32), MIXTURE.any_class(COUNT)
    )
    assert guided.dtype == jnp.float32
    error = np.abs(guided - exact).max(axis=1)
    assert np.all(error < 1e-5 * (1.0 + level.sigma / level.alpha))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [-1.0, 0.5, 3.0, 7.5])
def test_classifier_guidance_is_classifier_free_guidance_by_bayes(scale, x64):
    """ε_∅ - s σ ∇ log p(y | x) = ε_∅ + s (ε_c - ε_∅), and w on the conditional is 1 + w."""
    x, level = points(Linear())
    cond, null = MIXTURE.classes(LABELS), MIXTURE.any_class(COUNT)
    x0_cond, x0_null = MIXTURE.x0(x, level, cond.vector), MIXTURE.x0(x, level)

    def eps(x0):
        return (x - level.alpha[:, None] * np.asarray(x0)) / level.sigma[:, None]

    arrays = as_jax(x, level, jnp.float64)
    guided = guided_x0(ClassifierGuidance(scale), *arrays, null)
    expected = eps(x0_null) + scale * (eps(x0_cond) - eps(x0_null))
    np.testing.assert_allclose(eps(guided), expected, rtol=0, atol=1e-9)
    on_conditional = guided_x0(ClassifierGuidance(scale), *arrays, cond)
    free = ClassifierFree(1.0 + scale)(MIXTURE.denoise, null)(*arrays, cond).x0
    np.testing.assert_allclose(on_conditional, free, rtol=1e-8, atol=1e-8)


LEVEL = NoiseLevel(jnp.float32(5.0), jnp.float32(0.6), jnp.float32(0.8))
X = jnp.asarray([[0.5, -1.0], [2.0, 0.1], [-1.1, 0.7]])


def says(x, level, cond):
    return Prediction(jnp.tanh(x), 0.3 * x, -0.2 * x)


def similarity(x, level, cond):
    """A CLIP-like logit: linear in x, so that its gradient is the text itself."""
    return 2.0 * jnp.sum(x * cond.vector, axis=1)


TEXT = Condition(vector=jnp.asarray([[0.3, -0.4], [1.0, 0.0], [0.5, 0.5]]))


def test_any_similarity_guides_and_variances_stay():
    """x̂0 + s (σ² / α) · 2 text, for a denoiser that has learned both variances."""
    guided = ClassifierGuidance(3.0)(says, similarity)(X, LEVEL, TEXT)
    expected = np.tanh(X) + 3.0 * (0.64 / 0.6) * 2.0 * np.asarray(TEXT.vector)
    np.testing.assert_allclose(guided.x0, expected, rtol=1e-5)
    np.testing.assert_array_equal(guided.var_frac, 0.3 * X)
    np.testing.assert_array_equal(guided.log_var, -0.2 * X)


def test_gradient_of_either_form_is_scaled_and_at_x_t():
    """Both forms give the same gradient, that of log_prob at the x and level of the call."""
    seen = []

    def bent(x, level, cond):
        seen.append(level)
        return jnp.sum(jnp.sin(x) * level.sigma, axis=1)

    for form in ("score", "mean"):
        gradient = ClassifierGuidance(2.5, form=form).gradient(bent)(X, LEVEL, TEXT)
        np.testing.assert_allclose(gradient, 2.5 * np.cos(X) * 0.8, rtol=1e-6)
    assert all(level is LEVEL for level in seen)


def test_no_gradient_passes_through_the_denoiser():
    """A callback has no derivative, so differentiating the denoiser would raise."""

    def opaque(x, level, cond):
        return Prediction(jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(x.shape, x.dtype), x))

    guided = ClassifierGuidance(1.0)(opaque, similarity)(X, LEVEL, TEXT)
    plain = ClassifierGuidance(1.0)(says, similarity)(X, LEVEL, TEXT)
    np.testing.assert_allclose(guided.x0, plain.x0, rtol=1e-6)


def test_examples_do_not_see_each_other():
    def bent(x, level, cond):
        return jnp.sum(jnp.cos(x * cond.vector), axis=1)

    guided = ClassifierGuidance(4.0)(says, bent)
    together = guided(X, LEVEL, TEXT).x0
    for i in range(3):
        alone = guided(X[i : i + 1], LEVEL, Condition(vector=TEXT.vector[i : i + 1])).x0
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-6)


def test_scale_zero_is_no_guidance_bit_by_bit():
    guided = ClassifierGuidance(0.0)(says, similarity)(X, LEVEL, TEXT)
    np.testing.assert_array_equal(guided.x0, jnp.tanh(X))


def test_a_classifier_in_bfloat16_gives_float32():
    def low(x, level, cond):
        return similarity(x, level, cond).astype(jnp.bfloat16)

    guided = ClassifierGuidance(1.0)(says, low)(X, LEVEL, TEXT)
    assert guided.x0.dtype == jnp.float32
    expected = np.tanh(X) + (0.64 / 0.6) * 2.0 * np.asarray(TEXT.vector)
    np.testing.assert_allclose(guided.x0, expected, rtol=1e-5)


def test_guiding_after_the_threshold_leaves_the_range():
    """The released order: clip, then guide; the shift is not clipped again."""
    clipped = StaticThreshold(0.1)(says, Condition())
    guided = ClassifierGuidance(1.0)(clipped, similarity)(X, LEVEL, TEXT).x0
    expected = np.clip(np.tanh(X), -0.1, 0.1) + (0.64 / 0.6) * 2.0 * np.asarray(TEXT.vector)
    np.testing.assert_allclose(guided, expected, rtol=1e-5)
    assert np.abs(guided).max() > 0.1


def test_other_scales_share_one_compilation():
    traces = []

    @jax.jit
    def run(guidance, x):
        traces.append(1)
        return guidance(says, similarity)(x, LEVEL, TEXT).x0

    outs = [np.asarray(run(as_arrays(ClassifierGuidance(scale)), X)) for scale in (1, 2.5, 10.0)]
    assert len(traces) == 1
    np.testing.assert_allclose(outs[2] - outs[0], 6.0 * (outs[1] - outs[0]), rtol=1e-4)


@pytest.mark.parametrize("wrong", [lambda x, *_: x, lambda x, *_: jnp.sum(x)], ids=["BK", "mean"])
def test_a_log_probability_of_another_shape_is_refused(wrong):
    """Logits of all classes, and a sum over the batch, would both give a gradient silently."""
    with pytest.raises(ValueError, match=r"one number per example, shape \(3,\)"):
        ClassifierGuidance(1.0)(says, wrong)(X, LEVEL, TEXT)


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match=r"\('score', 'mean'\), got 'gradient'"):
        ClassifierGuidance(form="gradient")
    with pytest.raises(ValueError, match="wrap the sampler in MeanShift"):
        ClassifierGuidance(form="mean")(says, similarity)
    with pytest.raises(ValueError, match="finite number, got nan"):
        ClassifierGuidance(float("nan")).validate()
    ClassifierGuidance(10.0, form="mean").validate()
