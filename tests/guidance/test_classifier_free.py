"""Classifier-free guidance is Bayes' rule on a mixture, and commutes with the parameterization."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.configuration import from_dict, to_dict
from diffusion_jax.core.arrays import as_arrays
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.schedules import EDM, Linear
from diffusion_jax.core.types import NoiseLevel, Prediction
from diffusion_jax.guidance import (
    Chain,
    ClassifierFree,
    StaticThreshold,
    Unguided,
    WithNegative,
)
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


@pytest.mark.slow
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
    first = jnp.broadcast_to(cond.vector[:, :1], x.shape)
    return Prediction(cond.vector, first, -first)


LEVEL = NoiseLevel(jnp.float32(5.0), jnp.float32(0.6), jnp.float32(0.8))
C = Condition(vector=jnp.asarray([[0.1, 0.7], [1 / 3, -0.2]]))
N = Condition(vector=jnp.asarray([[-0.3, 0.9], [0.7, 11.3]]))


@pytest.mark.parametrize("rescale_in", [None, "eps", "v", "x0"])
@pytest.mark.parametrize("interval", [None, (0.0, 2.0), (2.0, np.inf)])
def test_scale_one_is_the_conditional_prediction_bit_by_bit(rescale_in, interval):
    """Also where rescaling is by 0, inside and outside of any interval; σ / α = 4 / 3 here."""
    rescale = None if rescale_in is None else 0.0
    guidance = ClassifierFree(1.0, rescale, rescale_in, interval)
    for level in (LEVEL, NoiseLevel(*(jnp.full(2, field) for field in LEVEL))):
        guided = guidance(echo, N)(jnp.ones((2, 2)), level, C)
        np.testing.assert_array_equal(guided.x0, C.vector)


def test_scale_zero_is_the_unconditional_prediction():
    guided = ClassifierFree(0.0)(echo, N)(jnp.zeros((2, 2)), LEVEL, C)
    np.testing.assert_allclose(guided.x0, N.vector, rtol=1e-6)


@pytest.mark.parametrize("interval", [None, (0.0, 2.0)])
def test_scale_extrapolates_and_variance_stays_conditional(interval):
    guidance = ClassifierFree(3.0, interval=interval)
    guided = guidance(echo, N)(jnp.zeros((2, 2)), LEVEL, C)
    np.testing.assert_allclose(guided.x0, N.vector + 3 * (C.vector - N.vector), rtol=1e-5)
    first = jnp.repeat(C.vector[:, :1], 2, axis=1)
    np.testing.assert_array_equal(guided.var_frac, first)
    np.testing.assert_array_equal(guided.log_var, -first)


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


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scale": float("nan")}, "scale must be a finite number, got nan"),
        ({"scale": float("inf")}, "scale must be a finite number, got inf"),
        ({"rescale": 1.5, "rescale_in": "v"}, r"rescale must lie in \[0, 1\], got 1.5"),
        ({"rescale": 0.5}, "belong together.*got 0.5 and None"),
        ({"rescale_in": "eps"}, "belong together.*got None and 'eps'"),
        ({"rescale": 0.5, "rescale_in": "score"}, "'x0'.*got 'score'"),
        ({"interval": (3.0, 0.3)}, r"0 <= lo < hi.*got \(3.0, 0.3\)"),
        ({"interval": (-1.0, 0.3)}, "0 <= lo < hi"),
        ({"interval": (float("nan"), 0.3)}, "0 <= lo < hi"),
    ],
)
def test_bad_knobs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ClassifierFree(**options).validate()
    ClassifierFree(0.0, 0.7, "v", (0.0, float("inf"))).validate()


def test_chain_applies_the_first_guide_innermost():
    """Guide, then clip: 0.1 + 2 · 0.4 is clipped; the other way round it would not be."""
    chain = Chain((ClassifierFree(3.0), StaticThreshold(0.5)))
    cond, uncond = (Condition(vector=jnp.full((1, 2), value)) for value in (0.4, 0.1))
    x = jnp.zeros((1, 2))
    np.testing.assert_array_equal(chain(echo, uncond)(x, LEVEL, cond).x0, 0.5)
    other = Chain((StaticThreshold(0.5), ClassifierFree(3.0)))
    np.testing.assert_allclose(other(echo, uncond)(x, LEVEL, cond).x0, 1.0, rtol=1e-6)
    assert Chain()(echo, uncond) is echo and Unguided()(echo, uncond) is echo


# Rescaling, against the formula on the output of the network.

PICTURES = np.random.default_rng(0).standard_normal((3, 2, 4, 4, 2))
OUTPUTS = {
    "eps": lambda x0, x, level: (x - level.alpha * x0) / level.sigma,
    "v": lambda x0, x, level: (
        (level.alpha * x - (level.alpha**2 + level.sigma**2) * x0) / level.sigma
    ),
    "x0": lambda x0, x, level: x0,
}


def rescaled(scale, rescale, space, level):
    """x̂0 guided by us, the conditional and the unconditional one, and x."""
    x0_cond, x0_uncond, x = PICTURES

    def denoise(x, level, cond):
        return Prediction(cond.image)

    cond, uncond = Condition(image=jnp.asarray(x0_cond)), Condition(image=jnp.asarray(x0_uncond))
    guidance = ClassifierFree(scale, rescale, space)
    return guidance(denoise, uncond)(jnp.asarray(x), level, cond).x0, x0_cond, x0_uncond, x


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("space", OUTPUTS)
@pytest.mark.parametrize("alpha, sigma", [(0.6, 0.8), (1.0, 3.0)])
def test_rescaling_is_that_of_the_networks_output(space, rescale, alpha, sigma, x64):
    """o (φ std(o_c) / std(o) + 1 - φ), with torch's sample deviation over each picture."""
    level = NoiseLevel(0.0, alpha, sigma)
    guided, x0_cond, x0_uncond, x = rescaled(7.5, rescale, space, level)
    output = OUTPUTS[space]
    of_cond, of_uncond = (output(x0, x, level) for x0 in (x0_cond, x0_uncond))
    mixed = of_uncond + 7.5 * (of_cond - of_uncond)
    deviations = [np.std(o, axis=(1, 2, 3), ddof=1, keepdims=True) for o in (of_cond, mixed)]
    expected = mixed * (rescale * deviations[0] / deviations[1] + 1.0 - rescale)
    np.testing.assert_allclose(output(np.asarray(guided), x, level), expected, rtol=1e-9)


