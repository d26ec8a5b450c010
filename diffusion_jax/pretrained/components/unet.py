"""diffusers' UNet2DModel and UNet2DConditionModel as our UNet and conditioners, and back."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.conditioners import CONDITIONERS, UNCONDITIONAL, Conditioner, combine
from diffusion_jax.conditioners.embeddings import where_given
from diffusion_jax.configuration import from_dict, to_dict
from diffusion_jax.core.condition import Condition, Grounding
from diffusion_jax.core.types import Params
from diffusion_jax.io.mapping import Row, prefixed
from diffusion_jax.io.tables.gligen import (
    ATTENTION_TYPES,
    POSITION_NET_ROWS,
    unet2d_condition_grounding,
)
from diffusion_jax.io.tables.options import UnsupportedOption
from diffusion_jax.io.tables.unet import label_rows, unet2d_config, unet2d_options, unet2d_rows
from diffusion_jax.io.tables.unet_blocks import UNetForm, has_old_attention_names
from diffusion_jax.io.tables.unet_condition import condition_options, unet2d_condition_config
from diffusion_jax.io.tables.unet_condition_options import unet2d_condition_options
from diffusion_jax.io.tables.unet_condition_rows import CONDITIONER_ROWS, unet2d_condition_rows
from diffusion_jax.models.grounding import TextGroundingConfig, TextImageGroundingConfig
from diffusion_jax.models.inputs import DType
from diffusion_jax.models.unet import UNet, UNetConfig
from diffusion_jax.pretrained.components.base import Component
from diffusion_jax.pretrained.components.gligen import (
    GroundingConfig,
    grounding_conditioner,
    grounding_config,
)

# Conditioners that have no dtype: float32 as times are, or what the batch has.
_UNTYPED = ("given_tokens", "given_vector", "label", "low_res", "noise_level")
_ATTENTION_TYPES = {TextGroundingConfig: "gated", TextImageGroundingConfig: "gated-text-image"}


@dataclasses.dataclass(frozen=True)
class ReleasedUNetConfig:
    """A UNet with what it is told, as diffusers has them in one class.

    Attributes:
      network: the UNet.
      in_channels: channels of x, with cond.image if there is one.
      conditioners: part -> (key of `CONDITIONERS`, its options).
      grounding: GLIGEN's position network; None without.
      kept: options of the file that change no number, and how it is laid out.
    """

    network: UNetConfig
    in_channels: int
    conditioners: Mapping[str, tuple[str, Mapping[str, Any]]]
    grounding: GroundingConfig | None = None
    kept: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __hash__(self) -> int:
        # Mappings have no hash; what is equal has these equal.
        return hash((self.network, self.in_channels, self.grounding))

    def build(self, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32) -> UNet:
        """The network, computing in `dtype` with parameters of `param_dtype`.

        Args:
          dtype: of the activations, a dtype or its name.
          param_dtype: of the parameters, a dtype or its name.
        """
        return self.network.build(dtype=dtype, param_dtype=param_dtype)

    def conditioner(self, *, dtype: DType = jnp.float32) -> Conditioner:
        """From the batch to the condition; see the conditioners for what they read.

        Tokens that no level attends to are not passed on. A batch without boxes is not grounded.

        Args:
          dtype: of what is computed, a dtype or its name.
        """
        parts = {}
        for name, (kind, options) in self.conditioners.items():
            if name == "tokens" and not self.network.reads_tokens:
                continue
            typed = {} if kind in _UNTYPED else {"dtype": dtype}
            parts[name] = CONDITIONERS[kind](**options, **typed)
        if self.grounding is not None:
            boxes = grounding_conditioner(self.grounding, dtype=dtype)
            parts["grounding"] = where_given("boxes", boxes)
        return combine(**parts) if parts else UNCONDITIONAL


def unet_config(form: UNetForm, grounding: GroundingConfig | None = None) -> ReleasedUNetConfig:
    """The dataclass that the plain fields of a translated configuration stand for.

    Raises:
      UnsupportedOption: if they contradict each other.
    """
    try:
        network = from_dict(UNetConfig, form.unet, "network")
    except ValueError as error:
        raise UnsupportedOption(f"the options do not make a UNet: {error}") from error
    return ReleasedUNetConfig(network, form.in_channels, form.conditioners, grounding, form.kept)


def unet_form(config: ReleasedUNetConfig) -> UNetForm:
    """`unet_config` backwards, with every field of our UNetConfig."""
    conditioners = {name: (kind, dict(o)) for name, (kind, o) in config.conditioners.items()}
    unet = to_dict(config.network)
    return UNetForm(unet, config.in_channels, conditioners, dict(config.kept))


def checked(
    options: dict[str, Any],
    config: ReleasedUNetConfig,
    read: Callable[[Mapping[str, Any]], ReleasedUNetConfig],
) -> dict[str, Any]:
    """The options, if reading them gives the configuration.

    Raises:
      UnsupportedOption: if it does not.
    """
    if read(options) != config:
        raise UnsupportedOption(
            f"{options['_class_name']} cannot express this UNet: what it can would be another one"
        )
    return options


def unet_shapes(config: ReleasedUNetConfig) -> Params:
    """Shapes of {"network": …, "conditioner": {part: …}}, the latter where there are any."""

    def struct(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    key, network = jax.random.key(0), config.network
    size = 2 ** (len(network.levels) - 1)
    x = struct(1, size, size, config.in_channels)
    cond = Condition()
    if network.concat_vector or network.needs_vector:
        cond = cond.replace(vector=struct(1, network.embed_dim))
    if network.reads_tokens:
        cond = cond.replace(tokens=struct(1, 1, config.conditioners["tokens"][1]["dim"]))
    if config.grounding is not None:
        objects = struct(1, 1, config.grounding.out_dim)
        cond = cond.replace(grounding=Grounding(objects, struct(1)))
    params = jax.eval_shape(config.build().init, key, x, struct(1), cond)["params"]
    told = jax.eval_shape(config.conditioner().init, key)
    told = {name: part for name, part in told.items() if jax.tree.leaves(part)}
    return {"network": params, "conditioner": told} if told else {"network": params}


def told_rows(config: ReleasedUNetConfig, rows: Mapping[str, Sequence[Row]]) -> tuple[Row, ...]:
    """The rows of what embeds conditions, from those of every kind of conditioner."""
    found: list[Row] = []
    for name, (kind, _) in config.conditioners.items():
        found += prefixed(rows.get(kind, ()), target=f"conditioner/{name}/")
    return tuple(found)


def _read_2d(config: Mapping[str, Any]) -> ReleasedUNetConfig:
    return unet_config(unet2d_config(config))


def _write_2d(config: ReleasedUNetConfig) -> dict[str, Any]:
    return checked(unet2d_options(unet_form(config)), config, _read_2d)


def _rows_2d(config: ReleasedUNetConfig, names: Collection[str]) -> tuple[Row, ...]:
    old = has_old_attention_names(names)
    network = unet2d_rows(to_dict(config.network), old_attention_names=old)
    told = {kind: label_rows(kind) for kind in ("label", "noise_level")}
    return prefixed(network, target="network/") + told_rows(config, told)


def _read_condition(config: Mapping[str, Any]) -> ReleasedUNetConfig:
    module = unet2d_condition_grounding(condition_options(config))
    grounding = None if module is None else grounding_config(module)
    return unet_config(unet2d_condition_config(config), grounding)


def _attention_type(config: ReleasedUNetConfig) -> str:
    if config.grounding is None:
        return "default"
    return _ATTENTION_TYPES.get(type(config.grounding), type(config.grounding).__name__)


def _write_condition(config: ReleasedUNetConfig) -> dict[str, Any]:
    options = unet2d_condition_options(unet_form(config))
    options["attention_type"] = _attention_type(config)
    return checked(options, config, _read_condition)


def _rows_condition(config: ReleasedUNetConfig, names: Collection[str]) -> tuple[Row, ...]:
    network = unet2d_condition_rows(
        to_dict(config.network),
        linear_projection=bool(config.kept.get("use_linear_projection")),
        old_attention_names=has_old_attention_names(names),
    )
    rows = prefixed(network, target="network/") + told_rows(config, CONDITIONER_ROWS)
    if config.grounding is None:
        return rows
    position = POSITION_NET_ROWS[ATTENTION_TYPES[_attention_type(config)]]
    return rows + prefixed(position, source="position_net.", target="conditioner/grounding/")


UNET2D = Component(read=_read_2d, write=_write_2d, shapes=unet_shapes, rows=_rows_2d)
UNET2D_CONDITION = Component(
    read=_read_condition, write=_write_condition, shapes=unet_shapes, rows=_rows_condition
)
