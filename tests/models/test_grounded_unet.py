"""A UNet with GLIGEN's adapters: the base network until they are trained, or where they are off."""

from functools import cache

import jax
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


TOLD = Condition(tokens=TOKENS, grounding=Grounding(OBJECTS, ONES))


@cache
def trained():
    """Random parameters."""
    return random_params(unet("self"), X, T, TOLD, scale=0.3)


def gates():
    """Paths of the adapters' gates."""
    return [path for path in flatten_dict(trained()) if path[-1] in ("alpha_attn", "alpha_ff")]


def with_open_gates(*paths):
    """The parameters where all other gates are as before training."""
    closed = set(gates()) - set(paths)
    flat = flatten_dict(trained())
    return unflatten_dict({p: np.zeros_like(v) if p in closed else v for p, v in flat.items()})


@jax.jit
def forward(params, gate):
    cond = Condition(tokens=TOKENS, grounding=Grounding(OBJECTS, gate))
    return unet("self").apply({"params": params}, X, T, cond)


def base_params():
    """Those of a UNet that has no adapters."""
    return partition(trained(), by_glob(trained(), FUSERS))[1]


def base(fuser, params):
    """The output without grounding."""
    return unet(fuser).apply({"params": params}, X, T, Condition(tokens=TOKENS))


@cache
def base_output():
    return np.asarray(jax.jit(lambda params: base(None, params))(base_params()))


def test_untrained_and_closed_adapters_give_the_base_network_to_the_bit():
    np.testing.assert_array_equal(forward(with_open_gates(), ONES), base_output())
    np.testing.assert_array_equal(forward(trained(), 0.0 * ONES), base_output())


def test_every_gate_opens_a_branch_of_its_own():
    """One transformer on the way down, two on the way up, with two gates each."""
    assert len(gates()) == 6
    for path in gates():
        assert np.abs(forward(with_open_gates(path), ONES) - base_output()).max() > 1e-4, path


def test_without_grounding_the_adapters_are_skipped():
    """So that their parameters may be missing, and the program is that of the base network."""
    programs = [jax.make_jaxpr(lambda p, f=f: base(f, p))(base_params()) for f in ("self", None)]
    assert str(programs[0]) == str(programs[1])


def test_adapters_are_the_leaves_below_fuser():
    adapters, base = partition(trained(), by_glob(trained(), FUSERS))
    names = {path[-1] if len(path) == 5 else path[4] for path in flatten_dict(adapters)}
    assert all(path[3] == "fuser" for path in flatten_dict(adapters))
    assert names == {"alpha_attn", "alpha_ff", "attn", "ff", "norm_attn", "norm_ff", "object_proj"}
    assert not any("fuser" in path for path in flatten_dict(base))
    without = random_params(unet(None), X, T, Condition(tokens=TOKENS))
    assert set(flatten_dict(base)) == set(flatten_dict(without))
    again = flatten_dict(merge(adapters, base))
    assert all(again[path] is leaf for path, leaf in flatten_dict(trained()).items())


def test_a_network_without_adapters_refuses_grounding():
    module = unet(None)
    with pytest.raises(ValueError, match="grounding"):
        jax.eval_shape(module.init, jax.random.key(0), X, T, TOLD)
