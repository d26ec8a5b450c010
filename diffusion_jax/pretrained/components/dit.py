"""diffusers' DiTTransformer2DModel, read and written as our DiT and its label conditioner."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.conditioners import Conditioner, combine, label
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import Params
from diffusion_jax.io.tables.dit import DIT_ROWS, DiTForm, dit_config, dit_options
from diffusion_jax.models.dit import DiT, DiTConfig
from diffusion_jax.models.embeddings import Sinusoidal
from diffusion_jax.models.inputs import DType
from diffusion_jax.pretrained.components.base import Component


@dataclasses.dataclass(frozen=True)
class LabeledDiTConfig:
    """A class-conditional DiT with the tables of its labels.

    Attributes:
      network: the DiT.
      in_channels: channels of x.
      num_classes: labels are 0 … num_classes - 1, and num_classes is the null label.
    """

    network: DiTConfig
    in_channels: int
    num_classes: int

    def build(self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32) -> DiT:
        """The network, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return self.network.build(dtype=dtype, param_dtype=param_dtype)

    def conditioner(self) -> Conditioner:
        """From batch["label"] [B] to the vector that the network reads."""
        tables = None if self.network.shared_embedding else self.network.depth
        return combine(label=label(self.num_classes, self.network.width, tables=tables))


def _read(config: Mapping[str, Any]) -> LabeledDiTConfig:
    form = dit_config(config)
    features = Sinusoidal(**form.dit["time_features"])
    network = DiTConfig(**{**form.dit, "time_features": features})
    return LabeledDiTConfig(network, form.in_channels, form.num_classes)


def _write(config: LabeledDiTConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(config.network)
    return dit_options(DiTForm(fields, config.in_channels, config.num_classes))


def dit_shapes(config: LabeledDiTConfig) -> Params:
    """Shapes of {"network": …, "conditioner": {"label": …}}."""

    def struct(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    patch, key = config.network.patch_size, jax.random.key(0)
    x = struct(1, patch, patch, config.in_channels)
    cond = Condition(vector=struct(1, config.network.embed_dim))
    network = jax.eval_shape(config.build().init, key, x, struct(1), cond)["params"]
    return {"network": network, "conditioner": jax.eval_shape(config.conditioner().init, key)}


DIT = Component(
    read=_read,
    write=_write,
    shapes=dit_shapes,
    rows=lambda config, names: DIT_ROWS,
    # Fixed positions, which some files hold and everybody computes.
    ignore=("pos_embed.pos_embed",),
)
