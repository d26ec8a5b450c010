"""Parameter trees without the cost of compiling an initializer."""

from typing import Any

import jax
import numpy as np


def random_params(module: Any, *args: Any, scale: float = 1.0, **kwargs: Any) -> Any:
    """Normal numbers in the shapes that the module's `init` would give, as numpy arrays."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args, **kwargs)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    random = np.random.default_rng(3)
    return jax.tree.unflatten(
        tree, [scale * random.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    )
