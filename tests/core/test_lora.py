"""LoRA: what it adds, what it leaves alone, and that only it is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from diffusion_jax.core.lora import init_lora, merge_lora
from diffusion_jax.training.ema import EMA
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.step import make_train_step, step_keys


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Conv(5, (3, 3), name="conv")(x)
        return nn.Dense(2, name="dense")(h)


@pytest.fixture(scope="module")
def net():
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 3))
    return x, Net().init(jax.random.key(0), x)["params"]


def drawn(lora):
    return jax.tree.map(lambda a: 0.5 + jax.random.normal(jax.random.key(3), a.shape), lora)


def test_a_new_lora_changes_nothing(net):
    x, params = net
    lora = init_lora(jax.random.key(2), params, rank=2, targets=("**/kernel",))
    assert lora["conv"]["down"].shape == (3, 3, 3, 2)
    assert lora["dense"]["up"].shape == (2, 2)
    merged = merge_lora(params, lora)
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_merged_kernels_compute_the_sum_of_both_paths(net):
    x, params = net
    lora = drawn(init_lora(jax.random.key(2), params, rank=2, targets=("**/kernel",)))
    scale = 0.7
    merged = Net().apply({"params": merge_lora(params, lora, scale)}, x)

    def conv(kernel, x):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)

    h = conv(params["conv"]["kernel"], x) + params["conv"]["bias"][None, None, None]
    h = h + scale * conv(lora["conv"]["down"], x) @ lora["conv"]["up"]
    y = h @ params["dense"]["kernel"] + params["dense"]["bias"][None, None, None]
    y = y + scale * (h @ lora["dense"]["down"]) @ lora["dense"]["up"]
    np.testing.assert_allclose(merged, y, rtol=1e-4, atol=1e-4)


def test_only_the_lora_is_trained(net):
    x, params = net
    lora = init_lora(jax.random.key(2), params, rank=2, targets=("conv/kernel",))
    tree = {"base": params, "lora": lora}

    def loss(params, batch, keys):
        merged = merge_lora(params["base"], params["lora"])
        y = Net().apply({"params": merged}, batch["image"])
        return jnp.square(y).mean(), {}

    tx = optax.adam(1e-2)
    state = TrainState.create(tree, tx, trainable=("lora/**",))
    moments = {leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}
    assert moments == {(3, 3, 3, 2), (2, 5)}
    step = jax.jit(make_train_step(loss, tx, ema=EMA(0.9)))
    losses = []
    for i in range(5):
        state, metrics = step(state, {"image": x}, step_keys(jax.random.key(0), i, 2))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, state.params["base"], params)


def test_bad_adapters_are_refused(net):
    _, params = net
    with pytest.raises(ValueError, match="rank must be"):
        init_lora(jax.random.key(0), params, rank=0)
    with pytest.raises(ValueError, match="kernels of dense layers"):
        init_lora(jax.random.key(0), params, rank=1, targets=("**/bias",))
    with pytest.raises(ValueError, match="matches no parameter"):
        init_lora(jax.random.key(0), params, rank=1)
    lora = init_lora(jax.random.key(0), params, rank=1, targets=("**/kernel",))
    with pytest.raises(ValueError, match="not there"):
        merge_lora(params, {"other": lora["conv"]})
    with pytest.raises(ValueError, match="has shape"):
        merge_lora(params, {"dense": lora["conv"]})
