"""p-values of squared Mahalanobis distances under a Gaussian model.

With known mean and covariance the squared distance follows a chi-squared distribution. If both are estimated from n
samples it follows Hotelling's T^2, which has a heavier tail (Hotelling 1931, Ann. Math. Stat. 2:360). Images are rarely
Gaussian, so thresholds come from calibration on normal images; the report shows how the two differ.
"""

import numpy as np
from jaxtyping import Float
from scipy import stats


def chi_squared_p_value(distance: Float[np.ndarray, "*shape"], dimensions: int) -> Float[np.ndarray, "*shape"]:
    """p-value for known mean and covariance.

    Args:
        distance: Squared Mahalanobis distances.
        dimensions: Number of dimensions D.

    Returns:
        p-values.

    Example:
        >>> chi_squared_p_value(np.array([0.0, 5.991]), dimensions=2).round(3).tolist()
        [1.0, 0.05]
    """
    return np.asarray(stats.chi2.sf(distance, dimensions))


def hotelling_p_value(distance: Float[np.ndarray, "*shape"], dimensions: int, n: float) -> Float[np.ndarray, "*shape"]:
    """p-value of a new sample for mean and covariance (normalised by 1/n) estimated from n others.

    (n - D) / (D (n + 1)) d^2 follows the F(D, n - D) distribution.

    Args:
        distance: Squared Mahalanobis distances.
        dimensions: Number of dimensions D.
        n: Number of samples.

    Returns:
        p-values.

    Raises:
        ValueError: If n <= D, because the covariance is then singular.
    """
    if n <= dimensions:
        raise ValueError(
            f"{n:g} samples give a singular covariance in {dimensions} dimensions; use more samples than dimensions"
        )
    freedom = n - dimensions
    return np.asarray(stats.f.sf(distance * freedom / (dimensions * (n + 1)), dimensions, freedom))
