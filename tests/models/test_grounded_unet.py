"""A UNet with GLIGEN's adapters: the base network until they are trained, or where they are off."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion_jax.core.condition import Condition, Grounding
from diffusion_jax.core.params import by_glob, merge, partition
from diffusion_jax.models import LevelConfig, UNetConfig
from diffusion_jax.models.transformer import SpatialTransformer
from tests.models.trees import random_params

B, SIDE, WIDTH, FUSERS = 2, 4, 8, "**/fuser/**"


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, T, TOKENS = normal(0, B, SIDE, SIDE, 3), np.asarray([3.0, 700.0]), normal(1, B, 5, WIDTH)
OBJECTS, ONES = normal(2, B, 4, WIDTH), np.ones(B, np.float32)


def unet(fuser):
    attention = SpatialTransformer(num_heads=2, fuser=fuser)
    level = LevelConfig(WIDTH, 1, attention=attention)
    config = UNetConfig((level,), norm_groups=4, middle_blocks=0, middle_attention=False)
    return config.build()


@lru_cache
def network(fuser):
    """(random parameters, the same before the adapters were trained, forward)."""
    module = unet(fuser)
    cond = Condition(tokens=TOKENS, grounding=Grounding(OBJECTS, ONES))
    trained = random_params(module, X, T, cond, scale=0.3)
    flat = flatten_dict(trained)
    gates = {path for path in flat if path[-1] in ("alpha_attn", "alpha_ff")}
    new = unflatten_dict({p: np.zeros_like(v) if p in gates else v for p, v in flat.items()})

    @jax.jit
    def forward(params, gate):
        cond = Condition(tokens=TOKENS, grounding=Grounding(OBJECTS, gate))
        return module.apply({"params": params}, X, T, cond)

    return trained, new, forward


def without_adapters(params):
    """The output of a UNet that has none, with the other parameters."""
    _, base = partition(params, by_glob(params, FUSERS))
    apply = jax.jit(unet(None).apply)
    return apply({"params": base}, X, T, Condition(tokens=TOKENS))


def test_untrained_and_closed_adapters_give_the_base_network_to_the_bit():
    trained, new, forward = network("self")
    base = without_adapters(new)
    np.testing.assert_array_equal(forward(new, ONES), base)
    np.testing.assert_array_equal(forward(trained, 0.0 * ONES), base)
    assert np.abs(forward(trained, ONES) - base).max() > 0.01


def test_without_grounding_the_adapters_are_skipped():
    trained, _, _ = network("self")
    apply = jax.jit(unet("self").apply)
    ours = apply({"params": trained}, X, T, Condition(tokens=TOKENS))
    np.testing.assert_array_equal(ours, without_adapters(trained))


def test_first_gradients_reach_the_gates_of_every_adapter_and_nothing_else_in_them():
    """tanh(0) = 0 shuts the branches off, tanh'(0) = 1 does not shut off the gates."""
    _, new, forward = network("self")
    trainable, frozen = partition(new, by_glob(new, FUSERS))

    def loss(trainable):
        return jnp.square(forward(merge(trainable, frozen), ONES)).mean()

    gradients = flatten_dict(jax.jit(jax.grad(loss))(trainable))
    gates = {path: leaf for path, leaf in gradients.items() if path[-1].startswith("alpha_")}
    # One transformer on the way down, two on the way up.
    assert len(gates) == 6 and all(abs(leaf) > 1e-6 for leaf in gates.values()), gates
    assert all(not np.any(leaf) for path, leaf in gradients.items() if path not in gates)


def test_adapters_are_the_leaves_below_fuser():
    trained, _, _ = network("self")
    adapters, base = partition(trained, by_glob(trained, FUSERS))
    names = {path[-1] if len(path) == 5 else path[4] for path in flatten_dict(adapters)}
    assert all(path[3] == "fuser" for path in flatten_dict(adapters))
    assert names == {"alpha_attn", "alpha_ff", "attn", "ff", "norm_attn", "norm_ff", "object_proj"}
    assert not any("fuser" in path for path in flatten_dict(base))
    without = random_params(unet(None), X, T, Condition(tokens=TOKENS))
    assert set(flatten_dict(base)) == set(flatten_dict(without))
    again = flatten_dict(merge(adapters, base))
    assert all(again[path] is leaf for path, leaf in flatten_dict(trained).items())


def test_a_network_without_adapters_refuses_grounding():
    module = unet(None)
    cond = Condition(tokens=TOKENS, grounding=Grounding(OBJECTS, ONES))
    with pytest.raises(ValueError, match="grounding"):
        jax.eval_shape(module.init, jax.random.key(0), X, T, cond)
