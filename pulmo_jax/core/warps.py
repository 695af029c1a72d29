"""Bilinear sampling of images at non-integer positions, the last step of every warp.

Positions are (y, x) in pixels, with 0 at the centre of the first pixel. A pixel extends half a pixel around its centre,
so an image of H rows covers [-1/2, H - 1/2].
"""

import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Bool, Float


def pixel_centres(height: int, width: int) -> Float[Array, "H W 2"]:
    """Positions of the pixel centres of an image.

    Args:
        height: Height in pixels.
        width: Width in pixels.

    Returns:
        Positions (y, x) in pixels.
    """
    return jnp.stack(jnp.meshgrid(jnp.arange(float(height)), jnp.arange(float(width)), indexing="ij"), axis=-1)


def inside(points: Float[Array, "*P 2"], shape: tuple[int, int]) -> Bool[Array, "*P"]:
    """Test whether points lie within an image.

    Args:
        points: Positions (y, x) in pixels.
        shape: Height and width of the image.

    Returns:
        True for each point inside the image.
    """
    last = jnp.asarray(shape, points.dtype) - 0.5
    return ((points >= -0.5) & (points <= last)).all(-1)


def bilinear(
    image: Float[Array, "H W"], points: Float[Array, "*P 2"], fill: float | Float[Array, ""] | None = None
) -> Float[Array, "*P"]:
    """Sample an image by bilinear interpolation; differentiable in the image and the points.

    No low-pass filter is applied: downsample an image first if it has many more pixels than there are points.

    Args:
        image: Image.
        points: Positions (y, x) in pixels.
        fill: Value outside the image. None: value of the nearest edge pixel.

    Returns:
        Sampled values.
    """
    values: Array = map_coordinates(image, [points[..., 0], points[..., 1]], order=1, mode="nearest")
    if fill is None:
        return values
    height, width = image.shape
    return jnp.asarray(jnp.where(inside(points, (height, width)), values, fill))
