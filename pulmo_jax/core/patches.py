"""Footprints, patch extraction, and the lags between the pixels of a patch.

A footprint is an array (P, 2) of offsets (dy, dx) in row-major order. A location is the flat index y W + x of the pixel
on which a patch is centred; the index of any pixel of a patch is then the sum of two integers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped


def disc(radius: float) -> Int[np.ndarray, "P 2"]:
    """Footprint of a disc.

    Args:
        radius: Radius in pixels; a radius of 4 has 49 pixels.

    Returns:
        Offsets (dy, dx) at a distance of at most `radius`.

    Example:
        >>> disc(1).tolist()
        [[-1, 0], [0, -1], [0, 0], [0, 1], [1, 0]]
        >>> len(disc(4))
        49
    """
    return annulus(0, radius)


def annulus(inner: float, outer: float) -> Int[np.ndarray, "P 2"]:
    """Footprint of an annulus, the neighbourhood from which the RX detector estimates its statistics.

    Args:
        inner: Inner radius in pixels, inclusive.
        outer: Outer radius in pixels, inclusive.

    Returns:
        Offsets (dy, dx) with inner <= distance <= outer.
    """
    offsets = square(2 * int(outer) + 1)
    distance_squared = (offsets**2).sum(-1)
    return offsets[(distance_squared >= inner**2) & (distance_squared <= outer**2)]


def square(side: int) -> Int[np.ndarray, "P 2"]:
    """Footprint of a square.

    Args:
        side: Side in pixels. For an even side the patch centre is the pixel below and to the right of the middle.

    Returns:
        Offsets (dy, dx).
    """
    return np.stack(np.meshgrid(*2 * [np.arange(side) - side // 2], indexing="ij"), axis=-1).reshape(-1, 2)


def flat_offsets(offsets: Int[np.ndarray, "P 2"], width: int) -> Int[np.ndarray, "P"]:
    """Convert offsets (dy, dx) to differences of flat indices.

    Args:
        offsets: Footprint.
        width: Width of the image in pixels.

    Returns:
        Differences of flat indices.
    """
    return offsets @ np.array([width, 1])


def extract(
    images: Shaped[Array, "*batch pixels"], locations: Int[Array, "*places"], flat: Int[np.ndarray, "P"]
) -> Shaped[Array, "..."]:
    """Extract patches from flattened images.

    Args:
        images: Images with their pixels flattened.
        locations: Flat indices of the patch centres; every patch must lie inside the image (not checked).
        flat: Footprint as differences of flat indices.

    Returns:
        Patches of shape (*batch, *places, P).
    """
    return images.at[..., locations[..., None] + flat].get(mode="promise_in_bounds")


def whole_patches(
    usable: Bool[np.ndarray, "H W"] | Bool[Array, "H W"], offsets: Int[np.ndarray, "P 2"], share: float
) -> Bool[np.ndarray, "H W"] | Bool[Array, "H W"]:
    """Find the pixels on which a complete patch can be centred.

    Args:
        usable: Pixels that may be used; a JAX array may be traced.
        offsets: Footprint of the patch.
        share: Smallest fraction of the patch that must be usable.

    Returns:
        Mask of usable pixels whose patch lies inside the image and is usable in at least `share` of its pixels.
    """
    (top, left), (bottom, right) = -offsets.min(0), offsets.max(0)
    height, width = usable.shape
    rows, columns = height - top - bottom, width - left - right
    if rows <= 0 or columns <= 0:
        return np.zeros((height, width), bool)
    count = sum(usable[top + dy : top + dy + rows, left + dx : left + dx + columns].astype(int) for dy, dx in offsets)
    complete = usable[top : height - bottom, left : width - right] & (count >= share * len(offsets))
    pad = jnp.pad if isinstance(usable, Array) else np.pad
    return pad(complete, ((top, bottom), (left, right)))


class Lags(NamedTuple):
    """Distinct lags between the pixels of a footprint; there are far fewer lags than pairs of pixels.

    Attributes:
        lag: Offsets (dy, dx) with dy > 0, or dy = 0 and dx >= 0.
        pair_lag: Index of the lag between pixels i and j of the footprint.
        pair_first: Index of the pixel, i or j, at which that lag starts.
    """

    lag: Int[np.ndarray, "L 2"]
    pair_lag: Int[np.ndarray, "P P"]
    pair_first: Int[np.ndarray, "P P"]


def pixel_lags(offsets: Int[np.ndarray, "P 2"]) -> Lags:
    """Index all pairs of pixels of a footprint by their lag.

    Args:
        offsets: Footprint.

    Returns:
        The distinct lags, and for each pair of pixels the index of its lag and of its first pixel.
    """
    difference = offsets[None] - offsets[:, None]  # from i to j
    backward = (difference[..., 0] < 0) | ((difference[..., 0] == 0) & (difference[..., 1] < 0))
    forward = np.where(backward[..., None], -difference, difference)
    lag, pair_lag = np.unique(forward.reshape(-1, 2), axis=0, return_inverse=True)
    first = np.arange(len(offsets))
    return Lags(lag, pair_lag.reshape(backward.shape), np.where(backward, first[None], first[:, None]))


def gather_pairs(
    products: Shaped[Array, "L pixels"],
    locations: Int[Array, "*places"],
    lags: Lags,
    flat: Int[np.ndarray, "P"],
) -> Shaped[Array, "*places P P"]:
    """Assemble the P x P matrix of each patch from maps of lagged products.

    Args:
        products: For each lag, the product of every pixel with the pixel one lag away.
        locations: Flat indices of the patch centres.
        lags: Lags of the footprint.
        flat: Footprint as differences of flat indices.

    Returns:
        One matrix for each location.
    """
    pair = lags.pair_lag * products.shape[1] + flat[lags.pair_first]
    index = locations[..., None, None] + jnp.asarray(pair, locations.dtype)
    return products.reshape(-1).at[index].get(mode="promise_in_bounds")


def windows(maps: Shaped[Array, "B H W C"], side: int, stride: int) -> Shaped[Array, "B R S P"]:
    """Extract square windows on a regular grid that starts at the first pixel.

    Args:
        maps: Images or feature maps.
        side: Side of a window in pixels.
        stride: Grid spacing in pixels.

    Returns:
        The side^2 C values of each window, in row-major order.
    """
    if side == 1:
        return maps[:, ::stride, ::stride]
    height, width = (length - side + 1 for length in maps.shape[1:3])
    parts = [maps[:, dy : dy + height : stride, dx : dx + width : stride] for dy in range(side) for dx in range(side)]
    return jnp.concatenate(parts, axis=-1)


def whole_windows(inside: Bool[Array, "B H W"], side: int, stride: int) -> Bool[Array, "B R S"]:
    """Find the windows that lie entirely inside a mask.

    Args:
        inside: Mask of each image.
        side: Side of a window in pixels.
        stride: Grid spacing in pixels.

    Returns:
        True for each window of the grid whose pixels are all inside.
    """
    window, strides = (1, side, side), (1, stride, stride)
    return jax.lax.reduce_window(inside, True, jax.lax.bitwise_and, window, strides, "VALID")


def interpolation_weights(count: int, side: int, stride: int, size: int) -> Float[np.ndarray, "H R"]:
    """Weights that interpolate linearly between the centres of windows along one axis; constant beyond the outermost
    ones.

    Args:
        count: Number of windows R.
        side: Side of a window in pixels.
        stride: Grid spacing in pixels.
        size: Length H of the axis in pixels.

    Returns:
        Matrix that maps R window values to H pixels.
    """
    middles = np.arange(count) * stride + (side - 1) / 2
    return np.stack([np.interp(np.arange(size), middles, unit_value) for unit_value in np.eye(count)], axis=1)


def nearest_weights(count: int, side: int, stride: int, size: int) -> Float[np.ndarray, "H R"]:
    """Weights that assign to each pixel along one axis the value of the window whose central pixel is nearest.

    Args:
        count: Number of windows R.
        side: Side of a window in pixels.
        stride: Grid spacing in pixels.
        size: Length H of the axis in pixels.

    Returns:
        Matrix that maps R window values to H pixels.
    """
    middles = np.arange(count) * stride + side // 2
    return np.eye(count)[np.abs(np.arange(size)[:, None] - middles).argmin(axis=1)]
