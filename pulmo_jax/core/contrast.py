"""Contrast normalisation of square images: SAHS, CLAHE, global and local z-scores.

Each image is normalised independently.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.ndimage import gaussian_filter1d

LEVELS = 256
ABOVE_SIGMAS, BELOW_SIGMAS = 2.5, 2.0
FLAT = 1e-6  # relative to the largest absolute value; smaller differences are rounding errors
LEAST_LOCAL_SD = 0.1  # regulariser of the local sd, relative to the sd of the image; avoids amplifying noise


def moderate(images: Float[Array, "B S S"]) -> Float[Array, "B S S"]:
    """Scale each image exactly by 2^64 or 2^-64, so that its extremes are far from the limits of float32.

    XLA implements division by a broadcast scalar as multiplication by the reciprocal. The reciprocal of a number above
    8.5e37 is subnormal and flushed to 0, which would turn such an image into zeros.

    Args:
        images: B square images of any unit.

    Returns:
        Scaled images.
    """
    largest = jnp.abs(images).max((1, 2), keepdims=True)
    return images * jnp.where(largest > 1, 2.0**-64, 2.0**64).astype(images.dtype)


def _unit(images: Array, low: Array, high: Array) -> Array:
    """Map [low, high] to [0, 1] and clip; a constant image becomes 0."""
    low, span = low[:, None, None], (high - low)[:, None, None]
    return jnp.where(span > 0, jnp.clip((images - low) / jnp.where(span > 0, span, 1), 0, 1), 0)


def sahs(images: Float[Array, "B S S"]) -> Float[Array, "B S S"]:
    """Statistical asymmetrical histogram stretching to [0, 255].

    The limits are mean + 2.5 sigma of the pixels above the mean and mean - 2.0 sigma of the pixels below it. Each sigma
    is the root-mean-square distance from the mean on its side.

    Args:
        images: B square images.

    Returns:
        Stretched images.

    Reference:
        Contrast step of PulmoAlign (2025).
    """
    images = zscore(images)  # SAHS is invariant to this; it avoids overflow
    mean = images.mean((1, 2))
    deviation = images - mean[:, None, None]

    def sigma(side: Array) -> Array:
        return jnp.sqrt((jnp.where(side, deviation, 0) ** 2).sum((1, 2)) / jnp.maximum(side.sum((1, 2)), 1))

    return 255 * _unit(images, mean - BELOW_SIGMAS * sigma(deviation < 0), mean + ABOVE_SIGMAS * sigma(deviation > 0))


def zscore(images: Float[Array, "B S S"]) -> Float[Array, "B S S"]:
    """Standardise each image to mean 0 and standard deviation 1.

    Args:
        images: B square images of any unit.

    Returns:
        Standardised images; a constant image becomes 0.
    """
    images = moderate(images)
    largest = jnp.maximum(jnp.abs(images).max((1, 2), keepdims=True), jnp.finfo(images.dtype).tiny)
    deviation = images / largest
    deviation = deviation - deviation.mean((1, 2), keepdims=True)
    peak = jnp.abs(deviation).max((1, 2), keepdims=True)
    varies = peak > FLAT
    unit = jnp.where(
        varies, deviation / jnp.where(varies, peak, 1), 0
    )  # keeps the squares of tiny and huge values in range
    return unit / jnp.maximum(jnp.sqrt((unit**2).mean((1, 2), keepdims=True)), 1e-6)


def local_zscore(images: Float[Array, "B S S"], sigma_px: float) -> Float[Array, "B S S"]:
    """Standardise each pixel by the Gaussian-weighted mean and standard deviation around it.

    Args:
        images: B square images.
        sigma_px: Standard deviation of the Gaussian window in pixels; edges are padded with the nearest pixel.

    Returns:
        Standardised images; a constant image becomes 0.
    """
    standardised = zscore(images)
    deviation = standardised - blurred(standardised, sigma_px)
    return deviation / jnp.sqrt(blurred(deviation**2, sigma_px) + LEAST_LOCAL_SD**2)


def asymmetry(images: Float[Array, "B S S"], sigma_px: float) -> Float[Array, "B S S"]:
    """Absolute difference between each blurred image and its left-right reflection.

    Lesions on one side stand out, while symmetric anatomy cancels.

    Args:
        images: B square images.
        sigma_px: Standard deviation of the Gaussian blur in pixels; a wider blur tolerates larger misalignment of the
            two sides.

    Returns:
        Difference images.
    """
    smooth = blurred(images, sigma_px)
    return jnp.abs(smooth - smooth[..., ::-1])


def blurred(images: Float[Array, "B S S"], sigma_px: float) -> Float[Array, "B S S"]:
    """Gaussian blur; edges are padded with the nearest pixel.

    Args:
        images: B square images.
        sigma_px: Standard deviation in pixels; 0 returns the images unchanged.

    Returns:
        Blurred images.
    """
    if not sigma_px:
        return images
    kernel = jnp.asarray(gaussian_filter1d(np.eye(images.shape[-1]), sigma_px, axis=0, mode="nearest"), images.dtype)
    return jnp.einsum("ij,bjk,lk->bil", kernel, images, kernel, precision="highest")


def clahe(images: Float[Array, "B S S"], tiles: int = 4, clip: float = 2.0) -> Float[Array, "B S S"]:
    """Contrast-limited adaptive histogram equalisation (CLAHE) to [0, 255].

    Follows OpenCV's implementation. Each image is quantised to 256 levels between its extremes. The histograms of
    `tiles` x `tiles` tiles are clipped, and the excess is distributed evenly over all levels. The lookup tables of the
    four nearest tiles are interpolated bilinearly. If S is not a multiple of `tiles`, the last rows and columns are
    padded by reflection.

    Args:
        images: B square images.
        tiles: Number of tiles along a side.
        clip: Clip limit, relative to the mean count of a histogram bin.

    Returns:
        Equalised images.

    Reference:
        Zuiderveld 1994, Graphics Gems IV, Section VIII.5.
    """
    images, side = moderate(images), images.shape[-1]
    padding = -side % tiles
    levels = jnp.round(255 * _unit(images, images.min((1, 2)), images.max((1, 2)))).astype(jnp.int32)
    padded = jnp.pad(levels, ((0, 0), (0, padding), (0, padding)), mode="reflect") if padding else levels
    size = (side + padding) // tiles
    limit = max(int(clip * size**2 / LEVELS), 1)
    tables = jax.vmap(lambda image: _tables(image, tiles, size, limit))(padded)
    return jax.vmap(lambda image, lookup: _blend(image, lookup, size))(levels, tables)


def _tables(levels: Array, tiles: int, size: int, limit: int) -> Array:
    """Lookup table (tiles, tiles, 256) of each tile."""
    parts = levels.reshape(tiles, size, tiles, size).swapaxes(1, 2).reshape(tiles**2, -1)
    counts = jax.vmap(lambda part: jnp.zeros(LEVELS, jnp.int32).at[part].add(1))(parts)
    cut = jnp.minimum(counts, limit)
    excess = (counts - cut).sum(1)[:, None]
    share, remainder = excess // LEVELS, excess % LEVELS
    stride = jnp.maximum(LEVELS // jnp.maximum(remainder, 1), 1)
    index = jnp.arange(LEVELS)
    extra = (index % stride == 0) & (index // stride < remainder)
    total = jnp.cumsum(cut + share + extra, axis=1)
    return jnp.round(total * (255 / size**2)).reshape(tiles, tiles, LEVELS)


def _blend(levels: Array, tables: Array, size: int) -> Array:
    tiles, side = len(tables), len(levels)
    position = (np.arange(side) / size - 0.5).astype(np.float32)
    first = np.floor(position).astype(int)
    fraction = jnp.asarray(position - first)
    near, far = np.clip(first, 0, tiles - 1), np.clip(first + 1, 0, tiles - 1)

    def look_up(rows: np.ndarray, columns: np.ndarray) -> Array:
        return tables[rows[:, None], columns[None], levels]

    top = look_up(near, near) * (1 - fraction) + look_up(near, far) * fraction
    bottom = look_up(far, near) * (1 - fraction) + look_up(far, far) * fraction
    return top * (1 - fraction[:, None]) + bottom * fraction[:, None]
