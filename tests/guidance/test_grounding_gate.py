"""GLIGEN's scheduled sampling: the gate of the grounding is open above a time, and shut below."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.condition import Condition, Grounding
from diffusion_jax.core.types import NoiseLevel, Prediction
from diffusion_jax.guidance import Chain, ClassifierFree, GroundedUntil

X = jnp.zeros((2, 1))
GATE = jnp.asarray([1.0, 0.5])
OBJECTS = jnp.ones((2, 3, 4))


def level_at(t):
    return NoiseLevel(jnp.asarray(t, jnp.float32), jnp.float32(0.8), jnp.float32(0.6))


def says_the_gate(x, level, cond):
    return Prediction(cond.grounding.gate[:, None] * jnp.ones_like(x))


def gate_seen(time, t):
    denoise = GroundedUntil(time)(says_the_gate, Condition())
    return np.asarray(denoise(X, level_at(t), Condition(grounding=Grounding(OBJECTS, GATE))).x0)[
        :, 0
    ]


@pytest.mark.parametrize(
    "time, t, is_open",
    [
        (500.0, 501.0, True),
        (500.0, 500.0, False),
        (500.0, 3.0, False),
        (-np.inf, 0.0, True),
        (np.inf, 999.0, False),
    ],
)
def test_gate_is_open_above_the_time(time, t, is_open):
    """Eq. 10: the gate is beta = 1 for the first steps and 0 for the others."""
    np.testing.assert_array_equal(gate_seen(time, t), GATE if is_open else np.zeros(2))


def test_every_example_has_its_own_level():
    np.testing.assert_array_equal(gate_seen(500.0, [700.0, 300.0]), [1.0, 0.0])
    np.testing.assert_array_equal(gate_seen(500.0, [300.0, 700.0]), [0.0, 0.5])


def test_conditions_without_grounding_are_left_alone():
    def denoise(x, level, cond):
        assert cond.grounding is None
        return Prediction(x + 1.0)

    out = GroundedUntil(0.0)(denoise, Condition())(X, level_at(5.0), Condition())
    np.testing.assert_array_equal(out.x0, X + 1.0)


def test_guidance_outside_sees_both_branches_gated():
    """x̂0 = g(∅) + s (g(c) - g(∅)) with both gates shut is 0, and with both open is not."""
    cond = Condition(grounding=Grounding(OBJECTS, GATE))
    null = Condition(grounding=Grounding(OBJECTS, 0.25 * GATE))
    for t, expected in ((600.0, (0.25 + 3.0 * 0.75) * GATE), (400.0, 0.0 * GATE)):
        guide = Chain((GroundedUntil(500.0), ClassifierFree(3.0)))
        out = guide(says_the_gate, null)(X, level_at(t), cond)
        np.testing.assert_allclose(out.x0[:, 0], expected, rtol=1e-6)


def test_time_is_data():
    @jax.jit
    def run(guide):
        cond = Condition(grounding=Grounding(OBJECTS, GATE))
        return guide(says_the_gate, Condition())(X, level_at(5.0), cond).x0

    for time in (1.0, 10.0, -np.inf):
        run(GroundedUntil(time))
    assert run._cache_size() == 1
