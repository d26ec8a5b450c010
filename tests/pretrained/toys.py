"""A network of two layers as if a library had released it, for tests of files and folders."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.io.mapping import Row
from diffusion_jax.io.tables.options import UnsupportedOption, complete
from diffusion_jax.pretrained import COMPONENTS, Component, Loaded


class Toy(nn.Module):
    """x [B, 4] -> [B, 2]."""

    width: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps x [B, 4] to [B, 2]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.LayerNorm(name="norm", **kinds)(nn.Dense(self.width, name="first", **kinds)(x))
        return nn.Dense(2, name="last", **kinds)(x)


@dataclass(frozen=True)
class ToyConfig:
    """The toy's only option."""

    width: int = 6

    def build(self, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32) -> Toy:
        """The module."""
        return Toy(self.width, jnp.dtype(dtype), jnp.dtype(param_dtype))


def _shapes(config: ToyConfig) -> Mapping[str, Any]:
    return jax.eval_shape(config.build().init, jax.random.key(0), jnp.zeros((1, 4)))["params"]


def _rows(config: ToyConfig, names: Collection[str]) -> tuple[Row, ...]:
    old = any(name.startswith("to_first") for name in names)
    first = Row("to_first" if old else "first", "first", "linear")
    return first, Row("norm", "norm", "norm"), Row("last", "last", "linear")


def _component(**about: Any) -> Component:
    def read(config: Mapping[str, Any]) -> ToyConfig:
        known = {key: value for key, value in config.items() if key != "architectures"}
        width = complete(known, {"width": 6}, "ToyModel")["width"]
        if width < 1:
            raise UnsupportedOption(f"width must be 1 or more, got {width}")
        return ToyConfig(width)

    return Component(
        read, lambda config: {**about, **asdict(config)}, _shapes, _rows, ("*.position_ids",)
    )


TOYS = {
    "ToyModel": _component(_class_name="ToyModel"),
    "ToyTextModel": _component(architectures=["ToyTextModel"]),
}


def add_toys(monkeypatch: Any) -> None:
    """Puts the toys into the table of components for one test."""
    for name, component in TOYS.items():
        monkeypatch.setitem(COMPONENTS, name, component)


def toy(class_name: str = "ToyModel", *, width: int = 6, seed: int = 0) -> Loaded:
    """A toy with random parameters, none of them square."""
    config = ToyConfig(width)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), _shapes(config)
    )
    return Loaded(class_name, config, config.build(), params)
