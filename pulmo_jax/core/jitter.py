"""Random changes of images and of the points in them, that keep what the points mean.

Geometry: a random affine map of every image, sampled bilinearly, and a mirror image whose points swap sides. Intensity:
a random gamma, a smooth field and noise, which move no point. All of it is a function of a key, on the device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from pulmo_jax.core.contrast import moderate
from pulmo_jax.core.warps import bilinear, pixel_centres

CUT = 2.5  # sd, of the deviates: none may move an image away
FIELD_NODES = 4  # along a side, of the smooth field


class Affine(NamedTuple):
    """Maps pixels of the new image to those of the old: centre + matrix (q - centre) + shift, (y, x) in px."""

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
    """`count` independent maps of images of `side` px.

    The numbers are sds of normal deviates that are cut at 2.5 sd: of the rotation, of the logarithms of the scale and
    of the ratio of height to width, of the shear, and of each component of the shift (in sides).
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
    """What each new pixel sees in the old image, bilinearly; outside it, the nearest pixel of its edge."""
    side = images.shape[-1]
    centre = (side - 1) / 2
    q = pixel_centres(side, side) - centre
    seen = jnp.einsum("bij,yxj->byxi", affine.matrix, q) + affine.shift[:, None, None] + centre
    return jax.vmap(bilinear)(images, seen)


def warp_points(points: Float[Array, "B K 2"], affine: Affine, side: int) -> Float[Array, "B K 2"]:
    """Where points of the old images are in the new ones, px."""
    centre = (side - 1) / 2
    a, b, c, d = (affine.matrix[:, i, j, None] for i in (0, 1) for j in (0, 1))
    dy, dx = jnp.moveaxis(points - centre - affine.shift[:, None], -1, 0)
    return jnp.stack([d * dy - b * dx, a * dx - c * dy], -1) / (a * d - b * c)[..., None] + centre


def mirror_points(points: Float[Array, "B K 2"], side: int, mirror: Int[Array, "K"]) -> Float[Array, "B K 2"]:
    """In the image reflected left to right, where point k is what point mirror[k] was."""
    swapped = points[:, mirror]
    return jnp.stack([swapped[..., 0], side - 1 - swapped[..., 1]], -1)


def mirrored_where(
    flip: Bool[Array, "B"], images: Float[Array, "B S S"], points: Float[Array, "B K 2"], mirror: Int[Array, "K"]
) -> tuple[Float[Array, "B S S"], Float[Array, "B K 2"]]:
    """Images and their points, those reflected for which `flip` holds."""
    chosen = flip[:, None, None]
    reflected = mirror_points(points, images.shape[-1], mirror)
    return jnp.where(chosen, images[..., ::-1], images), jnp.where(chosen, reflected, points)


def random_intensity(
    key: Key[Array, ""], images: Float[Array, "B S S"], *, gamma: float, field: float, noise: float
) -> Float[Array, "B S S"]:
    """Images in the range 0 to 1, each raised to a random power; plus a smooth field and pixel noise.

    gamma: sd of the logarithm of the power; field, noise: sds, of the range.
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
