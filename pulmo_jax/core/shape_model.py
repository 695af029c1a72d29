"""Gaussian shape model of landmarks, and the joint posterior of all landmarks given uncertain observations of each.

The covariance is the sample covariance shrunk toward its diagonal (Chen et al. 2010), plus a broad prior on the pose.
The pose terms are translation, scaling and rotation of the mean shape to first order, with a given standard deviation,
so that only the form of a shape is constrained and not its pose. Functions handle a single image and are vectorised
with `vmap`. D = 2 K.

Posteriors use the Cholesky factor of the prior, C = L L', and likelihoods given as precisions T, which may be 0 for
unobserved points: (C^-1 + T)^-1 = L (I + L' T L)^-1 L' needs no explicit inverse (Rasmussen and Williams 2006, Section
3.4.3).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from pulmo_jax.core import covariance
from pulmo_jax.types import InputError

LEAST_PRECISION = 1e-6  # lower bound of the precision of a landmark's likelihood, px^-2


class ShapeModel(NamedTuple):
    """Gaussian distribution of landmark shapes.

    Attributes:
        mean: Mean shape (y, x), in pixels.
        lower: Lower Cholesky factor of the covariance of the coordinates (y1, x1, y2, ...), in pixels.
        modes: Principal components of the covariance, one per row.
        variances: Variance of each mode in descending order, in px^2.
    """

    mean: Float[Array, "K 2"]
    lower: Float[Array, "D D"]
    modes: Float[Array, "D D"]
    variances: Float[Array, "D"]


class Posterior(NamedTuple):
    """Joint posterior of all landmarks of one image.

    Attributes:
        points: Posterior mean (y, x), in pixels.
        covariance: Joint covariance of all coordinates, in px^2.
    """

    points: Float[Array, "K 2"]
    covariance: Float[Array, "D D"]


def fit_shape_model(points: Float[np.ndarray, "N K 2"], pose_px: float = 0.0, least_px: float = 0.1) -> ShapeModel:
    """Fit the shape model to training shapes.

    Args:
        points: Landmarks (y, x) of N shapes, in pixels.
        pose_px: Root-mean-square displacement of a landmark for each of the four pose terms, added to the sample
            covariance, in pixels.
        least_px: Standard deviation added to every coordinate, in pixels.

    Returns:
        The shape model.

    Raises:
        InputError: If there are fewer than two shapes or coordinates that are not finite.
    """
    if len(points) < 2 or not np.isfinite(points).all():
        problem = f"{len(points)} shape(s)" if len(points) < 2 else "non-finite coordinates"
        raise InputError(f"shape model: {problem} given; at least 2 shapes with finite coordinates are needed.")
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
    """Unit vectors of infinitesimal translation along y and x, scaling, and rotation of a shape.

    Args:
        shape: Landmarks (y, x).

    Returns:
        One unit vector per row; zeros for scaling and rotation if all landmarks coincide.
    """
    centred = shape - shape.mean(0)
    turned = np.stack([-centred[:, 1], centred[:, 0]], -1)
    moves = np.stack([np.tile([1.0, 0.0], (len(shape), 1)), np.tile([0.0, 1.0], (len(shape), 1)), centred, turned])
    flat = moves.reshape(4, -1)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return flat / np.where(length > 0, length, 1)


def project_shape(model: ShapeModel, points: Float[Array, "K 2"], modes: int) -> Float[Array, "K 2"]:
    """Project a shape onto the mean and the first modes of the model.

    Args:
        model: Shape model.
        points: Landmarks (y, x) in pixels.
        modes: Number of modes.

    Returns:
        Nearest shape in that subspace.
    """
    leading = model.modes[:modes]
    return model.mean + (leading.T @ (leading @ (points - model.mean).ravel())).reshape(points.shape)


def posterior_from_precisions(
    model: ShapeModel, points: Float[Array, "K 2"], precisions: Float[Array, "K 2 2"]
) -> Posterior:
    """Posterior of the shape given Gaussian observations of each landmark.

    Args:
        model: Shape model.
        points: Observed positions (y, x) in pixels.
        precisions: Inverse covariance of each observation in px^-2; 0 for an unobserved landmark.

    Returns:
        Joint posterior.
    """
    return _posterior(model, jnp.einsum("kij,kj->ki", precisions, points - model.mean), precisions)


def posterior_from_gaussians(
    model: ShapeModel, points: Float[Array, "K 2"], covariances: Float[Array, "K 2 2"]
) -> Posterior:
    """Posterior of the shape given Gaussian observations of each landmark.

    Args:
        model: Shape model.
        points: Observed positions (y, x) in pixels.
        covariances: Covariance of each observation in px^2.

    Returns:
        Joint posterior.
    """
    return posterior_from_precisions(model, points, inverse_2x2(covariances))


def _posterior(model: ShapeModel, shifts: Array, precisions: Array) -> Posterior:
    """`shifts`: precision times deviation from the mean shape, for each landmark."""
    count = len(model.mean)
    lower = model.lower.reshape(count, 2, -1)
    weighted = jnp.einsum("kij,kjm->kim", precisions, lower).reshape(2 * count, -1)
    middle = jnp.linalg.cholesky(jnp.eye(2 * count, dtype=lower.dtype) + model.lower.T @ weighted)
    root = solve_triangular(middle, model.lower.T, lower=True)
    move = root.T @ (root @ shifts.ravel())
    return Posterior(model.mean + move.reshape(count, 2), root.T @ root)


def point_covariances(joint: Float[Array, "D D"]) -> Float[Array, "K 2 2"]:
    """Marginal covariance of each landmark.

    Args:
        joint: Joint covariance of all coordinates.

    Returns:
        The 2 x 2 blocks on the diagonal.
    """
    count = len(joint) // 2
    index = np.arange(count)
    return joint.reshape(count, 2, count, 2)[index, :, index]


def inverse_2x2(m: Float[Array, "*K 2 2"]) -> Float[Array, "*K 2 2"]:
    """Inverse of symmetric 2 x 2 matrices in closed form.

    Args:
        m: Symmetric matrices.

    Returns:
        Inverse matrices.
    """
    a, b, d = m[..., 0, 0], m[..., 0, 1], m[..., 1, 1]
    determinant = a * d - b * b
    rows = (jnp.stack([d, -b], -1), jnp.stack([-b, a], -1))
    return jnp.stack(rows, -2) / determinant[..., None, None]


def positive_2x2(m: Float[Array, "*K 2 2"], minimum: float) -> Float[Array, "*K 2 2"]:
    """Nearest symmetric 2 x 2 matrix whose eigenvalues are at least `minimum`, in closed form.

    Args:
        m: Symmetric matrices.
        minimum: Lower bound of the eigenvalues.

    Returns:
        Matrices with bounded eigenvalues.
    """
    a, b, d = m[..., 0, 0], m[..., 0, 1], m[..., 1, 1]
    middle, reach = (a + d) / 2, jnp.sqrt(((a - d) / 2) ** 2 + b * b)
    high, low = jnp.maximum(middle + reach, minimum), jnp.maximum(middle - reach, minimum)
    slope = jnp.where(reach > 0, (high - low) / jnp.where(reach > 0, 2 * reach, 1), 0)
    eye = jnp.eye(2, dtype=m.dtype)
    return ((high + low) / 2)[..., None, None] * eye + slope[..., None, None] * (m - middle[..., None, None] * eye)


class Moments(NamedTuple):
    """Mean and covariance of each landmark.

    Attributes:
        mean: Mean position (y, x) in pixels.
        covariance: Covariance in px^2.
    """

    mean: Float[Array, "K 2"]
    covariance: Float[Array, "K 2 2"]


def discrete_moments(logits: Float[Array, "K A"], positions: Float[Array, "K A 2"], cell_px: float) -> Moments:
    """Moments of discrete distributions over grid cells.

    Args:
        logits: Unnormalised log-probability of each of A cells, for each landmark.
        positions: Centres (y, x) of the cells in pixels.
        cell_px: Side of a cell in pixels; the probability is uniform within a cell.

    Returns:
        Mean and covariance of each landmark.
    """
    probability = jax.nn.softmax(logits, axis=-1)
    mean = jnp.einsum("ka,kai->ki", probability, positions)
    deviation = positions - mean[:, None]
    spread = jnp.einsum("ka,kai,kaj->kij", probability, deviation, deviation)
    return Moments(mean, spread + cell_px**2 / 12 * jnp.eye(2, dtype=spread.dtype))


def posterior_from_maps(
    model: ShapeModel,
    log_likelihoods: Float[Array, "K A"],
    positions: Float[Array, "K A 2"],
    cell_px: float,
    iterations: int = 12,
    damping: float = 0.5,
) -> Posterior:
    """Posterior of the shape given a likelihood map of each landmark, by expectation propagation.

    Each map is approximated by the Gaussian that yields the mean and covariance of the map's marginal when combined
    with the prior and the Gaussians of all other landmarks. Maps with several maxima are thereby resolved by the other
    landmarks. Updates of all landmarks are parallel and damped.

    Args:
        model: Shape model.
        log_likelihoods: Log-likelihood of each of A positions, for each landmark; -inf excludes a position.
        positions: Positions (y, x) in pixels.
        cell_px: Side of a grid cell in pixels.
        iterations: Number of iterations.
        damping: Step size of the updates, in (0, 1].

    Returns:
        Joint posterior.

    Reference:
        Minka 2001, UAI, Section 3.
    """
    relative = positions - model.mean[:, None]

    def improve(_: Array, sites: tuple[Array, Array]) -> tuple[Array, Array]:
        precisions, shifts = sites
        joint = _posterior(model, shifts, precisions)
        marginal = inverse_2x2(point_covariances(joint.covariance))
        shift_of_mean = joint.points - model.mean
        cavity = positive_2x2(marginal - precisions, LEAST_PRECISION)
        cavity_shift = jnp.einsum("kij,kj->ki", marginal, shift_of_mean) - shifts
        log_prior = jnp.einsum("ki,kai->ka", cavity_shift, relative) - _half_square(cavity, relative)
        tilted = discrete_moments(log_likelihoods + log_prior, relative, cell_px)
        site = positive_2x2(inverse_2x2(tilted.covariance) - cavity, LEAST_PRECISION)
        shift = jnp.einsum("kij,kj->ki", site + cavity, tilted.mean) - cavity_shift
        return precisions + damping * (site - precisions), shifts + damping * (shift - shifts)

    start = (jnp.zeros((len(relative), 2, 2), relative.dtype), jnp.zeros((len(relative), 2), relative.dtype))
    precisions, shifts = jax.lax.fori_loop(0, iterations, improve, start)
    return _posterior(model, shifts, precisions)


def _half_square(precisions: Array, relative: Array) -> Array:
    return jnp.einsum("kai,kij,kaj->ka", relative, precisions, relative) / 2
