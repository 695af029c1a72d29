"""Principal components of patches, and the energy that they leave: of one patch, or of every window of an image.

With orthonormal components U the residual of x is energy minus squared projections, |x - m|^2 - |U (x - m)|^2, so the
residuals of all windows of an image are correlations with the components: no window is ever cut out.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pulmo_jax.types import InputError


class Subspace(NamedTuple):
    """Mean and orthonormal components of P-pixel patches. variances: of each component, largest first, of the
    population form (1/N); rest: the mean variance of the P - M directions left out."""

    mean: Float[Array, "P"]
    components: Float[Array, "M P"]
    variances: Float[Array, "M"]
    rest: Float[Array, ""]


def fit(samples: Float[np.ndarray, "N P"], kept: float, most: int | None = None) -> Subspace:
    """The fewest components that hold the share `kept` of the variance, at most `most`; by the economic SVD.

    Runs on the host, for the number of components depends on the samples. Raises InputError for fewer than two samples
    or samples that are all the same.
    """
    if len(samples) < 2:
        raise InputError(f"principal components: {len(samples)} sample(s) given; at least 2 are needed: add images.")
    mean = samples.mean(0, dtype=np.float64)
    _, singular, components = np.linalg.svd(samples - mean.astype(samples.dtype), full_matrices=False)
    variances = singular.astype(np.float64) ** 2 / len(samples)
    if not variances.sum() > 0:
        raise InputError("principal components: all samples are the same; give images that differ.")
    shares = np.cumsum(variances) / variances.sum()
    count = min(int(np.searchsorted(shares, kept) + 1), len(variances), most or len(variances))
    rest = variances[count:].sum() / max(samples.shape[1] - count, 1)
    arrays = (mean, components[:count], variances[:count], rest)
    return Subspace(*(jnp.asarray(array, jnp.float32) for array in arrays))


def project(of: Subspace, samples: Float[Array, "N P"]) -> Float[Array, "N M"]:
    return (samples - of.mean) @ of.components.T


def reconstruct(of: Subspace, scores: Float[Array, "N M"]) -> Float[Array, "N P"]:
    return of.mean + scores @ of.components


def residual_energy(of: Subspace, samples: Float[Array, "N P"]) -> Float[Array, "N"]:
    """|x - m|^2 - |U (x - m)|^2, the squared L2 reconstruction error."""
    return jnp.maximum(((samples - of.mean) ** 2).sum(-1) - (project(of, samples) ** 2).sum(-1), 0)


def _fourier(length: int, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """exp(-2 pi i x f / length) at the first positions x and the frequencies of a real signal: real, imaginary part."""
    angle = 2 * np.pi * np.outer(np.arange(positions), np.arange(length // 2 + 1)) / length
    return np.cos(angle).astype(np.float32), -np.sin(angle).astype(np.float32)


def row_spectrum(templates: Float[Array, "M h w"], width: int) -> tuple[Float[Array, "f D M"], Float[Array, "f D M"]]:
    """What real and imaginary parts of an image's Fourier coefficients along its rows, of h rows, are multiplied by to
    give those of the correlation: D = 2h rows for each frequency of a circle of length `width`."""
    parts = _fourier(width, templates.shape[2])
    real, imaginary = (jnp.einsum("xf,mhx->fhm", part, templates) for part in parts)
    return jnp.concatenate([real, imaginary], 1), jnp.concatenate([-imaginary, real], 1)


def correlate(images: Float[Array, "B H W"], templates: Float[Array, "M h w"]) -> Float[Array, "x B y M"]:
    """sum_ij images[b, y+i, x+j] templates[m, i, j] wherever the template lies inside, axes (x, B, y, M).

    Along rows a product of Fourier coefficients, along columns a matrix product over the template's rows: for a large
    template that is a fifth of the direct sum's work. A circle of length W is long enough: what wraps is not kept.
    """
    return _correlate(images, row_spectrum(templates, images.shape[2]), templates.shape[2])


def _correlate(images: Array, spectrum: tuple[Array, Array], columns: int) -> Array:
    count, height, width = images.shape
    waves, rows = len(spectrum[0]), spectrum[0].shape[1] // 2
    n_y, n_x = height - rows + 1, width - columns + 1
    image_parts = [jnp.einsum("xf,bhx->fbh", part, images) for part in _fourier(width, width)]
    index = np.arange(n_y)[:, None] + np.arange(rows)
    near = jnp.stack([part[..., index] for part in image_parts], 3).reshape(waves, -1, 2 * rows)
    weight = np.where((np.arange(waves) == 0) | (2 * np.arange(waves) == width), 1, 2) / width
    back = [jnp.asarray(part * weight, images.dtype) for part in _fourier(width, n_x)]
    found = [part @ (near @ of).reshape(waves, -1) for part, of in zip(back, spectrum, strict=True)]
    return (found[0] + found[1]).reshape(n_x, count, n_y, -1)


def window_sums(images: Float[Array, "B H W"], rows: int, columns: int) -> Float[Array, "B y x"]:
    """The sum over every window of rows x columns."""
    down, across = (np.eye(size) for size in images.shape[1:])
    along_y = sum(down[i : i + images.shape[1] - rows + 1] for i in range(rows))
    along_x = sum(across[i : i + images.shape[2] - columns + 1] for i in range(columns))
    return jnp.asarray(along_y, images.dtype) @ images @ jnp.asarray(along_x, images.dtype).T


class Energies(NamedTuple):
    """Of every window: the energy that the components leave, and the squared projections over their variances."""

    residual: Float[Array, "B y x"]
    within: Float[Array, "B y x"]


def window_residuals(of: Subspace, images: Float[Array, "B H W"], rows: int, at_once: int = 8) -> Float[Array, "B y x"]:
    """The residual energy of every window of the template's size. rows: of the template; P / rows are its columns.
    at_once: images whose products fit into a core's cache."""
    return _windows(of, images, rows, at_once, lambda residual, _: residual)


