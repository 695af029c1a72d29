"""Pixels at places between pixels: what every warp ends with.

Places are (y, x) in px from 0 at pixel centres: a pixel covers half a pixel about its centre, an image of H rows
[-1/2, H - 1/2].
"""

import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Bool, Float


def pixel_centres(height: int, width: int) -> Float[Array, "H W 2"]:
    return jnp.stack(jnp.meshgrid(jnp.arange(float(height)), jnp.arange(float(width)), indexing="ij"), axis=-1)


def inside(points: Float[Array, "*P 2"], shape: tuple[int, int]) -> Bool[Array, "*P"]:
    """Whether points lie on an image of that shape (H, W)."""
    last = jnp.asarray(shape, points.dtype) - 0.5
    return ((points >= -0.5) & (points <= last)).all(-1)


def bilinear(
    image: Float[Array, "H W"], points: Float[Array, "*P 2"], fill: float | Float[Array, ""] | None = None
) -> Float[Array, "*P"]:
    """The image at points, between the four nearest pixels; differentiable in both.

    fill: the value outside of the image; None: that of the nearest edge pixel. There is no smoothing: shrink an image
    that has many more pixels than points before.
    """
    values: Array = map_coordinates(image, [points[..., 0], points[..., 1]], order=1, mode="nearest")
    if fill is None:
        return values
    height, width = image.shape
    return jnp.asarray(jnp.where(inside(points, (height, width)), values, fill))
