"""Affine-invariant ensemble sampling (Markov chain Monte Carlo), which needs no tuning."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

STRETCH = 2.0  # stretch parameter a: moves scale by a factor in [1/a, a]
LAG_WINDOW = 5.0  # window of the autocorrelation sum, in autocorrelation times


class Chain(NamedTuple):
    """Samples of an ensemble.

    Attributes:
        samples: Positions of W walkers after each of S steps.
        log_density: Log-density of each sample.
        accepted: Fraction of accepted moves.
    """

    samples: Float[Array, "S W D"]
    log_density: Float[Array, "S W"]
    accepted: Float[Array, ""]


def stretch_moves(
    log_density: Callable[[Float[Array, "D"]], Float[Array, ""]],
    walkers: Float[Array, "W D"],
    steps: int,
    key: Key[Array, ""],
) -> Chain:
    """Sample a density with affine-invariant stretch moves.

    Each half of the walkers moves along lines to walkers of the other half.

    Args:
        log_density: Log-density of a position, up to a constant.
        walkers: Initial positions: an even number greater than 2 D, all distinct.
        steps: Number of steps S.
        key: Random key.

    Returns:
        The chain.

    Reference:
        Goodman and Weare 2010, CAMCoS 5:65; Foreman-Mackey et al. 2013, PASP 125:306, for the parallel update.
    """
    half, dims = len(walkers) // 2, walkers.shape[1]
    value = jax.vmap(log_density)

    def move(moving: Array, values: Array, others: Array, key: Array) -> tuple[Array, Array, Array]:
        partner_key, stretch_key, accept_key = jax.random.split(key, 3)
        partners = others[jax.random.randint(partner_key, (half,), 0, half)]
        uniform = jax.random.uniform(stretch_key, (half,), moving.dtype)
        factor = ((STRETCH - 1) * uniform + 1) ** 2 / STRETCH  # density proportional to 1 / sqrt(z) on [1/2, 2]
        proposed = partners + factor[:, None] * (moving - partners)
        proposed_values = value(proposed)
        gain = (dims - 1) * jnp.log(factor) + proposed_values - values
        accept = jnp.log(jax.random.uniform(accept_key, (half,), moving.dtype)) < gain
        return jnp.where(accept[:, None], proposed, moving), jnp.where(accept, proposed_values, values), accept

    def step(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
        positions, values = carry
        first_key, second_key = jax.random.split(key)
        first, first_values, first_accepted = move(positions[:half], values[:half], positions[half:], first_key)
        second, second_values, second_accepted = move(positions[half:], values[half:], first, second_key)
        positions, values = jnp.concatenate([first, second]), jnp.concatenate([first_values, second_values])
        return (positions, values), (positions, values, jnp.concatenate([first_accepted, second_accepted]).mean())

    _, (samples, values, accepted) = jax.lax.scan(step, (walkers, value(walkers)), jax.random.split(key, steps))
    return Chain(samples, values, accepted.mean())


def independent_samples(samples: Float[np.ndarray, "S W D"]) -> float:
    """Effective number of independent samples of a chain.

    The number of samples divided by the integrated autocorrelation time of the worst dimension. The autocorrelation is
    averaged over walkers and summed within a window of 5 autocorrelation times.

    Args:
        samples: Samples of W walkers in S steps.

    Returns:
        Effective sample size.

    Reference:
        Sokal 1997, for the window.
    """
    steps, walkers, dims = samples.shape
    times = []
    for d in range(dims):
        deviation = samples[:, :, d] - samples[:, :, d].mean()
        power = abs(np.fft.rfft(deviation, 2 * steps, axis=0)) ** 2
        correlation = np.fft.irfft(power, axis=0)[:steps].mean(1)
        correlation = correlation / correlation[0] if correlation[0] > 0 else np.ones(steps)
        time = 2 * np.cumsum(correlation) - 1
        window = np.flatnonzero(np.arange(steps) >= LAG_WINDOW * time)
        times.append(time[window[0]] if len(window) else steps)
    return steps * walkers / max(1.0, *times)
