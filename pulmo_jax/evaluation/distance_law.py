"""How often Gaussian data are as far from their mean as this: p-values of squared Mahalanobis distances.

With mean and covariance known the distance is chi-squared. Learnt from n samples it is Hotelling's T^2, whose tail is
heavier (Hotelling 1931, Ann. Math. Stat. 2:360). Images are seldom Gaussian: calibration on normal ones is what
thresholds come from, and the distance between the two is shown in the report.
"""

import numpy as np
from jaxtyping import Float
from scipy import stats


def chi_squared_p_value(distance: Float[np.ndarray, "*shape"], dimensions: int) -> Float[np.ndarray, "*shape"]:
    """Of mean and covariance that are known."""
    return np.asarray(stats.chi2.sf(distance, dimensions))


def hotelling_p_value(distance: Float[np.ndarray, "*shape"], dimensions: int, n: float) -> Float[np.ndarray, "*shape"]:
    """Of a new sample, from the mean and the population covariance (1/n) of n others.

    (n - D) / (D (n + 1)) d^2 follows F(D, n - D). Raises ValueError for n <= D, where there is no such covariance.
    """
    if n <= dimensions:
        raise ValueError(f"{n:g} samples have no covariance of {dimensions} dimensions")
    freedom = n - dimensions
    return np.asarray(stats.f.sf(distance * freedom / (dimensions * (n + 1)), dimensions, freedom))
