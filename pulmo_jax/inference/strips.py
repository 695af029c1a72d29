"""Strips of an image on the device: normalised as in training, and cut into batches of tiles.

Each pixel is transferred once, in its own dtype. Rows shared by two strips stay on the device.
"""

from collections.abc import Iterable, Iterator
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

from pulmo_jax.core.tiling import Grid
from pulmo_jax.data.file_rows import FileRows, Rows
from pulmo_jax.data.transforms import Preprocessing

TILES = PartitionSpec("tiles")
AS_STORED = ("uint8", "int8", "uint16", "int16", "float16", "float32")  # transferred unchanged; others as float32

Constants = dict[str, Float[np.ndarray, "_"] | Float[Array, "_"]]


@cache
def on_devices(spec: PartitionSpec) -> NamedSharding:
    """Sharding over the devices of this process: batches of tiles are divided, other arrays replicated."""
    return NamedSharding(Mesh(np.array(jax.local_devices()), ("tiles",), axis_types=(AxisType.Auto,)), spec)


def everywhere(array: Shaped[np.ndarray, "..."] | Array) -> Array:
    """Copy an array to every device of this process."""
    return jax.device_put(array, on_devices(PartitionSpec()))


def cut_batches(
    positions: Iterable[Int[np.ndarray, "_ 2"]],
    batch_size: int,
    pixels: Rows,
    foreground: Bool[np.ndarray, "H W"] | None,
    grid: Grid,
    how: Preprocessing,
) -> Iterator[tuple[Int[np.ndarray, "_ 2"], Float[Array, "B P P C"]]]:
    """Cut batches of normalised tiles from an image.

    Args:
        positions: Batches of tile positions (y, x), px, in the order of `grid.positions`; a batch may start in one
            strip and end in another.
        batch_size: Number of tiles per batch.
        pixels: Pixels in the units of the training images.
        foreground: Foreground; None: all pixels.
        grid: Grid of the tiles and strips.
        how: Preprocessing of the run.

    Yields:
        Positions and tiles of each batch; a batch with fewer positions is padded with its last tile.
    """
    constants = constants_of(how)
    tiles = jnp.zeros((batch_size, grid.tile, grid.tile, pixels.shape[2]), jnp.float32, device=on_devices(TILES))

    def upload(top: int, rows: int) -> tuple[Array, Array | None]:
        inside = None if foreground is None else everywhere(padded(foreground, top, rows, grid.width))
        return everywhere(padded(pixels, top, rows, grid.width)), inside

    strip, at = None, -1
    for some in positions:
        filled = np.pad(some, ((0, batch_size - len(some)), (0, 0)), mode="edge")
        strips = grid.strip_of(filled)
        for k in np.unique(strips).tolist():
            if strip is None or k > at + 1:
                strip = extended(None, *upload(k * grid.rows, grid.tile), constants, keep=0)
            if k != at:
                below = upload(k * grid.rows + grid.tile, grid.rows)
                strip, at = extended(strip, *below, constants, keep=grid.tile), k
            tiles = cut_tiles(tiles, strip, (filled - (k * grid.rows, 0)).astype(np.int32), strips == k)
        yield some, tiles


def padded(
    array: Shaped[np.ndarray, "H W ..."] | FileRows, top: int, rows: int, width: int
) -> Shaped[np.ndarray, "rows width ..."]:
    """Copy rows of an array, cast to a dtype suitable for transfer (`AS_STORED`, otherwise float32), and pad it.

    Args:
        array: Image or mask.
        top: First row.
        rows: Number of rows.
        width: Number of columns, at least that of the array.

    Returns:
        The rows; beyond the array, its last row and column are repeated.
    """
    dtype = array.dtype.name if array.dtype.name in (*AS_STORED, "bool") else "float32"
    out = np.empty((rows, width, *array.shape[2:]), dtype)
    some = (
        array[top : top + rows]
        if top + rows <= len(array)
        else array[np.minimum(np.arange(top, top + rows), len(array) - 1)]
    )
    with np.errstate(over="ignore"):  # values beyond float32 become infinite and are treated as missing
        out[:, : array.shape[1]] = some
    out[:, array.shape[1] :] = out[:, array.shape[1] - 1 : array.shape[1]]
    return out


def constants_of(how: Preprocessing) -> Constants:
    """Constants of the normalisation: offset, scale, fill value and clip limits."""
    return {name: np.asarray(getattr(how, name), np.float32) for name in ("offset", "scale", "fill", "clip")}


def normalised(
    pixels: Num[Array, "h w C"], foreground: Bool[Array, "h w"] | None, constants: Constants
) -> Float[Array, "h w C"]:
    """Normalise pixels as in `data.transforms.preprocess`, on the device; bitwise equal on a CPU.

    Args:
        pixels: Pixels in the units of the training images.
        foreground: Foreground; None: all pixels.
        constants: Result of `constants_of`.

    Returns:
        Normalised pixels; the fill value where invalid.
    """
    pixels = pixels.astype(jnp.float32)
    values = jnp.clip((pixels - constants["offset"]) / constants["scale"], *constants["clip"])
    valid = jnp.isfinite(pixels).all(-1)
    valid = valid if foreground is None else valid & foreground
    return jnp.where(valid[..., None], values, constants["fill"])


@partial(jax.jit, static_argnames="keep")
def extended(
    strip: Float[Array, "h w C"] | None,
    pixels: Num[Array, "r w C"],
    foreground: Bool[Array, "r w"] | None,
    constants: Constants,
    *,
    keep: int,
) -> Float[Array, "_ w C"]:
    """Append new, normalised rows to the last rows of a strip.

    Args:
        strip: Strip; None: only the new rows are returned.
        pixels: New rows in the units of the training images.
        foreground: Their foreground; None: all pixels.
        constants: Result of `constants_of`.
        keep: Number of rows of the strip to keep.

    Returns:
        The extended strip.
    """
    new = normalised(pixels, foreground, constants)
    return new if strip is None else jnp.concatenate([strip[-keep:], new])


@jax.jit
def cut_tiles(
    tiles: Float[Array, "B P P C"],
    strip: Float[Array, "h w C"],
    positions: Int[Array, "B 2"],
    here: Bool[Array, "B"],
) -> Float[Array, "B P P C"]:
    """Cut the tiles that lie in a strip.

    Args:
        tiles: Tiles of the batch so far.
        strip: Normalised strip.
        positions: Position (y, x) of each tile in the strip, px.
        here: Whether a tile lies in this strip; other tiles are unchanged.

    Returns:
        The updated tiles.
    """
    shape = tiles.shape[1:]
    found = jax.vmap(lambda place: lax.dynamic_slice(strip, (*place, 0), shape))(positions)
    return lax.with_sharding_constraint(jnp.where(here[:, None, None, None], found, tiles), on_devices(TILES))
