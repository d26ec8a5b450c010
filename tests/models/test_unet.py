"""The UNet's size against published parameter counts, its structure and its refusals."""

import math

import jax
import numpy as np
import pytest

from diffusion_jax.core.condition import Condition
from diffusion_jax.models import Fourier, LevelConfig, UNetConfig
from diffusion_jax.models.encoder import DownLevel
from diffusion_jax.models.unet import UpLevel
from tests.models.trees import random_params


def shapes(config, *, size=32, channels=3):
    x = jax.ShapeDtypeStruct((1, size, size, channels), np.float32)
    t = jax.ShapeDtypeStruct((1,), np.float32)
    return jax.eval_shape(config.build().init, jax.random.key(0), x, t, Condition())["params"]


def count(params):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def test_the_default_is_the_cifar10_network_of_ddpm():
    """Ho et al. 2020, appendix B: 35.7 million parameters."""
    assert round(count(shapes(UNetConfig())) / 1e6, 1) == 35.7


def test_names_and_skips_of_the_tree():
    config = UNetConfig(
        levels=(LevelConfig(4, num_blocks=1), LevelConfig(8, num_blocks=2, attention=True)),
        norm_groups=2,
        time_embed_dim=6,
    )
    params = shapes(config, size=4, channels=5)
    assert set(params) == {
        "conv_in", "conv_out", "norm_out", "time_embed", "down_0", "down_1", "mid", "up_0", "up_1",
    }  # fmt: skip
    assert set(params["down_0"]) == {"res_0", "downsample"}
    assert set(params["down_1"]) == {"res_0", "res_1", "attn_0", "attn_1"}
    assert set(params["mid"]) == {"res_0", "attn", "res_1"}
    assert set(params["up_0"]) == {
        "res_0", "res_1", "res_2", "attn_0", "attn_1", "attn_2", "upsample",
    }  # fmt: skip
    assert set(params["up_1"]) == {"res_0", "res_1"}
    assert params["conv_in"]["kernel"].shape == (3, 3, 5, 4)
    assert params["time_embed"]["dense_1"]["kernel"].shape == (4, 6)

    # Every output on the way down is read once: conv_in 4, res 4, downsample 4, res 8, res 8.
    def widths(level):
        blocks = sorted(name for name in params[level] if name.startswith("res_"))
        return [params[level][name]["norm_1"]["scale"].shape[0] for name in blocks]

    assert widths("up_0") == [8 + 8, 8 + 8, 8 + 4]
    assert widths("up_1") == [8 + 4, 4 + 4]


def test_without_middle_attention_there_is_none():
    config = UNetConfig(levels=(LevelConfig(4, num_blocks=1),), norm_groups=2)
    without = UNetConfig(levels=config.levels, norm_groups=2, middle_attention=False)
    assert set(shapes(config)["mid"]) - set(shapes(without)["mid"]) == {"attn"}


def levels(*widths, attention=False):
    return tuple(LevelConfig(width, attention=attention) for width in widths)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: LevelConfig(0), "channels must be at least 1, got 0"),
        (lambda: LevelConfig(4, num_blocks=0), "num_blocks must be at least 1, got 0"),
        (lambda: UNetConfig(levels=()), "non-empty tuple"),
        (lambda: UNetConfig(levels=[LevelConfig(32)]), "non-empty tuple"),
        (lambda: UNetConfig(levels=levels(48)), "norm_groups = 32, got channels = 48"),
        (lambda: UNetConfig(out_channels=0), "out_channels"),
        (lambda: UNetConfig(dropout=1.5), "got 1.5"),
        (lambda: UNetConfig(resample="stride"), "got 'stride'"),
        (
            lambda: UNetConfig(resample="pool", downsample_padding="asymmetric"),
            "belongs to resample='conv', got resample='pool'",
        ),
        (lambda: UNetConfig(time_embed_dim=0), "time_embed_dim must be at least 1, got 0"),
        (lambda: UNetConfig(num_heads=0), "num_heads must be at least 1, got 0"),
        (lambda: UNetConfig(time_channels=8, time_features=Fourier()), "time_channels belongs to"),
        (lambda: UNetConfig(num_heads_up=3), "num_heads = 3"),
        (lambda: UNetConfig(num_heads_up=2, head_dim=64), "num_heads or head_dim"),
        (lambda: UNetConfig(downsample_padding="same"), "got 'same'"),
        (
            lambda: UNetConfig(resample="block", downsample_padding="asymmetric"),
            "belongs to resample='conv'",
        ),
        (lambda: UNetConfig(num_heads=4, head_dim=64), "num_heads or head_dim"),
        (lambda: UNetConfig(levels=levels(64, attention=True), head_dim=48), "head_dim = 48"),
        (lambda: UNetConfig(levels=levels(64), num_heads=3), "num_heads = 3"),
        (lambda: UNetConfig(middle_attention=False, middle_attention_groups=4), "belongs to"),
        (lambda: UNetConfig(middle_attention_groups=7), "must divide 256, got 7"),
    ],
)
def test_bad_configurations_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_sizes_that_cannot_be_halved_are_refused():
    with pytest.raises(ValueError, match="multiples of 8.*got 36 x 36"):
        shapes(UNetConfig(resample="pool"), size=36)


def test_heads_follow_the_width_or_stay():
    assert UNetConfig().heads(256) == 1
    assert UNetConfig(num_heads=4).heads(256) == 4
    assert UNetConfig(head_dim=64).heads(256) == 4
    assert UNetConfig(head_dim=64).heads_up(256) == 4
    assert UNetConfig(num_heads=4).heads_up(256) == 4
    both = UNetConfig(num_heads=4, num_heads_up=2)
    assert (both.heads(256), both.heads_up(256)) == (4, 2)


def test_the_way_up_has_its_own_heads():
    """Two heads by either field give the same level; the way down does not read the second."""
    level = LevelConfig(4, attention=True)
    x = np.random.default_rng(0).normal(size=(1, 2, 2, 4)).astype(np.float32)

    def up(**heads):
        module = UpLevel(UNetConfig(levels=(level,), norm_groups=2, **heads), level, last=True)
        arguments = (x, [x], x[:, 0, 0], Condition())
        params = {"params": random_params(module, *arguments, keys=None)}
        return np.asarray(jax.jit(module.apply)(params, *arguments, keys=None)[0])

    two = up(num_heads_up=2)
    np.testing.assert_allclose(up(num_heads=2), two, atol=1e-5)
    assert np.abs(up(num_heads=2, num_heads_up=1) - two).max() > 1e-3
    config = UNetConfig(levels=(level,), norm_groups=2, num_heads=4, num_heads_up=2)
    assert (DownLevel(config, level).num_heads(), UpLevel(config, level).num_heads()) == (4, 2)


def test_pooling_has_no_parameters_and_keeps_the_skips():
    config = UNetConfig(
        levels=(LevelConfig(4, num_blocks=1), LevelConfig(8, num_blocks=1)),
        norm_groups=2,
        resample="pool",
    )
    params = shapes(config, size=4)
    assert set(params["down_0"]) == {"res_0"}
    assert set(params["up_0"]) == {"res_0", "res_1"}
    # The pooled level is a skip as a convolution's result would be.
    assert params["up_0"]["res_1"]["norm_1"]["scale"].shape == (8 + 4,)


def test_time_features_may_be_wider_than_the_first_level():
    config = UNetConfig(levels=levels(4), norm_groups=2, time_channels=6)
    kernel = shapes(config, size=4)["time_embed"]["dense_1"]["kernel"]
    assert kernel.shape == (6, 16)
