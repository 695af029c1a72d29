"""Contrast of square images: SAHS, CLAHE, z-score, of the whole or by place; each image by its own pixels alone."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.ndimage import gaussian_filter1d

LEVELS = 256
ABOVE_SIGMAS, BELOW_SIGMAS = 2.5, 2.0
FLAT = 1e-6  # of an image's largest value: what differs less is rounding
LEAST_LOCAL_SD = 0.1  # of the image's own: what varies less stays faint


def moderate(images: Float[Array, "B S S"]) -> Float[Array, "B S S"]:
    """Each image times 2^64 or 2^-64, exactly, so that its extremes lie far inside the range of float32.

    XLA divides by a broadcast number as it multiplies by the reciprocal, and the reciprocal of a number above 8.5e37 is
    subnormal, which counts as 0: an image of such values would become 0.
    """
    largest = jnp.abs(images).max((1, 2), keepdims=True)
    return images * jnp.where(largest > 1, 2.0**-64, 2.0**64).astype(images.dtype)


def _unit(images: Array, low: Array, high: Array) -> Array:
    """[low, high] to [0, 1], clipped; an image of one level is 0."""
    low, span = low[:, None, None], (high - low)[:, None, None]
    return jnp.where(span > 0, jnp.clip((images - low) / jnp.where(span > 0, span, 1), 0, 1), 0)


def sahs(images: Float[Array, "B S S"]) -> Float[Array, "B S S"]:
    """Statistical asymmetrical histogram stretching to 0-255.

    The limits are mean + 2.5 sigma of the pixels above the mean, and mean - 2.0 sigma of those below it, each sigma
    the root mean square distance of that side from the mean (the contrast step of PulmoAlign 2025).
    """
    images = zscore(images)  # which changes no more than the units
    mean = images.mean((1, 2))
    step = images - mean[:, None, None]

    def sigma(side: Array) -> Array:
        return jnp.sqrt((jnp.where(side, step, 0) ** 2).sum((1, 2)) / jnp.maximum(side.sum((1, 2)), 1))

    return 255 * _unit(images, mean - BELOW_SIGMAS * sigma(step < 0), mean + ABOVE_SIGMAS * sigma(step > 0))


def zscore(images: Float[Array, "B S S"]) -> Float[Array, "B S S"]:
    """Each image at mean 0 and standard deviation 1, whatever its units; an image of one level is 0."""
    images = moderate(images)
    step = images / jnp.maximum(jnp.abs(images).max((1, 2), keepdims=True), jnp.finfo(images.dtype).tiny)
    step = step - step.mean((1, 2), keepdims=True)
    most = jnp.abs(step).max((1, 2), keepdims=True)
    seen = most > FLAT
    unit = jnp.where(seen, step / jnp.where(seen, most, 1), 0)  # squares of tiny or of huge values stay in range
    return unit / jnp.maximum(jnp.sqrt((unit**2).mean((1, 2), keepdims=True)), 1e-6)


def local_zscore(images: Float[Array, "B S S"], sigma_px: float) -> Float[Array, "B S S"]:
    """Each pixel less the Gaussian-weighted mean about it, over the sd of such differences about it.

    sigma_px: of the Gaussian; beyond the edge, the nearest pixel. An image of one level is 0.
    """
    whole = zscore(images)
    step = whole - blurred(whole, sigma_px)
    return step / jnp.sqrt(blurred(step**2, sigma_px) + LEAST_LOCAL_SD**2)


def asymmetry(images: Float[Array, "B S S"], sigma_px: float) -> Float[Array, "B S S"]:
    """The absolute difference between each image and itself reflected left to right, both blurred: the more, the less
    exactly the two sides must lie on each other. What grows on one side alone shows in it, anatomy hardly does."""
    smooth = blurred(images, sigma_px)
    return jnp.abs(smooth - smooth[..., ::-1])


def blurred(images: Float[Array, "B S S"], sigma_px: float) -> Float[Array, "B S S"]:
    """By a Gaussian; beyond the edge, the nearest pixel."""
    if not sigma_px:
        return images
    blur = jnp.asarray(gaussian_filter1d(np.eye(images.shape[-1]), sigma_px, axis=0, mode="nearest"), images.dtype)
    return jnp.einsum("ij,bjk,lk->bil", blur, images, blur, precision="highest")


def clahe(images: Float[Array, "B S S"], tiles: int = 4, clip: float = 2.0) -> Float[Array, "B S S"]:
    """Contrast-limited adaptive histogram equalisation (Zuiderveld 1994, Graphics Gems IV, VIII.5) to 0-255.

    OpenCV's form: each image at 256 levels between its extremes, `tiles` x `tiles` histograms cut at `clip` times their
    mean count, what was cut spread evenly, and the four nearest tiles' tables blended bilinearly. The last rows and
    columns are mirrored where S is no multiple of `tiles`.
    """
    images, side = moderate(images), images.shape[-1]
    more = -side % tiles
    levels = jnp.round(255 * _unit(images, images.min((1, 2)), images.max((1, 2)))).astype(jnp.int32)
    padded = jnp.pad(levels, ((0, 0), (0, more), (0, more)), mode="reflect") if more else levels
    size = (side + more) // tiles
    limit = max(int(clip * size**2 / LEVELS), 1)
    tables = jax.vmap(lambda image: _tables(image, tiles, size, limit))(padded)
    return jax.vmap(lambda image, of: _blend(image, of, size))(levels, tables)


def _tables(levels: Array, tiles: int, size: int, limit: int) -> Array:
    """(tiles, tiles, 256): what each tile makes of each level."""
    parts = levels.reshape(tiles, size, tiles, size).swapaxes(1, 2).reshape(tiles**2, -1)
    counts = jax.vmap(lambda part: jnp.zeros(LEVELS, jnp.int32).at[part].add(1))(parts)
    cut = jnp.minimum(counts, limit)
    excess = (counts - cut).sum(1)[:, None]
    each, rest = excess // LEVELS, excess % LEVELS
    stride = jnp.maximum(LEVELS // jnp.maximum(rest, 1), 1)
    index = jnp.arange(LEVELS)
    extra = (index % stride == 0) & (index // stride < rest)
    total = jnp.cumsum(cut + each + extra, axis=1)
    return jnp.round(total * (255 / size**2)).reshape(tiles, tiles, LEVELS)


def _blend(levels: Array, tables: Array, size: int) -> Array:
    tiles, side = len(tables), len(levels)
    place = (np.arange(side) / size - 0.5).astype(np.float32)
    first = np.floor(place).astype(int)
    share = jnp.asarray(place - first)
    near, far = np.clip(first, 0, tiles - 1), np.clip(first + 1, 0, tiles - 1)

    def of(rows: np.ndarray, columns: np.ndarray) -> Array:
        return tables[rows[:, None], columns[None], levels]

    top = of(near, near) * (1 - share) + of(near, far) * share
    bottom = of(far, near) * (1 - share) + of(far, far) * share
    return top * (1 - share[:, None]) + bottom * share[:, None]