@pytest.mark.parametrize("space", OUTPUTS)
def test_full_rescaling_gives_each_picture_the_conditional_deviation(space, x64):
    level = NoiseLevel(np.zeros(2), np.asarray([0.6, 0.1]), np.asarray([0.8, 0.9]))
    column = NoiseLevel(*(field[:, None, None, None] for field in level))
    guided, x0_cond, _, x = rescaled(7.5, 1.0, space, level)
    deviations = [
        np.std(OUTPUTS[space](np.asarray(x0), x, column), axis=(1, 2, 3))
        for x0 in (guided, x0_cond)
    ]
    np.testing.assert_allclose(*deviations, rtol=1e-9)
    for other in set(OUTPUTS) - {space}:
        elsewhere = [
            np.std(OUTPUTS[other](np.asarray(x0), x, column), axis=(1, 2, 3))
            for x0 in (guided, x0_cond)
        ]
        assert np.abs(elsewhere[0] / elsewhere[1] - 1.0).max() > 1e-3, other


@pytest.mark.parametrize("space", ["v", "x0"])
def test_rescaling_at_zero_signal(space, x64):
    """α = 0: v is -x0 then, so both spaces are one."""
    guided, x0_cond, x0_uncond, _ = rescaled(5.0, 0.7, space, NoiseLevel(0.0, 0.0, 1.0))
    mixed = x0_uncond + 5.0 * (x0_cond - x0_uncond)
    ratio = x0_cond.std((1, 2, 3), keepdims=True) / mixed.std((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(guided, mixed * (0.7 * ratio + 0.3), rtol=1e-9)


def test_rescaling_of_a_constant_picture_leaves_it():
    flat = [Condition(vector=jnp.full((1, 2), value)) for value in (0.4, 0.1)]
    guided = ClassifierFree(3.0, 1.0, "x0")(echo, flat[1])(jnp.zeros((1, 2)), LEVEL, flat[0])
    np.testing.assert_allclose(guided.x0, 1.0, rtol=1e-6)


# The interval, (lo, hi] of σ / α. Powers of two are exact.


def at_ratio(ratio):
    return NoiseLevel(jnp.float32(0.0), jnp.float32(0.25), jnp.float32(0.25 * ratio))


@pytest.mark.parametrize("ratio, inside", [(0.5, False), (1.0, False), (2.0, True), (4.0, False)])
def test_guidance_acts_in_its_interval_only(ratio, inside):
    """Without its lower end and with its upper one; elsewhere x̂0 is the conditional."""
    guidance = ClassifierFree(3.0, interval=(1.0, 2.0))
    guided = guidance(echo, N)(jnp.zeros((2, 2)), at_ratio(ratio), C)
    if inside:
        np.testing.assert_allclose(guided.x0, N.vector + 3 * (C.vector - N.vector), rtol=1e-5)
    else:
        np.testing.assert_array_equal(guided.x0, C.vector)
        np.testing.assert_array_equal(guided.var_frac, echo(C.vector, LEVEL, C).var_frac)


def test_interval_is_per_example_where_levels_are():
    level = jax.tree.map(lambda *fields: jnp.stack(fields), at_ratio(4.0), at_ratio(2.0))
    guided = ClassifierFree(3.0, interval=(1.0, 2.0))(echo, N)(jnp.zeros((2, 2)), level, C)
    np.testing.assert_array_equal(guided.x0[0], C.vector[0])
    np.testing.assert_allclose(guided.x0[1], N.vector[1] + 3 * (C.vector - N.vector)[1], rtol=1e-5)


def test_outside_the_interval_the_unconditional_half_is_not_computed():
    seen = []

    def counted(x, level, cond):
        jax.debug.callback(lambda x: seen.append(x.shape[0]), x)
        return Prediction(cond.vector)

    guided = ClassifierFree(3.0, interval=(1.0, 2.0))(counted, N)
    run = jax.jit(lambda level: guided(jnp.zeros((2, 2)), level, C).x0)
    for ratio, count in ((0.5, 2), (2.0, 4), (4.0, 2)):
        seen.clear()
        run(at_ratio(ratio)).block_until_ready()
        jax.effects_barrier()
        assert seen == [count]


def test_every_knob_is_data():
    """Scale, φ and interval share one compilation; the results differ."""
    traces = []

    @jax.jit
    def run(guidance):
        traces.append(1)
        return guidance(echo, N)(jnp.asarray([[0.3, -1.0], [2.0, 0.1]]), LEVEL, C).x0

    first = ClassifierFree(3.0, 0.7, "v", (1.0, 2.0))
    others = [
        first.replace(scale=5),
        first.replace(rescale=0.2),
        first.replace(interval=(1.4, 2.0)),
        first.replace(interval=(0, 1.3)),
    ]
    outs = [np.asarray(run(as_arrays(guidance))) for guidance in (first, *others)]
    assert len(traces) == 1
    np.testing.assert_allclose(outs[3], C.vector)
    np.testing.assert_allclose(outs[4], C.vector)
    assert all(np.abs(out - outs[0]).max() > 1e-3 for out in outs[1:])


# Negative conditions.

AVOID = Condition(vector=jnp.asarray([[0.5, 0.2], [-1.0, 2.0]]))


def test_a_negative_condition_takes_the_place_of_the_null():
    guided = WithNegative(ClassifierFree(3.0), AVOID)(echo, N)(jnp.zeros((2, 2)), LEVEL, C)
    np.testing.assert_allclose(guided.x0, AVOID.vector + 3 * (C.vector - AVOID.vector), rtol=1e-5)
    np.testing.assert_array_equal(guided.var_frac, echo(C.vector, LEVEL, C).var_frac)
    alone = WithNegative(ClassifierFree(1.0), AVOID)(echo, N)(jnp.zeros((2, 2)), LEVEL, C)
    np.testing.assert_array_equal(alone.x0, C.vector)
    plain = ClassifierFree(3.0)(echo, AVOID)(jnp.zeros((2, 2)), LEVEL, C)
    np.testing.assert_array_equal(guided.x0, plain.x0)


def test_a_negative_condition_is_data_in_a_chain():
    traces = []

    @jax.jit
    def run(guide):
        traces.append(1)
        return guide(echo, N)(jnp.zeros((2, 2)), LEVEL, C).x0

    outs = []
    for negative in (AVOID, N):
        guide = Chain((WithNegative(ClassifierFree(3.0), negative), StaticThreshold(0.8)))
        guide.validate()
        outs.append(np.asarray(run(as_arrays(guide))))
        expected = negative.vector + 3 * (C.vector - negative.vector)
        np.testing.assert_allclose(outs[-1], np.clip(expected, -0.8, 0.8), rtol=1e-5)
    assert len(traces) == 1 and np.abs(outs[0] - outs[1]).max() > 0.1


def test_a_negative_prompt_may_be_longer():
    """Its tokens are padded with the condition's to one length and masked: means stay."""

    def mean_token(x, level, cond):
        mask = cond.token_mask[..., None].astype(x.dtype)
        return Prediction((cond.tokens * mask).sum(1) / mask.sum(1))

    cond = Condition(tokens=jnp.full((1, 2, 2), 0.5))
    negative = Condition(tokens=jnp.asarray([[[0.1, 0.1], [0.2, 0.2], [0.6, 0.3]]]))
    guide = WithNegative(ClassifierFree(2.0), negative)
    guided = guide(mean_token, Condition(tokens=jnp.zeros((1, 2, 2))))(
        jnp.zeros((1, 2)), LEVEL, cond
    )
    np.testing.assert_allclose(guided.x0, [[2 * 0.5 - 0.3, 2 * 0.5 - 0.2]], rtol=1e-6)


def test_one_negative_for_each_image():
    one = Condition(vector=AVOID.vector[:1])
    with pytest.raises(ValueError, match=r"holds \[1\] examples for 2 images"):
        WithNegative(ClassifierFree(3.0), one)(echo, N)(jnp.zeros((2, 2)), LEVEL, C)
    with pytest.raises(ValueError, match="scale must be a finite number"):
        WithNegative(ClassifierFree(float("nan")), AVOID).validate()
    WithNegative(Unguided(), AVOID).validate()


@pytest.mark.parametrize(
    "guidance", [ClassifierFree(2), ClassifierFree(7.5, 0.7, "v", (0.28, 2.9))], ids=["", "all"]
)
def test_knobs_survive_json(guidance):
    assert from_dict(ClassifierFree, json.loads(json.dumps(to_dict(guidance)))) == guidance
