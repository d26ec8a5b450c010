"""Classifier-free guidance is Bayes' rule on a mixture, and commutes with the parameterization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.condition import Condition
from diffusion_jax.core.schedules import EDM, Linear
from diffusion_jax.core.types import NoiseLevel, Prediction
from diffusion_jax.guidance import Chain, ClassifierFree, StaticThreshold, Unguided
from tests.analytic import MIXTURE

X = np.asarray([[0.5, -1.0], [2.0, 0.1], [-1.1, 0.7], [0.0, 0.0]])
LABELS = [0, 1, 2, 0]


def score(x0, x, level):
    return (level.alpha * x0 - x) / level.sigma**2


@jax.jit
def bayes(x, level):
    """∇ log p(x) and ∇ log p(y | x) with p(y | x) by Bayes' rule, both by autodiff."""

    def log_class(x):
        probability = MIXTURE.class_probability(x, level)
        return jnp.sum(jnp.log(probability[jnp.arange(4), jnp.asarray(LABELS)]))

    return jax.grad(lambda x: jnp.sum(MIXTURE.log_density(x, level)))(x), jax.grad(log_class)(x)


@jax.jit
def guide(guidance, x, level, cond, uncond):
    return guidance(MIXTURE.denoise, uncond)(x, level, cond).x0


@pytest.mark.parametrize("schedule, t", [(Linear(), 20.0), (Linear(), 300.0), (Linear(), 900.0),
                                         (EDM(), 0.3), (EDM(), 5.0)])  # fmt: skip
def test_guided_score_is_that_of_the_bayes_classifier(schedule, t, x64):
    """s ε_c + (1 - s) ε_∅ is the score ∇ log p(x) + s ∇ log p(y | x)."""
    level = NoiseLevel(*(jnp.asarray(field) for field in schedule(np.asarray(t))))
    x = jnp.asarray(X) * level.alpha + 0.3 * level.sigma
    cond, uncond = MIXTURE.classes(LABELS), MIXTURE.any_class(4)

    prior, classifier = bayes(x, level)
    for scale in (1.0, 3.0, 7.5):
        guided = guide(ClassifierFree(scale), x, level, cond, uncond)
        expected = prior + scale * classifier
        np.testing.assert_allclose(score(guided, x, level), expected, rtol=1e-9, atol=1e-10)


def echo(x, level, cond):
    """A denoiser whose answer is its condition, to see the arithmetic alone."""
    del level
    return Prediction(cond.vector, jnp.broadcast_to(cond.vector[:, :1], x.shape))


LEVEL = NoiseLevel(jnp.float32(5.0), jnp.float32(0.6), jnp.float32(0.8))
C = Condition(vector=jnp.asarray([[0.1, 0.7], [1 / 3, -0.2]]))
N = Condition(vector=jnp.asarray([[-0.3, 0.9], [0.7, 11.3]]))


def test_scale_one_is_the_conditional_prediction_bit_by_bit():
    guided = ClassifierFree(1.0)(echo, N)(jnp.zeros((2, 2)), LEVEL, C)
    np.testing.assert_array_equal(guided.x0, C.vector)


def test_scale_zero_is_the_unconditional_prediction():
    guided = ClassifierFree(0.0)(echo, N)(jnp.zeros((2, 2)), LEVEL, C)
    np.testing.assert_allclose(guided.x0, N.vector, rtol=1e-6)


def test_scale_extrapolates_and_variance_stays_conditional():
    guided = ClassifierFree(3.0)(echo, N)(jnp.zeros((2, 2)), LEVEL, C)
    np.testing.assert_allclose(guided.x0, N.vector + 3 * (C.vector - N.vector), rtol=1e-5)
    np.testing.assert_array_equal(guided.var_frac, jnp.repeat(C.vector[:, :1], 2, axis=1))


def test_one_call_of_the_network_serves_both():
    shapes = []

    def denoise(x, level, cond):
        shapes.append((x.shape, cond.vector.shape, level.t.shape))
        return Prediction(x)

    ClassifierFree(2.0)(denoise, N)(jnp.zeros((2, 2)), LEVEL, C)
    assert shapes == [((4, 2), (4, 2), ())]
    levels = NoiseLevel(*(jnp.full(2, field) for field in LEVEL))
    ClassifierFree(2.0)(denoise, N)(jnp.zeros((2, 2)), levels, C)
    assert shapes[1][2] == (4,)


def test_guiding_x0_eps_or_v_is_the_same(x64):
    level = NoiseLevel(*(jnp.asarray(field) for field in Linear()(np.asarray(300.0))))
    x, scale = jnp.asarray(X), 7.5
    cond, uncond = MIXTURE.classes(LABELS), MIXTURE.any_class(4)
    guided = guide(ClassifierFree(scale), x, level, cond, uncond)
    predictions = [MIXTURE.denoise(x, level, c).x0 for c in (cond, uncond)]

    def eps(x0):
        return (x - level.alpha * x0) / level.sigma

    mixed_eps = eps(predictions[1]) + scale * (eps(predictions[0]) - eps(predictions[1]))
    np.testing.assert_allclose(guided, (x - level.sigma * mixed_eps) / level.alpha, rtol=1e-9)
    vs = [level.alpha * eps(x0) - level.sigma * x0 for x0 in predictions]
    mixed_v = vs[1] + scale * (vs[0] - vs[1])
    np.testing.assert_allclose(guided, level.alpha * x - level.sigma * mixed_v, rtol=1e-9)


def test_different_slots_are_refused():
    with pytest.raises(ValueError, match="'vector'"):
        ClassifierFree(2.0)(echo, Condition())(jnp.zeros((2, 2)), LEVEL, C)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale_must_be_finite(scale):
    with pytest.raises(ValueError, match="finite"):
        ClassifierFree(scale).validate()
    ClassifierFree(0.0).validate()


def test_chain_applies_the_first_guide_innermost():
    """Guide, then clip: 0.1 + 2 · 0.4 is clipped; the other way round it would not be."""
    chain = Chain((ClassifierFree(3.0), StaticThreshold(0.5)))
    cond, uncond = (Condition(vector=jnp.full((1, 2), value)) for value in (0.4, 0.1))
    x = jnp.zeros((1, 2))
    np.testing.assert_array_equal(chain(echo, uncond)(x, LEVEL, cond).x0, 0.5)
    other = Chain((StaticThreshold(0.5), ClassifierFree(3.0)))
    np.testing.assert_allclose(other(echo, uncond)(x, LEVEL, cond).x0, 1.0, rtol=1e-6)
    assert Chain()(echo, uncond) is echo and Unguided()(echo, uncond) is echo
