"""Principal components of patches, and the residual energy of a patch or of every window of an image.

With orthonormal components U, the residual energy of x is its energy minus the squared projections, |x - m|^2 - |U (x -
m)|^2. The residuals of all windows of an image are therefore correlations with the components; no window is ever
extracted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pulmo_jax.types import InputError


class Subspace(NamedTuple):
    """Principal subspace of patches with P pixels.

    Attributes:
        mean: Mean patch.
        components: Orthonormal components, one per row.
        variances: Variance along each component, in descending order, normalised by N.
        rest: Mean variance of the P - M discarded directions.
    """

    mean: Float[Array, "P"]
    components: Float[Array, "M P"]
    variances: Float[Array, "M"]
    rest: Float[Array, ""]


def fit(samples: Float[np.ndarray, "N P"], explained: float, max_components: int | None = None) -> Subspace:
    """Fit the smallest principal subspace that explains a given fraction of the variance.

    Uses the economic SVD and runs on the host, because the number of components depends on the samples.

    Args:
        samples: N patches of P pixels.
        explained: Fraction of the variance to explain.
        max_components: Upper limit on the number of components.

    Returns:
        The subspace.

    Raises:
        InputError: If there are fewer than two samples, or all samples are identical.
    """
    if len(samples) < 2:
        raise InputError(f"principal components: {len(samples)} sample(s) given, at least 2 are needed; add images.")
    mean = samples.mean(0, dtype=np.float64)
    _, singular, components = np.linalg.svd(samples - mean.astype(samples.dtype), full_matrices=False)
    variances = singular.astype(np.float64) ** 2 / len(samples)
    if not variances.sum() > 0:
        raise InputError("principal components: all samples are identical; give images that differ.")
    shares = np.cumsum(variances) / variances.sum()
    count = min(int(np.searchsorted(shares, explained) + 1), len(variances), max_components or len(variances))
    residual_variance = variances[count:].sum() / max(samples.shape[1] - count, 1)
    arrays = (mean, components[:count], variances[:count], residual_variance)
    return Subspace(*(jnp.asarray(array, jnp.float32) for array in arrays))


def project(subspace: Subspace, samples: Float[Array, "N P"]) -> Float[Array, "N M"]:
    """Coordinates of samples in the subspace.

    Args:
        subspace: Principal subspace.
        samples: N patches of P pixels.

    Returns:
        Coordinates along the M components.
    """
    return (samples - subspace.mean) @ subspace.components.T


def reconstruct(subspace: Subspace, scores: Float[Array, "N M"]) -> Float[Array, "N P"]:
    """Patches with given coordinates in the subspace.

    Args:
        subspace: Principal subspace.
        scores: Coordinates along the M components.

    Returns:
        Patches of P pixels.
    """
    return subspace.mean + scores @ subspace.components


def residual_energy(subspace: Subspace, samples: Float[Array, "N P"]) -> Float[Array, "N"]:
    """Squared L2 reconstruction error |x - m|^2 - |U (x - m)|^2.

    Args:
        subspace: Principal subspace.
        samples: N patches of P pixels.

    Returns:
        Residual energy of each sample.
    """
    return jnp.maximum(((samples - subspace.mean) ** 2).sum(-1) - (project(subspace, samples) ** 2).sum(-1), 0)


def _fourier(length: int, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Real and imaginary part of exp(-2 pi i x f / length) at the first `positions` x, for the non-negative
    frequencies.
    """
    angle = 2 * np.pi * np.outer(np.arange(positions), np.arange(length // 2 + 1)) / length
    return np.cos(angle).astype(np.float32), -np.sin(angle).astype(np.float32)


def row_spectrum(templates: Float[Array, "M h w"], width: int) -> tuple[Float[Array, "f D M"], Float[Array, "f D M"]]:
    """Fourier transform of templates along their rows, arranged for the products of `correlate`.

    The factors multiply the real and imaginary parts of an image's row-wise Fourier coefficients and give those of the
    correlation.

    Args:
        templates: M templates of h rows.
        width: Length of the periodic axis, in pixels.

    Returns:
        Factors of the real and the imaginary part, with D = 2h rows for each frequency.
    """
    parts = _fourier(width, templates.shape[2])
    real, imaginary = (jnp.einsum("xf,mhx->fhm", part, templates) for part in parts)
    return jnp.concatenate([real, imaginary], 1), jnp.concatenate([-imaginary, real], 1)


def correlate(images: Float[Array, "B H W"], templates: Float[Array, "M h w"]) -> Float[Array, "x B y M"]:
    """Cross-correlation sum_ij images[b, y+i, x+j] templates[m, i, j] wherever the template lies inside the image.

    Uses a Fourier transform along the rows and a matrix product over the rows of the template. For large templates this
    takes a fifth of the operations of the direct sum. A period of W suffices, because positions that wrap around are
    discarded.

    Args:
        images: B images.
        templates: M templates of h x w pixels.

    Returns:
        Correlations with axes (x, B, y, M).
    """
    return _correlate(images, row_spectrum(templates, images.shape[2]), templates.shape[2])


def _correlate(images: Array, spectrum: tuple[Array, Array], columns: int) -> Array:
    count, height, width = images.shape
    waves, rows = len(spectrum[0]), spectrum[0].shape[1] // 2
    n_y, n_x = height - rows + 1, width - columns + 1
    image_parts = [jnp.einsum("xf,bhx->fbh", part, images) for part in _fourier(width, width)]
    index = np.arange(n_y)[:, None] + np.arange(rows)
    strips = jnp.stack([part[..., index] for part in image_parts], 3).reshape(waves, -1, 2 * rows)
    weight = np.where((np.arange(waves) == 0) | (2 * np.arange(waves) == width), 1, 2) / width
    back = [jnp.asarray(part * weight, images.dtype) for part in _fourier(width, n_x)]
    parts = [
        part @ (strips @ template_part).reshape(waves, -1) for part, template_part in zip(back, spectrum, strict=True)
    ]
    return (parts[0] + parts[1]).reshape(n_x, count, n_y, -1)


def window_sums(images: Float[Array, "B H W"], rows: int, columns: int) -> Float[Array, "B y x"]:
    """Sum of the pixels of every window.

    Args:
        images: B images.
        rows: Height of the windows in pixels.
        columns: Width of the windows in pixels.

    Returns:
        One sum for each position of the window's first pixel.
    """
    down, across = (np.eye(size) for size in images.shape[1:])
    along_y = sum(down[i : i + images.shape[1] - rows + 1] for i in range(rows))
    along_x = sum(across[i : i + images.shape[2] - columns + 1] for i in range(columns))
    return jnp.asarray(along_y, images.dtype) @ images @ jnp.asarray(along_x, images.dtype).T


class Energies(NamedTuple):
    """Energies of every window.

    Attributes:
        residual: Energy outside the subspace.
        within: Squared Mahalanobis distance within the subspace.
    """

    residual: Float[Array, "B y x"]
    within: Float[Array, "B y x"]


def window_residuals(
    subspace: Subspace, images: Float[Array, "B H W"], rows: int, block_size: int = 8
) -> Float[Array, "B y x"]:
    """Residual energy of every window of an image.

    Args:
        subspace: Principal subspace of templates of P pixels.
        images: B images.
        rows: Height of the template; its width is P / rows.
        block_size: Number of images per block; a block should fit into the cache of one core.

    Returns:
        Residual energies.
    """
    return _windows(subspace, images, rows, block_size, lambda residual, _: residual)


def window_energies(subspace: Subspace, images: Float[Array, "B H W"], rows: int, block_size: int = 8) -> Energies:
    """Residual energy and squared Mahalanobis distance within the subspace, for every window of an image.

    Args:
        subspace: Principal subspace of templates of P pixels.
        images: B images.
        rows: Height of the template; its width is P / rows.
        block_size: Number of images per block; a block should fit into the cache of one core.

    Returns:
        Both energies.
    """
    return _windows(
        subspace,
        images,
        rows,
        block_size,
        lambda residual, squares: Energies(residual, _to_images((squares / subspace.variances).sum(-1))),
    )


def _windows(
    subspace: Subspace, images: Array, rows: int, block_size: int, combine: Callable[[Array, Array], Any]
) -> Any:
    """Apply `combine` to the residuals (B, y, x) and the squared projections (x, B, y, M) of each block of images."""
    level = subspace.mean.mean()  # subtracted from image and mean alike, to reduce rounding errors
    images, mean = images - level, (subspace.mean - level).reshape(rows, -1)
    components = subspace.components.reshape(-1, *mean.shape)
    spectrum = row_spectrum(jnp.concatenate([components, mean[None]]), images.shape[2])
    at_mean, square_mean = subspace.components @ mean.ravel(), (mean**2).sum()

    def block_energies(block: Array) -> Any:
        products = _correlate(block, spectrum, mean.shape[1])
        squares = (products[..., :-1] - at_mean) ** 2
        energy = window_sums(block**2, *mean.shape) + square_mean - 2 * _to_images(products[..., -1])
        return combine(jnp.maximum(energy - _to_images(squares.sum(-1)), 0), squares)

    count = len(images)
    blocks = jnp.pad(images, ((0, -count % block_size), (0, 0), (0, 0))).reshape(-1, block_size, *images.shape[1:])
    energies = jax.lax.map(block_energies, blocks)
    return jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:])[:count], energies)


def _to_images(maps: Array) -> Array:
    """Transpose (x, B, y) to (B, y, x)."""
    return maps.transpose(1, 2, 0)


def stack(subspaces: list[Subspace]) -> Subspace:
    """Stack subspaces of patches of one size along a leading axis.

    Args:
        subspaces: Subspaces with the same P.

    Returns:
        One subspace with a leading axis; missing components are padded with 0 and have variance 1.
    """
    n_components = max(len(subspace.components) for subspace in subspaces)

    def padded(subspace: Subspace) -> Subspace:
        missing = n_components - len(subspace.components)
        components = jnp.pad(subspace.components, ((0, missing), (0, 0)))
        return subspace._replace(
            components=components, variances=jnp.pad(subspace.variances, (0, missing), constant_values=1)
        )

    parts = [padded(subspace) for subspace in subspaces]
    return Subspace(*(jnp.stack(arrays) for arrays in zip(*parts, strict=True)))
