"""An image on the device, strip by strip: normalised as in training, and cut into batches of tiles.

Pixels travel once and in their own dtype. Rows that two strips share stay on the device.
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
from pulmo_jax.data.transforms import Preprocessing

TILES = PartitionSpec("tiles")
AS_STORED = ("uint8", "int8", "uint16", "int16", "float16", "float32")  # these travel as they are, others as float32

Constants = dict[str, Float[np.ndarray, "_"] | Float[Array, "_"]]


@cache
def on_devices(spec: PartitionSpec) -> NamedSharding:
    """Over the devices of this process: batches of tiles divided, or all on each."""
    return NamedSharding(Mesh(np.array(jax.local_devices()), ("tiles",), axis_types=(AxisType.Auto,)), spec)


def everywhere(array: Shaped[np.ndarray, "..."] | Array) -> Array:
    """On every device of this process."""
    return jax.device_put(array, on_devices(PartitionSpec()))


def cut_batches(
    positions: Iterable[Int[np.ndarray, "_ 2"]],
    batch_size: int,
    pixels: Shaped[np.ndarray, "H W C"],
    foreground: Bool[np.ndarray, "H W"] | None,
    grid: Grid,
    how: Preprocessing,
) -> Iterator[tuple[Int[np.ndarray, "_ 2"], Float[Array, "B P P C"]]]:
    """(positions, normalised tiles) of each batch; a batch with fewer positions repeats its last tile.

    positions: batches in the order of `grid.positions`; a batch may begin in one strip and end in another.
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
    array: Shaped[np.ndarray, "H W ..."], top: int, rows: int, width: int
) -> Shaped[np.ndarray, "rows width ..."]:
    """Rows of the array from `top` on, in a dtype that travels; beyond its ends the last rows and columns repeated."""
    dtype = array.dtype.name if array.dtype.name in (*AS_STORED, "bool") else "float32"
    out = np.empty((rows, width, *array.shape[2:]), dtype)
    some = (
        array[top : top + rows]
        if top + rows <= len(array)
        else array[np.minimum(np.arange(top, top + rows), len(array) - 1)]
    )
    with np.errstate(over="ignore"):  # numbers beyond float32 are infinite, that is, missing
        out[:, : array.shape[1]] = some
    out[:, array.shape[1] :] = out[:, array.shape[1] - 1 : array.shape[1]]
    return out


def constants_of(how: Preprocessing) -> Constants:
    """Arguments of `normalised`."""
    return {name: np.asarray(getattr(how, name), np.float32) for name in ("offset", "scale", "fill", "clip")}


def normalised(
    pixels: Num[Array, "h w C"], foreground: Bool[Array, "h w"] | None, constants: Constants
) -> Float[Array, "h w C"]:
    """`data.transforms.preprocess` on the device, with the same bits on a CPU."""
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
    """The last `keep` rows of a strip, and below them new rows, normalised."""
    new = normalised(pixels, foreground, constants)
    return new if strip is None else jnp.concatenate([strip[-keep:], new])


@jax.jit
def cut_tiles(
    tiles: Float[Array, "B P P C"],
    strip: Float[Array, "h w C"],
    positions: Int[Array, "B 2"],
    here: Bool[Array, "B"],
) -> Float[Array, "B P P C"]:
    """The tiles, those that lie in this strip cut from it."""
    shape = tiles.shape[1:]
    found = jax.vmap(lambda place: lax.dynamic_slice(strip, (*place, 0), shape))(positions)
    return lax.with_sharding_constraint(jnp.where(here[:, None, None, None], found, tiles), on_devices(TILES))
