"""Search for the orbit or fixed position that maximises the criterion: on a finer grid, then by gradient (D23)."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from pulmo_jax.core.kepler import Shape, orbit_through, sky_position
from pulmo_jax.methods.paco.epochs import Epochs, Flux, Star, cells_of, criterion, nearest, sample

STEPS, STEP_SIZE = 100, 0.07  # refinement; step size in pixels, radians and dimensionless parameters
OPEN_SHARE = 1e-3  # minimum relative distance of the initial eccentricity and inclination from their limits


class Found(NamedTuple):
    """Refined tracks.

    Attributes:
        criterion: Criterion along the track.
        start: Offset (north, east) from the star at the reference date, arcsec.
        shape: Shape of the orbit.
    """

    criterion: Float[Array, "*batch"]
    start: Float[Array, "*batch 2"]
    shape: Shape


def track(
    start: Float[Array, "2"], shape: Shape, days: Float[Array, "E"], star: Star | None
) -> tuple[Float[Array, "E 2"], Bool[Array, ""]]:
    """Compute the track of a source on the sky.

    Args:
        start: Offset (north, east) from the star at the reference date, arcsec.
        shape: Shape of the orbit.
        days: Days since the reference date.
        star: The star; None for a fixed position.

    Returns:
        Offset (north, east) at each date, arcsec, and whether the semi-major axis is within the star's limits.
    """
    if star is None:
        return jnp.broadcast_to(start, (len(days), 2)), jnp.asarray(True)
    orbit = orbit_through(shape, start[0], start[1], star.parallax_mas)
    low, high = star.semi_major_axis
    allowed = (orbit.semi_major_axis >= low) & (orbit.semi_major_axis <= high)
    return jnp.stack(sky_position(orbit, days, star.mass, star.parallax_mas), -1), allowed


@partial(jax.jit, static_argnames="star")
def tracks(epochs: Epochs, starts: Float[Array, "N 2"], shapes: Shape, star: Star | None) -> Int[Array, "N M E"]:
    """Compute the points of the finer grid along the tracks of M orbit shapes through each of N starting positions.

    Args:
        epochs: The maps.
        starts: Offsets (north, east) from the star at the reference date, arcsec.
        shapes: Shapes of the orbits, M of each parameter.
        star: The star; None for fixed positions.

    Returns:
        Indices of `epochs.nearest`; that of outside positions for orbits beyond the limits of the semi-major axis.
    """

    def through(start: Array) -> Array:
        sky, allowed = jax.vmap(lambda shape: track(start, shape, epochs.days, star))(shapes)
        index = nearest(epochs, epochs.north, sky)
        return jnp.where(allowed[:, None], index, epochs.fine.shape[1] * epochs.fine.shape[2])

    return jnp.asarray(jax.lax.map(through, starts))


@partial(jax.jit, static_argnames="flux")
def search(epochs: Epochs, index: Int[Array, "N M E"], flux: Flux) -> tuple[Float[Array, "N"], Int[Array, "N"]]:
    """Maximise the criterion over the orbit shapes through each starting position.

    Args:
        epochs: The maps.
        index: Points along the tracks, from `tracks` for maps on the same grid.
        flux: "free": independent flux at every epoch; "constant": common flux.

    Returns:
        The criterion of each starting position, and the index of its shape.
    """
    cells, epoch = cells_of(epochs.fine), jnp.arange(index.shape[-1])
    if flux == "free":  # one value per grid point saves the division per track
        cells = criterion(cells[..., None, :], flux)

        def values(at: Array) -> Array:
            return cells[epoch, at].sum(-1)
    else:

        def values(at: Array) -> Array:
            return criterion(cells[epoch, at], flux)

    def best(at: Array) -> tuple[Array, Array]:
        found = values(at)
        return found.max(), found.argmax()

    return jax.lax.map(best, index)


def refine(epochs: Epochs, starts: Float[Array, "K 2"], shapes: Shape, star: Star | None, flux: Flux) -> Found:
    """Maximise the criterion locally from each of K tracks by gradient steps (Adam), keeping the best of all steps.

    Args:
        epochs: The maps.
        starts: Offsets (north, east) from the star at the reference date, arcsec.
        shapes: Shape of the orbit through each start.
        star: The star; None for fixed positions.
        flux: "free": independent flux at every epoch; "constant": common flux.

    Returns:
        The K refined tracks.
    """
    low, high = (0.0, 1.0) if star is None else star.eccentricity
    unit = epochs.scale[0]

    def unpack(free: Array) -> tuple[Array, Shape]:
        eccentricity = low + (high - low) * jax.nn.sigmoid(free[2])
        return free[:2] * unit, Shape(eccentricity, jnp.tanh(free[3]), free[4], free[5])

    def pack(start: Array, shape: Shape) -> Array:
        share = jnp.clip((shape.eccentricity - low) / max(high - low, 1e-9), OPEN_SHARE, 1 - OPEN_SHARE)
        cos = jnp.clip(shape.cos_inclination, OPEN_SHARE - 1, 1 - OPEN_SHARE)
        rest = jnp.stack([jnp.log(share / (1 - share)), jnp.arctanh(cos), shape.omega, shape.mean_anomaly])
        return jnp.concatenate([start / unit, rest])

    def loss(free: Array) -> Array:
        sky, allowed = track(*unpack(free), epochs.days, star)
        return -jnp.where(allowed, criterion(sample(epochs, sky), flux), 0)

    def one(start: Array, shape: Shape) -> Found:
        free, value = descend(loss, pack(start, shape))
        return Found(-value, *unpack(free))

    return jax.vmap(one)(starts, shapes)


def descend(loss: Callable[[Array], Array], free: Float[Array, "D"]) -> tuple[Float[Array, "D"], Float[Array, ""]]:
    """Minimise a loss by Adam.

    Args:
        loss: Loss of the parameters.
        free: Initial parameters.

    Returns:
        The best parameters of all steps, and their loss.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(STEP_SIZE, STEPS))

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        free, state, best, lowest = carry
        value, slope = jax.value_and_grad(loss)(free)
        best, lowest = jnp.where(value < lowest, free, best), jnp.minimum(value, lowest)
        move, state = optimizer.update(jnp.nan_to_num(slope), state)
        return (free + move, state, best, lowest), None

    begin = (free, optimizer.init(free), free, jnp.asarray(jnp.inf, free.dtype))
    (_, _, best, lowest), _ = jax.lax.scan(step, begin, None, length=STEPS)
    return best, lowest
