"""The fast map (F18, Algorithm 2): filtering with the centred PSF, and interpolation along the tracks.

One filter per location gives a map of b in every frame and a single map of a; both are interpolated along the tracks by
cubic splines. (Linear interpolation would lose a tenth of the SNR, Keys' cubic convolution a fiftieth.)
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float, Int
from scipy.ndimage import distance_transform_edt

from pulmo_jax.core import geometry, patches, spline
from pulmo_jax.methods.paco.background import Background, Offsets, Program, Template, filters_at


class Field(NamedTuple):
    """Rectangle of h x w pixels whose patches lie within the frame; its locations are the pixels that carry a patch.

    Attributes:
        top: First row in the frame, px.
        left: First column in the frame, px.
        nearest: Flat index, within the rectangle, of the location nearest to each pixel.
        between: Whether the pixel and its neighbours to the right, below and diagonally below are all locations, so
            that splines interpolate between them.
    """

    top: int
    left: int
    nearest: Int[np.ndarray, "h w"]
    between: Bool[np.ndarray, "h w"]

    @classmethod
    def of(cls, whole: Bool[np.ndarray, "H W"], offsets: Int[np.ndarray, "P 2"]) -> "Field":
        """Construct the field of a patch footprint.

        Args:
            whole: Pixels on which a patch can be centred.
            offsets: Footprint of a patch (dy, dx), px.

        Returns:
            The field.
        """
        (top, left), (bottom, right) = -offsets.min(0), offsets.max(0)
        inner = whole[top : len(whole) - bottom, left : whole.shape[1] - right]
        row, column = distance_transform_edt(~inner, return_distances=False, return_indices=True)  # pyright: ignore
        padded = np.pad(inner, ((0, 1), (0, 1)))
        between = padded[:-1, :-1] & padded[1:, :-1] & padded[:-1, 1:] & padded[1:, 1:]
        return cls(int(top), int(left), row * inner.shape[1] + column, between)

    def locations(self, width: int, multiple: int) -> Int[np.ndarray, "N"]:
        """Return the flat frame indices of the rectangle's pixels, padded to a multiple by repeating the last one.

        Args:
            width: Width of the frames, px.
            multiple: Divisor of the number of indices.

        Returns:
            The indices.
        """
        rows, columns = self.nearest.shape
        index = (np.arange(rows)[:, None] + self.top) * width + np.arange(columns) + self.left
        return np.pad(index.ravel(), (0, -index.size % multiple), mode="edge").astype(np.int32)


@partial(jax.jit, static_argnames=("program",))
def filter_field(
    deviations: Float[Array, "T pixels"],
    background: Background,
    template: Template,
    chunks: Int[Array, "C N"],
    program: Program,
) -> tuple[Array, Array]:
    """Compute the matched filters of all locations; chunks are distributed over the devices.

    Args:
        deviations: Frames minus their temporal mean.
        background: Noise of the stack.
        template: PSF on a patch.
        chunks: Flat indices of the locations, in C chunks of N.
        program: Static settings.

    Returns:
        Filters (P, C N), and a with the state of the covariance (5, C N; see `background.Filters`).
    """

    def one_by_one(chunks: Array) -> tuple[Array, Array]:
        def of_chunk(locations: Array) -> tuple[Array, Array]:
            around = patches.extract(deviations, locations, program.flat_offsets)  # XLA removes it if unused
            weights, gram, state = filters_at(locations, around, background, template, program)
            return weights[..., 0].T, jnp.concatenate([gram[:, 0], state], axis=1).T

        return jax.lax.map(of_chunk, chunks)

    if program.n_devices > 1:
        mesh = jax.make_mesh((program.n_devices,), ("chunks",), axis_types=(AxisType.Auto,))
        spread = PartitionSpec("chunks")
        one_by_one = jax.shard_map(one_by_one, mesh=mesh, in_specs=spread, out_specs=spread, check_vma=False)
    weights, state = (jnp.moveaxis(part, 0, 1).reshape(part.shape[1], -1) for part in one_by_one(chunks))
    return weights, state


@partial(jax.jit, static_argnames=("program", "corner", "n_batch"), donate_argnames="sums")
def add_frames(
    sums: Float[Array, "3 pixels"],
    first: Int[Array, ""],
    deviations: Float[Array, "T H W"],
    weights: Float[Array, "P h w"],
    a_map: Float[Array, "h w"],
    between: Bool[Array, "h w"],
    nearest: Int[Array, "h w"],
    angles_deg: Float[Array, "T"],
    centre: Float[Array, "2"],
    program: Program,
    corner: tuple[int, int],
    n_batch: int,
) -> Float[Array, "3 pixels"]:
    """Add a, b and the number of usable frames of a batch of frames to the sums.

    The last batch starts early to have full size, and skips frames that are already summed.

    Args:
        sums: a, b and number of frames of the previous batches.
        first: First frame of the batch.
        deviations: Frames minus their temporal mean.
        weights: Matched filter of every pixel of the field.
        a_map: Map of a per frame.
        between: Pixels of `Field.between`, at which splines interpolate between locations.
        nearest: Nearest location to each pixel (`Field.nearest`).
        angles_deg: Rotation angle of each frame, degrees.
        centre: Centre of rotation (y, x), px.
        program: Static settings.
        corner: First pixel (y, x) of the field, px.
        n_batch: Number of frames per batch.

    Returns:
        The updated sums.
    """
    start = jnp.minimum(first, len(deviations) - n_batch)
    batch = jax.lax.dynamic_slice_in_dim(deviations, start, n_batch)
    b_maps = jax.vmap(splines, (0, None))(lay(weights, batch, program.offsets, corner), nearest)
    a_spline = splines(a_map, nearest)
    rows, columns = jnp.divmod(jnp.arange(sums.shape[1]), program.shape[1])
    tie_px = geometry.tie_tolerance_px(sums.dtype, max(program.shape))

    def add(sums: tuple[Array, ...], step: Array) -> tuple[tuple[Array, ...], None]:
        y, x = geometry.frame_position(rows, columns, angles_deg[start + step], centre)
        a, b, usable = interpolate((a_spline, b_maps[step]), y - corner[0], x - corner[1], between, tie_px)
        usable &= start + step >= first
        return (sums[0] + jnp.where(usable, a, 0), sums[1] + jnp.where(usable, b, 0), sums[2] + usable), None

    return jnp.stack(jax.lax.scan(add, tuple(sums), jnp.arange(n_batch))[0])


def lay(
    weights: Float[Array, "P h w"], frames: Float[Array, "T H W"], offsets: Offsets, corner: tuple[int, int]
) -> Float[Array, "T h w"]:
    """Apply the filter of every location to its patch in every frame.

    Args:
        weights: Matched filter of every pixel of the field.
        frames: Frames minus their temporal mean.
        offsets: Footprint of a patch (dy, dx), px.
        corner: First pixel (y, x) of the field, px.

    Returns:
        Maps of b.
    """
    height, width = weights.shape[1:]
    total = jnp.zeros((), frames.dtype)
    for weight, (dy, dx) in zip(weights, offsets, strict=True):
        top, left = corner[0] + dy, corner[1] + dx
        total += weight * frames[:, top : top + height, left : left + width]
    return total


def splines(image: Float[Array, "h w"], nearest: Int[Array, "h w"]) -> Float[Array, "h+3 w+3"]:
    """Compute spline coefficients, padded by 1 px at the low edges and 2 px at the high edges.

    Pixels that are not locations take the value of the nearest location, which avoids ringing of the splines.

    Args:
        image: Map on the field.
        nearest: Nearest location to each pixel (`Field.nearest`).

    Returns:
        The coefficients.
    """
    filled = image.reshape(-1).at[nearest].get(mode="promise_in_bounds")
    return jnp.pad(spline.coefficients(filled), (1, 2), mode="reflect")


def interpolate(
    coefficients: tuple[Array, Array],
    y: Float[Array, "M"],
    x: Float[Array, "M"],
    between: Bool[Array, "h w"],
    tie_px: float,
) -> tuple[Array, Array, Array]:
    """Evaluate two splines at positions in the field.

    Args:
        coefficients: Padded coefficients of both (see `splines`).
        y: Rows, px of the field.
        x: Columns, px of the field.
        between: Pixels at which splines interpolate between locations.
        tie_px: Tolerance for rounding a position to a pixel, px.

    Returns:
        Both values, and whether they are interpolated between locations.
    """
    height, width = between.shape
    row, column = jnp.floor(y + tie_px), jnp.floor(x + tie_px)
    along_y, along_x = spline.weights(y - row), spline.weights(x - column)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    row, column = jnp.where(inside, row, 0).astype(jnp.int32), jnp.where(inside, column, 0).astype(jnp.int32)
    usable = inside & between.reshape(-1).at[row * width + column].get(mode="promise_in_bounds")
    first, second = (image.reshape(-1) for image in coefficients)
    corner = row * (width + 3) + column
    a = b = jnp.zeros_like(y)
    for dy in range(4):
        for dx in range(4):
            weight, tap = along_y[dy] * along_x[dx], corner + dy * (width + 3) + dx
            a += weight * first.at[tap].get(mode="promise_in_bounds")
            b += weight * second.at[tap].get(mode="promise_in_bounds")
    return a, b, usable
