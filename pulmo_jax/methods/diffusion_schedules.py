"""Noise schedules of diffusion models: signal and noise amplitude at every step of the forward process.

The forward process is x_t = alpha_t x_0 + sigma_t z with noise z of unit variance and alpha_t^2 + sigma_t^2 = 1
(variance preserving). alpha_t^2 is the product of 1 - beta over the first t steps; step 0 is the clean image.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float, Int

Schedule = Literal["linear", "cosine"]
BETAS_AT_1000 = (1e-4, 0.02)  # first and last beta of the linear schedule with 1000 steps
MOST_BETA = 0.999
COSINE_OFFSET = 0.008


def amplitudes(schedule: Schedule, steps: int) -> tuple[Float[np.ndarray, "T"], Float[np.ndarray, "T"]]:
    """Compute the amplitudes of signal and noise.

    Args:
        schedule: linear: beta rises linearly from 1e-4 to 0.02 for 1000 steps; with another number of steps, both are
            scaled so that the last step has about the same noise. cosine: alpha_t^2 falls as a squared cosine.
        steps: Number of steps.

    Returns:
        alpha_t and sigma_t, float64, for t = 0 (clean image) to `steps`.

    Reference:
        Linear: Ho, Jain, Abbeel 2020, NeurIPS, Sec. 4. Cosine: Nichol and Dhariwal 2021, ICML, Eq. 17.
    """
    if schedule == "linear":
        first, last = (beta * 1000 / steps for beta in BETAS_AT_1000)
        betas = np.minimum(np.linspace(first, last, steps), MOST_BETA)
    else:
        along = np.arange(steps + 1) / steps
        level = np.cos((along + COSINE_OFFSET) / (1 + COSINE_OFFSET) * np.pi / 2) ** 2
        betas = np.minimum(1 - level[1:] / level[:-1], MOST_BETA)
    square = np.append(1.0, np.cumprod(1 - betas))
    return np.sqrt(square), np.sqrt(1 - square)


def descent(depth: int, calls: int) -> Int[np.ndarray, "N"]:
    """Choose the steps at which a sampler calls the network: evenly spaced from `depth` down, then 0.

    Args:
        depth: First step.
        calls: Number of calls, at most `depth`.

    Returns:
        `calls` + 1 strictly decreasing steps, the last of them 0.

    Example:
        >>> descent(10, 4).tolist()
        [10, 8, 5, 2, 0]
    """
    return np.rint(np.linspace(depth, 0, calls + 1)).astype(int)
