"""Footprints, the patches that they cut from images, and the lags between their pixels.

A footprint is an array (P, 2) of offsets (dy, dx) in row-major order. A location is the pixel that a patch is centred
on, as its flat index y W + x, so that every pixel of every patch is one sum of two integers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped


def disc(radius: float) -> Int[np.ndarray, "P 2"]:
    """Offsets within `radius` px; a radius of 4 has 49 pixels."""
    return annulus(0, radius)


def annulus(inner: float, outer: float) -> Int[np.ndarray, "P 2"]:
    """Offsets at inner <= distance <= outer px, the neighbourhood that RX learns from."""
    offsets = square(2 * int(outer) + 1)
    distance_squared = (offsets**2).sum(-1)
    return offsets[(distance_squared >= inner**2) & (distance_squared <= outer**2)]


def square(side: int) -> Int[np.ndarray, "P 2"]:
    """Offsets of a square; of an even side the middle is the pixel below and right of the centre."""
    return np.stack(np.meshgrid(*2 * [np.arange(side) - side // 2], indexing="ij"), axis=-1).reshape(-1, 2)


def flat_offsets(offsets: Int[np.ndarray, "P 2"], width: int) -> Int[np.ndarray, "P"]:
    """Offsets between flat indices of an image of that width."""
    return offsets @ np.array([width, 1])


def extract(
    images: Shaped[Array, "*batch pixels"], locations: Int[Array, "*places"], flat: Int[np.ndarray, "P"]
) -> Shaped[Array, "..."]:
    """The patches (*batch, *places, P) of flattened images at the locations, which must hold them whole."""
    return images.at[..., locations[..., None] + flat].get(mode="promise_in_bounds")


def whole_patches(usable: Bool[np.ndarray, "H W"], offsets: Int[np.ndarray, "P 2"], share: float) -> np.ndarray:
    """Which pixels (H, W) can be the middle of a patch: usable themselves, the patch inside the image and at least
    `share` of it usable."""
    (top, left), (bottom, right) = -offsets.min(0), offsets.max(0)
    height, width = usable.shape
    whole = np.zeros_like(usable)
    if height <= top + bottom or width <= left + right:
        return whole
    inner = np.s_[top : height - bottom, left : width - right]
    rows, columns = height - top - bottom, width - left - right
    count = sum(usable[top + dy : top + dy + rows, left + dx : left + dx + columns].astype(int) for dy, dx in offsets)
    whole[inner] = usable[inner] & (count >= share * len(offsets))
    return whole


class Lags(NamedTuple):
    """The distinct lags between the pixels of a footprint, of which far fewer exist than pairs.

    lag: (dy, dx) with dy > 0, or dy = 0 and dx >= 0. Pixels i and j of a patch are lag[pair_lag[i, j]] apart, from the
    footprint's pixel pair_first[i, j] on.
    """

    lag: Int[np.ndarray, "L 2"]
    pair_lag: Int[np.ndarray, "P P"]
    pair_first: Int[np.ndarray, "P P"]


def pixel_lags(offsets: Int[np.ndarray, "P 2"]) -> Lags:
    """Every pair of pixels, by its lag and where that starts."""
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
    """The matrix of every patch from maps that hold, at each pixel, what belongs to it and the one a lag away."""
    pair = lags.pair_lag * products.shape[1] + flat[lags.pair_first]
    index = locations[..., None, None] + jnp.asarray(pair, locations.dtype)
    return products.reshape(-1).at[index].get(mode="promise_in_bounds")


def windows(maps: Shaped[Array, "B H W C"], side: int, stride: int) -> Shaped[Array, "B R S P"]:
    """Square windows of `side` on a grid of `stride`, from the first pixel on: their side^2 C numbers, row by row."""
    if side == 1:
        return maps[:, ::stride, ::stride]
    height, width = (length - side + 1 for length in maps.shape[1:3])
    parts = [maps[:, dy : dy + height : stride, dx : dx + width : stride] for dy in range(side) for dx in range(side)]
    return jnp.concatenate(parts, axis=-1)


def whole_windows(inside: Bool[Array, "B H W"], side: int, stride: int) -> Bool[Array, "B R S"]:
    """Which of the windows lie inside with every pixel."""
    window, strides = (1, side, side), (1, stride, stride)
    return jax.lax.reduce_window(inside, True, jax.lax.bitwise_and, window, strides, "VALID")


def between_windows(count: int, side: int, stride: int, size: int) -> Float[np.ndarray, "H R"]:
    """Weights that interpolate what is known at the middles of `count` windows to `size` pixels; constant beyond."""
    middles = np.arange(count) * stride + (side - 1) / 2
    return np.stack([np.interp(np.arange(size), middles, one) for one in np.eye(count)], axis=1)


def nearest_windows(count: int, side: int, stride: int, size: int) -> Float[np.ndarray, "H R"]:
    """Weights that give each of `size` pixels what is known at the window whose middle pixel is nearest."""
    middles = np.arange(count) * stride + side // 2
    return np.eye(count)[np.abs(np.arange(size)[:, None] - middles).argmin(axis=1)]
