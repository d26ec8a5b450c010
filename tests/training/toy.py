"""A linear model whose gradients are known by hand, and an iterator that can be resumed."""

import jax
import jax.numpy as jnp
import numpy as np

BATCH = 4
WIDTH = 3


def params():
    """A frozen scale, an empty module, and a trainable matrix."""
    return {
        "adapter": {"w": jnp.arange(6, dtype=jnp.float32).reshape(WIDTH, 2) / 10},
        "base": {"scale": jnp.array([1.0, -2.0, 0.5])},
        "label": {},
    }


def loss(params, batch, keys):
    """mean_i |(scale · x_i + noise_i) w - y_i|² / 2, with a noise of its own per example."""
    assert params["label"] == {}
    noise = jax.vmap(lambda key: jax.random.normal(key, (WIDTH,)))(keys)
    x = params["base"]["scale"][None, :] * batch["x"] + noise
    error = x @ params["adapter"]["w"] - batch["y"]
    per_image = 0.5 * jnp.sum(error**2, axis=-1)
    return per_image.mean(), {"abs_error": jnp.abs(error).mean(), "noise": noise.mean()}


def gradient(params, batch, noise):
    """d loss / d w = xᵀ (x w - y) / B in float64."""
    x = np.float64(params["base"]["scale"]) * batch["x"] + np.float64(noise)
    w = np.float64(params["adapter"]["w"])
    return x.T @ (x @ w - batch["y"]) / len(x)


def batch(seed=0, size=BATCH):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(size, WIDTH)).astype(np.float32),
        "y": rng.normal(size=(size, 2)).astype(np.float32),
    }


class Data:
    """Batch number n is a function of n; `hook(n)` runs before it is handed out."""

    def __init__(self, hook=None, length=None):
        self.position, self.hook, self.length = 0, hook, length

    def __next__(self):
        if self.length is not None and self.position >= self.length:
            raise StopIteration
        if self.hook is not None:
            self.hook(self.position)
        self.position += 1
        return batch(self.position)

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def assert_bit_equal(a, b):
    """Same structure, and every leaf the same bytes."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
