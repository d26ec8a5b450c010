"""flax's layers, with parameters that are quick to read.

Whenever a network is applied, flax traces the initializer of every parameter to learn its shape and
compares. That takes almost half of the time in which a UNet is traced, and the initializers
of all layers are told the shape: here it is compared with what they are told.
"""

from typing import Any

import flax.linen as nn
import numpy as np
from flax.errors import ScopeParamShapeError

from diffusion_jax.models.convolution import conv_general_dilated


class Module(nn.Module):
    """flax's, that does not trace the initializer of a parameter that is there.

    Source: none; a convention of this library.
    """

    def param(self, name: str, init_fn: Any, *init_args: Any, **options: Any) -> Any:
        """As flax's; `init_args` are the shape and the dtype.

        Raises:
          ScopeParamShapeError: if the parameter has another shape.
        """
        if options or not init_args or not self.has_variable("params", name):
            return super().param(name, init_fn, *init_args, **options)
        value, shape = self.get_variable("params", name), tuple(init_args[0])
        if np.shape(value) != shape:
            assert self.scope is not None
            raise ScopeParamShapeError(name, self.scope.path_text, np.shape(value), shape)
        return value


class Dense(Module, nn.Dense):
    """flax's."""


class Conv(Module, nn.Conv):
    """flax's, with large convolutions in forms that take a CPU less time."""

    conv_general_dilated: Any = conv_general_dilated


class Embed(Module, nn.Embed):
    """flax's."""


class LayerNorm(Module, nn.LayerNorm):
    """flax's."""