def window_energies(of: Subspace, images: Float[Array, "B H W"], rows: int, at_once: int = 8) -> Energies:
    """The residual energy of every window, and its squared Mahalanobis distance within the subspace."""
    return _windows(
        of, images, rows, at_once, lambda residual, squares: Energies(residual, _back((squares / of.variances).sum(-1)))
    )


def _windows(of: Subspace, images: Array, rows: int, at_once: int, give: Callable[[Array, Array], Any]) -> Any:
    """give: of the residuals (B, y, x) and the squared projections (x, B, y, M) of some images."""
    level = of.mean.mean()  # of no consequence but for rounding
    images, mean = images - level, (of.mean - level).reshape(rows, -1)
    components = of.components.reshape(-1, *mean.shape)
    spectrum = row_spectrum(jnp.concatenate([components, mean[None]]), images.shape[2])
    at_mean, square_mean = of.components @ mean.ravel(), (mean**2).sum()

    def of_block(block: Array) -> Any:
        products = _correlate(block, spectrum, mean.shape[1])
        squares = (products[..., :-1] - at_mean) ** 2
        energy = window_sums(block**2, *mean.shape) + square_mean - 2 * _back(products[..., -1])
        return give(jnp.maximum(energy - _back(squares.sum(-1)), 0), squares)

    count = len(images)
    blocks = jnp.pad(images, ((0, -count % at_once), (0, 0), (0, 0))).reshape(-1, at_once, *images.shape[1:])
    found = jax.lax.map(of_block, blocks)
    return jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:])[:count], found)


def _back(maps: Array) -> Array:
    """(x, B, y) to (B, y, x)."""
    return maps.transpose(1, 2, 0)


def stack(subspaces: list[Subspace]) -> Subspace:
    """Of patches of one size, as one with a leading axis; missing components are 0 and have variance 1."""
    most = max(len(one.components) for one in subspaces)

    def filled(one: Subspace) -> Subspace:
        more = most - len(one.components)
        components = jnp.pad(one.components, ((0, more), (0, 0)))
        return one._replace(components=components, variances=jnp.pad(one.variances, (0, more), constant_values=1))

    parts = [filled(one) for one in subspaces]
    return Subspace(*(jnp.stack(arrays) for arrays in zip(*parts, strict=True)))
