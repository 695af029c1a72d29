"""Samples of a probability density by an ensemble of walkers that need no tuning."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

STRETCH = 2.0  # largest factor of a move
LAG_WINDOW = 5.0  # autocorrelation times over which they are summed


class Chain(NamedTuple):
    """samples: (S, W, D); log_density: of each; accepted: share of the moves."""

    samples: Float[Array, "S W D"]
    log_density: Float[Array, "S W"]
    accepted: Float[Array, ""]


def stretch_moves(log_density: Callable[[Array], Array], walkers: Float[Array, "W D"], steps: int, key: Array) -> Chain:
    """Affine-invariant sampling (Goodman & Weare 2010, CAMCoS 5:65), each half of the walkers moved along lines to the
    other half (Foreman-Mackey et al. 2013, PASP 125:306). An even number of walkers, more than 2 D, no two alike."""
    half, dims = len(walkers) // 2, walkers.shape[1]
    value = jax.vmap(log_density)

    def move(moving: Array, values: Array, others: Array, key: Array) -> tuple[Array, Array, Array]:
        partner_key, stretch_key, accept_key = jax.random.split(key, 3)
        partners = others[jax.random.randint(partner_key, (half,), 0, half)]
        uniform = jax.random.uniform(stretch_key, (half,), moving.dtype)
        factor = ((STRETCH - 1) * uniform + 1) ** 2 / STRETCH  # density as 1 / sqrt(z) between 1/2 and 2
        proposed = partners + factor[:, None] * (moving - partners)
        proposed_values = value(proposed)
        gain = (dims - 1) * jnp.log(factor) + proposed_values - values
        accept = jnp.log(jax.random.uniform(accept_key, (half,), moving.dtype)) < gain
        return jnp.where(accept[:, None], proposed, moving), jnp.where(accept, proposed_values, values), accept

    def step(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
        places, values = carry
        first_key, second_key = jax.random.split(key)
        first, first_values, one = move(places[:half], values[:half], places[half:], first_key)
        second, second_values, two = move(places[half:], values[half:], first, second_key)
        places, values = jnp.concatenate([first, second]), jnp.concatenate([first_values, second_values])
        return (places, values), (places, values, jnp.concatenate([one, two]).mean())

    _, (samples, values, accepted) = jax.lax.scan(step, (walkers, value(walkers)), jax.random.split(key, steps))
    return Chain(samples, values, accepted.mean())


def independent_samples(samples: Float[np.ndarray, "S W D"]) -> float:
    """How many independent samples a chain is worth in its worst dimension: its length over the integrated
    autocorrelation time, as the mean over walkers, with a window of 5 times itself (Sokal)."""
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
