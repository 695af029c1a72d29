"""Random augmentation of images and their landmarks.

Geometric: a random affine map of each image, sampled bilinearly, and left-right reflection with exchanged landmarks.
Intensity: a random gamma, a smooth additive field and noise, which leave the landmarks unchanged. All functions are
deterministic in their key and run on the device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from pulmo_jax.core.contrast import moderate
from pulmo_jax.core.warps import bilinear, pixel_centres

CUT = 2.5  # truncation of the normal deviates, in sd; keeps the anatomy inside the image
FIELD_NODES = 4  # nodes of the smooth field along a side


class Affine(NamedTuple):
    """Affine map from pixels q of the new image to those of the original: centre + matrix (q - centre) + shift.

    Attributes:
        matrix: Linear part.
        shift: Translation (y, x) in pixels.
    """

    matrix: Float[Array, "*B 2 2"]
    shift: Float[Array, "*B 2"]


def random_affine(
    key: Key[Array, ""],
    count: int,
    side: int,
    *,
    rotation_deg: float,
    scale: float,
    aspect: float,
    shear: float,
    shift: float,
) -> Affine:
    """Draw independent random affine maps.

    Parameters are drawn from normal distributions truncated at 2.5 standard deviations.

    Args:
        key: Random key.
        count: Number of maps B.
        side: Side of the images in pixels.
        rotation_deg: Standard deviation of the rotation, in degrees.
        scale: Standard deviation of the logarithm of the scale.
        aspect: Standard deviation of the logarithm of the ratio of height to width.
        shear: Standard deviation of the shear.
        shift: Standard deviation of each component of the translation, in sides.

    Returns:
        The maps.
    """
    noise, noise_shift = jax.random.split(key)
    deviates = jax.random.truncated_normal(noise, -CUT, CUT, (4, count))
    angle, size = jnp.deg2rad(rotation_deg) * deviates[0], jnp.exp(scale * deviates[1])
    ratio, slant = jnp.exp(0.5 * aspect * deviates[2]), shear * deviates[3]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    rotation = jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], -2)
    stretch = jnp.stack([jnp.stack([ratio, ratio * slant], -1), jnp.stack([0 * slant, 1 / ratio], -1)], -2)
    offsets = shift * side * jax.random.truncated_normal(noise_shift, -CUT, CUT, (count, 2))
    return Affine(size[:, None, None] * rotation @ stretch, offsets)


def warp_images(images: Float[Array, "B S S"], affine: Affine) -> Float[Array, "B S S"]:
    """Resample images under affine maps by bilinear interpolation; edges are padded with the nearest pixel.

    Args:
        images: B square images.
        affine: One map per image.

    Returns:
        Warped images.
    """
    side = images.shape[-1]
    centre = (side - 1) / 2
    q = pixel_centres(side, side) - centre
    source = jnp.einsum("bij,yxj->byxi", affine.matrix, q) + affine.shift[:, None, None] + centre
    return jax.vmap(bilinear)(images, source)


def warp_labelled(
    images: Float[Array, "B S S C"], codes: UInt8[Array, "B S S"], affine: Affine, outside: int
) -> tuple[Float[Array, "B S S C"], UInt8[Array, "B S S"]]:
    """Resample images bilinearly and the codes of their pixels by the nearest neighbour, under the same affine maps.

    Args:
        images: B square images; edges are padded with the nearest pixel.
        codes: Codes of their pixels.
        affine: One map per image.
        outside: Code of pixels from outside the image.

    Returns:
        Warped images and codes.
    """
    side = images.shape[1]
    centre = (side - 1) / 2
    q = jnp.concatenate([pixel_centres(side, side) - centre, jnp.ones((side, side, 1))], -1)
    # The shift is a column of the matrix: on a CPU, XLA would compute its random deviates again for every pixel.
    matrix = jnp.concatenate([affine.matrix, affine.shift[..., None] + centre], -1)
    source = jnp.einsum("bij,yxj->byxi", matrix, q, precision=jax.lax.Precision.HIGHEST)
    low = jnp.floor(source)
    part = source - low
    y, x = (jnp.clip(low[..., i].astype(jnp.int32) + jnp.arange(2)[:, None, None, None], 0, side - 1) for i in (0, 1))
    flat = images.reshape(len(images), side * side, -1)
    corners = [[jax.vmap(lambda i, at: i[at])(flat, y[i] * side + x[j]) for j in (0, 1)] for i in (0, 1)]
    along_y, along_x = part[..., :1], part[..., 1:]
    top, bottom = (row[0] + along_x * (row[1] - row[0]) for row in corners)
    nearest = jnp.round(source).astype(jnp.int32)
    known = ((nearest >= 0) & (nearest < side)).all(-1)
    at = jnp.clip(nearest, 0, side - 1)
    moved = jax.vmap(lambda c, at: c[at])(codes.reshape(len(codes), -1), at[..., 0] * side + at[..., 1])
    return top + along_y * (bottom - top), jnp.where(known, moved, jnp.uint8(outside))


def random_symmetry(
    key: Key[Array, ""], images: Float[Array, "B S S C"], codes: UInt8[Array, "B S S"], *, turns: bool
) -> tuple[Float[Array, "B S S C"], UInt8[Array, "B S S"]]:
    """Reflect half of the images left to right; with `turns`, also top to bottom and along the diagonal.

    Args:
        key: Random key.
        images: B square images.
        codes: Codes of their pixels.
        turns: Whether to draw among all eight symmetries of the square.

    Returns:
        Images and codes.
    """
    coins = jax.random.bernoulli(key, 0.5, (3, len(images)))

    def apply(array: Array) -> Array:
        x, y, diagonal = (coin.reshape(-1, *(1,) * (array.ndim - 1)) for coin in coins)
        array = jnp.where(x, array[:, :, ::-1], array)
        if not turns:
            return array
        array = jnp.where(y, array[:, ::-1], array)
        return jnp.where(diagonal, jnp.swapaxes(array, 1, 2), array)

    return apply(images), apply(codes)


def warp_points(points: Float[Array, "B K 2"], affine: Affine, side: int) -> Float[Array, "B K 2"]:
    """Move points with their images: the inverse of the map that `warp_images` samples.

    Args:
        points: Points (y, x) in pixels of the original images.
        affine: One map per image.
        side: Side of the images in pixels.

    Returns:
        Points in pixels of the warped images.
    """
    centre = (side - 1) / 2
    a, b, c, d = (affine.matrix[:, i, j, None] for i in (0, 1) for j in (0, 1))
    dy, dx = jnp.moveaxis(points - centre - affine.shift[:, None], -1, 0)
    return jnp.stack([d * dy - b * dx, a * dx - c * dy], -1) / (a * d - b * c)[..., None] + centre


def mirror_points(points: Float[Array, "B K 2"], side: int, mirror: Int[Array, "K"]) -> Float[Array, "B K 2"]:
    """Reflect points left to right and exchange paired landmarks.

    Args:
        points: Points (y, x) in pixels.
        side: Side of the images in pixels.
        mirror: Index of the landmark that becomes landmark k in the reflected image.

    Returns:
        Points in the reflected images.
    """
    swapped = points[:, mirror]
    return jnp.stack([swapped[..., 0], side - 1 - swapped[..., 1]], -1)


def mirrored_where(
    flip: Bool[Array, "B"], images: Float[Array, "B S S"], points: Float[Array, "B K 2"], mirror: Int[Array, "K"]
) -> tuple[Float[Array, "B S S"], Float[Array, "B K 2"]]:
    """Reflect the selected images and their landmarks left to right.

    Args:
        flip: Images to be reflected.
        images: B square images.
        points: Landmarks (y, x) in pixels.
        mirror: Index of the landmark that becomes landmark k in a reflected image.

    Returns:
        Images and landmarks.
    """
    selected = flip[:, None, None]
    reflected = mirror_points(points, images.shape[-1], mirror)
    return jnp.where(selected, images[..., ::-1], images), jnp.where(selected, reflected, points)


def random_intensity(
    key: Key[Array, ""], images: Float[Array, "B S S"], *, gamma: float, field: float, noise: float
) -> Float[Array, "B S S"]:
    """Random gamma, smooth additive field and pixel noise.

    Args:
        key: Random key.
        images: B square images, rescaled to [0, 1] before the augmentation.
        gamma: Standard deviation of the logarithm of the exponent.
        field: Standard deviation of the smooth field, relative to the intensity range.
        noise: Standard deviation of the pixel noise, relative to the intensity range.

    Returns:
        Augmented images.
    """
    power, smooth, pixels = jax.random.split(key, 3)
    images, count, side = moderate(images), len(images), images.shape[-1]
    low, high = images.min((1, 2), keepdims=True), images.max((1, 2), keepdims=True)
    # XLA may compute the images twice, rounded differently: a pixel below `low` by that would have no power.
    above = jnp.maximum(images - low, 0)
    unit = above / jnp.maximum(high - low, jnp.finfo(images.dtype).tiny)
    exponents = jnp.exp(gamma * jax.random.normal(power, (count, 1, 1)))
    nodes = jax.random.normal(smooth, (count, FIELD_NODES, FIELD_NODES))
    bumps = jax.image.resize(nodes, (count, side, side), "linear")
    return unit**exponents + field * bumps + noise * jax.random.normal(pixels, images.shape)
