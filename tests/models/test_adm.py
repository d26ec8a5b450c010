"""ADM's configurations against the released constructors, parameter by parameter."""

import math

import jax
import numpy as np
import pytest

from diffusion_jax.core.condition import Condition
from diffusion_jax.models import (
    LevelConfig,
    adm_classifier,
    adm_levels,
    adm_unet,
    adm_upsampler,
)


def count(config, size, channels=3):
    """Parameters, of the class embedding too where there is one."""
    x = jax.ShapeDtypeStruct((1, size, size, channels), np.float32)
    t = jax.ShapeDtypeStruct((1,), np.float32)
    vector, embedding = None, 0
    if getattr(config, "needs_vector", False):
        vector = jax.ShapeDtypeStruct((1, config.embed_dim), np.float32)
        embedding = 1000 * config.embed_dim
    init = config.build().init
    params = jax.eval_shape(init, jax.random.key(0), x, t, Condition(vector=vector))["params"]
    return embedding + sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


# Counted in guided-diffusion at 22e0df8 (create_model, sr_create_model, create_classifier) with the
# arguments of its published commands; the paper prints 296, 422, 554 and 559 million.
UNETS = {64: 295_904_454, 128: 421_529_606, 256: 553_838_086, 512: 558_997_638}
UPSAMPLERS = {256: 311_795_910, 512: 308_835_270}
CLASSIFIERS = {64: 65_438_568, 128: 42_568_040, 256: 54_096_360, 512: 54_448_360}


@pytest.mark.slow
@pytest.mark.parametrize("size, released", UNETS.items())
def test_denoising_networks_have_the_released_size(size, released):
    assert count(adm_unet(size), size) == released


@pytest.mark.slow
@pytest.mark.parametrize("size, released", UPSAMPLERS.items())
def test_upsamplers_have_the_released_size(size, released):
    assert count(adm_upsampler(size), size, channels=6) == released


@pytest.mark.slow
@pytest.mark.parametrize("size, released", CLASSIFIERS.items())
def test_classifiers_have_the_released_size(size, released):
    assert count(adm_classifier(size), size) == released


def test_the_network_for_64_pixels_level_by_level():
    assert adm_unet(64).levels == (
        LevelConfig(192, num_blocks=3),
        LevelConfig(384, num_blocks=3, attention=True),
        LevelConfig(576, num_blocks=3, attention=True),
        LevelConfig(768, num_blocks=3, attention=True),
    )
    assert (adm_unet(64).dropout, adm_unet(64).head_dim, adm_unet(64).out_channels) == (0.1, 64, 6)


def test_attention_is_chosen_by_the_size_in_pixels():
    def attention(config):
        return [level.attention for level in config.levels]

    assert attention(adm_unet(512)) == [False] * 4 + [True] * 3
    assert attention(adm_upsampler(512)) == [False] * 4 + [True, True]
    assert attention(adm_classifier(64)) == [False, True, True, True]
    own = adm_levels(16, width=32, depth=1, channel_mults=(1, 1.5), attention_resolutions=(16,))
    assert own == (LevelConfig(32, 1, attention=True), LevelConfig(48, 1))


def test_half_a_width_keeps_the_time_embedding():
    """At 512 pixels the first level is half as wide as the model."""
    for config, width in ((adm_unet(512), 256), (adm_classifier(512), 128)):
        assert config.levels[0].channels == width // 2
        assert (config.time_channels, config.embed_dim) == (width, 4 * width)


def test_heads_are_counted_at_128_pixels_and_measured_elsewhere():
    assert [adm_unet(size).heads(256) for size in (64, 128, 256, 512)] == [4, 4, 4, 4]
    assert [adm_unet(size).heads(1024) for size in (64, 128, 256, 512)] == [16, 4, 16, 16]
    assert (adm_upsampler(256).heads(768), adm_upsampler(512).heads(768)) == (4, 12)


@pytest.mark.parametrize("make", [adm_unet, adm_classifier, adm_upsampler])
def test_a_size_without_a_release_is_refused(make):
    with pytest.raises(ValueError, match="got 96; describe others by adm_levels"):
        make(96)
    with pytest.raises(ValueError, match="upsampler for images of 256, 512 pixels, got 64"):
        adm_upsampler(64)
    with pytest.raises(ValueError, match="got 32"):
        adm_levels(32, width=32, depth=1)
