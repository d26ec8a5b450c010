"""Attention: every implementation against the formula in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.condition import Condition, Grounding
from diffusion_jax.models import attention as attention_module
from diffusion_jax.models.attention import Attention, AttentionBlock, dot_product_attention
from diffusion_jax.pretrained import toy_pipeline
from tests.models.trees import random_params

B, N, M, H, D = 2, 3, 5, 2, 4


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def qkv():
    return normal(0, B, N, H, D), normal(1, B, M, H, D), normal(2, B, M, H, D)


def formula(q, k, v, mask=None):
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    out = np.empty(q.shape)
    full = np.ones((B, H, N, M), bool) if mask is None else np.broadcast_to(mask, (B, H, N, M))
    for b in range(B):
        for h in range(H):
            weights = np.exp(q[b, :, h] @ k[b, :, h].T / np.sqrt(D)) * full[b, h]
            out[b, :, h] = weights / weights.sum(1, keepdims=True) @ v[b, :, h]
    return out


def random_mask(*shape):
    mask = np.random.default_rng(3).random(shape) < 0.5
    mask[..., 0] = True
    return mask


MASKS = {
    "none": None,
    "keys": random_mask(B, 1, 1, M),
    "queries and keys": random_mask(1, 1, N, M),
    "heads": random_mask(1, H, N, M),
    "all": random_mask(B, H, N, M),
}


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("implementation", ["plain", "tiled", "xla", None])
def test_every_implementation_is_the_formula(implementation, mask):
    q, k, v = qkv()
    ours = dot_product_attention(q, k, v, mask=mask, implementation=implementation)
    np.testing.assert_allclose(ours, formula(q, k, v, mask), atol=2e-6)


@pytest.mark.parametrize("implementation", ["plain", "tiled"])
def test_large_logits_do_not_overflow(implementation):
    q, k, v = qkv()
    logits = np.einsum("bnhd,bmhd->bhnm", 60 * q, k) / np.sqrt(D)
    # exp is finite to 88 in float32, to 709 in the formula's float64.
    assert 88 < logits.max() < 709
    ours = dot_product_attention(60 * q, k, v, implementation=implementation)
    np.testing.assert_allclose(ours, formula(60 * q, k, v), atol=1e-4)


# Of three queries to five keys: two and one, one after the other, and one even if it is too much.
TILES = (2 * 4 * M, 4 * M, 1)


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("tile_bytes", TILES)
def test_tiles_of_some_queries_are_the_formula(tile_bytes, mask, monkeypatch):
    monkeypatch.setattr(attention_module, "TILE_BYTES", tile_bytes)
    q, k, v = qkv()
    ours = dot_product_attention(q, k, v, mask=mask, implementation="tiled")
    np.testing.assert_allclose(ours, formula(q, k, v, mask), atol=2e-6)


@pytest.mark.parametrize("tile_bytes", (2 * 4 * M, attention_module.TILE_BYTES))
def test_gradients_of_the_tiled_form_are_those_of_the_plain_form(tile_bytes, monkeypatch):
    monkeypatch.setattr(attention_module, "TILE_BYTES", tile_bytes)

    def loss(args, implementation):
        out = dot_product_attention(*args, mask=MASKS["keys"], implementation=implementation)
        return (out * normal(4, B, N, H, D)).sum()

    plain, tiled = (
        jax.jit(jax.grad(loss), static_argnums=1)(qkv(), name) for name in ("plain", "tiled")
    )
    for a, b in zip(plain, tiled, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_tiles_need_less_memory(monkeypatch):
    monkeypatch.setattr(attention_module, "TILE_BYTES", 2**18)
    args = (jax.ShapeDtypeStruct((1, 1024, 2, 8), jnp.float32),) * 3

    def memory(implementation):
        fn = functools.partial(dot_product_attention, implementation=implementation)
        return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * 2 * 1024**2
    assert memory("plain") >= logits
    assert memory("tiled") < logits / 4


def test_the_choice_reaches_every_attention(monkeypatch):
    def refuse(*args):
        raise AssertionError("not the chosen one")

    pipeline, struct = toy_pipeline(), jax.ShapeDtypeStruct
    monkeypatch.setattr(attention_module, "_plain", refuse)
    grounding = Grounding(struct((1, 2, 16), jnp.float32), struct((1,), jnp.float32))
    cond = Condition(tokens=struct((1, 3, 16), jnp.float32), grounding=grounding)
    inputs = {
        "unet": (struct((1, 16, 16, 4), jnp.float32), struct((1,), jnp.float32), cond),
        "vae": (struct((1, 64, 64, 3), jnp.float32),),
    }
    configs = {"unet": pipeline["unet"].config.network, "vae": pipeline["vae"].config}
    for name, config in configs.items():
        tiled = dataclasses.replace(config, attention_implementation="tiled").build()
        jax.eval_shape(tiled.init, jax.random.key(0), *inputs[name])
        with pytest.raises(AssertionError, match="not the chosen"):
            jax.eval_shape(config.build().init, jax.random.key(0), *inputs[name])
        with pytest.raises(ValueError, match="must be one of plain"):
            dataclasses.replace(config, attention_implementation="flash")


def test_a_cpu_tiles_what_is_big(monkeypatch):
    if jax.default_backend() != "cpu":
        pytest.fail("the suite runs on the CPU")
    q, k, v = qkv()
    assert attention_module._choose(q, k, None) == "plain"
    monkeypatch.setattr(attention_module, "TILE_BYTES", 4 * B * H * N * M - 1)
    assert attention_module._choose(q, k, None) == "tiled"


@pytest.mark.slow
def test_bfloat16_keeps_a_float32_softmax():
    """2000 equal logits: bfloat16 sums of 1 would stop at 256."""
    q = jnp.zeros((1, 1, 1, 8), jnp.bfloat16)
    k = jnp.zeros((1, 2000, 1, 8), jnp.bfloat16)
    v = jnp.ones((1, 2000, 1, 8), jnp.bfloat16)
    for implementation in ("plain", "tiled"):
        ours = dot_product_attention(q, k, v, implementation=implementation)
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(np.float32), 1.0, atol=0.01)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"k": np.zeros((B, M, H + 1, D)), "v": np.zeros((B, M, H + 1, D))}, "q must have shape"),
        ({"v": np.zeros((B, M + 1, H, D))}, "k and v"),
        ({"mask": np.ones((B, M), bool)}, "mask must be bool"),
        ({"mask": np.ones((B, 1, 1, M))}, "got float64"),
        ({"implementation": "flash"}, "got 'flash'"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    arguments = dict(zip("qkv", qkv(), strict=True)) | change
    options = {name: arguments.pop(name) for name in ("mask", "implementation") if name in change}
    with pytest.raises(ValueError, match=words):
        dot_product_attention(**arguments, **options)


@pytest.mark.slow
def test_attention_module_projects_splits_and_joins_heads():
    x, context = normal(0, 2, 3, 4), normal(1, 2, 5, 6)
    module = Attention(num_heads=2)
    params = random_params(module, x, context)

    def dense(name, h):
        return np.asarray(h) @ params[name]["kernel"] + params[name]["bias"]

    q, k, v = dense("query", x), dense("key", context), dense("value", context)
    h = dot_product_attention(*(a.reshape(2, -1, 2, 2) for a in (q, k, v))).reshape(2, 3, 4)
    ours = module.apply({"params": params}, x, context)
    np.testing.assert_allclose(ours, dense("out", np.asarray(h)), atol=1e-4)
    mask = np.zeros((2, 1, 1, 5), bool)
    mask[..., :2] = True
    masked = module.apply({"params": params}, x, context, mask=mask)
    shorter = module.apply({"params": params}, x, context[:, :2])
    np.testing.assert_allclose(masked, shorter, atol=1e-5)


def test_attention_names_the_width_that_its_heads_do_not_divide():
    with pytest.raises(ValueError, match="num_heads = 3, got 4"):
        Attention(num_heads=3).init(jax.random.key(0), normal(0, 1, 2, 4))


def test_a_new_attention_block_is_the_identity():
    x = normal(0, 1, 2, 3, 4)
    init = jax.jit(AttentionBlock(num_heads=2, norm_groups=2).init_with_output)
    # The parameters' generator is not the point, and this one compiles ten times faster.
    np.testing.assert_array_equal(init(jax.random.key(0, impl="rbg"), x)[0], x)


def test_every_pixel_sees_every_other():
    x = normal(0, 1, 2, 3, 4)
    block = AttentionBlock(num_heads=2, norm_groups=2)
    variables = {"params": random_params(block, x)}
    moved = x.copy()
    moved[0, 1, 2] += np.array([1.0, -1.0, 2.0, 0.0], np.float32)
    apply = jax.jit(block.apply)
    change = np.abs(apply(variables, moved) - apply(variables, x)).max(-1)
    assert (change > 1e-4).all()


def test_attention_may_leave_with_another_width():
    x = normal(0, 2, 3, 8)
    attention = Attention(2, out_features=5)
    assert jax.eval_shape(attention.init_with_output, jax.random.key(0), x)[0].shape == (2, 3, 5)
