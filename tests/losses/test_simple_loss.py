"""The simple loss: exact values for Gaussian data, weights, keys per example."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.denoiser import scaled_time
from diffusion_jax.core.parameterization import PARAMETERIZATIONS
from diffusion_jax.core.schedules import Cosine, CosineLogSNR
from diffusion_jax.losses.base import averaged
from diffusion_jax.losses.simple import Simple
from diffusion_jax.losses.weights import Uniform

SCHEDULE = Cosine(20)
STD = 0.5
COUNT = 4000
NAMES = ("eps", "x0", "v")


def rates(t):
    level = SCHEDULE(t)
    return level.alpha[:, None], level.sigma[:, None]


def exact(name):
    """The best possible network for data N(0, STD²)."""

    def network(params, x, t, cond, *, keys=None):
        alpha, sigma = rates(t)
        x0 = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * x
        eps = (x - alpha * x0) / sigma
        return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[name]

    return network


def residual_variance(name):
    """E (target - network)² for the best network, [T]: Var(x0 | x_t) in the target's unit."""
    level = SCHEDULE(np.arange(20.0))
    of_x0 = STD**2 * level.sigma**2 / (level.alpha**2 * STD**2 + level.sigma**2)
    factor = {"eps": (level.alpha / level.sigma) ** 2, "x0": 1.0, "v": level.sigma**-2}[name]
    return factor * of_x0


@functools.cache
def data():
    keys = image_keys(1, range(COUNT))
    x0 = STD * jax.random.normal(jax.random.key(7), (COUNT, 2))
    return x0, keys


def silent(params, x, t, cond, *, keys=None):
    return jnp.zeros_like(x)


def noisiest(level, parameterization):
    return (level.t == 19).astype(jnp.float32)


def twice_uniform(level, parameterization):
    return 2.0 * Uniform()(level, parameterization)


def simple(network, schedule, parameterization, *, weight=Uniform(), **options):
    """The average over times and examples of the loss of an example."""
    loss = Simple(weight).per_example(network, schedule, parameterization, **options)
    return averaged(loss, schedule)


@functools.cache
def values():
    """All losses of one batch in one compilation."""
    x0 = PARAMETERIZATIONS["x0"]()
    losses = {
        **{name: simple(exact(name), SCHEDULE, PARAMETERIZATIONS[name]()) for name in NAMES},
        "silent": simple(silent, SCHEDULE, PARAMETERIZATIONS["eps"]()),
        "noisiest": simple(exact("x0"), SCHEDULE, x0, weight=noisiest),
        "twice": simple(exact("x0"), SCHEDULE, x0, weight=twice_uniform),
    }

    @jax.jit
    def every(x0, keys):
        return {name: loss({}, x0, Condition(), keys)[0] for name, loss in losses.items()}

    return {name: float(value) for name, value in every(*data()).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_loss_of_the_exact_network_is_the_irreducible_one(name):
    """E_t Var(target | x_t), in closed form; the mean of 8000 squares has 3 % standard error."""
    expected = np.mean(residual_variance(name))
    assert abs(values()[name] / expected - 1) < 0.1, (values()[name], expected)


@pytest.mark.slow
def test_loss_of_a_network_that_says_nothing_is_the_targets_variance():
    # Var(eps) = 1, standard error √(2 / 8000) = 0.016.
    assert abs(values()["silent"] - 1.0) < 0.07


def test_weight_multiplies_each_example():
    """weight = 1 at one t and 0 elsewhere leaves that t's term, 1/T of the sum."""
    expected = residual_variance("x0")[19] / 20
    # About 200 of 4000 examples count: 7 % from their number, 7 % from their squares.
    assert abs(values()["noisiest"] / expected - 1) < 0.4
    np.testing.assert_allclose(values()["twice"], 2 * values()["x0"], rtol=1e-6)


def test_an_example_depends_on_its_own_key_only():
    """The loss of a batch is the mean over its halves, whatever the batch size."""
    loss = jax.jit(simple(silent, SCHEDULE, PARAMETERIZATIONS["eps"]()))
    x0, keys = data()

    def of(start, stop):
        return float(loss({}, x0[start:stop], Condition(), keys[start:stop])[0])

    whole, first, second = of(0, 4), of(0, 2), of(2, 4)
    np.testing.assert_allclose(whole, (first + second) / 2, rtol=1e-6)
    assert first != second


def test_network_gets_parameters_time_condition_and_dropout_keys():
    seen = {}

    def network(params, x, t, cond, *, keys=None):
        seen.update(t=t, cond=cond, keys=keys)
        return params["w"] + jnp.zeros_like(x)

    loss = simple(network, CosineLogSNR(), PARAMETERIZATIONS["x0"](), time_input=scaled_time)
    _, keys = data()
    cond = Condition(vector=jnp.ones((4, 1)))
    value, _ = loss({"w": 3.0}, jnp.zeros((4, 2)), cond, keys[:4])
    assert float(value) == 9.0
    assert seen["cond"] is cond
    t = np.asarray(seen["t"])
    assert t.shape == (4,) and t.min() >= 0 and t.max() > 1 and t.max() <= 1000
    dropout = np.asarray(jax.random.key_data(seen["keys"]))
    assert len(np.unique(dropout, axis=0)) == 4


def test_mean_is_over_pixels():
    """Any number of pixels with the same error gives the same loss."""

    def network(params, x, t, cond, *, keys=None):
        return jnp.ones_like(x)

    loss = simple(network, SCHEDULE, PARAMETERIZATIONS["x0"]())
    _, keys = data()
    shapes = ((2, 1), (2, 4, 4, 3))
    for value in jax.jit(
        lambda keys: [loss({}, jnp.zeros(shape), Condition(), keys)[0] for shape in shapes]
    )(keys[:2]):
        np.testing.assert_allclose(value, 1.0, rtol=1e-6)


def test_output_of_another_shape_is_refused():
    def network(params, x, t, cond, *, keys=None):
        return jnp.concatenate([x, x], axis=-1)

    loss = simple(network, SCHEDULE, PARAMETERIZATIONS["x0"]())
    _, keys = data()
    with pytest.raises(ValueError, match=r"\(3, 4\) for x0 of \(3, 2\)"):
        jax.eval_shape(loss, {}, jnp.zeros((3, 2)), Condition(), keys[:3])


def test_per_example_is_the_weighted_loss_at_the_given_times_with_the_given_keys():
    """A network that says nothing leaves each example the mean square of its own noise."""
    chosen, seen = PARAMETERIZATIONS["eps"](), {}

    def weight(level, parameterization):
        seen.update(parameterization=parameterization)
        return 1.0 + level.t

    @jax.jit
    def both(keys, t):
        loss = Simple(weight).per_example(silent, SCHEDULE, chosen)
        keys = jax.vmap(lambda key: jax.random.split(key))(keys)
        eps = jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys[:, 0])
        return loss({}, jnp.zeros((3, 4)), t, Condition(), keys), jnp.mean(eps**2, axis=1)

    t = np.float32([0.0, 7.0, 19.0])
    (values, metrics), squares = both(data()[1][:3], t)
    np.testing.assert_allclose(values, (1.0 + t) * squares, rtol=1e-6)
    assert dict(metrics) == {} and Simple().learned_variance is None
    assert seen["parameterization"] is chosen
