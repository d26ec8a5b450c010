"""Parameters read without their initializers: the same, and of the shape they must have."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamShapeError

from diffusion_jax.models.blocks import GroupNorm
from diffusion_jax.models.layers import Conv, Dense, Embed, LayerNorm

PAIRS = {
    "dense": (Dense(5), nn.Dense(5), jnp.ones((2, 3))),
    "conv": (Conv(4, (3, 3)), nn.Conv(4, (3, 3)), jnp.ones((2, 6, 6, 3))),
    "embed": (Embed(7, 4), nn.Embed(7, 4), jnp.arange(3)),
    "layer_norm": (LayerNorm(), nn.LayerNorm(), jnp.arange(6.0).reshape(2, 3)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_layers_are_those_of_flax(name):
    ours, theirs, x = PAIRS[name]
    params = ours.init(jax.random.key(0), x)
    expected = theirs.init(jax.random.key(0), x)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    np.testing.assert_array_equal(ours.apply(params, x), theirs.apply(expected, x))


@pytest.mark.parametrize("name", PAIRS)
def test_a_parameter_of_another_shape_is_refused_as_by_flax(name):
    ours, theirs, x = PAIRS[name]
    params = ours.init(jax.random.key(0), x)
    first = sorted(params["params"])[0]
    wrong = {"params": {**params["params"], first: jnp.ones((9, 9, 9))}}
    with pytest.raises(ScopeParamShapeError) as expected:
        theirs.apply(wrong, x)
    with pytest.raises(ScopeParamShapeError) as error:
        ours.apply(wrong, x)
    assert str(error.value) == str(expected.value)


def test_a_parameter_that_is_missing_is_refused():
    with pytest.raises(Exception, match="bias"):
        Dense(5).apply({"params": {"kernel": jnp.ones((3, 5))}}, jnp.ones((2, 3)))


@pytest.mark.parametrize("layer", [*(pair[0] for pair in PAIRS.values()), GroupNorm(groups=2)])
def test_no_initializer_is_traced_where_the_parameter_is_there(layer, monkeypatch):
    x = next((x for ours, _, x in PAIRS.values() if ours is layer), jnp.ones((2, 4, 4, 4)))
    params = layer.init(jax.random.key(0), x)

    def refuse(*args):
        raise AssertionError("an initializer is traced")

    monkeypatch.setattr(jax, "eval_shape", refuse)
    jax.jit(layer.apply)(params, x)
