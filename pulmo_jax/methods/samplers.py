"""Samplers of diffusion models: from a noisy image to a clean one in a given number of calls of the network.

Every sampler maps an image at step t and the network's estimate of the clean image to an image at an earlier step s:

    x_s = a x_t + b clean_t + c clean_before + d z,    z: new noise,

where clean_before is the estimate of the call before. The coefficients follow from the amplitudes alone, so a sampler
is a function that computes them, and `run` is the same loop for all. At s = 0 (no noise), each returns the last
estimate.

- ddpm: ancestral sampling from the Gaussian posterior q(x_s | x_t, x_0) (Ho et al. 2020, NeurIPS, Eqs. 6 and 7; between
  steps further apart, Nichol and Dhariwal 2021, ICML, Eq. 19).
- ddim: deterministic (Song, Meng, Ermon 2021, ICLR, Eq. 12 with sigma = 0).
- dpm_solver: DPM-Solver++(2M), second order and multistep, for the estimate of the clean image (Lu et al. 2022,
  arXiv:2211.01095, Algorithm 2); the first and the last step are of first order.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Kind = Literal["ddpm", "ddim", "dpm_solver"]


class Coefficients(NamedTuple):
    """Coefficients of N steps.

    Attributes:
        noisy: Weight a of the noisy image.
        clean: Weight b of the estimate of the clean image.
        before: Weight c of the estimate of the call before; 0 at the first step.
        noise: Weight d of new noise.
    """

    noisy: Float[np.ndarray, "N"]
    clean: Float[np.ndarray, "N"]
    before: Float[np.ndarray, "N"]
    noise: Float[np.ndarray, "N"]


def ddpm(alpha: Float[np.ndarray, "N1"], sigma: Float[np.ndarray, "N1"]) -> Coefficients:
    """Ancestral sampling; see `COEFFICIENTS`."""
    ratio = alpha[:-1] / alpha[1:]
    added = sigma[:-1] ** 2 - (ratio * sigma[1:]) ** 2  # variance that the forward process adds between both steps
    noisy, clean = ratio * sigma[1:] ** 2 / sigma[:-1] ** 2, alpha[1:] * added / sigma[:-1] ** 2
    return Coefficients(noisy, clean, np.zeros_like(clean), sigma[1:] * np.sqrt(added) / sigma[:-1])


def ddim(alpha: Float[np.ndarray, "N1"], sigma: Float[np.ndarray, "N1"]) -> Coefficients:
    """Deterministic sampling; see `COEFFICIENTS`."""
    noisy = sigma[1:] / sigma[:-1]
    clean, none = alpha[1:] - noisy * alpha[:-1], np.zeros(len(noisy))
    return Coefficients(noisy, clean, none, none)


def dpm_solver(alpha: Float[np.ndarray, "N1"], sigma: Float[np.ndarray, "N1"]) -> Coefficients:
    """DPM-Solver++(2M); see `COEFFICIENTS`."""
    first_order = ddim(alpha, sigma)
    log_snr = np.log(alpha[:-1] / sigma[:-1])  # half of it; infinite at the end, where the step is of first order
    steps, extrapolation = np.diff(log_snr), np.zeros(len(sigma) - 1)
    extrapolation[1:-1] = steps[1:] / steps[:-1] / 2  # 1 / (2 r) with r = h_before / h
    return first_order._replace(
        clean=first_order.clean * (1 + extrapolation), before=-first_order.clean * extrapolation
    )


# Functions of the amplitudes of signal and noise at N + 1 decreasing steps, without noise at the last.
COEFFICIENTS: Mapping[Kind, Callable[[np.ndarray, np.ndarray], Coefficients]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm_solver": dpm_solver,
}


def run(
    coefficients: Coefficients,
    clean_of: Callable[[Float[Array, "*S"], Array], Float[Array, "*S"]],
    noise_of: Callable[[Array], Float[Array, "*S"]],
    start: Float[Array, "*S"],
) -> Float[Array, "*S"]:
    """Run a sampler.

    Args:
        coefficients: Coefficients of its steps.
        clean_of: Function of a noisy image and the number of the step that estimates the clean image.
        noise_of: Function of the number of the step that draws noise of unit variance.
        start: Noisy image at the first step.

    Returns:
        The clean image.
    """
    random = bool(coefficients.noise.any())
    table = jnp.asarray(np.stack(coefficients, axis=1), start.dtype)

    def step(carry: tuple[Array, Array], item: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        (noisy, before), (number, weights) = carry, item
        clean = clean_of(noisy, number)
        after = weights[0] * noisy + weights[1] * clean + weights[2] * before
        return (after + weights[3] * noise_of(number) if random else after, clean), None

    (found, _), _ = jax.lax.scan(step, (start, jnp.zeros_like(start)), (jnp.arange(len(table)), table))
    return found
