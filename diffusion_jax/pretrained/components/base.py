"""What it takes to read and to write one released class of network."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from diffusion_jax.core.types import Params
from diffusion_jax.io.mapping import Row


class Component(NamedTuple):
    """One class of diffusers or transformers, in our terms.

    Configurations are frozen dataclasses with `build(dtype=, param_dtype=)`, which makes the
    module, so the functions here deal with plain values, shapes and names only.

    Attributes:
      read: the parsed config.json -> our configuration; raises `UnsupportedOption` for a value
        that we do not compute and for a key that nobody knows.
      write: our configuration -> a config.json that the other library reads; read(write(c)) == c.
      shapes: our configuration -> the parameter tree, of float32 `jax.ShapeDtypeStruct`s.
      rows: (our configuration, names of the file's tensors) -> the name table. The names tell
        layouts of one class apart, for example old attention names; an empty collection asks
        for the layout to write.
      ignore: globs of tensors that files may hold and nobody needs, "*.position_ids".
      averages: a file's tensors -> those with the moving averages of its weights in their place;
        raises MappingError if it does not hold them. None where files hold one set of weights.
    """

    read: Callable[[Mapping[str, Any]], Any]
    write: Callable[[Any], dict[str, Any]]
    shapes: Callable[[Any], Params]
    rows: Callable[[Any, Collection[str]], Sequence[Row]]
    ignore: tuple[str, ...] = ()
    averages: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
