"""Less memory for autoencoders: one image at a time, and one tile of an image at a time."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.core.types import Array


def sliced(fn: Callable[..., Any]) -> Callable[..., Any]:
    """fn, computed for one entry of the batch after the other.

    It equals fn to rounding wherever fn treats the entries of a batch independently, and needs
    the memory of a batch of one besides its arguments and results.

    Args:
      fn: takes arrays, or trees of them, of which every one is [B, ...]; returns the same kind.

    Source: none; a convention of this library.
    """

    def one(args):
        out = fn(*jax.tree.map(lambda a: a[None], args))
        return jax.tree.map(lambda a: a[0], out)

    return lambda *args: jax.lax.map(one, args)


def tiled(
    fn: Callable[[Array], Array], *, tile: int, overlap: int, scale: int | float | Fraction
) -> Callable[[Array], Array]:
    """fn, computed for one overlapping tile of an image after the other.

    Tiles begin every `tile - overlap` pixels, those at the far edges are smaller. Over the
    e = overlap · scale pixels of the result that a tile shares with the one above it, and then
    with the one to the left, the k-th pixel is

        (1 - k / e) · (that of the other tile, blended already) + k / e · (that of the tile);

    e is the whole tile where that is smaller. An image that fits into a tile is given to fn as it
    is. Norms and attention inside of fn see a tile only, so the result is that of the whole image
    only if fn is local.

    Beside argument and result, memory is that of fn on one tile. It compiles fn once for every
    shape of tile: with an overlap of up to half a tile these are up to three a side, nine in all.

    Args:
      fn: [B, H, W, C] -> [B, scale · H, scale · W, C'], floating point.
      tile: height and width of a tile in pixels of the argument.
      overlap: pixels of the argument that neighbours share, in [0, tile).
      scale: of fn, above 0: 8 for a decoder that doubles three times, Fraction(1, 8) for its
        encoder. It must take `tile` and `overlap` to whole numbers.

    Returns:
      [B, H, W, C] -> [B, scale · H, scale · W, C'].

    Raises:
      ValueError: if a number is out of range or not whole; from the result, if its argument is
        not of rank 4 or of a size that is not whole after the scale, or fn gives another shape.

    Source: diffusers 0.42.1, `AutoencoderKL.tiled_decode` and `_tiled_encode`, with tile =
    `tile_latent_min_size` and `tile_sample_min_size`, and overlap = tile · `tile_overlap_factor`
    where that is whole. Its `AutoencoderTiny` blends by another rule, which is not here.
    """
    plan = _Plan(tile, overlap, _scale(scale))
    plan.check()

    def call(x: Array) -> Array:
        if x.ndim != 4:
            raise ValueError(f"tiles are cut from [B, H, W, C], got {x.shape}")
        for name, size in (("height", x.shape[1]), ("width", x.shape[2])):
            plan.out(size, f"the {name}")
        if max(x.shape[1:3]) <= tile:
            return _checked(fn, x, plan)
        return _by_tiles(fn, x, plan)

    return call


class _Plan(NamedTuple):
    tile: int
    overlap: int
    scale: Fraction

    def check(self) -> None:
        for name in ("tile", "overlap"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} must be an int, got {getattr(self, name)!r}")
        if self.tile < 1:
            raise ValueError(f"tile must be at least 1, got {self.tile}")
        if not 0 <= self.overlap < self.tile:
            raise ValueError(f"overlap must lie in [0, tile = {self.tile}), got {self.overlap}")
        self.out(self.tile, "tile")
        self.out(self.overlap, "overlap")

    def out(self, size: int, name: str) -> int:
        """Pixels of the result to so many of the argument."""
        scaled = size * self.scale
        if scaled.denominator != 1:
            raise ValueError(
                f"{name} must be a multiple of {self.scale.denominator}, so that it is whole "
                f"after the scale of {self.scale}, got {size}"
            )
        return scaled.numerator


class _Run(NamedTuple):
    """Tiles of one size that follow each other along a side.

    Attributes:
      start: of the first tile, in pixels of the argument.
      count: number of tiles.
      taken: of a tile, in pixels of the argument.
      size: of a tile, in pixels of the result, as are the next two.
      core: what is kept of a tile, up to the next one.
      shared: with the tile before.
    """

    start: int
    count: int
    taken: int
    size: int
    core: int
    shared: int


def _scale(scale: int | float | Fraction) -> Fraction:
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be above 0 and finite, got {scale}")
    return Fraction(scale)


def _runs(side: int, plan: _Plan) -> list[_Run]:
    stride = plan.tile - plan.overlap
    starts: dict[int, list[int]] = {}
    for start in range(0, side, stride):
        starts.setdefault(min(plan.tile, side - start), []).append(start)
    runs = []
    for taken, at in starts.items():
        size = plan.out(taken, "a tile")
        core, shared = (min(size, plan.out(n, "a tile")) for n in (stride, plan.overlap))
        runs.append(_Run(at[0], len(at), taken, size, core, shared))
    return runs


def _checked(fn: Callable[[Array], Array], x: Array, plan: _Plan) -> Array:
    out = fn(x)
    expected = (x.shape[0], *(plan.out(size, "a tile") for size in x.shape[1:3]))
    if out.ndim != 4 or out.shape[:3] != expected or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(
            f"at the scale of {plan.scale} the function must give floating point numbers of "
            f"[{', '.join(map(str, expected))}, C] for {x.shape}, got {out.dtype} of {out.shape}"
        )
    return out


def _blend(before: Array, tile: Array, axis: int, first: Array) -> Array:
    """Ramps from `before` to the tile, along an axis, over as many pixels as `before` has.

    `first` says that there is no tile before; its zeros then stand for nothing.
    """
    shared = before.shape[axis]
    if shared == 0:
        return tile
    head, rest = jnp.split(tile, [shared], axis)
    weight = jnp.where(first, 1.0, jnp.arange(shared, dtype=jnp.float32) / shared)
    weight = jnp.expand_dims(weight, [a for a in range(4) if a != axis])
    wide = jnp.promote_types(tile.dtype, jnp.float32)
    before, head = before.astype(wide), head.astype(wide)
    # In this form tiles that agree come out as they are.
    head = (before + (head - before) * weight).astype(tile.dtype)
    return jnp.concatenate([head, rest], axis)


def _last(x: Array, count: int, axis: int) -> Array:
    return jax.lax.slice_in_dim(x, x.shape[axis] - count, x.shape[axis], axis=axis)


def _joined(parts: Array, axis: int) -> Array:
    """[N, ...] -> the N parts one after the other along an axis of theirs."""
    parts = jnp.moveaxis(parts, 0, axis)
    return parts.reshape(
        parts.shape[:axis] + (parts.shape[axis] * parts.shape[axis + 1],) + parts.shape[axis + 2 :]
    )


def _by_tiles(fn: Callable[[Array], Array], x: Array, plan: _Plan) -> Array:
    rows, columns = (_runs(side, plan) for side in x.shape[1:3])
    stride = plan.tile - plan.overlap
    largest = (x.shape[0], rows[0].taken, columns[0].taken, x.shape[3])
    out = jax.eval_shape(lambda a: _checked(fn, a, plan), jax.ShapeDtypeStruct(largest, x.dtype))
    batch, channels = out.shape[0], out.shape[3]

    def one_tile(row, y, column, above, left, at):
        tile = jax.lax.dynamic_slice(
            x, (0, y, at, 0), (x.shape[0], row.taken, column.taken, x.shape[3])
        )
        tile = _blend(above, _checked(fn, tile, plan), 1, y == 0)
        return _blend(left, tile, 2, at == 0)

    def one_row(row, aboves, y):
        """aboves: for each run of columns [count, B, shared, size, C'] of the row above."""
        left = jnp.zeros((batch, row.size, columns[0].shared, channels), out.dtype)
        cores, belows = [], []
        for column, above in zip(columns, aboves, strict=True):

            def step(left, told, column=column):
                tile = one_tile(row, y, column, told[1], left, told[0])
                core = tile[:, : row.core, : column.core]
                return _last(tile, column.shared, 2), (core, _last(tile, row.shared, 1))

            ats = column.start + stride * jnp.arange(column.count)
            left, (core, below) = jax.lax.scan(step, _last(left, column.shared, 2), (ats, above))
            cores.append(_joined(core, 2))
            belows.append(below)
        return tuple(belows), jnp.concatenate(cores, axis=2)

    aboves = tuple(
        jnp.zeros((column.count, batch, rows[0].shared, column.size, channels), out.dtype)
        for column in columns
    )
    done = []
    for row in rows:
        aboves = tuple(_last(above, row.shared, 2) for above in aboves)
        ys = row.start + stride * jnp.arange(row.count)
        aboves, core = jax.lax.scan(lambda a, y, row=row: one_row(row, a, y), aboves, ys)
        done.append(_joined(core, 1))
    return jnp.concatenate(done, axis=1)
