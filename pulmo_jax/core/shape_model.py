"""A Gaussian of landmark shapes, and what it makes of uncertain landmarks: all points together.

The covariance is the sample's, shrunk toward its diagonal (Chen et al. 2010), plus a free pose: translation, scale and
rotation of the mean shape, to first order, of a given standard deviation. A shape that moves as a whole is then
unlikely by its form only. Everything works on one image; `vmap` makes it many. D = 2 K.

Posteriors are written with the prior's Cholesky factor, C = L L', and likelihoods as precisions T, which may be 0 where
a point says nothing: (C^-1 + T)^-1 = L (I + L' T L)^-1 L' needs no inverse (Rasmussen & Williams 2006, sec. 3.4.3).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from pulmo_jax.core import covariance
from pulmo_jax.types import InputError

LEAST_PRECISION = 1e-6  # of a point's likelihood, px^-2


class ShapeModel(NamedTuple):
    """Mean shape and lower Cholesky factor of the covariance of its coordinates (y1, x1, y2, ...), px and px^2.

    modes, variances: the principal components of that covariance, largest first (one mode a row).
    """

    mean: Float[Array, "K 2"]
    lower: Float[Array, "D D"]
    modes: Float[Array, "D D"]
    variances: Float[Array, "D"]


class Posterior(NamedTuple):
    """points: px. covariance: of all coordinates together, px^2."""

    points: Float[Array, "K 2"]
    covariance: Float[Array, "D D"]


def fit_shape_model(points: Float[np.ndarray, "N K 2"], pose_px: float = 0.0, least_px: float = 0.1) -> ShapeModel:
    """pose_px: root mean square movement of a point by each of the four poses, beyond what the sample shows.
    least_px: a standard deviation that every coordinate has besides. Raises InputError for fewer than two shapes or
    coordinates that are not numbers.
    """
    if len(points) < 2 or not np.isfinite(points).all():
        found = f"{len(points)} shape(s)" if len(points) < 2 else "coordinates that are not finite"
        raise InputError(f"shape model: {found} given; at least 2 shapes of finite coordinates are needed.")
    mean = points.mean(0, dtype=np.float64)
    deviations = jnp.asarray((points - mean).reshape(len(points), -1), jnp.float32)
    sample = covariance.sample_covariance(deviations)
    rho = covariance.oas_shrinkage(sample, float(len(points)))
    c = np.asarray(covariance.shrink(sample, rho), np.float64)
    poses = pose_directions(mean) * np.sqrt(len(mean))
    c += pose_px**2 * poses.T @ poses + least_px**2 * np.eye(len(c))
    variances, modes = np.linalg.eigh(c)
    arrays = (mean, np.linalg.cholesky(c), modes[:, ::-1].T, variances[::-1])
    return ShapeModel(*(jnp.asarray(array, jnp.float32) for array in arrays))


def pose_directions(shape: Float[np.ndarray, "K 2"]) -> Float[np.ndarray, "4 D"]:
    """Unit vectors of the movements of all points by shifts along y and x, scaling and a small rotation."""
    centred = shape - shape.mean(0)
    turned = np.stack([-centred[:, 1], centred[:, 0]], -1)
    moves = np.stack([np.tile([1.0, 0.0], (len(shape), 1)), np.tile([0.0, 1.0], (len(shape), 1)), centred, turned])
    flat = moves.reshape(4, -1)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return flat / np.where(length > 0, length, 1)


def project_shape(model: ShapeModel, points: Float[Array, "K 2"], modes: int) -> Float[Array, "K 2"]:
    """The nearest shape that the mean and the first modes can make."""
    some = model.modes[:modes]
    return model.mean + (some.T @ (some @ (points - model.mean).ravel())).reshape(points.shape)


def with_precisions(model: ShapeModel, points: Float[Array, "K 2"], precisions: Float[Array, "K 2 2"]) -> Posterior:
    """Posterior of the shape where each point was seen at `points` with that precision (inverse covariance, px^-2)."""
    return _posterior(model, jnp.einsum("kij,kj->ki", precisions, points - model.mean), precisions)


def with_gaussians(model: ShapeModel, points: Float[Array, "K 2"], covariances: Float[Array, "K 2 2"]) -> Posterior:
    """Posterior of the shape where each point was seen at `points` with an error of that covariance, px^2."""
    return with_precisions(model, points, inverse_2x2(covariances))


def _posterior(model: ShapeModel, shifts: Array, precisions: Array) -> Posterior:
    """shifts: precision times deviation from the mean shape, of each point."""
    count = len(model.mean)
    lower = model.lower.reshape(count, 2, -1)
    weighted = jnp.einsum("kij,kjm->kim", precisions, lower).reshape(2 * count, -1)
    middle = jnp.linalg.cholesky(jnp.eye(2 * count, dtype=lower.dtype) + model.lower.T @ weighted)
    root = solve_triangular(middle, model.lower.T, lower=True)
    move = root.T @ (root @ shifts.ravel())
    return Posterior(model.mean + move.reshape(count, 2), root.T @ root)


def point_covariances(of: Float[Array, "D D"]) -> Float[Array, "K 2 2"]:
    """The blocks on the diagonal."""
    count = len(of) // 2
    index = np.arange(count)
    return of.reshape(count, 2, count, 2)[index, :, index]


def inverse_2x2(m: Float[Array, "*K 2 2"]) -> Float[Array, "*K 2 2"]:
    """Of symmetric matrices, in closed form."""
    a, b, d = m[..., 0, 0], m[..., 0, 1], m[..., 1, 1]
    determinant = a * d - b * b
    rows = (jnp.stack([d, -b], -1), jnp.stack([-b, a], -1))
    return jnp.stack(rows, -2) / determinant[..., None, None]


def positive_2x2(m: Float[Array, "*K 2 2"], least: float) -> Float[Array, "*K 2 2"]:
    """The nearest symmetric matrix whose eigenvalues are at least `least`, in closed form."""
    a, b, d = m[..., 0, 0], m[..., 0, 1], m[..., 1, 1]
    middle, reach = (a + d) / 2, jnp.sqrt(((a - d) / 2) ** 2 + b * b)
    high, low = jnp.maximum(middle + reach, least), jnp.maximum(middle - reach, least)
    slope = jnp.where(reach > 0, (high - low) / jnp.where(reach > 0, 2 * reach, 1), 0)
    eye = jnp.eye(2, dtype=m.dtype)
    return ((high + low) / 2)[..., None, None] * eye + slope[..., None, None] * (m - middle[..., None, None] * eye)


class Moments(NamedTuple):
    mean: Float[Array, "K 2"]
    covariance: Float[Array, "K 2 2"]


def discrete_moments(logits: Float[Array, "K A"], positions: Float[Array, "K A 2"], cell_px: float) -> Moments:
    """Of each point on its A positions, each a cell of that side over which the point is spread evenly."""
    share = jax.nn.softmax(logits, axis=-1)
    mean = jnp.einsum("ka,kai->ki", share, positions)
    step = positions - mean[:, None]
    spread = jnp.einsum("ka,kai,kaj->kij", share, step, step)
    return Moments(mean, spread + cell_px**2 / 12 * jnp.eye(2, dtype=spread.dtype))


def with_maps(
    model: ShapeModel,
    log_likelihoods: Float[Array, "K A"],
    positions: Float[Array, "K A 2"],
    cell_px: float,
    iterations: int = 12,
    damping: float = 0.5,
) -> Posterior:
    """Posterior of the shape where each point has a likelihood on a grid of positions, -inf where it cannot be.

    Expectation propagation (Minka 2001, UAI, sec. 3; all points in parallel, damped): each map is stood for by the
    Gaussian that, with the prior and all other points' Gaussians, has the mean and covariance that the map itself would
    have there. Many maxima are so weighed by what the other points say.
    """
    places = positions - model.mean[:, None]

    def improve(_: Array, sites: tuple[Array, Array]) -> tuple[Array, Array]:
        precisions, shifts = sites
        all_points = _posterior(model, shifts, precisions)
        marginal = inverse_2x2(point_covariances(all_points.covariance))
        move = all_points.points - model.mean
        others = positive_2x2(marginal - precisions, LEAST_PRECISION)
        of_others = jnp.einsum("kij,kj->ki", marginal, move) - shifts
        log_prior = jnp.einsum("ki,kai->ka", of_others, places) - _half_square(others, places)
        found = discrete_moments(log_likelihoods + log_prior, places, cell_px)
        site = positive_2x2(inverse_2x2(found.covariance) - others, LEAST_PRECISION)
        shift = jnp.einsum("kij,kj->ki", site + others, found.mean) - of_others
        return precisions + damping * (site - precisions), shifts + damping * (shift - shifts)

    start = (jnp.zeros((len(places), 2, 2), places.dtype), jnp.zeros((len(places), 2), places.dtype))
    precisions, shifts = jax.lax.fori_loop(0, iterations, improve, start)
    return _posterior(model, shifts, precisions)


def _half_square(precisions: Array, places: Array) -> Array:
    return jnp.einsum("kai,kij,kaj->ka", places, precisions, places) / 2
