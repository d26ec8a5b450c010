"""What levels may be: other ways up, other bottoms, other attention, other resolutions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.condition import Condition, Grounding
from diffusion_jax.models import (
    LevelConfig,
    PixelAttention,
    SpatialTransformer,
    TextAttention,
    UNetConfig,
)
from diffusion_jax.models.blocks import (
    GroupNorm,
    ResBlock,
    Upsample,
    fir_downsample,
    fir_upsample,
    nearest_upsample,
)
from diffusion_jax.models.encoder import DownLevel
from diffusion_jax.models.transformer import SpatialTransformerBlock, TransformerBlock
from diffusion_jax.models.unet import UpLevel
from tests.models.trees import random_params

RANDOM = np.random.default_rng(0)
SD = UNetConfig(
    levels=(LevelConfig(4, 1, attention=SpatialTransformer(2)),),
    middle_blocks=1,
    middle_attention=False,
    norm_groups=2,
)
NCSN = UNetConfig(
    levels=(LevelConfig(8, 1, out_scale=2**0.5), LevelConfig(8, 1, out_scale=2**0.5)),
    resample="pyramid",
    norm_groups=None,
    middle_out_scale=2**0.5,
)


def normal(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


MASK = np.asarray([[True] * 5, [True, True, False, False, False]])
X, T, TOKENS = normal(2, 4, 4, 3), np.asarray([3.0, 500.0], np.float32), normal(2, 5, 6)


@functools.lru_cache
def built(config, dtype):
    network = config.build(dtype=dtype)
    return network, jax.jit(network.apply)


def apply(config, x=X, cond=None, params=None, dtype="float32"):
    cond = Condition(tokens=TOKENS if config.reads_tokens else None) if cond is None else cond
    network, run = built(config, dtype)
    params = random_params(network, x, T, cond, scale=0.3) if params is None else params
    return np.asarray(run({"params": params}, x, T, cond)), params


def names(config, cond=Condition()):
    return {
        part: set(tree) if isinstance(tree, dict) else tree
        for part, tree in random_params(config.build(), X, T, cond).items()
    }


def test_the_way_up_may_differ_from_the_way_down():
    up = (LevelConfig(4, 1), LevelConfig(8, 1, attention=True, resample="block"))
    config = UNetConfig(levels=(LevelConfig(4, 1), LevelConfig(8, 1)), up_levels=up, norm_groups=2)
    found = names(config)
    assert found["down_0"] == {"res_0", "downsample"} and found["down_1"] == {"res_0"}
    assert found["up_0"] == {"res_0", "res_1", "attn_0", "attn_1", "upsample"}
    assert found["up_1"] == {"res_0", "res_1"}
    tree = random_params(config.build(), X, T, Condition())
    assert set(tree["down_0"]["downsample"]) == {"conv"}
    assert "conv_1" in tree["up_0"]["upsample"]
    with pytest.raises(ValueError, match="as many blocks as levels"):
        dataclasses.replace(config, up_levels=(up[0], LevelConfig(8, 2)))


@pytest.mark.parametrize("blocks, expected", [(0, None), (1, {"res_0"}), (2, {"res_0", "res_1"})])
def test_the_bottom_may_be_missing_or_one_block(blocks, expected):
    config = UNetConfig(
        levels=(LevelConfig(4, 1),), norm_groups=2, middle_blocks=blocks, middle_attention=False
    )
    assert names(config).get("mid") == expected
    if blocks < 2:
        with pytest.raises(ValueError, match="between two blocks"):
            dataclasses.replace(config, middle_attention=True)


def test_groups_of_the_norm_at_the_bottom():
    """Given beside True they are those of a specification."""
    base = UNetConfig(levels=(LevelConfig(8, 1),), norm_groups=2)
    params = {"params": random_params(base.build(), X, T, Condition())}

    def program(**changes):
        network = dataclasses.replace(base, **changes).build()
        return str(jax.make_jaxpr(network.apply)(params, X, T, Condition()))

    ours = program(middle_attention_groups=4)
    assert ours == program(middle_attention=PixelAttention(1, norm_groups=4))
    assert ours != program()


def test_transformers_heed_the_mask_and_need_the_tokens():
    mask, changed = MASK, TOKENS.copy()
    changed[1, 2:] += 1.0

    def told(tokens, mask):
        return apply(SD, cond=Condition(tokens=tokens, token_mask=mask), params=params)[0]

    _, params = apply(SD, cond=Condition(tokens=TOKENS, token_mask=mask))
    np.testing.assert_array_equal(told(changed, mask), told(TOKENS, mask))
    seen = np.abs(told(changed, mask | True) - told(TOKENS, mask | True)).max((1, 2, 3))
    assert seen[0] == 0.0 and seen[1] > 1e-3
    for cond, words in [
        (Condition(), "attends to cond.tokens"),
        (Condition(tokens=TOKENS[0]), r"cond.tokens must have shape \[B, L, D\]"),
        (Condition(tokens=TOKENS, token_mask=mask.astype("f4")), "token_mask must be bool"),
        (Condition(tokens=TOKENS, grounding=Grounding(TOKENS, T)), "grounding"),
    ]:
        with pytest.raises(ValueError, match=words):
            apply(SD, cond=cond)


def transformer_block(x, tokens, p, heads, tokens_only=False):
    """A transformer block in numpy, by its equations."""

    def norm(h, name):
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
        return h * p[name]["scale"] + p[name]["bias"]

    def attend(q, kv, p):
        q, k, v = (a @ p[n]["kernel"] for a, n in ((q, "query"), (kv, "key"), (kv, "value")))
        split = [a.reshape(*a.shape[:2], heads, -1).swapaxes(1, 2) for a in (q, k, v)]
        logits = split[0] @ split[1].swapaxes(2, 3) / np.sqrt(split[0].shape[-1])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        h = weights / weights.sum(-1, keepdims=True) @ split[2]
        h = h.swapaxes(1, 2).reshape(q.shape)
        return h @ p["out"]["kernel"] + p["out"]["bias"]

    h = norm(x, "norm_1")
    x = x + attend(h, tokens if tokens_only else h, p["attn_1"])
    x = x + attend(norm(x, "norm_2"), tokens, p["attn_2"])
    h = norm(x, "norm_3") @ p["ff"]["in"]["kernel"] + p["ff"]["in"]["bias"]
    h, gate = np.split(h, 2, axis=-1)
    erf = np.vectorize(__import__("math").erf)
    h = h * gate * 0.5 * (1.0 + erf(gate / np.sqrt(2.0)))
    return x + h @ p["ff"]["out"]["kernel"] + p["ff"]["out"]["bias"]


@pytest.mark.parametrize("tokens_only", [False, True])
def test_a_transformer_block_is_its_equations(tokens_only):
    module, x = TransformerBlock(2, 3, tokens_only), normal(2, 4, 6)
    params = random_params(module, x, TOKENS, scale=0.5)
    ours = jax.jit(module.apply)({"params": params}, x, TOKENS)
    expected = transformer_block(x, TOKENS, params, 2, tokens_only)
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_a_fuser_is_skipped_without_grounding_and_by_a_gate_of_zero():
    spec = SpatialTransformer(2, fuser="self")
    module, x = SpatialTransformerBlock(spec, 2, 1, 2), normal(2, 2, 2, 4)

    def grounded(gate):
        return Grounding(normal(2, 3, 4), np.full(2, gate, np.float32))

    params = {"params": random_params(module, x, TOKENS, None, grounded(1.0))}
    run = jax.jit(module.apply)
    without = run(params, x, TOKENS)
    np.testing.assert_array_equal(run(params, x, TOKENS, None, grounded(0.0)), without)
    assert np.abs(run(params, x, TOKENS, None, grounded(1.0)) - without).max() > 1e-3


@pytest.mark.parametrize("kind", [TextAttention, SpatialTransformer])
def test_specifications_without_heads_have_those_of_the_network(kind):
    """On the way up its own, as self-attention has."""
    level = LevelConfig(8, 1, attention=kind())
    config = UNetConfig(levels=(level,), norm_groups=2, num_heads=4, num_heads_up=2)
    assert DownLevel(config, level).heads(kind()) == 4
    assert UpLevel(config, level).heads(kind()) == 2
    assert UpLevel(config, level).heads(kind(num_heads=8)) == 8
    assert UpLevel(config, level).heads(kind(head_dim=8)) == 1
    wide, narrow = LevelConfig(6, 1, attention=kind()), LevelConfig(4, 1, attention=kind())
    config = UNetConfig(
        levels=(wide,), up_levels=(narrow,), norm_groups=2, num_heads=3, num_heads_up=4
    )
    assert UpLevel(config, narrow).heads(kind()) == 4
    widths = UNetConfig(levels=(level,), norm_groups=2, head_dim=2)
    assert UpLevel(widths, level).heads(kind()) == 4


def test_depth_may_differ_from_place_to_place():
    spec = SpatialTransformer(1, depth=(1, 3))
    level = LevelConfig(4, 2, attention=spec)
    up = LevelConfig(4, 2, attention=dataclasses.replace(spec, depth=(2, 1, 1)))
    config = UNetConfig(levels=(level,), up_levels=(up,), middle_attention=False, norm_groups=2)
    tree = random_params(config.build(), X, T, Condition(tokens=TOKENS))

    def blocks(part):
        return [
            sum(name.startswith("block_") for name in tree[part][f"attn_{i}"])
            for i in range(len([name for name in tree[part] if name.startswith("attn_")]))
        ]

    assert blocks("down_0") == [1, 3] and blocks("up_0") == [2, 1, 1]


def fir(x, up, down, pad):
    """Zeros between pixels, padding, the filter and decimation, one step after the other."""
    taps = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64.0 * up**2
    spread = np.zeros((x.shape[0] * up, x.shape[1] * up))
    spread[::up, ::up] = x
    spread = np.pad(spread, pad)
    shape = [n - 3 for n in spread.shape]
    out = [
        [(spread[i : i + 4, j : j + 4] * taps).sum() for j in range(shape[1])]
        for i in range(shape[0])
    ]
    return np.asarray(out)[::down, ::down]


def test_filters_of_the_pyramid():
    x = normal(4, 6)
    ours = np.asarray(fir_downsample(x[None, :, :, None]))[0, :, :, 0]
    np.testing.assert_allclose(ours, fir(x, 1, 2, (1, 1)), atol=1e-6)
    ours = np.asarray(fir_upsample(x[None, :, :, None]))[0, :, :, 0]
    np.testing.assert_allclose(ours, fir(x, 2, 1, (2, 1)), atol=1e-6)


def test_the_pyramid_reads_the_image_and_writes_the_output_at_every_resolution():
    tree = random_params(NCSN.build(), X, T, Condition())
    assert set(tree["down_0"]) == {"res_0", "downsample", "image"}
    assert set(tree["down_1"]) == {"res_0"}
    assert set(tree["up_0"]) == {"res_0", "res_1", "upsample", "image", "image_norm"}
    assert "shortcut" in tree["down_0"]["downsample"] and "shortcut" in tree["up_0"]["upsample"]
    # With every other way closed, the output is what the coarse level adds, made finer.
    tree["conv_out"] = jax.tree.map(np.zeros_like, tree["conv_out"])
    tree["up_0"]["image"]["kernel"][:] = 0.0
    out, _ = apply(NCSN, params=tree)
    constant = np.broadcast_to(tree["up_0"]["image"]["bias"], (2, 2, 2, 3))
    np.testing.assert_allclose(out, fir_upsample(jnp.asarray(constant)), atol=1e-5)


def test_input_and_output_are_rescaled_where_configured():
    base = UNetConfig(levels=(LevelConfig(4, 1),), norm_groups=2)
    centred = dataclasses.replace(base, center_input=True, divide_by_time=True)
    ours, params = apply(centred)
    plain, _ = apply(base, x=2.0 * X - 1.0, params=params)
    np.testing.assert_allclose(ours * T[:, None, None, None], plain, atol=2e-5, rtol=1e-4)


def test_out_scale_divides_the_sum_and_time_act_is_for_the_time():
    x, emb = normal(1, 2, 2, 4), normal(1, 3)
    base = ResBlock(4, 2)
    params = {"params": random_params(base, x, emb)}
    plain = np.asarray(base.apply(params, x, emb))
    halved = ResBlock(4, 2, out_scale=2.0).apply(params, x, emb)
    np.testing.assert_allclose(halved, plain / 2.0, atol=1e-6)
    silent = ResBlock(4, 2, time_act=False).apply(params, x, jax.nn.silu(emb))
    np.testing.assert_allclose(silent, plain, atol=1e-5)


def test_none_groups_are_a_quarter_of_the_width_at_most_32():
    for width, groups in ((8, 2), (256, 32)):
        x = normal(1, 2, width)
        norm, same = GroupNorm(None), GroupNorm(groups)
        params = {"params": random_params(norm, x)}
        np.testing.assert_array_equal(norm.apply(params, x), same.apply(params, x))


def test_the_vector_is_added_or_concatenated_and_activated_with_the_time():
    level = LevelConfig(4, 1, time_act=False)
    config = UNetConfig(levels=(level,), norm_groups=2, middle_time_act=False, embed_act="silu")
    cond = Condition(vector=normal(2, 16))
    late, params = apply(config, cond=cond)
    early = dataclasses.replace(
        config, levels=(LevelConfig(4, 1),), middle_time_act=True, embed_act=None
    )
    np.testing.assert_allclose(apply(early, cond=cond, params=params)[0], late, atol=1e-5)
    both = dataclasses.replace(early, concat_vector=True)
    tree = random_params(both.build(), X, T, cond)
    assert tree["down_0"]["res_0"]["time"]["kernel"].shape == (32, 4)
    with pytest.raises(ValueError, match="cond.vector"):
        apply(both, cond=Condition())


@pytest.mark.parametrize("padding, size", [("symmetric", (7, 6)), ("asymmetric", (7, 6))])
def test_convolutions_take_images_of_any_size(padding, size):
    config = UNetConfig(
        levels=(LevelConfig(4, 1), LevelConfig(4, 1)), norm_groups=2, downsample_padding=padding
    )
    out = jax.eval_shape(
        config.build().init_with_output, jax.random.key(0), normal(2, *size, 3), T, Condition()
    )[0]
    assert out.shape == (2, *size, 3)


def test_a_way_up_without_convolutions_takes_no_odd_sizes():
    levels = (LevelConfig(4, 1), LevelConfig(4, 1))
    up = (levels[0], LevelConfig(4, 1, resample="pool"))
    config = UNetConfig(levels=levels, up_levels=up, norm_groups=2)
    with pytest.raises(ValueError, match="multiples of 2.*got 5 x 4"):
        jax.eval_shape(config.build().init, jax.random.key(0), normal(2, 5, 4, 3), T, Condition())


def test_upsampling_to_an_odd_size_drops_a_row():
    x = normal(1, 3, 4, 2)
    module = Upsample()
    params = {"params": random_params(module, x)}
    params["params"]["conv"]["kernel"][:] = 0.0
    params["params"]["conv"]["kernel"][1, 1] = np.eye(2)
    expected = np.asarray(nearest_upsample(x))[:, :5] + params["params"]["conv"]["bias"]
    np.testing.assert_allclose(module.apply(params, x, (5, 8)), expected, atol=1e-6)


@pytest.mark.parametrize("config", [SD, NCSN], ids=["transformer", "pyramid"])
def test_half_precision_is_finite_and_near(config):
    """Of networks whose program in full precision other tests have compiled."""
    cond = Condition(tokens=TOKENS, token_mask=MASK) if config is SD else Condition()
    full, params = apply(config, cond=cond)
    half, _ = apply(config, cond=cond, params=params, dtype="bfloat16")
    assert half.dtype == jnp.bfloat16
    assert np.abs(half.astype("f4") - full).max() < 0.1 * np.abs(full).max()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: LevelConfig(4, resample="stride"), "got 'stride'"),
        (lambda: LevelConfig(4, out_scale=0.0), "out_scale must be positive"),
        (lambda: UNetConfig(middle_blocks=3), "middle_blocks must be 0, 1 or 2"),
        (
            lambda: UNetConfig(middle_blocks=0, middle_attention=False, middle_out_scale=2.0),
            "belong to blocks, got middle_blocks = 0 with 2.0",
        ),
        (lambda: UNetConfig(act="tanh"), "act must be one of"),
        (lambda: UNetConfig(embed_act="tanh"), "embed_act must be one of"),
        (
            lambda: UNetConfig(levels=(LevelConfig(32), LevelConfig(32, resample="pyramid"))),
            "must be the finest",
        ),
        (
            lambda: UNetConfig(levels=(LevelConfig(32, attention=SpatialTransformer(depth=(1,))),)),
            r"depth must be one number or 2, one behind each residual block, got \(1,\)",
        ),
        (
            lambda: UNetConfig(
                levels=(LevelConfig(32, attention=SpatialTransformer(depth=(1, 1))),)
            ),
            "depth must be one number or 3",
        ),
        (
            lambda: UNetConfig(levels=(LevelConfig(32, attention=SpatialTransformer(64)),)),
            "num_heads = 64",
        ),
        (lambda: SpatialTransformer(2, head_dim=4), "num_heads or head_dim"),
        (lambda: SpatialTransformer(depth=0), "every depth must be at least 1"),
        (lambda: SpatialTransformer(fuser="other"), "fuser must be None or one of"),
        (lambda: PixelAttention(0), "num_heads must be at least 1"),
        (lambda: PixelAttention(norm=False, norm_groups=4), "belongs to norm=True, got 4"),
        (
            lambda: UNetConfig(levels=(LevelConfig(32, attention=PixelAttention(norm_groups=5)),)),
            "must divide channels = 32, got 5",
        ),
        (lambda: UNetConfig(conv_in_kernel=4), "conv_in_kernel must be odd, got 4"),
        (lambda: UNetConfig(conv_out_kernel=2), "conv_out_kernel must be odd, got 2"),
        (
            lambda: UNetConfig(
                levels=(LevelConfig(32, attention=TextAttention()),), num_heads_up=5
            ),
            "num_heads = 5",
        ),
        (
            lambda: UNetConfig(levels=(LevelConfig(32, attention=TextAttention(head_dim=5)),)),
            "head_dim = 5",
        ),
    ],
)
def test_bad_specifications_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
